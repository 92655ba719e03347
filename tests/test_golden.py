"""cupyq.ext against every recorded output of exllamav2 (tests/golden), with both errors in a table at the end of the run.

Where a product, norm or block has an exact value, it is computed here in float64, and exllamav2's own error is measured
by it too: ours must not be larger. What is exact by definition (packed words, codes, weights) must be equal, bit for bit.
"""

import math

import numpy as np
import pytest
from conftest import golden
from kernel_checks import move

import cupyq.ext as ext_c
from cupyq.formats.exl2 import dequantize_exl2

FILES = ("quant", "exl2_matrix", "gptq_matrix", "norm", "rope", "element", "cache", "sampling", "blocks")
GOLDEN = {(file, case): data for file in FILES for case, data in golden(file).items()}

ON_HOST = {"sampling": None, "rope": ("mrope",), "element": ("had_",), "cache": ("count_match",)}
"""Cases whose functions work on the host alone, by the beginning of their names; None: all of the file."""


def runs_on_gpu(file, case):
    prefixes = ON_HOST.get(file, ())
    return prefixes is not None and not case.startswith(tuple(prefixes))


RUNS = [pytest.param(file, case, "numpy", id=f"{file}-{case}-numpy") for file, case in GOLDEN] + [
    pytest.param(file, case, "cupy", id=f"{file}-{case}-cupy", marks=pytest.mark.gpu)
    for file, case in GOLDEN
    if runs_on_gpu(file, case)
]


@pytest.mark.parametrize("file, case, library", RUNS)
def test_recorded(file, case, library, record_property):
    # exllamav2 reports a scale of 0 and codes of NaN with the arithmetic of its kernels; NumPy would warn about both.
    with np.errstate(all="ignore"):
        rows = RUNNERS[file](case, *GOLDEN[file, case], lambda array: move(library, array.copy()))
    assert rows
    what, ours, theirs = worst(rows)
    record_property("golden", [f"{file} {case}", what, library, float(ours), None if theirs is None else float(theirs)])
    for what, ours, _, allowed in rows:
        assert ours <= allowed, f"{what}: error {ours:.3g}, allowed {allowed:.3g}"


def worst(rows):
    """(what, our error, exllamav2's) of the row that conftest prints: where both are known, the one nearest to theirs."""
    compared = [row for row in rows if row[2]] or rows
    return max(compared, key=lambda row: row[1] / (row[2] or row[3] or 1))[:3]


def host(array):
    """NumPy, CuPy or torch to NumPy."""
    if isinstance(array, np.ndarray):
        return array
    return array.cpu().numpy() if hasattr(array, "cpu") else array.get()


# A row is (what, our error, exllamav2's or None, allowed).


def different(what, ours, recorded, allowed=0):
    ours = host(ours)
    assert ours.shape == recorded.shape and ours.dtype == recorded.dtype, what
    return f"{what}: values that differ", int(np.sum(bits(ours) != bits(recorded))), None, allowed


def bits(array):
    return array.view(f"u{array.itemsize}") if array.dtype.kind == "f" else array


def norm_wise(what, ours, recorded, exact, allowed=None):
    """Relative errors in the 2-norm. `allowed` None: no more than exllamav2's, nor 6e-4."""
    errors = [np.linalg.norm(host(y).astype(np.float64) - exact) / np.linalg.norm(exact) for y in (ours, recorded)]
    return f"{what}: norm-wise", *errors, min(errors[1], 6e-4) if allowed is None else allowed


def in_roundings(what, ours, recorded, exact, allowed):
    """Largest errors in units of half a spacing of the result's dtype at the exact value: 1 is one perfect rounding."""
    dtype = recorded.dtype
    assert host(ours).dtype == dtype and ours.shape == recorded.shape
    # A value that cancellation made tiny is measured as one of 1/64 of the largest: fp32 sums have no more to give.
    size = np.maximum(np.abs(exact), np.abs(exact).max() / 64)
    half = np.spacing(size.astype(dtype)).astype(np.float64) / 2
    errors = [np.max(np.abs(host(y).astype(np.float64) - exact) / half) for y in (ours, recorded)]
    return f"{what}: roundings", *errors, allowed


def close(what, ours, recorded, relative):
    ours, recorded = host(ours).astype(np.float64), recorded.astype(np.float64)
    return f"{what}: relative", float(np.max(np.abs(ours - recorded) / np.maximum(np.abs(recorded), 1e-30))), None, relative


def float64(array):
    return array.astype(np.float64)


# --- quant ------------------------------------------------------------------------------------------------------------


def run_quant(case, inputs, outputs, scalars, place):
    given = {name: place(array) for name, array in inputs.items()}
    new = {name: place(np.zeros_like(array)) for name, array in outputs.items()}
    if case == "pack_rows_4":
        ext_c.pack_rows_4(given["input"], new["output"])
    elif case.startswith("pack_columns"):
        ext_c.pack_columns(given["input"], new["output"], scalars["bits"])
    elif case.startswith("quantize_err"):
        sums = place(np.zeros((scalars["p_grid"] + 1, 128), np.float32))
        ext_c.quantize_err(given["input"], sums, given["scale"], *(scalars[name] for name in ERR_SCALARS))
        return [close("sums", host(sums).sum(axis=1), outputs["err"], 1e-3)]
    elif case.startswith("quantize_range_inplace"):
        ext_c.quantize_range_inplace(given["weights"], given["scale"], new["out_q"], *(scalars[n] for n in RANGE_SCALARS))
        return [different("out_q", new["out_q"], outputs["out_q"]), different("weights", given["weights"], outputs["weights"])]
    elif case.startswith("quantize_range"):
        arguments = [new["quant"], given["scale"], new["out_q"], scalars["qzero"], scalars["maxq"], given["hessian_inv"]]
        ext_c.quantize_range(*arguments, given["weights"], new["error"], scalars["a"], scalars["b"])
        # The order of float32 sums may move a weight across the middle between two codes, and then changes its column.
        same = (host(new["out_q"]) == outputs["out_q"]).all(axis=0)
        rows = [("out_q: columns that differ", int(np.sum(~same)), None, 1)]
        for name, found in (("quant", new["quant"]), ("error", new["error"]), ("weights", given["weights"])):
            ours, recorded = host(found)[:, same], outputs[name][:, same]
            rows.append(norm_wise(name, ours, recorded, float64(recorded), 1e-5))
        return [(what, ours, None, allowed) for what, ours, _, allowed in rows]
    else:
        ext_c.quantize(*(given["input"], new["output"], given["scale"], new["out_q"]), scalars["qzero"], scalars["maxq"])
    return [different(name, new[name], recorded) for name, recorded in outputs.items()]


ERR_SCALARS = ("qzero", "maxq", "err_norm", "min_p", "max_p", "p_grid")
RANGE_SCALARS = ("qzero", "maxq", "a", "b")


# --- matrices ---------------------------------------------------------------------------------------------------------


def make_exl2(tensors, place, prescale=1.0, prefix=""):
    """A handle for recorded tensors, made as exllamav2's Python does."""
    t = {name: place(tensors[prefix + name]) for name in ("q_weight", "q_scale") if prefix + name in tensors}
    q_groups = tensors[prefix + "q_groups"]
    # An fp16 tensor times a number, in torch: the product in float32, rounded.
    scale_max = (tensors[prefix + "q_scale_max"].astype(np.float32) * np.float32(prescale / 256)).astype(np.float16)
    invperm = tensors[prefix + "q_invperm"]
    perms = (place(p.astype(np.uint16).view(np.int16)) for p in (np.argsort(invperm), invperm))
    group_map = ext_c.make_group_map(q_groups, tensors[prefix + "q_weight"].shape[0])
    bias = tensors.get(prefix + "bias")
    return ext_c.make_q_matrix(
        t["q_weight"], *perms, t["q_scale"], place(scale_max), place(q_groups), place(group_map), None, None, None,
        None if bias is None else place(bias), None, 0,
    )  # fmt: skip


def run_exl2(case, inputs, outputs, scalars, place):
    q_weight = inputs["q_weight"].copy()
    handle = make_exl2(inputs, place, scalars["prescale"])
    group_map = ext_c.make_group_map(inputs["q_groups"], inputs["q_weight"].shape[0])
    assert np.array_equal(q_weight, inputs["q_weight"])
    return [different("group_map", group_map, outputs["group_map"]), *matrix_rows(handle, inputs, outputs, place)]


def run_gptq(case, inputs, outputs, scalars, place):
    t = {name: place(inputs[name]) for name in ("qweight", "qzeros", "scales")}
    g_idx = inputs.get("g_idx")
    perms = [None if g_idx is None else place(np.zeros(g_idx.size, np.int16)) for _ in range(2)]
    handle = ext_c.make_q_matrix(t["qweight"], *perms, None, None, None, None, t["qzeros"], t["scales"], g_idx, None, None, 0)
    rows = matrix_rows(handle, inputs, outputs, place)
    if g_idx is not None:
        perm, inverse = (host(p).view(np.uint16).astype(int) for p in perms)
        assert np.array_equal(perm, np.argsort(g_idx, kind="stable")) and np.array_equal(inverse[perm], np.arange(perm.size))
    return rows


def matrix_rows(handle, inputs, outputs, place):
    weight = place(np.full_like(outputs["weight"], np.nan))
    ext_c.reconstruct(handle, weight)
    rows = [different("weight", weight, outputs["weight"])]
    bias = float64(inputs["bias"]) if "bias" in inputs else 0
    for m in (1, 3, 8, 40):
        a = inputs[f"a{m}"]
        c = place(np.full_like(outputs[f"c{m}"], np.nan))
        ext_c.gemm_half_q_half(place(a), handle, c, False)
        rows.append(norm_wise(f"{m} rows", c, outputs[f"c{m}"], float64(a) @ float64(outputs["weight"]) + bias))
    ext_c.free_q_matrix(handle)
    return rows


# --- norm, rope, element ----------------------------------------------------------------------------------------------


def exact_norm(x, w, b, eps, is_rms):
    x = float64(x)
    x = x if is_rms else x - x.mean(axis=-1, keepdims=True)
    y = x * float64(w) / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)
    return y if b is None else y + float64(b)


def run_norm(case, inputs, outputs, scalars, place):
    x, w, b, recorded = inputs["x"], inputs["w"], inputs.get("b"), outputs["y"]
    eps, is_rms = scalars["epsilon"], scalars.get("rms", case.startswith("rms"))
    exact = exact_norm(x, w, b, eps, is_rms)
    weights = [place(w)] if case.startswith("rms") else [place(w), None if b is None else place(b)]
    flag = [is_rms] if case.startswith("head") else []
    family = case.partition("_")[0] + "_norm"
    y = place(np.full_like(recorded, np.nan))
    getattr(ext_c, family)(place(x), *weights, y, eps, *flag)
    # float32 results carry each rounding of the fp32 chain; with a bias, exllamav2 rounds to fp16 twice.
    allowed = 8 if recorded.dtype == np.float32 else 1.1
    rows = [in_roundings("y", y, recorded, exact, allowed)]
    if x.dtype == recorded.dtype:
        inside = place(x)
        getattr(ext_c, family + "_")(inside, *weights, eps, *flag)
        rows.append(different("in place", inside, host(y)))
    return rows


def exact_rope(x, sin, cos, positions, style):
    """x [batch, seq, heads, head_dim]; positions [batch, seq]."""
    x, y = float64(x), float64(x).copy()
    s, c = (float64(table)[positions][:, :, None] for table in (sin, cos))
    r = sin.shape[-1]
    first, second = (np.s_[0 : r // 2], np.s_[r // 2 : r]) if style == "neox" else (np.s_[0:r:2], np.s_[1:r:2])
    one = first if style == "gptj" else np.s_[0 : r // 2]
    two = second if style == "gptj" else np.s_[0 : r // 2]
    y[..., first] = x[..., first] * c[..., one] - x[..., second] * s[..., one]
    y[..., second] = x[..., second] * c[..., two] + x[..., first] * s[..., two]
    return y


def run_rope(case, inputs, outputs, scalars, place):
    if case == "mrope":
        positions = place(np.full_like(outputs["pos"], -1))
        spans, grids = ([tuple(item) for item in scalars[name]] for name in ("spans", "grids"))
        following = ext_c.gen_mrope_pos_ids(positions, place(inputs["ids"]), scalars["merge_size"], spans, grids)
        assert following == scalars["next"]
        return [different("positions", positions, outputs["pos"])]
    x, heads, head_dim, past = inputs["x"], scalars["num_heads"], scalars["head_dim"], scalars["past_len"]
    offsets = inputs.get("offsets")
    inside = place(x)
    tables = [place(inputs[name][None, None]) for name in ("sin", "cos")]
    ext_c.rope_(
        inside, *tables, past, heads, head_dim, None if offsets is None else place(offsets), scalars["neox_style"]
    )  # fmt: skip
    shape = (x.shape[0], -1, heads, head_dim)
    tokens = np.arange(x.reshape(shape).shape[1])
    base = np.zeros(x.shape[0], int) if offsets is None else offsets.astype(int)
    base = np.maximum(base, 0) if past == -1 else base + past
    style = "neox" if scalars["neox_style"] else "gptj"
    exact = exact_rope(x.reshape(shape), inputs["sin"], inputs["cos"], np.maximum(base[:, None] + tokens, 0), style)
    exact = exact.reshape(x.shape)
    # Where the two terms cancel, a rounding of either is many of the sum: measured against the larger of the pair.
    errors = [float(np.max(np.abs(float64(host(y)) - exact))) for y in (inside, outputs["y"])]
    size = np.spacing(np.float16(np.abs(exact).max())).astype(np.float64)
    return [("y: largest, absolute", *errors, 0.51 * size), ("y: from the recorded", float(
        np.max(np.abs(float64(host(inside)) - float64(outputs["y"])))), None, size)]  # fmt: skip


def run_element(case, inputs, outputs, scalars, place):
    given = {name: place(array) for name, array in inputs.items()}
    if case.startswith("softcap"):
        ext_c.softcap_(given["x"], scalars["scale"])
        exact = scalars["scale"] * np.tanh(float64(inputs["x"]) / scalars["scale"])
        return [in_roundings("y", given["x"], outputs["y"], exact, 1.1 if given["x"].dtype == np.float16 else 8)]
    if case.startswith("gemm"):
        alpha, beta = scalars["alpha"], scalars["beta"]
        ext_c.gemm_half_half_half(given["a"], given["b"], given["c"], alpha, beta, False)
        exact = alpha * (float64(inputs["a"]) @ float64(inputs["b"])) + beta * float64(inputs["c"])
        return [norm_wise("c", given["c"], outputs["c"], exact)]
    if case.startswith("tensor_remap"):
        getattr(ext_c, case)(given["tensor"], given["index"])
        return [different("tensor", given["tensor"], outputs["tensor"])]
    if case.startswith("had"):
        h = place(np.zeros_like(outputs["h"]))
        getattr(ext_c, case.rpartition("_")[0])(h)
        return [different("h", h, outputs["h"])]
    codes, scales, y = (place(np.zeros_like(outputs[name])) for name in ("q", "scales", "y"))
    ext_c.matrix_fp16_to_q4(given["x"], codes, scales)
    rows = [different("codes", codes, outputs["q"]), different("scales", scales, outputs["scales"])]
    ext_c.matrix_q4_to_fp16(place(outputs["q"]), place(outputs["scales"]), y)
    return [*rows, different("decoded", y, outputs["y"])]


# --- cache ------------------------------------------------------------------------------------------------------------


def run_cache(case, inputs, outputs, scalars, place):
    if case == "rotate":
        cache = place(inputs["cache"])
        ext_c.cache_rotate(cache, place(inputs["order"]), place(np.zeros(inputs["cache"].shape[1], np.float16)))
        return [different("cache", cache, outputs["cache"])]
    if case == "count_match":
        assert ext_c.count_match(place(inputs["a"]), place(inputs["b"]), scalars["max_a"]) == scalars["result"]
        return [("count", 0, None, 0)]
    if case == "fp8":
        span = [scalars[name] for name in ("batch_size", "offset", "width")]
        codes, y = place(np.zeros_like(outputs["q"])), place(np.zeros_like(outputs["y"]))
        ext_c.fp16_to_fp8(place(inputs["x"]), codes, *span)
        ext_c.fp8_to_fp16(place(outputs["q"]), y, *span)
        return [different("codes", codes, outputs["q"]), different("decoded", y, outputs["y"])]
    return run_paged(inputs, outputs, scalars, place) if "page_size" in scalars else run_q_kv(inputs, outputs, scalars, place)


def run_q_kv(inputs, outputs, scalars, place):
    span = [*(scalars[name] for name in ("batch_size", "offset", "width")), 0, None, None, scalars["wbits"]]
    new = {name: place(np.zeros_like(array)) for name, array in outputs.items()}
    ext_c.fp16_to_q_kv(place(inputs["k"]), new["kq"], new["ks"], place(inputs["v"]), new["vq"], new["vs"], *span)
    old = {name: place(outputs[name]) for name in ("kq", "ks", "vq", "vs")}
    ext_c.q_to_fp16_kv(old["kq"], new["k"], old["ks"], old["vq"], new["v"], old["vs"], *span)
    return [different(name, new[name], recorded) for name, recorded in outputs.items()]


def run_paged(inputs, outputs, scalars, place):
    """The recording holds the written slots of a cache of pages; the others are zero."""
    page, table, lengths, slots = scalars["page_size"], inputs["block_table"], inputs["cache_seqlens"], inputs["slots"]
    pages = int(max(table.max(), slots.max() // page)) + 1

    def whole(rows):
        cache = np.zeros((1, pages * page, *rows.shape[1:]), rows.dtype)
        cache[0, slots] = rows
        return cache

    new = {name: place(np.zeros_like(whole(outputs[name]))) for name in outputs}
    where = [page, place(lengths), place(table), scalars["wbits"]]
    k, v = place(whole(inputs["k_rows"])), place(whole(inputs["v_rows"]))
    ext_c.fp16_to_q_kv(k, new["kq"], new["ks"], v, new["vq"], new["vs"], len(table), 0, scalars["new_tokens"], *where)
    old = {name: place(whole(outputs[name])) for name in ("kq", "ks", "vq", "vs")}
    where[1] = place((lengths + scalars["new_tokens"]).astype(np.int32))
    ext_c.q_to_fp16_kv(old["kq"], new["k"], old["ks"], old["vq"], new["v"], old["vs"], len(table), 0, 0, *where)
    rows = [different(name, host(new[name])[0, slots], recorded) for name, recorded in outputs.items()]
    for name in ("kq", "ks", "vq", "vs"):
        others = np.delete(host(new[name])[0], slots, axis=0)
        rows.append((f"{name}: other slots written", int(np.count_nonzero(others)), None, 0))
    return rows


# --- sampling ---------------------------------------------------------------------------------------------------------


def run_sampling(case, inputs, outputs, scalars, place):
    if case.startswith("rep"):
        logits = place(inputs["logits"])
        names = ("penalty_max", "sustain", "decay", "alpha_frequency", "alpha_presence")
        ext_c.apply_rep_penalty(place(inputs["sequence"]), *(scalars[name] for name in names), logits)
        return [("logits: largest, absolute", float(np.max(np.abs(host(logits) - outputs["logits"]))), None, 1e-6)]
    if case == "filter_exclusive":
        allowed = place(np.ones_like(outputs["filter"]))
        ext_c.logit_filter_exclusive(allowed, scalars["lists"])
        return [different("filter", allowed, outputs["filter"])]
    if case.startswith("partial"):
        # All five were recorded as -1, which is what a byte order mark before each string gives: none is found. Matches are
        # in test_ext_sampling.py.
        strings = [("\ufeff" + string).encode("utf-32-le") for string in scalars["strings"]]
        offsets = np.cumsum([0, *map(len, strings)]).astype(np.int32)
        text = scalars["match"].encode("utf-32-le")
        found = ext_c.partial_strings_match(np.frombuffer(text, np.uint8), offsets, np.frombuffer(b"".join(strings), np.uint8))
        assert found == scalars["result"]
        return [("position", 0, None, 0)]
    return run_sample_basic(inputs, outputs, scalars, place)


def run_sample_basic(inputs, outputs, s, place):
    logits = place(inputs["logits"][:, None])
    vocab, top = logits.shape[-1], outputs["top_tokens"].size
    found = {"tokens": [], "probs": [], "mu": []}
    for random in inputs["random"].tolist():
        token, prob = place(np.zeros((1, 1), np.int64)), place(np.zeros((1, 1), np.float32))
        top_probs, top_tokens = place(np.zeros((1, 1, top), np.float32)), place(np.zeros((1, 1, top), np.int64))
        mu = ext_c.sample_basic(
            logits, *(s[name] for name in ("temperature", "top_k", "top_p", "top_a", "min_p", "tfs", "typical")), random,
            token, prob, top_probs, top_tokens, None, s["mirostat"], [s["mirostat_mu"]], s["mirostat_tau"], s["mirostat_eta"],
            s["post_temperature"], place(np.ones(vocab, bool)), s["xtc_probability"], s["xtc_threshold"], s["min_temp"],
            s["max_temp"], s["temp_exponent"], s["smoothing_factor"], s["skew"],
        )  # fmt: skip
        for name, value in (("tokens", token.item()), ("probs", prob.item()), ("mu", mu[0] if mu else 0.0)):
            found[name].append(value)
    rows = [
        different("tokens", np.array(found["tokens"]), outputs["tokens"]),
        different("top tokens", host(top_tokens).ravel(), outputs["top_tokens"]),
    ]
    pairs = {"probs": found["probs"], "top_probs": host(top_probs).ravel()} | ({"mu": found["mu"]} if s["mirostat"] else {})
    for name, ours in pairs.items():
        rows.append((f"{name}: largest, absolute", float(np.max(np.abs(np.array(ours) - outputs[name]))), None, 1e-4))
    return rows


# --- blocks -----------------------------------------------------------------------------------------------------------

BLOCK_TOLERANCE = 3e-3


def run_blocks(case, inputs, outputs, scalars, place):
    kind = case.partition("_")[0]
    return {"attn": run_attention, "mlp": run_mlp, "moe": run_moe}[kind](inputs, outputs, scalars, place)


class Exact:
    """The recorded tensors in float64: norms, projections with their adapters, activations."""

    def __init__(self, inputs, scalars):
        self.inputs, self.scalars = inputs, scalars

    def project(self, name, x):
        tensors = {key[len(name) + 1 :]: value for key, value in self.inputs.items() if key.startswith(name + ".")}
        y = x @ float64(dequantize_exl2(tensors)) + float64(tensors.get("bias", np.float16(0)))
        if "lora_a" in tensors:
            y += x @ float64(tensors["lora_a"]) @ float64(tensors["lora_b"])
        return y

    def norm(self, name, x):
        if name not in self.inputs:
            return x
        is_rms = self.scalars.get("norm", "rms") == "rms"
        return exact_norm(x, self.inputs[name], self.inputs.get(f"{name}_bias"), self.scalars["epsilon"], is_rms)

    def activate(self, x, name):
        if name == "silu":
            return x / (1 + np.exp(-x))
        return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def plus(self, x, y):
        """The residual with a block's result."""
        x = float64(x)
        if "post_layernorm" in self.inputs:
            return x + self.norm("post_layernorm", y)
        return x + y if self.scalars.get("residual", True) else y


def optional(inputs, name, place):
    return place(inputs[name]) if name in inputs else None


def register_loras(set_loras, handle, projections, inputs, place):
    """Adapters 7 (recorded) and 8 (zeros, not used) of the recorded projections; the ids to pass to the forward functions."""
    if not any(key.endswith("lora_a") for key in inputs):
        return []
    arguments = []
    for name in projections:
        for side in ("lora_a", "lora_b"):
            recorded = inputs.get(f"{name}.{side}")
            arguments.append({} if recorded is None else {7: place(recorded), 8: place(np.full_like(recorded, np.nan))})
    assert set_loras(handle, *arguments) == 8
    return [7]


def run_attention(inputs, outputs, scalars, place):
    batch, seq, head_dim = (scalars[name] for name in ("batch_size", "q_len", "head_dim"))
    heads, kv_heads, style = scalars["num_heads"], scalars["num_kv_heads"], scalars["rope"]
    is_rms, is_fp32 = scalars["norm"] == "rms", inputs["x"].dtype == np.float32
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    matrices = [make_exl2(inputs, place, prefix=name + ".") for name in names]
    norms = [optional(inputs, name, place) for name in ("layernorm", "layernorm_bias")]
    others = [optional(inputs, name, place) for name in ("q_norm", "k_norm", "post_layernorm", "post_layernorm_bias")]
    rotary = inputs["sin"].shape[-1]
    handle = ext_c.make_q_attn(
        *norms, is_rms, True, scalars["epsilon"], *matrices, None, None, batch * seq, inputs["x"].shape[-1], heads, kv_heads,
        head_dim, 2048, scalars["residual"], {"gptj": 1, "neox": 2}[style], rotary, *others, is_fp32, True,
    )  # fmt: skip
    loras = register_loras(ext_c.q_attn_set_loras, handle, names, inputs, place)
    x = place(inputs["x"])
    q, k, v = (place(np.full_like(outputs[name], np.nan)) for name in "qkv")
    tables = [place(inputs[name][None, None]) for name in ("sin", "cos")]
    ext_c.q_attn_forward_1(handle, x, batch, seq, 0, place(inputs["past_lens"]), q, k, v, *tables, loras, None)
    assert np.array_equal(host(x), inputs["x"])
    ext_c.q_attn_forward_2(handle, x, place(inputs["attn_output"]), batch, seq, loras, None)
    for matrix in matrices:
        ext_c.free_q_matrix(matrix)
    ext_c.free_q_attn(handle)

    exact = Exact(inputs, scalars)
    hidden = exact.norm("layernorm", float64(inputs["x"]))
    positions = inputs["past_lens"].astype(int)[:, None] + np.arange(seq)
    rows = []
    for name, ours, count in (("q", q, heads), ("k", k, kv_heads), ("v", v, kv_heads)):
        y = exact.project(f"{name}_proj", hidden).reshape(batch, seq, count, head_dim)
        if name != "v":
            if f"{name}_norm" in inputs:
                y = exact_norm(y, inputs[f"{name}_norm"], None, scalars["epsilon"], True)
            y = exact_rope(y, inputs["sin"], inputs["cos"], positions, style)
        rows.append(block_row(name, ours, outputs[name], y.reshape(outputs[name].shape)))
    y = exact.project("o_proj", float64(inputs["attn_output"]))
    return [*rows, block_row("x", x, outputs["x"], exact.plus(inputs["x"], y))]


def block_row(what, ours, recorded, exact):
    # Ours within the recording's tolerance of it, and at least as near to the exact value.
    apart = np.linalg.norm(float64(host(ours)) - float64(recorded)) / np.linalg.norm(float64(recorded))
    assert apart <= BLOCK_TOLERANCE, f"{what}: {apart:.3g} from the recorded"
    what, error, theirs, _ = norm_wise(what, ours, recorded, exact)
    return what, error, theirs, theirs


def run_mlp(inputs, outputs, scalars, place):
    names = ("gate_proj", "up_proj", "down_proj")
    handles = [make_exl2(inputs, place, prefix=n + ".") if f"{n}.q_weight" in inputs else 0 for n in names]
    norms = [optional(inputs, name, place) for name in ("layernorm", "layernorm_bias")]
    post = [optional(inputs, name, place) for name in ("post_layernorm", "post_layernorm_bias")]
    is_fp32 = inputs["x"].dtype == np.float32
    handle = ext_c.make_q_mlp(
        *norms, scalars["norm"] == "rms", scalars["epsilon"], *handles, None, None, None, None, len(inputs["x"]),
        scalars["act"] == "gelu", True, *post, is_fp32, True,
    )  # fmt: skip
    loras = register_loras(ext_c.q_mlp_set_loras, handle, names, inputs, place)
    x = place(inputs["x"])
    ext_c.q_mlp_forward_(handle, x, loras, None)
    for matrix in filter(None, handles):
        ext_c.free_q_matrix(matrix)
    ext_c.free_q_mlp(handle)

    exact = Exact(inputs, scalars)
    hidden = exact.norm("layernorm", float64(inputs["x"]))
    up = exact.project("up_proj", hidden)
    if handles[0]:
        inner = exact.activate(exact.project("gate_proj", hidden), scalars["act"]) * up
    else:
        inner = exact.activate(up, scalars["act"])
    return [block_row("x", x, outputs["x"], exact.plus(inputs["x"], exact.project("down_proj", inner)))]


def run_moe(inputs, outputs, scalars, place):
    experts, top_k = scalars["num_experts"], scalars["top_k"]
    matrices = [[make_exl2(inputs, place, prefix=f"{w}.{i}.") for i in range(experts)] for w in ("w1", "w2", "w3")]
    handle = ext_c.make_q_moe_mlp(
        place(inputs["layernorm"]), None, True, scalars["epsilon"], place(inputs["gate"]), experts, top_k, *matrices,
        None, None, None, None, None, None, 4, False,
    )  # fmt: skip
    x = place(inputs["x"])
    ext_c.q_moe_mlp_forward_(handle, x)
    for matrix in sum(matrices, []):
        ext_c.free_q_matrix(matrix)
    ext_c.free_q_moe_mlp(handle)

    exact = Exact(inputs, scalars)
    hidden = exact.norm("layernorm", float64(inputs["x"]))
    logits = hidden @ float64(inputs["gate"]).T
    chosen = np.argsort(-logits, axis=1)[:, :top_k]
    y = np.zeros_like(hidden)
    for row in range(len(hidden)):
        weights = np.exp(logits[row, chosen[row]] - logits[row].max())
        for expert, weight in zip(chosen[row], weights / weights.sum(), strict=True):
            inner = exact.activate(exact.project(f"w1.{expert}", hidden[row]), "silu")
            y[row] += weight * exact.project(f"w2.{expert}", inner * exact.project(f"w3.{expert}", hidden[row]))
    return [block_row("x", x, outputs["x"], exact.plus(inputs["x"], y))]


RUNNERS = {
    "quant": run_quant,
    "exl2_matrix": run_exl2,
    "gptq_matrix": run_gptq,
    "norm": run_norm,
    "rope": run_rope,
    "element": run_element,
    "cache": run_cache,
    "sampling": run_sampling,
    "blocks": run_blocks,
}


# --- the comparisons can fail -----------------------------------------------------------------------------------------


def test_every_file_has_its_cases():
    counts = {file: sum(name == file for name, _ in GOLDEN) for file in FILES}
    assert counts == {
        "quant": 23, "exl2_matrix": 9, "gptq_matrix": 5, "norm": 16, "rope": 19, "element": 13, "cache": 8, "sampling": 25,
        "blocks": 14,
    }  # fmt: skip


@pytest.mark.parametrize(
    "file, case, tensor",
    [
        ("quant", "pack_columns_5", "output"),
        ("quant", "quantize_err_4", "err"),
        ("exl2_matrix", "mix_all", "weight"),
        ("gptq_matrix", "g64_act", "weight"),
        ("cache", "q_kv_6", "kq"),
        ("cache", "paged_4", "vs"),
        ("sampling", "sample_3", "tokens"),
    ],
)
def test_one_wrong_value_is_seen(file, case, tensor):
    inputs, outputs, scalars = GOLDEN[file, case]
    wrong = outputs[tensor].copy()
    wrong.flat[3] = wrong.flat[3] * 1.1 + 0.1 if wrong.dtype.kind == "f" else wrong.flat[3] ^ 1
    rows = RUNNERS[file](case, inputs, outputs | {tensor: wrong}, scalars, np.copy)
    assert any(ours > allowed for _, ours, _, allowed in rows)


@pytest.mark.parametrize("case, name", [("attn_llama", "layernorm"), ("mlp_lora", "down_proj.lora_b"), ("moe_4_2", "gate")])
def test_a_changed_input_is_seen(case, name):
    inputs, outputs, scalars = GOLDEN["blocks", case]
    changed = inputs[name].copy()
    changed[...] = np.roll(changed, 1, axis=0)
    with pytest.raises(AssertionError, match="from the recorded"):
        run_blocks(case, inputs | {name: changed}, outputs, scalars, np.copy)
