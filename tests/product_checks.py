"""What the tests of products with quantized weights share: layers of random tensors, calls between sentinels, the bound on
errors, and kernels compiled in parallel before they are run."""

import importlib

import numpy as np
from conftest import exact_bound
from kernel_checks import ROUNDING, banded, float16, is_hopper, move, on_gpu, unwritten
from random_layers import random_exl2, random_gptq

from cupyq import QMatrix, _kernels
from cupyq.formats import exl2, gptq
from cupyq.models.warmup import compile_traced
from cupyq.ops.qmatmul import qmatmul, qmatmul_gated, qmatmul_workspace_size
from cupyq.ops.qmatmul_config import COUNTERS

ops_module = importlib.import_module("cupyq.ops.qmatmul")  # the op of the same name hides the module

EVERY = (8, 6, 5, 4, 3, 2)


class Layer:
    """A QMatrix of random tensors, with the float16 weights and the bias that it stands for."""

    def __init__(self, library, tensors, **options):
        self.tensors = tensors
        self.q = QMatrix.from_tensors({key: move(library, value) for key, value in tensors.items()}, **options)
        self.unrounded = (unrounded_exl2 if "q_weight" in tensors else unrounded_gptq)(tensors, **options)
        self.weight = (exl2.dequantize_exl2 if "q_weight" in tensors else gptq.dequantize_gptq)(tensors, **options)
        self.bias = tensors.get("bias", np.zeros(self.q.n, np.float16)).astype(np.float64)

    def __iter__(self):
        yield from (self.weight, self.unrounded, self.bias)


def unrounded_exl2(tensors):
    """(code - zero) * scale, rows in original order: the weights before their rounding to fp16, exact in float32."""
    layout, perm = exl2.validate_exl2(tensors)
    codes = exl2.unpack_exl2(tensors["q_weight"], layout).astype(np.float32)
    scales = exl2.exl2_scales(tensors["q_scale"], tensors["q_scale_max"]).astype(np.float32)
    zeros = np.repeat(np.float32(2) ** (layout.bits - 1), layout.rows)
    stored = (codes - zeros[:, None].astype(np.float32)) * np.repeat(scales, layout.rows, axis=0)
    if perm is None:
        return stored
    weight = np.empty_like(stored)
    weight[perm] = stored
    return weight


def unrounded_gptq(tensors, zeros="v1"):
    layout = gptq.validate_gptq(tensors, zeros=zeros)
    codes, true_zeros = gptq.unpack_gptq(tensors, layout, zeros=zeros)
    zero, scale = (array.astype(np.float32)[layout.row_group] for array in (true_zeros, tensors["scales"]))
    return (codes - zero) * scale


def exl2_layer(library, seed, widths, **options):
    return Layer(library, random_exl2(np.random.default_rng(seed), widths, **options))


def side_by_side(layers):
    *weights, bias = zip(*layers, strict=True)
    return *(np.concatenate(weight, axis=1) for weight in weights), np.concatenate(bias)


def check_product(y, x, *layers, residual=None, rounds_weights=False):
    """Error at most twice that of a product of the same dtypes with fp32 sums, plus one rounding; and little on the whole.

    rounds_weights: weights are in x's dtype, as where they are decoded before a product. The same-dtype reference is that of
    either kind whose error is larger.
    """
    weight, unrounded, bias = side_by_side(layers)
    added = bias if residual is None else bias + residual.astype(np.float64)
    exact = x.astype(np.float64) @ weight.astype(np.float64) + added
    kinds = [w.astype(np.float32) for w in (weight.astype(x.dtype), unrounded)]
    same = np.stack([(x.astype(np.float32) @ w + added.astype(np.float32)).astype(y.dtype) for w in kinds])
    exact_bound(y, exact, same, ulp=ROUNDING[y.dtype])
    allowed = 6e-4 if y.dtype == float16 else 6e-4 + 2.0**-9 * (1 + rounds_weights)
    assert relative_error(y, exact) <= allowed, f"norm-wise {relative_error(y, exact):.3g}"


def relative_error(y, exact):
    return np.linalg.norm(y.astype(np.float64) - exact) / np.linalg.norm(exact)


def product(cupy, x, q, *, op=qmatmul, residual=None, in_place=False, dtype=None, shift=0, **options):
    """The result in an `out` that was NaN (or the residual) between sentinels, `shift` values off an aligned address."""
    n = q.matrices[0].n if op is qmatmul_gated else q.n
    initial = residual if in_place else unwritten((*x.shape[:-1], n), x.dtype if dtype is None else np.dtype(dtype))
    out, check = banded(cupy, initial, shift)
    if residual is not None:
        options["residual"] = out if in_place else on_gpu(cupy, residual, shift)
    if dtype is not None:
        options["dtype"] = dtype
    assert op(on_gpu(cupy, x, shift), q, out=out, **options) is out
    check()
    return out.get()


def compiled_first():
    """False, then True. In the first turn of a loop launches are noted, not run; then they are compiled, in parallel."""
    with _kernels.tracing() as wanted:
        yield False
    compile_traced(wanted)
    yield True


def ways():
    """Of multiplying, on this GPU; see pick_kernel."""
    return ("mma", "wgmma", "dequantise") if is_hopper() else ("mma", "dequantise")


def pin(monkeypatch, way):
    monkeypatch.setattr(ops_module, "pick_kernel", lambda *arguments: way)


def fresh_workspace(cupy, q, rows, **options):
    """As large as is asked for, zero where it must be, NaN elsewhere."""
    workspace = cupy.full(qmatmul_workspace_size(q, rows, **options), np.nan, np.float32)
    workspace[:COUNTERS] = 0
    return workspace


# 13 blocks each, in groups of different sizes
PARTS = (((4,), 6, 40), ((5, 4), 3, 136), (EVERY, 1, 8), ((4, 3, 2), 2, 264))


def parts(count, *, shares_order, seed=30):
    """Layers of different widths; the stored order of their rows is one, or each its own (of one: none at all)."""
    layers = []
    for index, (widths, blocks, n) in enumerate(PARTS[:count]):
        has_perm = shares_order or index != 1
        made = random_exl2(
            np.random.default_rng(seed + index), widths, n=n, group_blocks=blocks, has_perm=has_perm, has_bias=index % 2 == 0
        )
        if shares_order and index:
            made["q_invperm"] = layers[0].tensors["q_invperm"]
        layers.append(Layer("cupy", made))
    return layers


def gated_layers(seed, kind="exl2", shares_order=True, n=72):
    """Gate and up whose products are about 1: where activations bend."""
    rng = np.random.default_rng(seed)
    if kind == "exl2":
        made = [random_exl2(rng, widths, n=n, group_blocks=b, has_bias=b == 3) for widths, b in (((5, 4), 3), ((4,), 6))]
        made = [dict(t, q_scale_max=(t["q_scale_max"] / np.float16(40)).astype(np.float16)) for t in made]
        if shares_order:
            made[1]["q_invperm"] = made[0]["q_invperm"]
    else:
        made = [random_gptq(rng, 4, k=416, n=n, groups=5, act_order=not shares_order, has_bias=True) for _ in range(2)]
        made = [dict(t, scales=(t["scales"] / np.float16(4)).astype(np.float16)) for t in made]
    return [Layer("cupy", tensors) for tensors in made]
