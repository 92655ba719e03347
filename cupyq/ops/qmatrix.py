"""QMatrix: a quantized weight matrix as a value. From checkpoint tensors, checked, in the form its backend computes with."""

import functools
from dataclasses import dataclass, field

import numpy as np

from cupyq._arrays import FLOATS, admit, check, float16, is_cupy, require_cupy
from cupyq._foreign import native
from cupyq._kernels import instance, launch
from cupyq.errors import FormatError
from cupyq.formats import exl2, gptq, tiles
from cupyq.ops.matrix_table import joined_rows


@dataclass(frozen=True, eq=False)
class DeviceTiles:
    """The matrix on a GPU: words in tiles (formats/tiles.py) and fp16 scales. All CuPy arrays."""

    layout: tiles.TileLayout
    words: object  # uint32 [column tiles * words_per_column_tile]
    scales: object  # float16 [column tiles, groups, 32]; groups are those that have rows
    zeros: object  # float16 [column tiles, groups, 32], or None: the zero is 2**(bits - 1)
    block_bits: object  # int32 [blocks]
    block_start: object  # int32 [blocks]: first word inside a column tile
    block_group: object  # int32 [blocks]: from 0, rising by 0 or 1
    rows: object  # int32 [32 * blocks]: stored row -> row of W, -1 for padding; None: identity

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

    is_frozen = True  # see _replay

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
        qzeros, scales and optionally g_idx (GPTQ); either may hold `bias`, and row_input, as `tp.split` makes it. NumPy arrays
        give a NumPy matrix. CuPy arrays give one on their GPU, repacked there; the small tables (q_groups, q_invperm, q_perm,
        row_input, g_idx, q_scale_max) may stay NumPy. Arrays of other frameworks come in by DLPack. The caller's arrays are
        never altered, nor kept on a GPU.
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
        found = f"{', '.join(map(ascii, sorted(tensors)[:8]))}{', ...' if len(tensors) > 8 else ''}" or "none"
        raise FormatError(f"{where}neither EXL2 (q_weight, ...) nor GPTQ (qweight, ...) tensors, found {found}")

    @property
    def bits_per_weight(self):
        return self.storage_bits / (self.k * self.n)

    @property
    def shape(self):
        return self.k, self.n

    @property
    def order(self):
        """int32 [32 * blocks] on the GPU: stored row -> column of x, -1 for padding; None: identity, as always on NumPy."""
        return None if self.tiles is None else self.tiles.rows

    # What it shares with JoinedQMatrix, where it is the only matrix. On a GPU:

    shares_order = True

    @property
    def matrices(self):
        return (self,)

    @property
    def blocks(self):
        return self.tiles.layout.blocks

    @property
    def column_tiles(self):
        return self.tiles.layout.column_tiles

    @property
    def width_blocks(self):
        """Blocks of width 8, 6, 5, 4, 3 and 2."""
        return self.tiles.layout.width_blocks

    @functools.cached_property
    def rows(self):
        """numpy.void: struct Matrices of cu/matrix.cuh."""
        return joined_rows((self,))

    @functools.cached_property
    def dense(self):
        """float32 [k, n], NumPy matrices only: the fp16 weights, exactly. Kept, as a NumPy model needs them at every step."""
        return self._dequantize().astype(np.float32)


_SMALL_TABLES = ("q_groups", "q_invperm", "q_perm", "row_input", "g_idx", "q_scale_max")


def _placed(array, name):
    """The array after its checks; small tables, whose values are looked at, as NumPy arrays."""
    admit(array, name)
    if is_cupy(array) and name in _SMALL_TABLES:
        return array.get()
    check(array, name)
    return array


def _library(tensors, large):
    """The module of the large tensors; all of them must agree."""
    on_gpu = {key: is_cupy(tensors[key]) for key in large if key in tensors}
    if len(set(on_gpu.values())) > 1:
        here, there = (next(k for k, v in on_gpu.items() if v is side) for side in (True, False))
        raise TypeError(f"{here} is a CuPy array and {there} a NumPy array: put both in one place")
    if not any(on_gpu.values()):
        return np
    on_gpu["bias"] = is_cupy(tensors.get("bias"))
    devices = {tensors[key].device.id for key, is_there in on_gpu.items() if is_there}
    if len(devices) > 1:
        names = ", ".join(key for key, is_there in on_gpu.items() if is_there)
        raise ValueError(f"{names} are on different GPUs {sorted(devices)}: move them to one")
    return require_cupy()


def _float32_bias(tensors, xp):
    """The bias in float32, an array of its own. A GPU's is not sent through the host, which would wait for it."""
    bias = tensors.get("bias")
    if bias is None:
        return None
    if xp is np or not is_cupy(bias):
        host = bias.get() if is_cupy(bias) else bias
        return xp.asarray(host.astype(np.float32))
    widened = xp.empty(bias.shape, np.float32)
    launch(_widen_instance(bias.dtype), (-(-bias.size // 256),), (256,), (bias, widened, np.int32(bias.size)))
    return widened


def _widen_instance(dtype):
    return instance("widen_bias", dtype, file="repack")


def _from_exl2(tensors, prescale, name):
    layout, perm = exl2.validate_exl2(tensors, name)
    xp = _library(tensors, ("q_weight", "q_scale"))
    common = dict(
        kind="exl2",
        k=layout.k,
        n=layout.n,
        bits=tuple(dict.fromkeys(layout.bits.tolist())),
        group_count=layout.group_count,
        storage_bits=exl2.exl2_size_bits(layout, has_bias="bias" in tensors),
        xp=xp,
        name=name,
    )
    if xp is np:
        dequantize = functools.partial(exl2.dequantize_exl2, tensors, prescale=prescale, name=name)
        return QMatrix(**common, bias=_float32_bias(tensors, xp), _dequantize=dequantize)
    with tensors["q_weight"].device:
        device_tiles, base = _device_tiles(
            xp, tiles.exl2_tiles(layout, perm), tensors["q_weight"], exl2.scale_base(tensors["q_scale_max"], prescale)
        )
        _launch_columns("exl2_scales", device_tiles.scales, layout.n, (tensors["q_scale"], base))
        return QMatrix(**common, bias=_float32_bias(tensors, xp), tiles=device_tiles)


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
        name=options["name"],
    )
    if xp is np:
        dequantize = functools.partial(gptq.dequantize_gptq, tensors, **options)
        return QMatrix(**common, bias=_float32_bias(tensors, xp), _dequantize=dequantize)
    with tensors["qweight"].device:
        device_tiles, _ = _device_tiles(xp, tiles.gptq_tiles(layout), tensors["qweight"], None)
        scales, qzeros = tensors["scales"], tensors["qzeros"]
        if scales.dtype != float16:  # rare and small: rounded, and checked for overflow, on the host
            scales = xp.asarray(gptq.gptq_scales(scales.get(), options["name"]))
        if device_tiles.layout.groups < layout.group_count:
            used = xp.asarray(np.flatnonzero(layout.group_rows))
            scales, qzeros = scales[used], qzeros[used]
        _launch_columns("gptq_scales", device_tiles.scales, layout.n, (scales,))
        rule = map(np.int32, (layout.bits, *gptq.zero_rule(options["zeros"], layout.bits)))
        _launch_columns("gptq_zeros", device_tiles.zeros, layout.n, (qzeros,), rule)
        return QMatrix(**common, bias=_float32_bias(tensors, xp), tiles=device_tiles)


def _device_tiles(xp, layout, packed, base):
    """(DeviceTiles of the packed words whose scales and zeros are still empty, base on the GPU).

    With a base there are no zeros. Small tables travel in one copy.
    """
    tables = (layout.row, layout.block_bits, layout.block_start, layout.block_group, base)
    rows, block_bits, block_start, block_group, base = _upload(xp, tables)
    scales = xp.empty((layout.column_tiles, layout.groups, tiles.TILE), np.float16)
    words = xp.empty(layout.words, np.uint32)
    packed_rows = None if layout.packed_row is None else rows
    sizes = map(np.int32, (layout.n, layout.blocks, layout.words_per_column_tile))
    launch(
        instance("repack_weights", file="repack"),
        (layout.column_tiles, -(-layout.blocks // 8)),
        (256,),
        (packed, packed_rows, block_bits, block_start, words, *sizes),
    )
    zeros = xp.empty_like(scales) if base is None else None
    return DeviceTiles(layout, words, scales, zeros, block_bits, block_start, block_group, rows), base


def _upload(xp, tables):
    """The NumPy arrays (or None) on the GPU: views of one buffer, each at a multiple of 128 bytes."""
    starts, size = [], 0
    for table in tables:
        starts.append(size)
        size += 0 if table is None else -(-table.nbytes // 128) * 128
    host = np.empty(size, np.uint8)
    for start, table in zip(starts, tables, strict=True):
        if table is not None:
            host[start : start + table.nbytes] = table.view(np.uint8)
    device = xp.asarray(host)
    return [
        None if table is None else device[start : start + table.nbytes].view(table.dtype)
        for start, table in zip(starts, tables, strict=True)
    ]


def _launch_columns(name, out, n, inputs, rest=()):
    """A kernel of repack.cu that writes [column tiles, groups, 32]."""
    column_tiles, groups, _ = out.shape
    arguments = (*inputs, out, np.int32(n), np.int32(groups), *rest)
    launch(instance(name, file="repack"), (column_tiles, -(-groups // 8)), (256,), arguments)


INSTANCES = [instance(name, file="repack") for name in ("repack_weights", "exl2_scales", "gptq_scales", "gptq_zeros")]
INSTANCES += [_widen_instance(dtype) for dtype in FLOATS]
