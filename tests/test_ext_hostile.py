"""cupyq.ext misused: whatever comes, a Python exception that says so, and what would have been written stays as it was.

Each function has one good call. Every argument of it is then replaced in turn by things of the wrong kind: None, text,
other numbers, arrays of other dtypes, shapes and places, and for handles stale ones, foreign ones and random integers.
"""

import inspect
import warnings

import numpy as np
import pytest
from kernel_checks import move, on_both
from test_ext import CALLS
from test_golden import GOLDEN, host, make_exl2

import cupyq.ext as ext_c
from cupyq.errors import CupyqError
from cupyq.formats.gptq import pack_gptq

ACCEPTED = (TypeError, ValueError, IndexError, OverflowError, OSError, CupyqError)

UNREAD = {
    "temp_state", "temp_gathered_state", "temp_a", "temp_b", "temp_logits", "temp_dq", "temp", "max_rows", "max_seq_len",
    "max_dq_rows", "use_graphs", "force_cuda", "force_cublas", "loras_temp",
}  # fmt: skip
"""Arguments that are accepted for exllamav2's sake."""

FLAGS = {
    "rms", "neox_style", "layernorm_is_rms", "headnorm_is_rms", "has_residual", "residual_fp32", "act_gelu", "mirostat",
}  # fmt: skip
"""Arguments whose truth counts, whatever they are."""

IGNORED = {
    ("fp16_to_q_kv", "batch_size"),  # where the cache is paged, as in the good call
    ("fp16_to_q_kv", "offset"),
    ("tp_broadcast", "dim"),
    ("tp_cross_device_barrier", "broadcast_type"),
}
ANY_DTYPE = {("stloader_read", "target"), ("cache_rotate", "cache")}


def zeros(dtype, *shape):
    return np.zeros(shape, dtype)


f16, f32, i16, i32, i64, u8 = np.float16, np.float32, np.int16, np.int32, np.int64, np.uint8


class Good:
    """A good call of every function: a dict of its arguments, made anew each time, on one library."""

    def __init__(self, library, tmp_path):
        self.library = library
        self.file = tmp_path / "tensor"
        self.file.write_bytes(bytes(64))
        self.matrices = {}

    def place(self, array):
        return move(self.library, array)

    def arrays(self, **arrays):
        return {name: self.place(value) if isinstance(value, np.ndarray) else value for name, value in arrays.items()}

    def matrix(self, k, n):
        """A live handle of a matrix [k, n]; k and n multiples of 32."""
        if (k, n) not in self.matrices:
            words, groups = np.arange(k // 8 * n, dtype=i32).reshape(k // 8, n), k // 32
            table = np.array([[4, 4 * g] for g in range(groups)], i16).reshape(-1)
            self.matrices[k, n] = ext_c.make_q_matrix(
                *map(self.place, (words, np.arange(k, dtype=i16))), None, self.place(zeros(i32, groups, n // 8)),
                self.place(zeros(f16, groups) + f16(0.01)), self.place(table), None, None, None, None, None, None, 0,
            )  # fmt: skip
        return self.matrices[k, n]

    def attention(self, rope_style=2):
        return ext_c.make_q_attn(**self.make_q_attn() | {"rope_style": rope_style})

    def __getattr__(self, name):
        raise AttributeError(f"no good call of {name}")

    # quant
    def pack_rows_4(self):
        return self.arrays(input=zeros(i16, 2, 16) + i16(1), output=zeros(i32, 2, 2))

    def pack_columns(self):
        return self.arrays(input=zeros(i16, 32, 8), output=zeros(i32, 4, 8), bits=4)

    def quantize(self):
        x = zeros(f32, 4, 8)
        return self.arrays(input=x, output=x.copy(), scale=zeros(f32, 8) + f32(1), out_q=zeros(i16, 4, 8), qzero=8, maxq=15)

    def quantize_err(self):
        scalars = dict(qzero=8, maxq=15, err_norm=2.0, min_p=0.5, max_p=1.0, p_grid=4)
        return self.arrays(input=zeros(f32, 4, 8), output=zeros(f32, 5, 128), scale=zeros(f32, 8) + f32(1)) | scalars

    def quantize_range(self):
        w = zeros(f32, 4, 8)
        return self.arrays(
            quant=w.copy(), scale=zeros(f32, 8) + f32(1), out_q=zeros(i16, 4, 8), qzero=8, maxq=15,
            hessian_inv=np.eye(4, dtype=f32), weights=w, error=w.copy(), a=0, b=4,
        )  # fmt: skip

    def quantize_range_inplace(self):
        scale = zeros(f32, 8) + f32(1)
        return self.arrays(weights=zeros(f32, 4, 8), scale=scale, out_q=zeros(i16, 4, 8), qzero=8, maxq=15, a=0, b=4)

    def sim_anneal(self):
        slots = [[(1, 0.5), (2, 0.25)]]
        return dict(slots=slots, max_cost=3, initial_temp=1.0, cooling_factor=0.5, min_temp=0.1, iterations=2, norm=1.0)

    # safetensors
    def stloader_read(self):
        return self.arrays(filename=str(self.file), offset=0, size=32, target=zeros(f16, 16))

    def tensor_remap(self):
        return self.arrays(tensor=zeros(i32, 2, 8), index=np.arange(8, dtype=i32))

    def tensor_remap_4bit(self):
        return self.arrays(tensor=zeros(i32, 2, 1), index=np.arange(8, dtype=i32))

    # qmatrix
    def make_q_matrix(self):
        return self.arrays(
            q_weight=zeros(i32, 8, 32), q_perm=np.arange(64, dtype=i16), q_invperm=np.arange(64, dtype=i16),
            q_scale=zeros(i32, 2, 4), q_scale_max=zeros(f16, 2), q_groups=np.array([4, 0, 4, 4], i16),
            q_group_map=zeros(i16, 128), gptq_qzeros=None, gptq_scales=None, gptq_g_idx=None, bias=zeros(f16, 32),
            temp_dq=zeros(f16, 2048), max_dq_rows=0,
        )  # fmt: skip

    def make_q_matrix_split(self):
        return self.make_q_matrix()

    def make_gptq_matrix(self):
        rng = np.random.default_rng(0)
        g_idx = rng.permutation(np.repeat(np.arange(2), 32))
        t = pack_gptq(rng.integers(0, 16, (64, 32)), rng.integers(1, 16, (2, 32)), zeros(f16, 2, 32) + f16(1), g_idx, 4)
        return self.make_q_matrix() | self.arrays(
            q_weight=t["qweight"], q_perm=zeros(i16, 64), q_invperm=zeros(i16, 64), q_scale=None, q_scale_max=None,
            q_groups=None, q_group_map=None, gptq_qzeros=t["qzeros"], gptq_scales=t["scales"], gptq_g_idx=t["g_idx"],
        )  # fmt: skip

    def free_q_matrix(self):
        return {"handle": ext_c.make_q_matrix(**self.make_q_matrix())}

    def reconstruct(self):
        return self.arrays(handle=self.matrix(64, 32), output=zeros(f16, 64, 32))

    def gemm_half_q_half(self):
        return self.arrays(a=zeros(f16, 3, 64), b_handle=self.matrix(64, 32), c=zeros(f16, 3, 32), force_cuda=False)

    def matrix_fp16_to_q4(self):
        return self.arrays(in_=zeros(f16, 2, 64), out=zeros(u8, 64), scales=zeros(f16, 4))

    def matrix_q4_to_fp16(self):
        return self.arrays(in_=zeros(u8, 64), scales=zeros(f16, 4), out=zeros(f16, 2, 64))

    def make_group_map(self):
        return {"q_groups": np.array([4, 0, 4, 4], i16), "num_qrows": 8}

    # qattn
    def make_q_attn(self):
        weight = zeros(f16, 64) + f16(1)
        return self.arrays(
            layernorm=weight, layernorm_bias=None, layernorm_is_rms=True, headnorm_is_rms=True, norm_epsilon=1e-5,
            q_proj=self.matrix(64, 64), k_proj=self.matrix(64, 32), v_proj=self.matrix(64, 32), o_proj=self.matrix(64, 64),
            temp_state=None, temp_dq=None, max_rows=8, hidden_size=64, num_heads=2, num_kv_heads=1, head_dim=32,
            max_seq_len=16, has_residual=True, rope_style=2, sincos_size=32, q_norm=zeros(f16, 2, 32) + f16(1),
            k_norm=zeros(f16, 1, 32) + f16(1), post_layernorm=weight.copy(), post_layernorm_bias=None, residual_fp32=False,
            use_graphs=True,
        )  # fmt: skip

    def free_q_attn(self):
        return {"handle": self.attention()}

    def q_attn_forward_1(self):
        return self.arrays(
            handle=self.attention(), x=zeros(f16, 6, 64) + f16(1), batch_size=2, q_len=3, past_len=0,
            past_lens=zeros(i32, 2), q_temp=zeros(f16, 6, 64), k_temp=zeros(f16, 6, 32), v_temp=zeros(f16, 6, 32),
            sin=zeros(f16, 1, 1, 16, 32), cos=zeros(f16, 1, 1, 16, 32), loras=[7], loras_temp=None,
        )  # fmt: skip

    def q_attn_forward_2(self):
        x = zeros(f16, 6, 64)
        return self.arrays(
            handle=self.attention(), x=x, attn_output=x.copy(), batch_size=2, q_len=3, loras=[7], loras_temp=None
        )  # fmt: skip

    def q_attn_set_loras(self):
        names = ("q", "k", "v", "o")
        sides = {f"{n}_{side}": {} for n in names for side in "ab"}
        return {"handle": self.attention()} | sides | {"q_a": {1: self.place(zeros(f16, 64, 4))}} | {
            "q_b": {1: self.place(zeros(f16, 4, 64))}
        }  # fmt: skip

    # qmlp
    def make_q_mlp(self):
        weight = zeros(f16, 64) + f16(1)
        return self.arrays(
            layernorm=weight, layernorm_bias=None, layernorm_is_rms=True, norm_epsilon=1e-5, gate=self.matrix(64, 96),
            up=self.matrix(64, 96), down=self.matrix(96, 64), temp_state=None, temp_a=None, temp_b=None, temp_dq=None,
            max_rows=8, act_gelu=False, has_residual=True, post_layernorm=None, post_layernorm_bias=None, residual_fp32=False,
            use_graphs=False,
        )  # fmt: skip

    def free_q_mlp(self):
        return {"handle": ext_c.make_q_mlp(**self.make_q_mlp())}

    def q_mlp_forward_(self):
        return self.free_q_mlp() | self.arrays(x=zeros(f16, 1, 3, 64), loras=[7], loras_temp=None)

    def q_mlp_set_loras(self):
        pair = {"up_a": {1: self.place(zeros(f16, 64, 4))}, "up_b": {1: self.place(zeros(f16, 4, 96))}}
        return self.free_q_mlp() | {f"{n}_{side}": {} for n in ("gate", "up", "down") for side in "ab"} | pair

    def make_q_moe_mlp(self):
        groups = {w: [self.matrix(*shape)] * 2 for w, shape in (("w1", (64, 32)), ("w2", (32, 64)), ("w3", (64, 32)))}
        temps = dict.fromkeys(("temp_state", "temp_gathered_state", "temp_a", "temp_b", "temp_logits", "temp_dq"))
        return self.arrays(
            layernorm=zeros(f16, 64) + f16(1), layernorm_bias=None, layernorm_is_rms=True, norm_epsilon=1e-5,
            gate=zeros(f16, 2, 64), num_experts=2, num_experts_per_token=1, **groups, **temps, max_rows=4, act_gelu=False,
        )  # fmt: skip

    def free_q_moe_mlp(self):
        return {"handle": ext_c.make_q_moe_mlp(**self.make_q_moe_mlp())}

    def q_moe_mlp_forward_(self):
        return self.free_q_moe_mlp() | self.arrays(x=zeros(f16, 3, 64))

    # cache
    def fp16_to_fp8(self):
        x = zeros(f16, 2, 4, 2, 32)
        return self.arrays(in_=x, out=zeros(u8, *x.shape), batch_size=2, offset=1, width=2)

    def fp8_to_fp16(self):
        x = zeros(f16, 2, 4, 2, 32)
        return self.arrays(in_=zeros(u8, *x.shape), out=x, batch_size=2, offset=1, width=2)

    def fp16_to_q_kv(self):
        x, codes, scales = zeros(f16, 1, 8, 2, 32), zeros(u8, 1, 8, 2, 16), zeros(f16, 1, 8, 2, 1)
        return self.arrays(
            k_in=x, k_out=codes, k_scales=scales, v_in=x.copy(), v_out=codes.copy(), v_scales=scales.copy(), batch_size=1,
            offset=0, width=2, page_size=4, cache_seqlens=zeros(i32, 1), block_table=np.array([[1, 0]], i32), wbits=4,
        )  # fmt: skip

    def q_to_fp16_kv(self):
        call = self.fp16_to_q_kv()
        swapped = {"k_in": call["k_out"], "k_out": call["k_in"], "v_in": call["v_out"], "v_out": call["v_in"]}
        return call | swapped | {"page_size": 0, "cache_seqlens": None, "block_table": None}

    def count_match(self):
        return dict(a=np.arange(4)[None], b=np.arange(4)[None], max_a=3)

    def cache_rotate(self):
        return self.arrays(cache=zeros(f16, 4, 16), order=np.array([0, 2], i32), temp=zeros(f16, 16))

    # numeric
    def had_paley(self):
        return {"h": zeros(f16, 12, 12)}

    def had_paley2(self):
        return {"h": zeros(f16, 12, 12)}

    def gemm_half_half_half(self):
        scalars = dict(alpha=1.0, beta=1.0, force_cublas=False)
        return self.arrays(a=zeros(f16, 2, 8), b=zeros(f16, 8, 4), c=zeros(f16, 2, 4)) | scalars

    def rms_norm(self):
        return self.arrays(x=zeros(f16, 2, 8), w=zeros(f16, 8), y=zeros(f16, 2, 8), epsilon=1e-5)

    def rms_norm_(self):
        return self.arrays(x=zeros(f16, 2, 8), w=zeros(f16, 8), epsilon=1e-5)

    def layer_norm(self):
        return self.arrays(x=zeros(f16, 2, 8), w=zeros(f16, 8), b=zeros(f16, 8), y=zeros(f16, 2, 8), epsilon=1e-5)

    def layer_norm_(self):
        return self.arrays(x=zeros(f16, 2, 8), w=zeros(f16, 8), b=zeros(f16, 8), epsilon=1e-5)

    def head_norm(self):
        weights = self.arrays(w=zeros(f16, 3, 8), b=zeros(f16, 3, 8))
        return self.arrays(x=zeros(f16, 2, 3, 8)) | weights | self.arrays(y=zeros(f16, 2, 3, 8), epsilon=1e-5, rms=True)

    def head_norm_(self):
        return self.arrays(x=zeros(f16, 2, 3, 8), w=zeros(f16, 3, 8), b=zeros(f16, 3, 8), epsilon=1e-5, rms=False)

    def rope_(self):
        tables = self.arrays(sin=zeros(f16, 1, 16, 32), cos=zeros(f16, 1, 16, 32))
        rest = self.arrays(past_len=0, num_heads=2, head_dim=32, offsets=zeros(i32, 2), neox_style=False)
        return self.arrays(x=zeros(f16, 2, 6, 32)) | tables | rest

    def gen_mrope_pos_ids(self):
        return dict(mrope_pos_ids=zeros(i64, 3, 6), ids=np.arange(6), merge_size=1, spans=[(2, 4)], grids=[(1, 1, 2)])

    def softcap_(self):
        return self.arrays(x=zeros(f16, 2, 8), scale=30.0)

    # sampling
    def apply_rep_penalty(self):
        scalars = dict(penalty_max=1.1, sustain=-1, decay=0, alpha_frequency=0.0, alpha_presence=0.0)
        return dict(sequence=zeros(i64, 2, 5), **scalars, logits=zeros(f32, 2, 8))

    def sample_basic(self):
        return dict(
            logits=zeros(f32, 1, 1, 8), temperature=1.0, top_k=4, top_p=0.9, top_a=0.0, min_p=0.0, tfs=0.0, typical=0.0,
            random=0.5, output_tokens=zeros(i64, 1, 1), output_probs=zeros(f32, 1, 1), output_kprobs=zeros(f32, 1, 1, 2),
            output_ktokens=zeros(i64, 1, 1, 2), logit_filter=np.ones((1, 8), bool), mirostat=False, mirostat_mu=[0.0],
            mirostat_tau=1.0, mirostat_eta=0.1, post_temperature=1.0, xtc_mask=np.ones(8, bool), xtc_probability=0.0,
            xtc_threshold=0.1, min_temp=0.0, max_temp=0.0, temp_exponent=1.0, smoothing_factor=0.0, skew=0.0,
        )  # fmt: skip

    def logit_filter_exclusive(self):
        return dict(filter=np.ones((2, 8), bool), exclusive_lists=[[1, 2], [3]])

    def fast_fill_cpu_ones_bool(self):
        return dict(tensor=zeros(bool, 4))

    def fast_fadd_cpu(self):
        return dict(a=zeros(f32, 2, 4), b=zeros(f32, 4))

    def fast_copy_cpu(self):
        return dict(dst=zeros(f32, 2, 4), src=zeros(f32, 2, 4))

    def partial_strings_match(self):
        text = np.frombuffer("ab".encode("utf-32-le"), u8)
        return dict(match=text, offsets=np.array([0, 8], i32), strings=text)

    # tp, on the host
    def make_tp_context(self):
        halves = [(0, 0, 1), (0, 1, 2)]
        splits = {f"{name}_split": list(halves) for name in ("kv", "id", "vc", "rs", "q")}
        return splits | {"pinned_temp": [zeros(f16, 4096), zeros(f16, 4096)], "streams": []}

    def context(self):
        return ext_c.make_tp_context(**self.make_tp_context())

    def free_tp_context(self):
        return {only_argument("free_tp_context"): self.context()}

    def tp_broadcast(self):
        targets = [zeros(f16, 2, 4) for _ in range(2)]
        return dict(tp_context=self.context(), buffer=0, source=zeros(f16, 2, 4), broadcast_type=0, targets=targets, dim=1)

    def tp_gather(self):
        parts, targets = ([zeros(f16, 2, w) for _ in range(2)] for w in (1, 2))
        return dict(
            tp_context=self.context(), buffer=0, inputs=parts, broadcast_type=0, targets=targets, broadcast_type_target=0, dim=1
        )

    def tp_cross_device_barrier(self):
        return dict(tp_context=self.context(), broadcast_type=0)

    def tp_all_reduce(self):
        return dict(
            tp_context=self.context(), buffer=0, tensors=[zeros(f16, 2, 4) for _ in range(2)],
            residuals=[zeros(f16, 2, 4) for _ in range(2)],
        )  # fmt: skip

    def rms_norm_tp(self):
        x, y = ([zeros(f16, 2, 8) for _ in range(2)] for _ in range(2))
        return dict(x_list=x, w_list=[zeros(f16, 8)] * 2, y_list=y, epsilon=1e-5, tp_context=self.context())


def only_argument(name):
    """The name of a function's only argument."""
    (found,) = inspect.signature(getattr(ext_c, name)).parameters
    return found


COVERED_ELSEWHERE = {"gemm_half_q_half_tp", "tp_attn_forward_", "tp_attn_forward_paged_", "tp_mlp_forward_"}
NOTHING_TO_PASS = {"dump_profile_results", "set_flash_attn_func"}
NAMES = [name for name in ext_c.__all__ if name not in COVERED_ELSEWHERE | NOTHING_TO_PASS]
HOST_FUNCTIONS = {
    "sim_anneal", "make_group_map", "count_match", "had_paley", "had_paley2", "gen_mrope_pos_ids", "apply_rep_penalty",
    "sample_basic", "logit_filter_exclusive", "fast_fill_cpu_ones_bool", "fast_fadd_cpu", "fast_copy_cpu",
    "partial_strings_match", "make_tp_context", "free_tp_context", "tp_broadcast", "tp_gather", "tp_cross_device_barrier",
    "tp_all_reduce", "rms_norm_tp",
}  # fmt: skip


def is_array(value):
    return hasattr(value, "dtype") and hasattr(value, "shape")


def wrong_arrays(array, library):
    """(what is wrong, array) in several ways. The first two are never right."""
    xp = np if isinstance(array, np.ndarray) else __import__("cupy")
    other = np.float64 if array.dtype != np.float64 else np.int8
    yield "dtype", array.astype(other)
    yield "as text", "array"
    yield "no dimensions", xp.zeros((), array.dtype)
    yield "one more dimension, of 3", xp.zeros((3, *array.shape), array.dtype)
    if array.ndim:
        yield "longer", xp.zeros((*array.shape[:-1], array.shape[-1] + 5), array.dtype)
        yield "empty", xp.zeros((*array.shape[:-1], 0), array.dtype)
        yield "more rows", xp.zeros((array.shape[0] + 1, *array.shape[1:]), array.dtype)
    if library == "cupy" and xp is not np:
        yield "on the host", array.get()
    yield "values out of range", xp.full(array.shape, 100 if array.dtype.kind in "iu" else np.nan, array.dtype)


def wrong_values(name, value, library):
    if name == "iterations":  # a large number of them is no mistake, and takes its time
        yield from (("text", "text"), ("below 0", -1), ("none", None))
        return
    if is_array(value):
        yield from wrong_arrays(value, library)
    for wrong in (
        None,
        "text",
        object(),
        b"bytes",
        1.5,
        -1,
        -(2**40),
        2**70,
        float("nan"),
        True,
        [],
        [None],
        ["a"],
        {},
        (1, 2),
    ):
        if type(wrong) is not type(value):
            yield f"{wrong!r:.20}", wrong
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        for wrong in (-1, -7, 0, 10**6, 2**31, -(2**63), 2**70, float("inf"), float("nan")):
            if type(wrong) is type(value):
                yield f"{wrong!r}", wrong
    if isinstance(value, list) and value:
        yield from (("shorter", value[:-1]), ("longer", value + value[-1:]), ("of text", ["text", *value[1:]]))
        yield from (("of None", [None] * len(value)), ("of numbers", [-5] * len(value)))
        if is_array(value[0]):
            yield from ((f"of {what}", [wrong, *value[1:]]) for what, wrong in wrong_arrays(value[0], library))
    if isinstance(value, dict):
        a, b = np.zeros((64, 4), f16), np.zeros((64, 4), f32)
        yield from (("other ids", {9: move(library, a)}), ("of text", {1: "a"}), ("text to array", {"a": move(library, a)}))
        yield from (("another dtype", {1: move(library, b)}), ("another shape", {1: move(library, a[:5])}), ("None", {1: None}))


def snapshot(call):
    """Bytes of every array in a call, by name."""
    found = {}
    for name, value in call.items():
        items = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, (list, tuple)) else [value])
        found |= {(name, key): host(item).tobytes() for key, item in items if is_array(item)}
    return found


def attempt(function, call):
    """The exception that a call raises, or None. Anything but the accepted kinds fails the test."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            function(**call)
        except ACCEPTED as error:
            return error
    return None


@on_both
@pytest.mark.parametrize("name", [*NAMES, "make_gptq_matrix"])
def test_misuse(name, library, tmp_path):
    if name in HOST_FUNCTIONS and library == "cupy":
        library = "numpy"
    good = Good(library, tmp_path)
    function = getattr(ext_c, "make_q_matrix" if name == "make_gptq_matrix" else name)
    assert attempt(function, getattr(good, name)()) is None, "the good call fails"
    unrefused = []
    for argument in getattr(good, name)():
        for what, wrong in wrong_values(argument, getattr(good, name)()[argument], library):
            call = getattr(good, name)() | {argument: wrong}
            before = snapshot(call)
            error = attempt(function, call)
            if error is None:
                unrefused.append((argument, what))
                continue
            assert "\n" not in str(error), f"{argument} {what}: {error}"
            assert len(str(error)) < 600, f"{argument} {what}: {error}"
            assert snapshot(call) == before, f"{argument} {what}: something was written before {error!r}"
    if library == "cupy":
        move(library, np.zeros(1)).device.synchronize()  # what went wrong in a kernel would be reported here
    wrongly_kept = [case for case in unrefused if must_be_refused(name, *case, getattr(good, name)())]
    assert not wrongly_kept


def must_be_refused(name, argument, what, call):
    """Whether a replacement can never be right: what it may be depends on the argument."""
    if argument in UNREAD | FLAGS or (name, argument) in IGNORED:
        return False
    value = call[argument]
    if what in ("'text'", "<object object at 0x", "as text", "of text"):
        return True
    if is_array(value) or (isinstance(value, list) and value and is_array(value[0])):
        return what.removeprefix("of ") == "dtype" and (name, argument) not in ANY_DTYPE
    return isinstance(value, (int, float)) and what in ("nan", "inf", "None", "[]", "{}")


HANDLES = {
    "free_q_matrix": ["handle"], "reconstruct": ["handle"], "gemm_half_q_half": ["b_handle"],
    "make_q_attn": ["q_proj", "k_proj", "v_proj", "o_proj"], "free_q_attn": ["handle"], "q_attn_forward_1": ["handle"],
    "q_attn_forward_2": ["handle"], "q_attn_set_loras": ["handle"], "make_q_mlp": ["gate", "up", "down"],
    "free_q_mlp": ["handle"], "q_mlp_forward_": ["handle"], "q_mlp_set_loras": ["handle"], "free_q_moe_mlp": ["handle"],
    "q_moe_mlp_forward_": ["handle"], "tp_broadcast": ["tp_context"], "tp_gather": ["tp_context"],
    "tp_cross_device_barrier": ["tp_context"], "tp_all_reduce": ["tp_context"], "rms_norm_tp": ["tp_context"],
}  # fmt: skip


@on_both
@pytest.mark.parametrize("name", HANDLES)
def test_handles_that_are_none(name, library, tmp_path):
    if name in HOST_FUNCTIONS and library == "cupy":
        library = "numpy"
    good = Good(library, tmp_path)
    stale = good.free_q_matrix()["handle"]
    ext_c.free_q_matrix(stale)
    live = {"q_matrix": good.matrix(64, 32), "q_attn": good.attention(), "q_mlp": good.free_q_mlp()["handle"]}
    live |= {"q_moe_mlp": good.free_q_moe_mlp()["handle"], "tp_context": good.context()}
    kind = "tp_context" if name in HOST_FUNCTIONS else name.removeprefix("free_")
    kind = next((k for k in ("q_attn", "q_moe_mlp", "q_mlp") if kind.startswith(k)), "q_matrix") if kind not in live else kind
    foreign = [handle for other, handle in live.items() if other != kind]
    rng = np.random.default_rng(0)
    random = [int(n) for n in rng.integers(-(2**62), 2**62, 20)] + [int(n) for n in rng.integers(1, 1000, 20)]
    wrong = [
        stale,
        *foreign,
        *random,
        -1,
        2**63,
        2**200,
        "7",
        1.0,
        float(live[kind]),
        True,
        None,
        np.int64(live[kind]),
        [live[kind]],
    ]
    for argument in HANDLES[name]:
        call = getattr(good, name)()
        before = snapshot(call)
        for handle in [*wrong, *([] if argument == "gate" else [0])]:
            with pytest.raises(ValueError, match="must be a handle from make_") as error:
                getattr(ext_c, name)(**call | {argument: handle})
            assert "\n" not in str(error.value) and snapshot(call) == before


def test_freed_twice(tmp_path):
    good = Good("numpy", tmp_path)
    for name in ("free_q_matrix", "free_q_attn", "free_q_mlp", "free_q_moe_mlp", "free_tp_context"):
        call = getattr(good, name)()
        getattr(ext_c, name)(**call)
        with pytest.raises(ValueError, match="was freed or never given out"):
            getattr(ext_c, name)(**call)


@pytest.mark.gpu
def test_no_error_has_stayed_on_the_gpu(cupy, tmp_path):
    """Indices out of range are only found by the kernels: an illegal access would break every later call."""
    for name in ("tensor_remap", "cache_rotate", "fp16_to_q_kv", "rope_", "q_attn_forward_1", "q_moe_mlp_forward_"):
        good = Good("cupy", tmp_path)
        for argument, value in getattr(good, name)().items():
            if is_array(value):
                for number in (-1, 100, 2**30, -(2**31)):
                    fill = number if value.dtype.kind in "iu" else float(number)
                    wrong = cupy.asarray(np.full(value.shape, fill).astype(value.dtype))
                    attempt(getattr(ext_c, name), getattr(good, name)() | {argument: wrong})
    cupy.cuda.runtime.deviceSynchronize()
    inputs, outputs, _ = GOLDEN["exl2_matrix", "b4"]
    weight = cupy.zeros((512, 96), np.float16)
    ext_c.reconstruct(make_exl2(inputs, cupy.asarray), weight)
    assert np.array_equal(weight.get().view(np.uint16), outputs["weight"].view(np.uint16))


def test_every_function_is_misused():
    assert set(NAMES) | COVERED_ELSEWHERE | NOTHING_TO_PASS == set(CALLS)
    for name in NOTHING_TO_PASS:
        with pytest.raises(TypeError):
            getattr(ext_c, name)(1)
