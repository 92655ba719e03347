"""QMatrix: a quantized weight matrix as a value. From checkpoint tensors, checked, in the form its backend computes with."""

import functools
from dataclasses import dataclass, field

import numpy as np

from cupyq._arrays import float16, is_cupy, native, require_cupy
from cupyq._kernels import instance, launch
from cupyq.errors import FormatError
from cupyq.formats import exl2, gptq, tiles


@dataclass(frozen=True, eq=False)
class DeviceTiles:
    """The matrix on a GPU: words in tiles (formats/tiles.py) and fp16 scales. All CuPy arrays."""

    layout: tiles.TileLayout
    words: object  # uint32 [column tiles * words_per_column_tile]
    scales: object  # float16 [groups, padded_n]
    zeros: object  # float16 [groups, padded_n], or None: the zero is 2**(bits - 1)
    block_bits: object  # int32 [blocks]
    block_start: object  # int32 [blocks]: first word inside a column tile
    block_group: object  # int32 [blocks]
    rows: object  # int32 [32 * blocks], or None: identity

    @property
    def nbytes(self):
        return sum(value.nbytes for value in vars(self).values() if is_cupy(value))


@dataclass(frozen=True, eq=False)
class QMatrix:
    """Quantized weights W [k, n] of a linear layer y = x W (+ bias).

    Build one with `QMatrix.from_tensors`; it never changes afterwards and owns (or, on NumPy, shares read-only) its data.
    `xp` is the module whose arrays it works with. `bits` are the code widths present, widest first; `storage_bits` counts
    codes, scales and permutation as exllamav2's optimiser does (EXL2) or as the tensors lie on disk (GPTQ).
    """

    kind: str  # "exl2" or "gptq"
    k: int
    n: int
    bits: tuple
    group_count: int
    storage_bits: int
    xp: object
    bias: object  # float32 [n] or None
    name: str = ""
    tiles: DeviceTiles | None = field(default=None, repr=False)  # CuPy
    _dequantize: object = field(default=None, repr=False)  # NumPy: () -> float16 [k, n]

    @classmethod
    def from_tensors(cls, tensors, *, prescale=1.0, bias=None, group_size=None, bits=None, zeros="v1", name=""):
        """The matrix of one layer's checkpoint tensors, EXL2 or GPTQ, told apart by their names.

        tensors: dict with q_weight, q_scale, q_scale_max, q_groups and optionally q_invperm or q_perm (EXL2), or qweight,
        qzeros, scales and optionally g_idx (GPTQ); either may hold `bias`. NumPy arrays give a NumPy matrix. CuPy arrays
        give one on their GPU, repacked there; the small tables (q_groups, q_invperm, q_perm, g_idx, q_scale_max) may stay
        NumPy. Arrays of other frameworks come in by DLPack. The caller's arrays are never altered, nor kept on a GPU.
        prescale multiplies EXL2 scales; bias overrides `tensors["bias"]`; group_size, bits and zeros ("v1": stored is
        zero - 1, "v2": stored is zero, "v1-wrapped": v1 modulo 2**bits) are for GPTQ, and inferred where the tensors tell.
        `name` appears in errors. Raises FormatError naming the tensor that does not fit.
        """
        if not isinstance(tensors, dict):
            raise TypeError(f"tensors must be a dict of checkpoint tensors, got {type(tensors).__name__}")
        named = tensors if bias is None else tensors | {"bias": bias}
        with native({key: value for key, value in named.items() if value is not None}) as arrays:
            tensors = {key: _placed(array, key) for key, array in arrays.items()}
            if "q_weight" in tensors:
                if group_size is not None or bits is not None:
                    raise ValueError("group_size and bits are for GPTQ tensors, and these are EXL2 (q_weight)")
                return _from_exl2(tensors, float(prescale), name)
            if "qweight" in tensors:
                if prescale != 1.0:
                    raise ValueError(f"prescale is for EXL2 tensors, and these are GPTQ (qweight): got {prescale}")
                return _from_gptq(tensors, dict(bits=bits, group_size=group_size, zeros=zeros, name=name))
        where = f"{name}: " if name else ""
        raise FormatError(
            f"{where}neither EXL2 (q_weight, ...) nor GPTQ (qweight, ...) tensors, found {sorted(tensors) or 'none'}"
        )

    @property
    def bits_per_weight(self):
        return self.storage_bits / (self.k * self.n)

    @property
    def shape(self):
        return self.k, self.n

    @functools.cached_property
    def dense(self):
        """float32 [k, n], NumPy matrices only: the fp16 weights, exactly. Kept, as a NumPy model needs them at every step."""
        return self._dequantize().astype(np.float32)


_SMALL_TABLES = ("q_groups", "q_invperm", "q_perm", "g_idx", "q_scale_max")


def _placed(array, name):
    """The array after its checks; small tables, whose values are looked at, as NumPy arrays."""
    if not (isinstance(array, np.ndarray) or is_cupy(array)):
        raise TypeError(f"{name} must be an array, got {type(array).__name__}")
    if is_cupy(array) and name in _SMALL_TABLES:
        return array.get()
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous, got strides {array.strides}: pass ascontiguousarray({name})")
    return array


def _library(tensors, large):
    """The module of the large tensors; all of them must agree."""
    on_gpu = {key: is_cupy(tensors[key]) for key in large if key in tensors}
    if len(set(on_gpu.values())) > 1:
        here, there = (next(k for k, v in on_gpu.items() if v is side) for side in (True, False))
        raise TypeError(f"{here} is a CuPy array and {there} a NumPy array: put both in one place")
    devices = {tensors[key].device.id for key in on_gpu if on_gpu[key]}
    if len(devices) > 1:
        raise ValueError(f"{', '.join(on_gpu)} are on different GPUs {sorted(devices)}: move them to one")
    return require_cupy() if devices else np


def _float32_bias(tensors, xp):
    bias = tensors.get("bias")
    if bias is None:
        return None
    host = bias.get() if is_cupy(bias) else bias
    return xp.asarray(host.astype(np.float32))


def _from_exl2(tensors, prescale, name):
    layout, perm = exl2.validate_exl2(tensors, name)
    xp = _library(tensors, ("q_weight", "q_scale"))
    common = dict(
        kind="exl2",
        k=layout.k,
        n=layout.n,
        bits=tuple(dict.fromkeys(int(b) for b in layout.bits)),
        group_count=layout.group_count,
        storage_bits=exl2.exl2_size_bits(layout, has_bias="bias" in tensors),
        xp=xp,
        bias=_float32_bias(tensors, xp),
        name=name,
    )
    if xp is np:
        return QMatrix(**common, _dequantize=lambda: exl2.dequantize_exl2(tensors, prescale=prescale, name=name))
    with tensors["q_weight"].device:
        tile_layout = tiles.exl2_tiles(layout, perm)
        scales = xp.empty((layout.group_count, tile_layout.padded_n), np.float16)
        grid = (layout.group_count, -(-tile_layout.padded_n // 256))
        base = xp.asarray(exl2.scale_base(tensors["q_scale_max"], prescale))
        arguments = (tensors["q_scale"], base, scales, np.int32(layout.n), np.int32(tile_layout.padded_n))
        launch(instance("exl2_scales", file="repack"), grid, (256,), arguments)
        return QMatrix(**common, tiles=_device_tiles(xp, tile_layout, tensors["q_weight"], scales, None))


def _from_gptq(tensors, options):
    layout = gptq.validate_gptq(tensors, **options)
    xp = _library(tensors, ("qweight", "qzeros", "scales"))
    common = dict(
        kind="gptq",
        k=layout.k,
        n=layout.n,
        bits=(layout.bits,),
        group_count=layout.group_count,
        storage_bits=8 * sum(tensors[key].nbytes for key in ("qweight", "qzeros", "scales", "g_idx") if key in tensors),
        xp=xp,
        bias=_float32_bias(tensors, xp),
        name=options["name"],
    )
    if xp is np:
        return QMatrix(**common, _dequantize=lambda: gptq.dequantize_gptq(tensors, **options))
    with tensors["qweight"].device:
        tile_layout = tiles.gptq_tiles(layout)
        columns = (np.int32(layout.n), np.int32(tile_layout.padded_n))
        grid = (layout.group_count, -(-tile_layout.padded_n // 256))
        scales = tensors["scales"]
        if scales.dtype != float16:  # rare and small: rounded, and checked for overflow, on the host
            scales = xp.asarray(gptq.gptq_scales(scales.get(), options["name"]))
        padded_scales = xp.empty((layout.group_count, tile_layout.padded_n), np.float16)
        launch(instance("pad_columns", file="repack"), grid, (256,), (scales, padded_scales, *columns))
        zeros = xp.empty_like(padded_scales)
        rule = map(np.int32, gptq.zero_rule(options["zeros"], layout.bits))
        arguments = (tensors["qzeros"], zeros, *columns, np.int32(layout.bits), *rule)
        launch(instance("gptq_zeros", file="repack"), grid, (256,), arguments)
        return QMatrix(**common, tiles=_device_tiles(xp, tile_layout, tensors["qweight"], padded_scales, zeros))


def _device_tiles(xp, layout, packed, scales, zeros):
    start = (np.cumsum(layout.block_bits) - layout.block_bits) * tiles.TILE
    words = xp.empty(layout.words, np.uint32)
    result = DeviceTiles(
        layout=layout,
        words=words,
        scales=scales,
        zeros=zeros,
        block_bits=xp.asarray(layout.block_bits),
        block_start=xp.asarray(start.astype(np.int32)),
        block_group=xp.asarray(layout.block_group),
        rows=None if layout.row is None else xp.asarray(layout.row),
    )
    launch(
        instance("repack_weights", file="repack"),
        (layout.column_tiles, -(-layout.blocks // 8)),
        (256,),
        (
            packed,
            xp.asarray(layout.bit_offset),
            result.block_bits,
            result.block_start,
            words,
            np.int32(layout.n),
            np.int32(layout.blocks),
            np.int32(layout.words_per_column_tile),
        ),
    )
    return result


INSTANCES = [instance(name, file="repack") for name in ("repack_weights", "exl2_scales", "gptq_zeros", "pad_columns")]
