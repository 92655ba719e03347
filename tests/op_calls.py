"""Valid calls of every public op, for tests/test_ops.py."""

import functools
import importlib

import numpy as np
from kernel_checks import FLOATS, float16, float32, move
from placed_calls import Callee, OfLibrary, Placed, realized
from random_layers import random_exl2, random_gptq

from cupyq import ops
from cupyq.formats import kv_cache

int16, int32, uint8 = map(np.dtype, (np.int16, np.int32, np.uint8))

CALLS = {}
"""{name of an op: function of a Maker -> {argument: value}}. `k_cache.codes` is part of an argument that `built` makes."""

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


@functools.cache
def op_named(name):
    return Callee(name, getattr(ops, name))


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
