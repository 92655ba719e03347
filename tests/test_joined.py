"""layers/joined.py, and layers of quantized matrices where several steps are one launch: joined projections, norms that write
in stored order, products that add themselves to the residual. Against plain arithmetic, and what keeps the steps apart."""

import numpy as np
import pytest
from kernel_checks import float16, host, move, on_both
from layer_checks import Plain, close, numbers, plain_block, rms

from cupyq._arrays import namespace
from cupyq.formats import exl2, gptq
from cupyq.layers import MLP, Attention, DecoderLayer, HeadNorm, KVCache, Linear, ParallelDecoderLayer, Step
from cupyq.layers.lora import LoraWeights, Selection
from cupyq.ops.qmatrix import QMatrix
from cupyq.ops.rope import rope_tables

HIDDEN, INNER, HEAD_DIM, HEADS, KV_HEADS = 96, 160, 32, 3, 1
TABLES = rope_tables(HEAD_DIM, 128, theta=100.0)
SIZES = {
    "q": (HIDDEN, HEADS * HEAD_DIM),
    "k": (HIDDEN, KV_HEADS * HEAD_DIM),
    "v": (HIDDEN, KV_HEADS * HEAD_DIM),
    "o": (HEADS * HEAD_DIM, HIDDEN),
    "gate": (HIDDEN, INNER),
    "up": (HIDDEN, INNER),
    "down": (INNER, HIDDEN),
}


def tensors_of(kind, k, n, seed, order_seed):
    """(checkpoint tensors, their float16 weights [k, n]) of 4 bits; the order of the rows depends on order_seed."""
    rng, groups = np.random.default_rng(seed), k // 32
    perm = np.random.default_rng(order_seed).permutation(k)
    codes = rng.integers(0, 16, (k, n)).astype(np.uint8)
    bias = {"bias": rng.standard_normal(n).astype(np.float16)}
    if kind == "exl2":
        scale_max = (0.03 + 0.03 * rng.random(groups)).astype(np.float16)
        tensors = exl2.pack_exl2(codes, rng.integers(0, 16, (groups, n)), scale_max, [4] * groups, [32] * groups, perm)
        return tensors | bias, exl2.dequantize_exl2(tensors)
    scales = (0.01 + 0.03 * rng.random((groups, n))).astype(np.float16)
    row_group = perm // 32 if kind == "act-order" else np.arange(k) // 32
    tensors = gptq.pack_gptq(codes, rng.integers(5, 12, (groups, n)), scales, row_group, 4, "v1")
    return tensors | bias, gptq.dequantize_gptq(tensors)


class Layers:
    """The linear layers of one block, twice: quantized on a library, and their weights as plain arrays."""

    def __init__(self, kind, library, shares_order=True):
        self.library, self.quantized, self.plain = library, {}, {}
        for seed, (name, (k, n)) in enumerate(SIZES.items()):
            tensors, weight = tensors_of(kind, k, n, seed, k if shares_order else seed)
            matrix = QMatrix.from_tensors({key: move(library, value) for key, value in tensors.items()})
            self.quantized[name] = Linear(matrix, name=name)
            self.plain[name] = Plain(weight.T.astype(np.float32), tensors["bias"].astype(np.float32))

    def attention(self, linears, **options):
        options = {"layer": 0, "head_dim": HEAD_DIM, "scale": 0.2} | options
        return Attention(*(linears[name] for name in "qkvo"), **options)

    def mlp(self, linears, activation="silu"):
        return MLP(linears["gate"], linears["up"], linears["down"], activation)

    def block(self, linears, make, activation="silu", **options):
        return make(self.attention(linears, **options), self.mlp(linears, activation))


def llama(attention, mlp, post=False):
    roles = ("attention_norm", "mlp_norm") + ("attention_post_norm", "mlp_post_norm") * post
    return DecoderLayer(attention, mlp, **{role: rms(HIDDEN, seed) for seed, role in enumerate(roles)})


def gemma(attention, mlp):
    return llama(attention, mlp, post=True)


def cohere(attention, mlp):
    return ParallelDecoderLayer(attention, mlp, norm=rms(HIDDEN, 5))


def on(library, layer):
    """The layer, after moving the weights of its norms."""
    for norm in (*vars(layer).values(), *vars(layer.attention).values()):
        if hasattr(norm, "eps"):
            norm.weight = move(library, norm.weight)
    return layer


def dtype_of(library):
    return np.dtype(np.float32) if library == "numpy" else float16


def run(library, layer, x, pieces, adapters=None, workspaces=None):
    """What a layer adds to x [batch, seq, hidden], piece by piece behind a cache."""
    xp, dtype = namespace(x=move(library, x)), dtype_of(library)
    sizes = {"layers": 1, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": dtype}
    cache = KVCache(xp, batch=len(x), capacity=x.shape[1] + 2, **sizes, workspaces=workspaces)
    sin, cos = (move(library, table) for table in TABLES)
    found, begin = [], 0
    for piece in pieces:
        length = begin + piece
        step = Step(sin, cos, cache.positions, cache, cache.kv_lengths(piece), adapters, **cache.workspaces)
        hidden = xp.array(np.ascontiguousarray(x[:, begin:length]))
        assert layer(hidden, step, dtype) is hidden and hidden.dtype == np.float32
        found.append(host(hidden))
        cache.advance(piece)
        begin = length
    return np.concatenate(found, axis=1) - x[:, :begin]


def head_norms():
    norms = {f"{name}_norm": 1 + numbers(HEAD_DIM, seed=seed, scale=0.3) for seed, name in ((7, "q"), (8, "k"))}
    return {name: HeadNorm(weight, eps=1e-5) for name, weight in norms.items()}


CASES = {
    "llama exl2": ("exl2", llama, {}),
    "llama act-order": ("act-order", llama, {}),
    "llama gptq": ("gptq", llama, {}),
    "head norms": ("exl2", llama, head_norms),
    "no rotation": ("gptq", llama, {"rope_style": None}),
    "gptj, window": ("exl2", llama, {"rope_style": "gptj", "window": 3}),
    "gemma": ("act-order", gemma, {"softcap": 2.0}),
    "cohere": ("exl2", cohere, {}),
}


@on_both
@pytest.mark.parametrize("case", CASES)
def test_blocks_of_quantized_matrices(library, case):
    """Few rows in several pieces, and then more than one launch takes."""
    kind, make, options = CASES[case]
    options = options() if callable(options) else options
    layers, activation = Layers(kind, library), "gelu_tanh" if make is gemma else "silu"
    plain = layers.block(layers.plain, make, activation, **options)
    wrong = layers.block(layers.plain | {"v": layers.plain["k"]}, make, activation, **options)
    x = numbers(2, 44, HIDDEN, seed=30)
    expected, mistaken = (np.stack([plain_block(block, row, TABLES) for row in x]) - x for block in (plain, wrong))
    layer = on(library, layers.block(layers.quantized, make, activation, **options))
    tolerance = 1e-5 if library == "numpy" else 3e-3
    for pieces in ([3, 1, 1], [40, 1, 3]):
        found = run(library, layer, x, pieces)
        assert close(found, expected[:, : found.shape[1]], tolerance)
        assert not close(found, mistaken[:, : found.shape[1]], 10 * tolerance)


@on_both
def test_orders_that_differ_are_gathered(library):
    layers = Layers("exl2", library, shares_order=False)
    layer = on(library, layers.block(layers.quantized, llama))
    x = numbers(1, 6, HIDDEN, seed=30)
    expected = plain_block(layers.block(layers.plain, llama), x[0], TABLES) - x[0]
    assert close(run(library, layer, x, [5, 1])[0], expected, 1e-5 if library == "numpy" else 3e-3)


def step_with_cache(adapters=None):
    cache = KVCache(np, batch=1, capacity=4, layers=1, kv_heads=KV_HEADS, head_dim=HEAD_DIM, dtype=np.float32)
    return Step(*TABLES, cache.positions, cache, cache.kv_lengths(1), adapters)


def test_what_is_joined_and_when():
    layers = Layers("exl2", "numpy")
    attention, mlp = layers.attention(layers.quantized), layers.mlp(layers.quantized)
    assert attention._fused(step_with_cache()).matrices == tuple(layers.quantized[name].weight for name in "qkv")
    gate_and_up = mlp._joined.matrix_for((mlp.gate, mlp.up), None)
    assert gate_and_up.matrices == tuple(layers.quantized[name].weight for name in ("gate", "up"))
    assert len(attention.matrices()) == 5 and len(mlp.matrices()) == 4
    assert attention._fused(Step(*TABLES, np.zeros(1, np.int32))) is None  # nowhere to append to
    attention.q_norm = HeadNorm(np.ones(HEAD_DIM, np.float32), kind="layer")
    assert attention._fused(step_with_cache()) is None
    attention.q_norm = HeadNorm(np.ones(HEAD_DIM, np.float32), eps=1e-5)
    attention.k_norm = HeadNorm(np.ones(HEAD_DIM, np.float32), eps=1e-6)
    assert attention._fused(step_with_cache()) is None
    attention.k_norm = HeadNorm(np.ones(HEAD_DIM, np.float32), eps=1e-5)
    assert attention._fused(step_with_cache()) is not None
    attention.k = Linear(layers.plain["k"].weight, layers.plain["k"].bias)
    assert attention._fused(step_with_cache()) is None
    other = Layers("gptq", "numpy").quantized
    for name, changed in (("k", other["k"]), ("v", Linear(layers.plain["v"].weight))):
        assert layers.attention(layers.quantized | {name: changed})._fused(step_with_cache()) is None


def lora_weights(library, k, n, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((k, 4)) * 0.1, rng.standard_normal((4, n)) * 0.1
    dtype = dtype_of(library)
    return a @ b, LoraWeights.of(move(library, a.astype(dtype)), move(library, b.astype(dtype)), 0)


@on_both
@pytest.mark.parametrize("name", SIZES)
def test_an_adapter_of_any_projection_counts(library, name):
    """What it adds depends on that projection's own x and y: such a step is less fused, and right."""
    layers = Layers("exl2", library)
    layer = on(library, layers.block(layers.quantized, llama))
    x = numbers(1, 5, HIDDEN, seed=30)
    without = run(library, layer, x, [4, 1])
    delta, layers.quantized[name].lora = lora_weights(library, *SIZES[name], seed=3)
    changed = Plain(layers.plain[name].weight + delta.T, layers.plain[name].bias)
    plain = layers.block(layers.plain | {name: changed}, llama)
    expected = plain_block(plain, x[0], TABLES) - x[0]
    for column, active, is_used in ((0, {0}, True), (1, {1}, False)):
        weights = np.zeros((1, 2), np.float32)
        weights[0, column] = 1
        selection = Selection(move(library, weights), frozenset(active))
        found = run(library, layer, x, [4, 1], selection)
        assert close(found[0], expected, 1e-5 if library == "numpy" else 3e-3) == is_used
        if not is_used:
            assert np.array_equal(found, without)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

STEP = ["rms_norm", "qmatmul", "qkv_append", "attention_decode", "qmatmul", "rms_norm", "qmatmul", "qmatmul"]


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "more"), [("gptq", 0), ("exl2", 2), ("act-order", 2)])
def test_a_step_is_few_launches(cupy, kind, more):
    """Rows in another order cost a launch before o and before down, whose input no norm writes."""
    from cupyq import _kernels

    layers = Layers(kind, "cupy")
    layer = on("cupy", layers.block(layers.quantized, llama))
    with _kernels.tracing() as launched:
        run("cupy", layer, numbers(3, 1, HIDDEN), [1])
    names = [instance.expression.split("<")[0] for instance, _ in launched]
    assert len(names) == len(STEP) + more
    assert [name for name in names if name != "gather_columns"] == STEP


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["exl2", "gptq"])
def test_one_workspace_serves_every_product(cupy, kind):
    from cupyq.ops.attention import attention_workspace_size
    from cupyq.ops.qmatmul import FUSED_ROWS, qmatmul_workspace_size

    layers = Layers(kind, "cupy")
    layer = on("cupy", layers.block(layers.quantized, llama))
    x = numbers(2, 20, HIDDEN, seed=30)
    sizes = {
        "workspace": max(qmatmul_workspace_size(matrix, FUSED_ROWS) for matrix in layer.matrices()),
        "attention_workspace": attention_workspace_size(HEAD_DIM),
    }
    workspaces = {name: cupy.zeros(size, np.float32) for name, size in sizes.items()}
    expected = run("cupy", layer, x, [16, 1, 3])
    for _ in range(2):
        assert np.array_equal(run("cupy", layer, x, [16, 1, 3], workspaces=workspaces), expected)
