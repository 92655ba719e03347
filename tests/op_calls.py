"""Valid calls of every public op, the ways to spoil them, and what must hold of a spoilt call: it is right, or it says what is
wrong and has written nothing. For tests/test_ops.py, on NumPy and on a GPU."""

import ctypes
import functools
import importlib
import inspect
import linecache
import warnings
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
from kernel_checks import FLOATS, bfloat16, float16, float32, host, move
from random_layers import random_exl2, random_gptq

from cupyq import _arrays, ops
from cupyq.errors import CupyqError
from cupyq.formats import kv_cache

int16, int32, int64, uint8 = map(np.dtype, (np.int16, np.int32, np.int64, np.uint8))

# --- valid calls ------------------------------------------------------------------------------------------------------

CALLS = {}
"""{name of an op: function of a Maker -> {argument: value}}. `k_cache.codes` is the part of an argument that BUILDERS make."""

OUTPUTS = {
    "encode_blocks": ("codes", "scales"), "route": ("weights", "experts"), "quantize_group": ("codes", "error", "loss"),
    "search_scales": ("codes", "scale_max"), "search_scales_gptq": ("scales", "zeros"),
}  # fmt: skip
"""What an op returns, where that is not `out`."""

NOTHING_RETURNED = {
    "advance", "cache_rotate", "kv_append", "kv_encode", "kv_decode", "kv_encode_paged", "kv_decode_paged", "quantize_range",
    "quantize_range_inplace", "count_match", "lora", "gemm", "group_rows",
}  # fmt: skip
"""Ops that take no array to return a result in."""


ERRORS = (ValueError, TypeError, CupyqError)


class Callee:
    """A function to call: its arguments, which of them it writes to, and how arguments in parts are put together."""

    errors: tuple = ERRORS
    spared: frozenset = frozenset()
    """Arguments that stay as they are."""

    def __init__(self, name, function):
        self.name, self.function = name, function
        self.parameters = inspect.signature(function).parameters
        self.writes = frozenset(inspect.getclosurevars(function).nonlocals["writes"])
        self.names = frozenset(self.parameters)
        """What its errors may name, besides the parts of arguments."""

    def run(self, arguments):
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return self.function(**built(arguments))

    def may_write(self, argument):
        return argument.split(".")[0] in self.writes

    def again(self, argument, value):
        """An argument that is no array, for another call of the same meaning."""
        return value.make("numpy") if isinstance(value, OfLibrary) else value


@functools.cache
def op_named(name):
    return Callee(name, getattr(ops, name))


@dataclass(frozen=True)
class OfLibrary:
    """An argument that is no array, such as a QMatrix: what makes it for a library."""

    make: Any


class Maker:
    """Random arguments of one call. `choose(list)` takes one of a list; the rest follows from the seed."""

    def __init__(self, choose, seed, dtypes=FLOATS):
        self.choose, self.rng = choose, np.random.default_rng(seed)
        self.dtype = choose(list(dtypes))

    def floats(self, *shape, dtype=None):
        return self.rng.standard_normal(shape).astype(np.float32).astype(self.dtype if dtype is None else dtype)

    def integers(self, low, high, *shape, dtype=np.int32):
        return self.rng.integers(low, high, shape).astype(dtype)


def call(function):
    CALLS[function.__name__.rstrip("_")] = function
    return function


def _unary(m):
    return {"x": m.floats(*m.choose([(3, 33), (2, 8), (1,), (2, 3, 5)]))}


def _gated(m):
    shape = m.choose([(3, 33), (2, 8)])
    return {"gate": m.floats(*shape), "up": m.floats(*shape)}


CALLS |= {"silu": _unary, "relu": _unary, "silu_mul": _gated, "relu_mul": _gated}
CALLS["gelu"] = lambda m: _unary(m) | {"approximate": m.choose(["tanh", "none"])}
CALLS["gelu_mul"] = lambda m: _gated(m) | {"approximate": m.choose(["tanh", "none"])}
CALLS["softcap"] = lambda m: _unary(m) | {"cap": 30.0}
CALLS["clamp"] = lambda m: _unary(m) | {"bound": 0.5}


@call
def add(m):
    shape = m.choose([(3, 33), (2, 8), (5,)])
    return {"x": m.floats(*shape), "y": m.floats(*shape, dtype=m.choose([m.dtype, float16]))}


@call
def add_weighted(m):
    return {"x": m.floats(3, 8), "y": m.floats(3, 8), "weights": np.float32(m.choose([[0, 1, 0.5], [1, 2, 3]]))}


@call
def embedding(m):
    ids = m.integers(0, 7, *m.choose([(2, 3), (4,)]), dtype=m.choose([np.int32, np.int64]))
    return {"ids": ids, "table": m.floats(7, 12), "scale": 1.5, "dtype": m.choose([None, m.dtype, float32])}


@call
def matmul(m):
    transpose = m.choose([False, True])
    weight = m.floats(*((5, 6) if transpose else (6, 5)))
    more = m.choose([{}, {"bias": m.floats(5)}, {"dtype": float32}])
    return {"x": m.floats(*m.choose([(3, 6), (2, 2, 6), (6,)])), "weight": weight, "transpose": transpose, **more}


@call
def gemm(m):
    return {"a": m.floats(3, 6), "b": m.floats(6, 5), "c": m.floats(3, 5), "alpha": 0.5, "beta": m.choose([0.0, 2.0])}


def _norm(m):
    x, more = m.floats(*m.choose([(3, 24), (2, 2, 24), (24,)])), {}
    kind = m.choose(["plain", "residual", "order", "dtype"])
    if kind == "residual":
        more = {"residual": m.floats(*x.shape, dtype=m.choose([x.dtype, float32]))}
    elif kind == "order":
        more = {"order": m.integers(-1, 24, 32)}
    elif kind == "dtype":
        more = {"dtype": float32}
    return {"x": x, "weight": m.floats(24, dtype=m.choose([m.dtype, float32])), "eps": 1e-5, **more}


CALLS["rms_norm"] = _norm


@call
def layer_norm(m):
    arguments = _norm(m)
    return arguments | m.choose([{}, {"bias": m.floats(24, dtype=arguments["weight"].dtype)}])


@call
def head_norm(m):
    shape = m.choose([(8,), (3, 8)])
    more = m.choose([{}, {"bias": m.floats(*shape)}])
    return {"x": m.floats(2, 3, 8), "weight": m.floats(*shape), "eps": 1e-5, "kind": m.choose(["rms", "layer"]), **more}


@call
def rope(m):
    dtype = m.choose([float32, float16])
    positions = m.choose([np.int32([0, 9]), np.int32([[0, 1, 2], [9, 3, 15]])])
    tables = {"sin": m.floats(16, 4, dtype=dtype), "cos": m.floats(16, 4, dtype=dtype)}
    return {"x": m.floats(2, 3, 2, 12), **tables, "positions": positions, "style": m.choose(["neox", "gptj"])}


def _cache(m, name, shape, kind):
    if kind is None:
        return {name: m.floats(*shape)}
    scale_shape = kv_cache.scale_shape(shape, kind)
    scales = None if scale_shape is None else np.zeros(scale_shape, float16)
    return {f"{name}.kind": kind, f"{name}.codes": np.zeros(kv_cache.code_shape(shape, kind), uint8), f"{name}.scales": scales}


def _caches(m, names, head_dim_of, dtype_has_codes=True):
    """Two caches of 2 heads, their head_dim, and a block table or none."""
    is_paged = m.choose([False, True])
    kinds = m.choose([(None, None), ("fp8", "e4m3"), ("q8", "q4")]) if dtype_has_codes else (None, None)
    head_dim = 64 if "q4" in kinds else head_dim_of
    shape = (6, 4, 2, head_dim) if is_paged else (2, 12, 2, head_dim)
    caches = _cache(m, names[0], shape, kinds[0]) | _cache(m, names[1], shape, kinds[1])
    return caches, head_dim, {"block_table": np.int32([[4, 0, 2], [1, 5, 3]])} if is_paged else {}


@call
def kv_append(m):
    caches, head_dim, table = _caches(m, ("k_cache", "v_cache"), 8)
    new = {name: m.floats(2, 3, 2, head_dim) for name in ("k", "v")}
    return new | caches | {"positions": np.int32([0, 9])} | table


@call
def qkv_append(m):
    caches, head_dim, table = _caches(m, ("k_cache", "v_cache"), 8)
    qkv, more = m.floats(2, 3, (4 + 2 * 2) * head_dim), {"style": None, "sin": None, "cos": None}
    if m.choose([True, False]):
        more = {name: m.floats(16, 4, dtype=float32) for name in ("sin", "cos")} | {"style": m.choose(["neox", "gptj"])}
    norms = {"q_norm": m.floats(head_dim), "k_norm": m.floats(head_dim), "eps": 1e-5}
    return {"qkv": qkv, **caches, "positions": np.int32([0, 9]), "heads": 4, **more, **m.choose([{}, norms]), **table}


@call
def attention(m):
    caches, head_dim, table = _caches(m, ("k", "v"), 16, m.dtype != float32)
    for name in caches:
        if name.endswith("codes"):
            caches[name] = m.integers(0, 60, *caches[name].shape, dtype=uint8)
        elif name.endswith("scales") and caches[name] is not None:
            caches[name] = np.full_like(caches[name], 0.05)
    lengths = {"kv_lengths": np.int32([12, 5])}
    seq = m.choose([1, 3])
    call = {"q": m.floats(2, seq, 4, head_dim)} | caches | m.choose([{}, lengths])
    if m.choose([False, True]):
        call |= lengths | {"q": m.floats(5, 4, head_dim), "query_starts": np.int32([0, 3, 5])}
    options = [{}, {"window": 4, "softcap": 20.0}, {"sinks": m.floats(4, dtype=float32), "causal": False, "scale": 0.3}]
    return call | table | m.choose(options)


@call
def route(m):
    return {"logits": m.floats(3, 7), "top_k": m.choose([1, 2, 7]), "renormalize": m.choose([True, False])}


@call
def group_rows(m):
    return {"experts": m.integers(0, 5, 6, 2), "num_experts": 5, "tile_rows": m.choose([None, 8])}


@call
def combine_rows(m):
    return {"y": m.floats(3, 2, 9), "weights": m.floats(3, 2, dtype=float32)}


@call
def sample(m):
    kinds = [
        {"temperature": 0.0},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "seed": 3, "step": 2},
        {"top_k": np.int32([0, 4, 30]), "seed": np.arange(3), "tfs": 0.9, "typical": 0.9, "smoothing": 0.1, "top_a": 0.01},
        {"mirostat_tau": 8.0, "mirostat_eta": 0.1, "mirostat_mu": np.full(3, 16, float32), "min_temp": 0.1, "max_temp": 1.5},
        {"xtc_probability": 1.0, "xtc_threshold": 0.01, "xtc_mask": m.integers(0, 2, 40, dtype=uint8), "skew": 0.5},
        {"temp_exponent": 0.5, "post_temperature": 0.9, "max_temp": 1.2},
        {"table": OfLibrary(lambda library: ops.SamplerTable(3, importlib.import_module(library), top_k=[1, 4, 9])), "step": 2},
    ]
    first = {"top_ids": np.zeros((3, 4), int32), "top_probabilities": np.zeros((3, 4), float32)}
    first |= {"probabilities": np.zeros(3, float32)}
    return {"logits": m.floats(3, 40)} | m.choose(kinds) | m.choose([{}, first])


@call
def penalize(m):
    named = {"bias_ids": m.integers(0, 40, 5), "bias": m.floats(5, dtype=float32)}
    ids = m.choose([named, {"bias": m.floats(40, dtype=float32)}])
    kinds = [
        {"repetition": 1.1, "frequency": 0.1, "presence": np.float32([0, 1, 2]), "sustain": 3, "decay": 2},
        {"dry_multiplier": 0.8, "dry_base": 1.5, "dry_allowed_length": 1, "dry_max_ngram": 9, "dry_range": 7},
        {"dry_multiplier": 0.8, "dry_breakers": m.integers(0, 2, 40, dtype=uint8)},
        ids | {"allowed": m.integers(0, 2, 40, dtype=uint8)},
        {"table": OfLibrary(lambda library: ops.PenaltyTable(3, importlib.import_module(library), presence=[0, 1, 2]))},
    ]
    history = m.integers(0, 41, 3, 12, dtype=m.choose([np.int32, np.int64]))
    lengths = m.choose([{}, {"lengths": np.int32([0, 7, 12])}])
    return {"logits": m.floats(3, 40), "history": history, **lengths, **m.choose(kinds)}


@call
def advance(m):
    counters = {name: m.integers(0, 6, 3) for name in ("positions", "lengths")} | {"steps": np.arange(2, 5)}
    kept = {"tokens": m.integers(0, 9, 4, 3), "history": m.integers(0, 9, 3, 5)}
    return {"ids": m.integers(0, 9, 3), **counters, **m.choose([{}, kept])}


@call
def hadamard(m):
    return {"x": m.floats(3, 16), "size": m.choose([2, 8, 16]), "scale": 0.25}


@call
def remap_columns(m):
    return {"x": m.integers(-9, 9, 3, 7), "index": m.integers(0, 7, 7)}


@call
def remap_nibbles(m):
    return {"x": m.integers(-(2**31), 2**31, 3, 2), "index": m.integers(0, 16, 16)}


@call
def pack_columns(m):
    return {"codes": m.integers(0, 256, 32, 5, dtype=int16), "bits": m.choose([2, 3, 4, 5, 6, 8])}


@call
def pack_rows_4(m):
    return {"scales": m.integers(1, 17, 3, 16, dtype=int16)}


def _quantizing(m):
    scale = np.abs(m.floats(7, dtype=float32)) + np.float32(0.1)
    return {"x": m.floats(5, 7, dtype=float32), "scale": scale, "qzero": m.choose([0, 8]), "maxq": 15}


@call
def quantize(m):
    return _quantizing(m) | m.choose([{}, {"codes": np.zeros((5, 7), int16)}])


@call
def quantize_err(m):
    return _quantizing(m) | {"err_norm": m.choose([2.0, 3.5]), "min_p": 0.7, "max_p": 1.2, "p_grid": 3}


@call
def quantize_range_inplace(m):
    arguments = _quantizing(m)
    arguments["weights"] = arguments.pop("x")
    return arguments | {"a": 1, "b": m.choose([1, 4, 5])} | m.choose([{}, {"codes": np.zeros((5, 7), int16)}])


@call
def quantize_range(m):
    arguments = quantize_range_inplace(m)
    arguments |= {name: m.floats(5, 7, dtype=float32) for name in ("quant", "error")}
    return arguments | {"hessian_inv": np.triu(m.floats(5, 5, dtype=float32) * np.float32(0.1)) + np.eye(5, dtype=float32)}


@call
def search_scales(m):
    more = m.choose([{}, {"scales16": np.zeros(9, float16)}])
    weights = np.abs(m.floats(4, dtype=float32))
    return {"target": m.floats(4, 9, dtype=float32), "weights": weights, "bits": m.choose([2, 3, 4, 5, 6, 8]), **more}


@call
def search_scales_gptq(m):
    arguments = search_scales(m) | {"is_symmetric": m.choose([True, False])}
    arguments.pop("scales16", None)
    return arguments


@call
def quantize_group(m):
    target, original = m.floats(4, 9, dtype=float32), m.floats(4, 9, dtype=float32)
    numbers = {"factor": m.floats(4, 4, dtype=float32), "loss_weights": np.abs(m.floats(4, dtype=float32))}
    numbers |= {"scales16": np.abs(m.floats(9, dtype=float16)), "bits": m.choose([2, 4, 8])}
    return {"target": target, "original": original, **numbers, **m.choose([{}, {"zeros": m.integers(0, 4, 9, dtype=uint8)}])}


@call
def lora(m):
    y = m.floats(6, 5, dtype=m.choose([m.dtype, float32]))
    arrays = {"y": y, "x": m.floats(6, 7), "a": m.floats(7, 4), "b": m.floats(4, 5)}
    workspace = {"workspace": np.zeros(ops.lora_workspace_size(6, 7, 4), float32)}
    arrays |= {"rank_adapter": np.int32([0, 1, 1, 0]), "weights": np.float32([[0, 1], [0.5, 0], [1, 2]])}
    return arrays | m.choose([{}, workspace])


def _codec(m, shape):
    kind = m.choose(["fp8", "e4m3", "q4", "q8"])
    scale_shape = kv_cache.scale_shape(shape, kind)
    codes = m.integers(0, 120, *kv_cache.code_shape(shape, kind), dtype=uint8)
    scales = None if scale_shape is None else np.abs(m.floats(*scale_shape, dtype=float16))
    return {"x": m.floats(*shape, dtype=float16), "codes": codes, "scales": scales, "kind": kind}


def _contiguous_codec(m):
    return _codec(m, m.choose([(2, 4, 2, 32), (2, 4, 1, 32)])) | {"start": 1, "width": 2} | m.choose([{}, {"rows": 1}])


def _paged_codec(m):
    return _codec(m, (6, 4, 2, 32)) | {"lengths": np.int32([0, 5]), "block_table": np.int32([[4, 0], [1, 5]])}


CALLS |= {"kv_encode": _contiguous_codec, "kv_decode": _contiguous_codec, "kv_decode_paged": _paged_codec}
CALLS["kv_encode_paged"] = lambda m: _paged_codec(m) | {"width": 2}
CALLS["encode_blocks"] = lambda m: {"x": m.floats(*m.choose([(64,), (2, 64)]), dtype=float16), "kind": m.choose(["q4", "q8"])}


@call
def decode_blocks(m):
    kind = m.choose(["q4", "q8"])
    codes = m.integers(0, 256, *kv_cache.code_shape((128,), kind), dtype=uint8)
    return {"codes": codes, "scales": np.abs(m.floats(4, dtype=float16)), "kind": kind}


@call
def cache_rotate(m):
    return {"cache": m.choose([m.floats(5, 6), m.integers(0, 9, 5, 2, 3, dtype=uint8)]), "order": np.int32([3, 0, 2])}


@call
def count_match(m):
    return {"a": np.arange(5), "b": np.arange(7)[None], "limit": 6}


@functools.cache
def _tensors(kind, n=64, seed=0):
    rng = np.random.default_rng(seed)
    if kind == "exl2":
        return random_exl2(rng, (5, 4), n=n, group_blocks=1, has_bias=True)
    return random_gptq(rng, 4, k=160, n=n, groups=5, act_order=True)


@functools.cache
def matrix(library, kind="exl2", n=64, seed=0):
    return ops.QMatrix.from_tensors({key: move(library, value) for key, value in _tensors(kind, n, seed).items()})


@functools.cache
def joined(library, kind="exl2"):
    return ops.JoinedQMatrix.from_matrices([matrix(library, kind), matrix(library, kind, seed=1)])


@functools.cache
def experts(library, kind="exl2"):
    return ops.QMatrixGroup.from_matrices([matrix(library, kind), matrix(library, kind, seed=1)])


@call
def reconstruct(m):
    return {f"q.{name}": value for name, value in _tensors(m.choose(["exl2", "gptq"])).items()}


def _product_dtype(m):
    return m.dtype if m.dtype != float32 else float16


@call
def qmatmul(m):
    kind, k, dtype = m.choose(["exl2", "gptq"]), 160, _product_dtype(m)
    x, more = m.floats(*m.choose([(3, k), (2, 2, k), (k,)]), dtype=dtype), {}
    which = m.choose(["plain", "residual", "norm", "gate", "float32", "joined"])
    if which == "residual":
        more = {"residual": m.floats(*x.shape[:-1], 64, dtype=dtype)}
    elif which == "norm":
        x = m.floats(3, k)
        more = {"before.weight": m.floats(k), "before.eps": 1e-5, "before.dtype": dtype}
    elif which == "gate":
        x, more = m.floats(3, 2 * k, dtype=dtype), {"before": ops.InputGate("silu")}
    elif which == "float32":
        more = {"dtype": float32}
    make = joined if which == "joined" else matrix
    return {"x": x, "q": OfLibrary(functools.partial(make, kind=kind)), "batch_invariant": m.choose([False, True]), **more}


@call
def qmatmul_gated(m):
    kind, dtype = m.choose(["exl2", "gptq"]), _product_dtype(m)
    activation = m.choose(["silu", "gelu", "gelu_tanh", "relu"])
    more = m.choose([{}, {"before.weight": m.floats(160), "before.eps": 1e-5, "before.dtype": dtype}])
    pair = OfLibrary(functools.partial(joined, kind=kind))
    return {"x": m.floats(3, 160, dtype=dtype), "joined": pair, "activation": activation, **more}


@call
def qmatmul_grouped(m):
    chosen = m.integers(0, 2, 5, 1)
    groups = OfLibrary(lambda library: ops.group_rows(move(library, chosen), 2))
    kind = m.choose(["exl2", "gptq"])
    more = m.choose([{}, {"dtype": float32}])
    x = m.floats(*m.choose([(5, 160), (5, 1, 160)]), dtype=_product_dtype(m))
    return {"x": x, "matrices": OfLibrary(functools.partial(experts, kind=kind)), "groups": groups, **more}


def _built(parts):
    if "kind" in parts:
        return ops.CacheCodes(**parts)
    if "eps" in parts:
        return ops.InputNorm(**parts)
    return ops.QMatrix.from_tensors(parts)


def built(arguments):
    """The arguments of an op, those in parts put together."""
    whole, parts = {}, {}
    for name, value in arguments.items():
        argument, _, part = name.partition(".")
        if part:
            parts.setdefault(argument, {})[part] = value
        else:
            whole[name] = value
    return whole | {argument: _built(values) for argument, values in parts.items()}


def valid_call(name, m):
    """Arguments of a call that succeeds, on the host; in about half of the calls its results have arrays to go to."""
    arguments = CALLS[name](m)
    if name in NOTHING_RETURNED or not m.choose([True, False]):
        return arguments
    results = op_named(name).run(realized("numpy", {key: Placed(value) for key, value in arguments.items()}).arguments)
    results = results if isinstance(results, tuple) else (results,)
    for argument, result in zip(OUTPUTS.get(name, ("out",)), results, strict=True):
        arguments[argument] = np.full(result.shape, 77).astype(result.dtype)
    return arguments


# --- placing ----------------------------------------------------------------------------------------------------------

BAND = 64
_SENTINEL = 0xA5

LAYOUTS = ("transposed", "reversed", "every second", "broadcast", "one byte off", "one element off")


@dataclass(frozen=True)
class Placed:
    """A value and how it comes: an array in memory of its own between bands, laid out in some way, perhaps in a wrapper."""

    value: Any
    layout: str = "plain"
    wrapper: str = ""
    shares: tuple = ()  # (argument, elements): its memory begins that many elements after that of another argument


class Exporter:
    """An array of some other framework, which has nothing but DLPack."""

    def __init__(self, array, device=None):
        self.array, self.device = array, device

    def __dlpack_device__(self):
        return self.device or self.array.__dlpack_device__()

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)


class ReadOnlyExporter(Exporter):
    """An immutable array on a GPU, as JAX has them."""

    def __dlpack__(self, **options):
        capsule = self.array.__dlpack__(**options)
        name = _arrays._capsule_name(capsule)
        if name == b"dltensor_versioned":
            flags = ctypes.c_uint64.from_address(_arrays._capsule_pointer(capsule, name) + _arrays._FLAGS_OFFSET)
            flags.value |= _arrays._READ_ONLY
        return capsule


class Subclass(np.ndarray):
    """An array of a class derived from NumPy's, such as memmap, that behaves as NumPy's do."""


WRAPPERS = (
    "dlpack", "read-only", "read-only dlpack", "unknown device", "matrix", "masked", "subclass", "list", "other library",
)  # fmt: skip


def _strided(shape, layout, itemsize):
    """(strides, first byte, bytes in all) of an array laid out in some way."""
    strides = [itemsize] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(shape[axis + 1], 1)
    size = int(np.prod(shape)) * itemsize
    if layout == "transposed":
        strides = [itemsize] * len(shape)
        for axis in range(1, len(shape)):
            strides[axis] = strides[axis - 1] * max(shape[axis - 1], 1)
    elif layout == "reversed" and shape and shape[-1]:
        strides[-1] = -itemsize
        return strides, (shape[-1] - 1) * itemsize, size
    elif layout == "every second":
        return [2 * stride for stride in strides], 0, 2 * size
    elif layout == "broadcast" and shape:
        strides[0] = 0
    elif layout == "one byte off":
        return strides, 1, size + 1
    elif layout == "one element off":
        return strides, itemsize, size + itemsize
    return strides, 0, size


class Realized:
    """The arguments of a call in one library, and the memory they lie in."""

    def __init__(self):
        self.arguments, self.arrays, self.roots, self.starts = {}, {}, {}, {}

    def snapshot(self):
        return {name: host(root).copy() for name, root in self.roots.items()}


def realized(library, placed):
    """The Placed arguments in memory."""
    result = Realized()
    for name, item in placed.items():
        if not isinstance(item.value, np.ndarray):
            result.arguments[name] = item.value.make(library) if isinstance(item.value, OfLibrary) else item.value
    arrays = [name for name, item in placed.items() if isinstance(item.value, np.ndarray)]
    for name in sorted(arrays, key=lambda name: bool(placed[name].shares)):
        _place(library, name, placed[name], result, placed)
    return result


def _place(library, name, item, result, placed):
    value = item.value
    if value.dtype.hasobject:
        result.arguments[name] = result.arrays[name] = value
        return
    strides, first, size = _strided(value.shape, item.layout, value.itemsize)
    if item.shares and item.shares[0] in result.starts:
        other, elements = item.shares
        root = result.roots[other]
        first += result.starts[other] + elements * value.itemsize
    else:
        following = sum(i.value.nbytes * 2 + 16 for i in placed.values() if i.shares and i.shares[0] == name)
        root = np.full(BAND + size + following + BAND, _SENTINEL, uint8)
        root = move(library, root)
        result.roots[name] = root
        first += BAND
    result.starts[name] = first
    xp_array = _view(library, root, value.dtype, value.shape, strides, first)
    if name in result.roots and value.size:
        _fill(library, root, xp_array, value, strides, first)
    result.arrays[name] = xp_array
    result.arguments[name] = _wrapped(library, xp_array, item.wrapper)


def _view(library, root, dtype, shape, strides, first):
    if library == "numpy":
        return np.ndarray(shape, dtype, root, first, strides)
    import cupy

    return cupy.ndarray(shape, dtype, root.data + first, tuple(strides))


def _fill(library, root, array, value, strides, first):
    if library == "numpy":
        for index in [0] if 0 in strides and value.ndim else [slice(None)]:
            if value.ndim and 0 in strides:
                array[index] = value[index]
            else:
                array[...] = value
        return
    flat = host(root).copy()
    _fill("numpy", flat, np.ndarray(value.shape, value.dtype, flat, first, strides), value, strides, first)
    root.set(flat)


def _wrapped(library, array, wrapper):
    if wrapper == "dlpack":
        return Exporter(array)
    if wrapper == "unknown device":
        return Exporter(array, (12, 0))
    if wrapper.startswith("read-only") and library == "numpy":
        array = array.view()
        array.flags.writeable = False
        return Exporter(array) if wrapper == "read-only dlpack" else array
    if wrapper == "read-only dlpack":
        return ReadOnlyExporter(array)
    if wrapper == "matrix" and library == "numpy" and array.ndim == 2:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return array.view(np.matrix)
    if wrapper == "masked" and library == "numpy":
        return np.ma.MaskedArray(array, mask=np.arange(array.size).reshape(array.shape) % 2 == 0)
    if wrapper == "subclass" and library == "numpy":
        return array.view(Subclass)
    if wrapper == "list":
        return array.tolist()
    if wrapper == "other library" and library == "cupy":
        return array.get()
    return array


def well_formed(callee, realized_call, placed):
    """The arguments of the same call on NumPy, with plain arrays that share nothing."""
    copies = {}
    for name in realized_call.arguments:
        if name not in realized_call.arrays:
            copies[name] = callee.again(name, placed[name].value)
            continue
        array = host(realized_call.arrays[name])
        copies[name] = np.array(array, array.dtype.newbyteorder("="), copy=True, order="C", subok=False)
    return copies


# --- what must hold ---------------------------------------------------------------------------------------------------


def attempt(callee, placed, library="numpy"):
    """Call a function -> "right" or "refused". AssertionError where it is neither, or anything else was written.

    What is right is what the function makes of plain copies on NumPy. Where NumPy refuses values that a GPU, which does not
    read them back, leaves out, the GPU's answer is whatever its docstring says.
    """
    call = realized(library, placed)
    copies, before = well_formed(callee, call, placed), call.snapshot()
    try:
        results = callee.run(call.arguments)
    except Exception as error:
        assert_helpful(error, callee, placed)
        after = call.snapshot()
        changed = [root for root in before if before[root].tobytes() != after[root].tobytes()]
        assert not changed, f"{changed} changed before {error!r}"
        return "refused"
    after = call.snapshot()
    for argument, array in call.arrays.items():
        if callee.may_write(argument) and argument in call.starts:  # the bytes that are its elements may change
            root = argument if argument in call.roots else placed[argument].shares[0]
            place = array.shape, f"V{array.dtype.itemsize}", call.starts[argument], array.strides
            _bytes_of(before[root], *place)[...] = _bytes_of(after[root], *place)
    for root in before:
        where = np.flatnonzero(before[root] != after[root])
        assert not where.size, f"{root}: byte {where[0]} of its memory changed, which is not the op's to write"
    try:
        expected = callee.run(copies)
    except callee.errors as error:
        assert library != "numpy", f"accepted, but plain copies of the same values are refused: {error}"
        return "right"
    compare(callee, results, expected, call, copies)
    return "right"


def _bytes_of(root, shape, dtype, first, strides):
    return np.ndarray(shape, dtype, root, first, strides)


TOLERANCE = {float16: 4e-3, bfloat16: 3e-2, float32: 1e-4}
PRODUCT_TOLERANCE = TOLERANCE | {float32: 1e-3}
"""A kernel scales the sum of a group, NumPy its weights: 3e-4 apart, norm-wise, whatever the result is rounded to."""


def compare(callee, results, expected, call, copies):
    """Results and what was written in place, against those of the plain call."""
    pairs = [("result", *pair) for pair in zip(_flat(results), _flat(expected), strict=True)]
    written = [argument for argument in call.arrays if callee.may_write(argument) and argument != "workspace"]
    pairs += [(argument, call.arrays[argument], copies[argument]) for argument in written]
    for what, found, wanted in pairs:
        if not isinstance(wanted, np.ndarray):
            assert found == wanted, f"{what}: {found!r}, expected {wanted!r}"
            continue
        found = found.array if isinstance(found, Exporter) else found
        is_exact = isinstance(found, np.ndarray)
        found = np.asarray(host(found))
        found = found.astype(found.dtype.newbyteorder("="))
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), f"{what}: {found.dtype} {found.shape}"
        if is_exact or wanted.dtype not in TOLERANCE:
            both_nan = (found != found) & (wanted != wanted)
            same = found.tobytes() == wanted.tobytes() or np.all(both_nan | (found == wanted))
            assert same or (not is_exact and callee.name == "qkv_append"), f"{what} differs from that of plain copies"
        else:
            a, b = found.astype(np.float64), wanted.astype(np.float64)
            bound = (PRODUCT_TOLERANCE if callee.name.startswith("qmatmul") else TOLERANCE)[wanted.dtype]
            limit = bound * max(1.0, np.abs(b[np.isfinite(b)]).max(initial=0))
            assert np.allclose(a, b, rtol=bound, atol=limit, equal_nan=True), f"{what} differs from NumPy's"


def _flat(results):
    if hasattr(results, "order") and hasattr(results, "tiles"):
        return [results.order, results.offsets, results.tiles]
    return list(results) if isinstance(results, tuple) else [results]


def assert_helpful(error, callee, placed):
    """One line that names an argument, raised on purpose: by a `raise` of cupyq's, and not from within NumPy or CuPy."""
    is_expected = isinstance(error, callee.errors) and not isinstance(error, (UnicodeError, np.exceptions.AxisError))
    assert is_expected, f"{type(error).__name__}: {error}"
    message = str(error)
    assert message and "\n" not in message and len(message) < 400, f"not one line: {message!r}"
    if isinstance(error, OSError):
        return  # the system's own words, with the file's name
    parts = {part for argument in placed for part in argument.split(".")}
    names = parts | callee.names
    said = set("".join(c if c.isalnum() or c == "_" else " " for c in message).split())
    assert names & said, f"names no argument: {message}"
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    file, line = trace.tb_frame.f_code.co_filename, linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
    is_own = "/cupyq/" in file and line.strip().startswith("raise ")
    is_signature = isinstance(error, TypeError) and "unexpected keyword argument" in message
    assert is_own or is_signature, f"not raised on purpose ({file.rpartition('/')[2]}:{trace.tb_lineno}): {message}"


# --- spoiling ---------------------------------------------------------------------------------------------------------

DTYPES = tuple(
    np.dtype(d)
    for d in (
        bool, np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.float16, np.float32,
        np.float64, np.complex64, np.longdouble, object, "S4", "U2", "M8[s]", [("a", "f4"), ("b", "i4")], ">f4", ">f2", ">i4",
        ">i8", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.int4,
    )
)  # fmt: skip

SCALARS = (
    None, "text", b"bytes", object(), [], [1.0], {}, (1, 2), 1.5, -1, -7, 0, 1, 2, 9, 2**31, -(2**31), 2**63, 2**70, 1j,
    float("nan"), float("inf"), float("-inf"), True, False, 1e300, -0.5, np.arange(2), np.float32(2), np.int64(3), np.array(2),
    np.array(float("nan")), "q4", "silu", "neox", np.float64, np.zeros((2, 2)), ...,
)  # fmt: skip

ANY_NUMBER = {
    ("gemm", "alpha"), ("gemm", "beta"), ("embedding", "scale"), ("hadamard", "scale"), ("quantize_err", "min_p"),
    ("quantize_err", "max_p"),
}  # fmt: skip
"""Factors: NaN and Inf are numbers like others there."""


def spoil_shape(choose, value):
    shape = list(value.shape)
    axis = choose(list(range(len(shape)))) if shape else None
    how = choose(["add", "drop", "0", "1", "more", "less", "double", "flat", "scalar", "swap"])
    if how == "add":
        return value[None]
    if axis is None:
        return value.reshape(1, 1)
    if how == "drop":
        return np.ascontiguousarray(np.take(value, 0, axis=axis)) if shape[axis] else value[None]
    if how == "flat":
        return value.reshape(-1)
    if how == "scalar":
        return np.zeros((), value.dtype)
    if how == "swap":
        return np.ascontiguousarray(value.swapaxes(axis, 0))
    count = {"0": 0, "1": 1, "more": shape[axis] + 1, "less": max(shape[axis] - 1, 0), "double": 2 * shape[axis]}[how]
    return np.resize(value, (*shape[:axis], count, *shape[axis + 1 :])).astype(value.dtype)


def spoil_dtype(choose, value):
    dtype = choose(DTYPES)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        if dtype.names or dtype.kind in "MSU":
            return np.zeros(value.shape, dtype)
        try:
            return (value if value.dtype in DTYPES[:12] else value.astype(np.float32)).astype(dtype)
        except (TypeError, ValueError):
            return np.zeros(value.shape, dtype)


def spoil_contents(choose, value):
    value = value.copy()
    if not value.size:
        return value
    if value.dtype.kind in "MSUbO" or value.dtype.names or value.dtype == ml_dtypes.int4:
        return value
    if value.dtype.kind in "iu":
        info = np.iinfo(value.dtype)
        number = choose([info.max, info.min, 100, -1, 5, 0])
        number = min(max(number, info.min), info.max)
    else:
        number = choose([np.nan, np.inf, -np.inf, 0.0, 6e4, 3e38, -0.0])
    everywhere = choose([False, True])
    with np.errstate(all="ignore"):
        if everywhere:
            value[...] = number
        else:
            value.reshape(-1)[choose([0, value.size // 2, value.size - 1])] = number
    return value


KINDS = ("shape", "dtype", "layout", "wrapper", "contents", "alias", "scalar", "huge")


GPU_KINDS = ("layout", "wrapper", "alias", "scalar")
"""What a GPU's own path has to notice: shapes, dtypes and contents go through the checks that NumPy's go through."""


def spoilt(callee, placed, choose, kinds=KINDS):
    """(placed, what was done, whether the call may not succeed): one argument spoilt."""
    argument = choose(sorted(placed.keys() - callee.spared))
    item = placed[argument]
    if not isinstance(item.value, np.ndarray):
        if "scalar" not in kinds:
            return placed, "nothing", False
        index = choose(list(range(len(SCALARS))))
        wrong = SCALARS[index]
        done = f"{argument} = {wrong!r}"
        return placed | {argument: Placed(wrong)}, done, must_be_refused(callee, argument, item.value, wrong)
    kind = choose(list(kinds))
    if kind == "scalar":
        wrong = choose(["none", "text", "number", "object", "array of objects"])
        wrong = {"none": None, "text": "text", "number": float("nan"), "object": object(), "array of objects": [None]}[wrong]
        must = wrong is not None and not is_setting(callee.name, argument)
        return placed | {argument: Placed(wrong)}, f"{argument} = {wrong!r}", must
    if kind == "layout":
        layout = choose(list(LAYOUTS))
        must = kinds is GPU_KINDS and layout == "one byte off" and item.value.size > 0 and item.value.itemsize > 1
        must = must and not is_setting(callee.name, argument) and argument not in _TABLES
        return placed | {argument: replace(item, layout=layout)}, f"{argument} {layout}", must
    if kind == "wrapper":
        wrapper = choose(list(WRAPPERS))
        read_only = ("read-only dlpack",) if kinds is GPU_KINDS else ("read-only", "read-only dlpack")
        must = wrapper == "unknown device" or wrapper in read_only and callee.may_write(argument)
        return placed | {argument: replace(item, wrapper=wrapper)}, f"{argument} {wrapper}", must and "." not in argument
    if kind == "alias":
        others = [n for n, i in placed.items() if n != argument and isinstance(i.value, np.ndarray) and not i.shares]
        if not others or item.value.dtype.hasobject or any(i.shares for i in placed.values()):
            return placed, "nothing", False
        other, elements = choose(others), choose([0, 0, 1, -1, 3])
        if kinds is GPU_KINDS and not (callee.may_write(argument) or callee.may_write(other)):
            return placed, "nothing", False  # what is read there could be any number
        if placed[other].value.dtype.hasobject or placed[other].layout != "plain":
            return placed, "nothing", False
        return placed | {argument: replace(item, shares=(other, elements))}, f"{argument} on {other} + {elements}", False
    if kind == "huge":
        shape = tuple(choose([2**20, 2**31, 2**40]) if i == 0 else n for i, n in enumerate(item.value.shape))
        if not shape or item.value.dtype.hasobject:
            return placed, "nothing", False
        return placed | {argument: Placed(Huge(item.value.dtype, shape))}, f"{argument} huge {shape}", True
    spoil = {"shape": spoil_shape, "dtype": spoil_dtype, "contents": spoil_contents}[kind]
    if item.value.dtype.hasobject or item.value.dtype.names:
        return placed, "nothing", False
    value = spoil(choose, item.value)
    done = f"{argument} {value.dtype} {value.shape}" if kind != "contents" else f"{argument} = {value.reshape(-1)[:3]}..."
    return placed | {argument: replace(item, value=value)}, done, False


_TABLES = ("q.q_groups", "q.q_invperm", "q.q_perm", "q.g_idx", "q.q_scale_max")  # travel through the host


class Huge(OfLibrary):
    """An array of a huge shape that all lies in one element."""

    def __init__(self, dtype, shape):
        super().__init__(functools.partial(self._made, dtype=dtype, shape=shape))

    @staticmethod
    def _made(library, dtype, shape):
        element = move(library, np.zeros((), dtype))
        if library == "numpy":
            return np.broadcast_to(element, shape)
        import cupy

        return cupy.broadcast_to(element, shape)


def is_setting(name, argument):
    """Settings of the sampler may be numbers or arrays."""
    if name not in ("sample", "penalize"):
        return False
    return argument in importlib.import_module(f"cupyq.ops.{'sampling' if name == 'sample' else 'penalties'}").SETTINGS


def must_be_refused(callee, argument, valid, wrong):
    """Whether a value in place of a valid one that is no array can never be right."""
    parameter = callee.parameters.get(argument)
    is_default = parameter is not None and parameter.default is not inspect.Parameter.empty and wrong is parameter.default
    if is_default or is_setting(callee.name, argument) or valid is None or isinstance(valid, bool) or "dtype" in argument:
        return False
    if isinstance(valid, (int, float)):
        is_odd = isinstance(wrong, float) and not np.isfinite(wrong)
        if is_odd:
            return (callee.name, argument) not in ANY_NUMBER
        if wrong is None:
            return True
        if argument in ("eps", "cap", "bound", "softcap", "err_norm", "window") or argument.endswith(".eps"):
            return isinstance(wrong, (int, float)) and wrong < 0 or isinstance(wrong, (str, list, dict, tuple, complex))
        return isinstance(wrong, (str, bytes, list, dict, tuple, complex)) or wrong is ...
    if isinstance(valid, str):
        return not isinstance(wrong, str) and not (wrong is None and argument == "style")
    return wrong is not None
