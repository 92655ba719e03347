"""cupyq.ext: every one of the 68 functions is called, from NumPy, CuPy and torch; what it promises beyond the recordings.

The recorded outputs themselves are in test_golden.py, misuse in test_ext_hostile.py.
"""

import importlib.util
import inspect
import threading

import numpy as np
import pytest
import test_golden
from conftest import golden
from kernel_checks import move, on_both, same_bits
from test_golden import GOLDEN, RUNNERS, exact_norm, exact_rope, float64, host, make_exl2, runs_on_gpu

import cupyq.ext as ext_c
from cupyq.formats.exl2 import dequantize_exl2, pack_exl2
from cupyq.formats.gptq import dequantize_gptq, pack_gptq

HAS_TORCH = importlib.util.find_spec("torch") is not None

# --- the surface ------------------------------------------------------------------------------------------------------

SIGNATURES = """
pack_rows_4 input output
pack_columns input output bits
quantize input output scale out_q qzero maxq
quantize_err input output scale qzero maxq err_norm min_p max_p p_grid
quantize_range quant scale out_q qzero maxq hessian_inv weights error a b
quantize_range_inplace weights scale out_q qzero maxq a b
sim_anneal slots max_cost initial_temp cooling_factor min_temp iterations norm
apply_rep_penalty sequence penalty_max sustain decay alpha_frequency alpha_presence logits
sample_basic logits temperature top_k top_p top_a min_p tfs typical random output_tokens output_probs output_kprobs
 output_ktokens logit_filter mirostat mirostat_mu mirostat_tau mirostat_eta post_temperature xtc_mask xtc_probability
 xtc_threshold min_temp max_temp temp_exponent smoothing_factor skew
logit_filter_exclusive filter exclusive_lists
fast_fill_cpu_ones_bool tensor
fast_fadd_cpu a b
fast_copy_cpu dst src
dump_profile_results
partial_strings_match match offsets strings
stloader_read filename offset size target
tensor_remap tensor index
tensor_remap_4bit tensor index
make_q_matrix q_weight q_perm q_invperm q_scale q_scale_max q_groups q_group_map gptq_qzeros gptq_scales gptq_g_idx bias
 temp_dq max_dq_rows
make_q_matrix_split q_weight q_perm q_invperm q_scale q_scale_max q_groups q_group_map gptq_qzeros gptq_scales gptq_g_idx
 bias temp_dq max_dq_rows
free_q_matrix handle
reconstruct handle output
gemm_half_q_half a b_handle c force_cuda
gemm_half_q_half_tp a_list b_list c_list force_cuda tp_context t_device
matrix_fp16_to_q4 in_ out scales
matrix_q4_to_fp16 in_ scales out
make_group_map q_groups num_qrows
make_q_attn layernorm layernorm_bias layernorm_is_rms headnorm_is_rms norm_epsilon q_proj k_proj v_proj o_proj temp_state
 temp_dq max_rows hidden_size num_heads num_kv_heads head_dim max_seq_len has_residual rope_style sincos_size q_norm k_norm
 post_layernorm post_layernorm_bias residual_fp32 use_graphs
free_q_attn handle
q_attn_forward_1 handle x batch_size q_len past_len past_lens q_temp k_temp v_temp sin cos loras loras_temp
q_attn_forward_2 handle x attn_output batch_size q_len loras loras_temp
q_attn_set_loras handle q_a q_b k_a k_b v_a v_b o_a o_b
tp_attn_forward_paged_ tp_context hidden_states temp_bc0 temp_bc1 temp_bc2 temp_q temp_k temp_v temp_o k_cache v_cache
 pre_layernorm norm_epsilon q_proj k_proj v_proj o_proj head_dim rope_style batch_size q_len sin cos past_lens block_index
 scaling
tp_attn_forward_ tp_context hidden_states temp_bc0 temp_bc1 temp_bc2 temp_q temp_k temp_v temp_o k_cache v_cache
 pre_layernorm norm_epsilon q_proj k_proj v_proj o_proj head_dim rope_style batch_size q_len sin cos past_len_tp scaling
set_flash_attn_func
make_q_mlp layernorm layernorm_bias layernorm_is_rms norm_epsilon gate up down temp_state temp_a temp_b temp_dq max_rows
 act_gelu has_residual post_layernorm post_layernorm_bias residual_fp32 use_graphs
free_q_mlp handle
make_q_moe_mlp layernorm layernorm_bias layernorm_is_rms norm_epsilon gate num_experts num_experts_per_token w1 w2 w3
 temp_state temp_gathered_state temp_a temp_b temp_logits temp_dq max_rows act_gelu
free_q_moe_mlp handle
q_mlp_forward_ handle x loras loras_temp
q_mlp_set_loras handle gate_a gate_b up_a up_b down_a down_b
q_moe_mlp_forward_ handle x
tp_mlp_forward_ tp_context hidden_states temp_bc0 temp_bc1 temp_bc2 temp_gate temp_up temp_down pre_layernorm norm_epsilon
 gate up down act_gelu
fp16_to_fp8 in_ out batch_size offset width
fp8_to_fp16 in_ out batch_size offset width
fp16_to_q_kv k_in k_out k_scales v_in v_out v_scales batch_size offset width page_size cache_seqlens block_table wbits
q_to_fp16_kv k_in k_out k_scales v_in v_out v_scales batch_size offset width page_size cache_seqlens block_table wbits
count_match a b max_a
cache_rotate cache order temp
had_paley h
had_paley2 h
gemm_half_half_half a b c alpha beta force_cublas
rms_norm x w y epsilon
rms_norm_ x w epsilon
rms_norm_tp x_list w_list y_list epsilon tp_context
layer_norm x w b y epsilon
layer_norm_ x w b epsilon
head_norm x w b y epsilon rms
head_norm_ x w b epsilon rms
rope_ x sin cos past_len num_heads head_dim offsets neox_style
gen_mrope_pos_ids mrope_pos_ids ids merge_size spans grids
softcap_ x scale
make_tp_context kv_split id_split vc_split rs_split q_split pinned_temp streams
free_tp_context handle
tp_broadcast tp_context buffer source broadcast_type targets dim t_device
tp_gather tp_context buffer inputs broadcast_type targets broadcast_type_target dim t_device
tp_cross_device_barrier tp_context broadcast_type t_device stage next_stage
tp_all_reduce tp_context buffer tensors residuals
"""


def test_all_names_in_exllamav2s_order_with_its_arguments():
    table = [line.split() for line in SIGNATURES.strip().replace("\n ", " ").split("\n")]
    assert len(table) == 68 and [name for name, *_ in table] == ext_c.__all__
    wrong = {}
    for name, *arguments in table:
        found = list(inspect.signature(getattr(ext_c, name)).parameters)
        # Names that are keywords of the language, or of a lone first argument, may differ; their order counts.
        if found != arguments and (len(arguments) != 1 or len(found) != 1):
            wrong[name] = found
    assert not wrong


# --- every function is called -----------------------------------------------------------------------------------------


class Surface:
    """cupyq.ext that notes what is called; for torch, absent arguments become meta tensors, as exllamav2 passes them."""

    def __init__(self, absent=None):
        self.called, self.absent = set(), absent

    def __getattr__(self, name):
        def call(*arguments, **named):
            self.called.add(name)
            if self.absent is not None:
                arguments = [self.absent if value is None else value for value in arguments]
            return getattr(ext_c, name)(*arguments, **named)

        return call


def placing(library):
    """(function from a NumPy array to one of the library, Surface)."""
    if not library.startswith("torch"):
        return lambda array: move(library, array.copy()), Surface()
    import torch

    device = "cuda" if library == "torch-gpu" else "cpu"
    return lambda array: torch.from_numpy(array.copy()).to(device), Surface(torch.empty((1, 1), device="meta"))


def call_sim_anneal(ext, place):
    slots = [[(10, 0.5), (30, 0.1)], [(10, 0.9), (30, 0.2)]]
    for _ in range(2):
        solution, indices, total, cost, worst = ext.sim_anneal(slots, 40, 1.0, 0.9, 0.01, 100, 1.0)
        assert indices == [0, 1] and solution == [(10, 0.5), (30, 0.2)] and (cost, worst) == (40, 0.5)
        assert total == pytest.approx(0.7)


def call_fast_functions(ext, place):
    allowed = place(np.zeros((2, 7), bool))
    ext.fast_fill_cpu_ones_bool(allowed)
    assert host(allowed).all()
    a, b = place(np.arange(6, dtype=np.float32).reshape(2, 3)), place(np.float32([10, 20, 30]))
    ext.fast_fadd_cpu(a, b)
    assert host(a).tolist() == [[10, 21, 32], [13, 24, 35]]
    target = place(np.zeros((2, 3), np.float32))
    ext.fast_copy_cpu(target, a)
    assert host(target).tolist() == host(a).tolist()
    assert ext.dump_profile_results() is None


def call_partial_strings_match(ext, place):
    strings = [text.encode("utf-32-le") for text in ("stop", "zürich")]
    offsets = np.cumsum([0, *map(len, strings)]).astype(np.int32)
    for text, expected in (("please stop here", 7), ("in zür", -2), ("nothing", -1)):
        text = np.frombuffer(text.encode("utf-32-le"), np.uint8)
        assert ext.partial_strings_match(text, offsets, np.frombuffer(b"".join(strings), np.uint8)) == expected


def call_set_flash_attn_func(ext, place):
    assert ext.set_flash_attn_func() is None


def call_stloader_read(ext, place, tmp_path):
    content = np.random.default_rng(0).integers(0, 256, 5000, np.uint8)
    (tmp_path / "tensors").write_bytes(content.tobytes())
    for dtype, offset, size in ((np.float16, 3, 4000), (np.int32, 1000, 4000), (np.uint8, 4999, 1), (np.uint8, 0, 0)):
        target = place(np.zeros(size // np.dtype(dtype).itemsize + 2, dtype))
        ext.stloader_read(str(tmp_path / "tensors"), offset, size, target)
        found = host(target).tobytes()
        assert found[:size] == content[offset : offset + size].tobytes() and not any(found[size:])


def call_make_q_matrix_split(ext, place):
    inputs, outputs, _ = GOLDEN["exl2_matrix", "mix_all"]
    scale_max = (inputs["q_scale_max"].astype(np.float32) / 256).astype(np.float16)
    perm = np.argsort(inputs["q_invperm"])
    group_map = ext.make_group_map(inputs["q_groups"], inputs["q_weight"].shape[0])
    for a, b in ((0, 32), (32, 96)):
        handle = ext.make_q_matrix_split(
            place(inputs["q_weight"])[:, a:b], place(perm.astype(np.int16)), place(inputs["q_invperm"].astype(np.int16)),
            place(inputs["q_scale"])[:, a // 8 : b // 8], place(scale_max), place(inputs["q_groups"]), place(group_map), None,
            None, None, place(inputs["bias"])[a:b], None, 0,
        )  # fmt: skip
        weight = place(np.zeros((512, b - a), np.float16))
        ext.reconstruct(handle, weight)
        assert same_bits(host(weight), np.ascontiguousarray(outputs["weight"][:, a:b]))
        ext.free_q_matrix(handle)


def tp_context(ext, place):
    """(handle, pinned buffers, objects to keep) of two devices in name; where there is a GPU, both are the first."""
    halves = [(0, 0, 1), (0, 1, 2)]
    # hidden 256, intermediate 512
    splits = [halves, [(0, 0, 256), (0, 256, 512)], [(0, 0, 16), (0, 16, 32)], [(0, 0, 128), (0, 128, 256)], halves]
    pinned, (streams, keep) = [np.zeros(2**16, np.float16) for _ in range(2)], streams_of(place)
    return ext.make_tp_context(*splits, pinned, streams), pinned, keep


def streams_of(place):
    """(streams argument, objects to keep) for arrays that `place` makes."""
    if not is_on_gpu(place(np.zeros(1, np.float16))):
        return [], []
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    return [stream.ptr], [stream]


def is_on_gpu(array):
    return not isinstance(array, np.ndarray) and array.__dlpack_device__()[0] == 2


def call_tp_exchange(ext, place):
    context, pinned, keep = tp_context(ext, place)
    x = np.arange(8, dtype=np.float16).reshape(2, 4)
    targets = [place(np.zeros((2, 4), np.float16)) for _ in range(2)]
    ext.tp_broadcast(context, 0, place(x), 0, targets, 1, -1)
    ext.tp_cross_device_barrier(context, 0)
    gathered = [place(np.zeros((2, 4), np.float16)) for _ in range(2)]
    parts = [place(np.ascontiguousarray(x[:, :2])), place(np.ascontiguousarray(x[:, 2:]))]
    ext.tp_gather(context, 1, parts, 0, gathered, 0, 2, -1)
    residuals = [place(np.ones((2, 4), np.float16)) for _ in range(2)]
    ext.tp_all_reduce(context, 0, [place(x), place(2 * x)], residuals)
    ext.free_tp_context(context)
    for found, expected in ((targets, x), (gathered, x), (residuals, 1 + 3 * x)):
        assert all(host(array).tolist() == expected.tolist() for array in found)


def call_tp_products(ext, place):
    context, pinned, keep = tp_context(ext, place)
    inputs, outputs, _ = GOLDEN["exl2_matrix", "b4"]
    handle = make_exl2(inputs, place)
    a, c = [place(inputs["a3"]) for _ in range(2)], [place(np.zeros((3, 96), np.float16)) for _ in range(2)]
    ext.gemm_half_q_half_tp(a, [handle, handle], c, False, context, -1)
    x, w = np.float16([[3, 4], [6, 8]]), np.float16([1, 2])
    y = [place(np.zeros((2, 2), np.float16)) for _ in range(2)]
    ext.rms_norm_tp([place(x)] * 2, [place(w)] * 2, y, 0.0, context)
    ext.free_tp_context(context)
    ext.free_q_matrix(handle)
    exact = float64(inputs["a3"]) @ float64(outputs["weight"]) + float64(inputs["bias"])
    for product, normed in zip(c, y, strict=True):
        assert np.linalg.norm(host(product) - exact) < 6e-4 * np.linalg.norm(exact)
        assert np.allclose(host(normed), exact_norm(x, w, None, 0.0, True), rtol=2**-10)


def halves_of(inputs, name, place, columns):
    """Handles of a recorded matrix cut into two halves of its columns."""
    tensors = {key.removeprefix(name + "."): value for key, value in inputs.items() if key.startswith(name + ".")}
    found = []
    for a, b in ((0, columns // 2), (columns // 2, columns)):
        cut = {"q_weight": tensors["q_weight"][:, a:b].copy(), "q_scale": tensors["q_scale"][:, a // 8 : b // 8].copy()}
        found.append(make_exl2(tensors | cut, place))
    return found


def call_tp_mlp(ext, place):
    context, pinned, keep = tp_context(ext, place)
    inputs, outputs, scalars = GOLDEN["blocks", "mlp_silu"]
    x = inputs["x"]
    temps = [[place(np.zeros((5, width), np.float16)) for _ in range(2)] for width in (256, 256, 512, 256, 256, 128)]
    matrices = [halves_of(inputs, name, place, n) for name, n in (("gate_proj", 512), ("up_proj", 512), ("down_proj", 256))]
    norms = [place(inputs["layernorm"]) for _ in range(2)]
    ext.tp_mlp_forward_(context, place(x), *temps, norms, scalars["epsilon"], *matrices, False)
    ext.free_tp_context(context)  # waits
    y = pinned[0][: x.size].reshape(x.shape)
    assert np.linalg.norm(float64(y) - float64(outputs["x"])) < 3e-3 * np.linalg.norm(float64(outputs["x"]))


def call_tp_attention(ext, place):
    """One new token in each of two empty sequences attends to itself alone: v comes out, whatever q and k are."""
    inputs, _, scalars = GOLDEN["blocks", "attn_llama"]
    x = inputs["x"][:2]
    exact = test_golden.Exact(inputs, scalars)
    v = exact.project("v_proj", exact.norm("layernorm", float64(x))).reshape(2, 2, 64)
    expected = float64(x) + exact.project("o_proj", np.repeat(v, 2, axis=1).reshape(2, 256))
    for paged in (False, True):
        halves = [(0, 0, 1), (0, 1, 2)]
        pinned, (streams, keep) = [np.zeros(2**14, np.float16) for _ in range(2)], streams_of(place)
        context = ext.make_tp_context(halves, [], [], [], [(0, 0, 2), (0, 2, 4)], pinned, streams)
        widths = (256, 256, 256, 128, 64, 64, 128)
        temps = [[place(np.full((2, width), np.nan, np.float16)) for _ in range(2)] for width in widths]
        shape = (3, 256, 1, 64) if paged else (2, 16, 1, 64)
        caches = [[place(np.zeros(shape, np.float16)) for _ in range(2)] for _ in range(2)]
        projections = [("q_proj", 256), ("k_proj", 128), ("v_proj", 128), ("o_proj", 256)]
        matrices = [halves_of(inputs, name, place, n) for name, n in projections]
        tables = [[place(inputs[name][None, None])] for name in ("sin", "cos")]
        lengths = [place(np.zeros(2, np.int32)) for _ in range(2)]
        block_index = [[place(np.array([[2], [0]], np.int32)) for _ in range(2)]] if paged else []
        forward = ext.tp_attn_forward_paged_ if paged else ext.tp_attn_forward_
        forward(
            context, place(x), *temps, *caches, [place(inputs["layernorm"]) for _ in range(2)], scalars["epsilon"],
            *matrices, 64, 2, 2, 1, *tables, lengths, *block_index, 0.125,
        )  # fmt: skip
        ext.free_tp_context(context)
        y = float64(pinned[0][: x.size].reshape(x.shape))
        assert np.linalg.norm(y - expected) < 1e-3 * np.linalg.norm(expected)
        first = host(caches[1][0])[[2, 0], 0] if paged else host(caches[1][0])[:, 0]
        assert np.linalg.norm(float64(first[:, 0]) - v[:, 0]) < 1e-3 * np.linalg.norm(v[:, 0])
        assert keep is not None


CALLS = {
    "pack_rows_4": ("quant", "pack_rows_4"),
    "pack_columns": ("quant", "pack_columns_5"),
    "quantize": ("quant", "quantize_3"),
    "quantize_err": ("quant", "quantize_err_3"),
    "quantize_range": ("quant", "quantize_range_4"),
    "quantize_range_inplace": ("quant", "quantize_range_inplace_4"),
    "sim_anneal": call_sim_anneal,
    "apply_rep_penalty": ("sampling", "rep_3"),
    "sample_basic": ("sampling", "sample_14"),
    "logit_filter_exclusive": ("sampling", "filter_exclusive"),
    **dict.fromkeys(("fast_fill_cpu_ones_bool", "fast_fadd_cpu", "fast_copy_cpu", "dump_profile_results"), call_fast_functions),
    "partial_strings_match": call_partial_strings_match,
    "stloader_read": call_stloader_read,
    "tensor_remap": ("element", "tensor_remap"),
    "tensor_remap_4bit": ("element", "tensor_remap_4bit"),
    **dict.fromkeys(
        ("make_q_matrix", "free_q_matrix", "reconstruct", "gemm_half_q_half", "make_group_map"), ("exl2_matrix", "mix_all")
    ),
    "make_q_matrix_split": call_make_q_matrix_split,
    **dict.fromkeys(("gemm_half_q_half_tp", "rms_norm_tp"), call_tp_products),
    **dict.fromkeys(("matrix_fp16_to_q4", "matrix_q4_to_fp16"), ("element", "q4")),
    **dict.fromkeys(
        ("make_q_attn", "free_q_attn", "q_attn_forward_1", "q_attn_forward_2", "q_attn_set_loras"), ("blocks", "attn_lora")
    ),
    **dict.fromkeys(("tp_attn_forward_paged_", "tp_attn_forward_"), call_tp_attention),
    "set_flash_attn_func": call_set_flash_attn_func,
    **dict.fromkeys(("make_q_mlp", "free_q_mlp", "q_mlp_forward_", "q_mlp_set_loras"), ("blocks", "mlp_lora")),
    **dict.fromkeys(("make_q_moe_mlp", "free_q_moe_mlp", "q_moe_mlp_forward_"), ("blocks", "moe_4_2")),
    "tp_mlp_forward_": call_tp_mlp,
    **dict.fromkeys(("fp16_to_fp8", "fp8_to_fp16"), ("cache", "fp8")),
    **dict.fromkeys(("fp16_to_q_kv", "q_to_fp16_kv"), ("cache", "paged_8")),
    "count_match": ("cache", "count_match"),
    "cache_rotate": ("cache", "rotate"),
    "had_paley": ("element", "had_paley_12"),
    "had_paley2": ("element", "had_paley2_28"),
    "gemm_half_half_half": ("element", "gemm_4x512x64_b1"),
    **dict.fromkeys(("rms_norm", "rms_norm_"), ("norm", "rms_64_f16_f16")),
    **dict.fromkeys(("layer_norm", "layer_norm_"), ("norm", "layer_64_bias")),
    **dict.fromkeys(("head_norm", "head_norm_"), ("norm", "head_64_layer")),
    "rope_": ("rope", "h64_r32_gptj_both"),
    "gen_mrope_pos_ids": ("rope", "mrope"),
    "softcap_": ("element", "softcap_f16"),
    **dict.fromkeys(
        ("make_tp_context", "free_tp_context", "tp_broadcast", "tp_gather", "tp_cross_device_barrier", "tp_all_reduce"),
        call_tp_exchange,
    ),
}


def test_every_function_has_its_call():
    assert CALLS.keys() == set(ext_c.__all__)


LIBRARIES = ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)]
if HAS_TORCH:
    LIBRARIES += ["torch", pytest.param("torch-gpu", marks=pytest.mark.gpu)]

HOST_ONLY = (call_sim_anneal, call_fast_functions, call_partial_strings_match, call_set_flash_attn_func)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", CALLS)
def test_call(name, library, monkeypatch, tmp_path):
    call = CALLS[name]
    on_host = call in HOST_ONLY if callable(call) else not runs_on_gpu(*call)
    if on_host:  # arrays on the host, wherever the others are
        library = {"cupy": "numpy", "torch-gpu": "torch"}.get(library, library)
    place, surface = placing(library)
    monkeypatch.setattr(test_golden, "ext_c", surface)  # for make_exl2 and the recorded cases
    if callable(call):
        call(surface, place, *([tmp_path] if call is call_stloader_read else []))
    else:
        file, case = call
        with np.errstate(all="ignore"):
            rows = RUNNERS[file](case, *GOLDEN[call], place)
        for what, ours, _, allowed in rows:
            assert ours <= allowed, what
    assert name in surface.called


# --- handles ----------------------------------------------------------------------------------------------------------


def small_matrix(rng=None, k=64, n=32, bits=4, place=np.asarray):
    """(handle, fp16 weights) of a random EXL2 matrix."""
    rng = rng or np.random.default_rng(1)
    scale_max = (rng.random(2) * 0.5 + 0.25).astype(np.float16)
    tensors = pack_exl2(
        rng.integers(0, 2**bits, (k, n)), rng.integers(0, 16, (2, n)), scale_max, [bits] * 2, [k // 2] * 2, rng.permutation(k)
    )
    return make_exl2(tensors, place), dequantize_exl2(tensors)


def test_handles_are_never_given_out_twice():
    handles = []
    for _ in range(5):
        handles.append(small_matrix()[0])
        ext_c.free_q_matrix(handles[-1])
    assert len(set(handles)) == 5 and all(type(handle) is int for handle in handles)


def test_handles_from_many_threads():
    found, failed = [], []

    def work():
        try:
            for _ in range(20):
                handle, weight = small_matrix()
                out = np.zeros_like(weight)
                ext_c.reconstruct(handle, out)
                assert same_bits(out, weight)
                found.append(handle)
                ext_c.free_q_matrix(handle)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(set(found)) == 80


def test_blocks_keep_the_matrices_they_were_made_of():
    up, _ = small_matrix(k=64, n=64)
    handle = ext_c.make_q_mlp(
        None, None, True, 1e-5, 0, up, up, None, None, None, None, 8, False, True, None, None, False, False
    )  # fmt: skip
    ext_c.free_q_matrix(up)
    x = np.ones((2, 64), np.float16)
    ext_c.q_mlp_forward_(handle, x, [], None)
    assert np.isfinite(x).all() and not np.array_equal(x, np.ones((2, 64)))


# --- matrices ---------------------------------------------------------------------------------------------------------


@on_both
def test_the_callers_tensors_are_not_altered_and_not_looked_at_again(library):
    inputs, outputs, _ = golden("exl2_matrix")["mix_all"]
    tensors = {name: move(library, inputs[name].copy()) for name in ("q_weight", "q_scale", "q_groups", "bias")}
    tensors["q_scale_max"] = move(library, (inputs["q_scale_max"].astype(np.float32) / 256).astype(np.float16))
    before = {name: host(array).tobytes() for name, array in tensors.items()}
    invperm = inputs["q_invperm"].astype(np.int16)
    t = tensors
    handle = ext_c.make_q_matrix(
        t["q_weight"], None, move(library, invperm), t["q_scale"], t["q_scale_max"], t["q_groups"], None, None, None, None,
        t["bias"], None, 0,
    )  # fmt: skip
    assert {name: host(array).tobytes() for name, array in tensors.items()} == before
    for array in tensors.values():
        array[...] = 0
    weight = move(library, np.zeros_like(outputs["weight"]))
    ext_c.reconstruct(handle, weight)
    assert same_bits(host(weight), outputs["weight"])
    c = move(library, np.zeros((1, 96), np.float16))
    ext_c.gemm_half_q_half(move(library, np.zeros((1, 512), np.float16)), handle, c, True)
    assert same_bits(host(c), inputs["bias"][None])


@on_both
def test_scales_that_are_subnormal_after_the_division(library):
    rng = np.random.default_rng(2)
    scale_max = np.array([2.0**-14 * 1.4995, 2.0**-7 * 1.0625, 2.0**-16 * 1.25, 0.3], np.float16)
    tensors = pack_exl2(rng.integers(0, 16, (128, 32)), rng.integers(0, 16, (4, 32)), scale_max, [4] * 4, [32] * 4)
    handle = make_exl2(tensors, lambda array: move(library, array.copy()))
    weight = move(library, np.zeros((128, 32), np.float16))
    ext_c.reconstruct(handle, weight)
    assert same_bits(host(weight), dequantize_exl2(tensors))


def gptq_tensors(rng, act_order):
    groups = np.repeat(np.arange(4), 32)
    codes, zeros = rng.integers(0, 16, (128, 32)), rng.integers(1, 17, (4, 32))
    zeros[0, :4] = 16
    return pack_gptq(codes, zeros, rng.random((4, 32)).astype(np.float16), rng.permutation(groups) if act_order else None, 4)


@on_both
@pytest.mark.parametrize("act_order", [False, True])
def test_eleven_arguments_are_lorax(library, act_order):
    """No bias, and a stored zero of 15 means 0, where exllamav2 keeps 16."""
    t = gptq_tensors(np.random.default_rng(3), act_order)
    g_idx = t.pop("g_idx", None)
    given = {name: move(library, array) for name, array in t.items()}
    temp_dq = move(library, np.zeros(128 * 32, np.float16))
    perms = [move(library, np.zeros(128, np.int16)) if act_order else None for _ in range(2)]
    shared = (given["qweight"], *perms, None, None, None, None, given["qzeros"], given["scales"], g_idx)
    tensors = t | ({} if g_idx is None else {"g_idx": g_idx})
    weights = []
    for handle, zeros in (
        (ext_c.make_q_matrix(*shared, temp_dq), "v1-wrapped"),
        (ext_c.make_q_matrix(*shared, temp_dq=temp_dq), "v1-wrapped"),
        (ext_c.make_q_matrix(*shared, None, temp_dq, 0), "v1"),
        (ext_c.make_q_matrix(*shared, bias=None, temp_dq=temp_dq, max_dq_rows=16), "v1"),
    ):
        weight = move(library, np.zeros((128, 32), np.float16))
        ext_c.reconstruct(handle, weight)
        weights.append(host(weight))
        assert same_bits(weights[-1], dequantize_gptq(tensors, zeros=zeros))
        y = move(library, np.zeros((1, 32), np.float16))
        ext_c.gemm_half_q_half(move(library, np.zeros((1, 128), np.float16)), handle, y, force_cuda=False)
        assert not host(y).any()
    assert not np.array_equal(weights[0], weights[2])
    if act_order:
        perm, inverse = map(host, perms)
        assert np.array_equal(perm, np.argsort(g_idx, kind="stable")) and np.array_equal(inverse[perm], np.arange(128))


@pytest.mark.gpu
def test_weights_on_the_gpu_with_small_tables_on_the_host(cupy):
    inputs, outputs, _ = golden("gptq_matrix")["g64_act"]
    handle = ext_c.make_q_matrix(
        cupy.asarray(inputs["qweight"]), cupy.zeros(512, np.int16), None, None, None, None, None,
        cupy.asarray(inputs["qzeros"]), cupy.asarray(inputs["scales"]), inputs["g_idx"], None, None, 0,
    )  # fmt: skip
    weight = cupy.zeros((512, 96), np.float16)
    ext_c.reconstruct(handle, weight)
    assert same_bits(weight.get(), outputs["weight"])


# --- attention, MLP, experts ------------------------------------------------------------------------------------------


def attention_block(library, *, residual_fp32=False, has_residual=True, post_norm=None, rope_style=2, seed=4):
    """(handle, weights by name) of a block with hidden 64, 2 heads and 1 key-value head of 32."""
    place = lambda array: move(library, array)  # noqa: E731
    rng = np.random.default_rng(seed)
    weights, handles = {}, {}
    for name, n in (("q", 64), ("k", 32), ("v", 32), ("o", 64)):
        handles[name], weights[name] = small_matrix(rng, n=n, place=place)
    post = None if post_norm is None else place(post_norm)
    handle = ext_c.make_q_attn(
        None, None, True, True, 1e-5, *handles.values(), None, None, 16, 64, 2, 1, 32, 128, has_residual, rope_style, 32, None,
        None, post, None, residual_fp32, False,
    )  # fmt: skip
    return handle, weights


def tables(library, positions=16, columns=32, dtype=np.float16):
    angles = np.arange(positions)[:, None] * 10000.0 ** (-np.arange(columns // 2) / (columns // 2))
    sin, cos = (np.concatenate([f(angles)] * 2, axis=1).astype(dtype) for f in (np.sin, np.cos))
    return move(library, sin), move(library, cos)


def near(found, exact, relative=1e-3):
    found = float64(host(found))
    return np.linalg.norm(found - exact) <= relative * np.linalg.norm(exact)


@on_both
@pytest.mark.parametrize("residual_fp32", [False, True])
@pytest.mark.parametrize("has_post_norm", [False, True])
def test_the_residual_may_be_fp32_with_or_without_a_post_norm(library, residual_fp32, has_post_norm):
    rng = np.random.default_rng(5)
    post = (rng.random(64) + 0.5).astype(np.float16) if has_post_norm else None
    handle, weights = attention_block(library, residual_fp32=residual_fp32, post_norm=post)
    dtype = np.float32 if residual_fp32 else np.float16
    x, mixed = rng.standard_normal((3, 64)).astype(dtype), rng.standard_normal((3, 64)).astype(np.float16)
    inside = move(library, x.copy())
    ext_c.q_attn_forward_2(handle, inside, move(library, mixed), 1, 3, [], None)
    y = float64(mixed) @ float64(weights["o"])
    y = y if post is None else exact_norm(y, post, None, 1e-5, True)
    assert near(inside, float64(x) + y, 1e-6 if residual_fp32 and not has_post_norm and library == "numpy" else 5e-4)


def adapter(rng, k, n, rank=4):
    return (rng.standard_normal((k, rank)) / 8).astype(np.float16), (rng.standard_normal((rank, n)) / 2).astype(np.float16)


@on_both
def test_adapters_are_chosen_by_id_and_join_before_the_post_norm(library):
    rng = np.random.default_rng(6)
    post = (rng.random(64) + 0.5).astype(np.float16)
    handle, weights = attention_block(library, post_norm=post)
    pairs = {5: adapter(rng, 64, 64, 4), 6: adapter(rng, 64, 64, 7)}
    a, b = ({key: move(library, pair[side]) for key, pair in pairs.items()} for side in (0, 1))
    assert ext_c.q_attn_set_loras(handle, {}, {}, {}, {}, {}, {}, a, b) == 7
    mixed = rng.standard_normal((3, 64)).astype(np.float16)
    for loras in ([], [5], [6, 5], [99], [5, 5]):  # 99 is not registered
        x = move(library, np.zeros((3, 64), np.float16))
        ext_c.q_attn_forward_2(handle, x, move(library, mixed), 1, 3, loras, None)
        y = float64(mixed) @ float64(weights["o"])
        for key in loras:
            if key in pairs:
                y = y + float64(mixed) @ float64(pairs[key][0]) @ float64(pairs[key][1])
        assert near(x, exact_norm(y, post, None, 1e-5, True), 5e-4), loras
    # Registering anew replaces what was there.
    assert ext_c.q_attn_set_loras(handle, *({} for _ in range(8))) == 0
    x = move(library, np.zeros((3, 64), np.float16))
    ext_c.q_attn_forward_2(handle, x, move(library, mixed), 1, 3, [5], None)
    assert near(x, exact_norm(float64(mixed) @ float64(weights["o"]), post, None, 1e-5, True), 5e-4)


@on_both
def test_k_and_v_may_go_straight_into_a_cache(library):
    handle, weights = attention_block(library)
    rng = np.random.default_rng(7)
    x = rng.standard_normal((1, 3, 64)).astype(np.float16)
    caches = [move(library, np.full((1, 16, 1, 32), 7, np.float16)) for _ in range(2)]
    q = move(library, np.zeros((1, 3, 64), np.float16))
    k, v = (cache[:1, 4:7] for cache in caches)
    sin, cos = tables(library)
    ext_c.q_attn_forward_1(handle, move(library, x), 1, 3, 4, None, q, k, v, sin, cos, [], None)
    positions = np.arange(4, 7)[None]
    hidden = float64(x)
    exact_k = exact_rope((hidden @ float64(weights["k"])).reshape(1, 3, 1, 32), host(sin), host(cos), positions, "neox")
    found_k, found_v = (host(cache) for cache in caches)
    assert near(found_k[:, 4:7], exact_k) and near(found_v[:, 4:7, 0], hidden @ float64(weights["v"]))
    for cache in (found_k, found_v):
        assert (cache[:, :4] == 7).all() and (cache[:, 7:] == 7).all()


@on_both
def test_experts_of_any_number_and_rows(library):
    rng = np.random.default_rng(8)
    place = lambda array: move(library, array)  # noqa: E731
    made = [[small_matrix(rng, n=64, place=place) for _ in range(3)] for _ in range(3)]
    gate, weight = rng.standard_normal((3, 64)).astype(np.float16), np.ones(64, np.float16)
    handle = ext_c.make_q_moe_mlp(
        place(weight), None, True, 1e-5, place(gate), 3, 2, *([h for h, _ in group] for group in made), None, None, None, None,
        None, None, 4, True,
    )  # fmt: skip
    x = rng.standard_normal((7, 64)).astype(np.float16)
    inside = place(x.copy())
    ext_c.q_moe_mlp_forward_(handle, inside)
    (w1, w2, w3), hidden = ([float64(w) for _, w in group] for group in made), exact_norm(x, weight, None, 1e-5, True)
    logits = hidden @ float64(gate).T
    expected = float64(x)
    for row in range(7):
        chosen = np.argsort(-logits[row])[:2]
        shares = np.exp(logits[row, chosen] - logits[row].max())
        for e, share in zip(chosen, shares / shares.sum(), strict=True):
            g = hidden[row] @ w1[e]
            g = g / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
            expected[row] += share * ((g * (hidden[row] @ w3[e])) @ w2[e])
    assert near(inside, expected, 2e-3)


# --- rope -------------------------------------------------------------------------------------------------------------


@on_both
def test_rope_reads_the_first_half_of_a_neox_table(library):
    rng = np.random.default_rng(9)
    x = rng.standard_normal((2, 3, 2, 32)).astype(np.float16)
    sin, cos = (host(table).copy() for table in tables("numpy"))
    exact = exact_rope(x, sin, cos, np.arange(5, 8)[None].repeat(2, axis=0), "neox")
    sin[:, 16:] = cos[:, 16:] = np.nan
    inside = move(library, x.copy())
    ext_c.rope_(inside, move(library, sin), move(library, cos), 5, 2, 32, None, True)
    assert np.abs(float64(host(inside)) - exact).max() < 2**-9


@on_both
def test_rope_positions_below_zero_are_zero(library):
    x = np.random.default_rng(10).standard_normal((2, 4, 1, 32)).astype(np.float16)
    sin, cos = tables(library)
    for past, offsets, positions in (
        (-1, [-5, 2], [[0, 1, 2, 3], [2, 3, 4, 5]]),
        (3, [-5, 2], [[0, 0, 0, 1], [5, 6, 7, 8]]),
        (-2, None, [[0, 0, 0, 1]] * 2),
        (0, [0, 12], [[0, 1, 2, 3], [12, 13, 14, 15]]),
    ):
        inside = move(library, x.copy())
        given = None if offsets is None else move(library, np.array(offsets, np.int32))
        ext_c.rope_(inside, sin, cos, past, 1, 32, given, True)
        exact = exact_rope(x, host(sin), host(cos), np.array(positions), "neox")
        assert np.abs(float64(host(inside)) - exact).max() < 2**-9


@on_both
@pytest.mark.parametrize("neox", [True, False])
def test_rope_beyond_the_table(library, neox):
    x = np.ones((2, 2, 1, 32), np.float16)
    sin, cos = (move(library, np.repeat(host(t)[:, :16], 2, axis=1)) for t in tables("numpy"))
    inside = move(library, x.copy())
    with pytest.raises(ValueError, match="past_len 15 puts the last of 2 tokens at 16, outside the 16 positions"):
        ext_c.rope_(inside, sin, cos, 15, 1, 32, None, neox)
    offsets = np.array([3, 15], np.int32)
    if library == "numpy":
        with pytest.raises(ValueError, match="put token 1 of row 1 at 16"):
            ext_c.rope_(inside, sin, cos, 0, 1, 32, offsets, neox)
        assert np.array_equal(inside, x)
    else:
        ext_c.rope_(inside, sin, cos, 0, 1, 32, move(library, offsets), neox)
        assert np.isfinite(host(inside)[0]).all() and np.isfinite(host(inside)[1, 0]).all()
        assert np.isnan(host(inside)[1, 1]).all()


@on_both
def test_interleaved_tables_must_repeat_their_values(library):
    sin, cos = tables(library)  # two halves, not pairs
    x = move(library, np.ones((1, 2, 1, 32), np.float16))
    with pytest.raises(ValueError, match="sin must hold one value for both columns of each pair"):
        ext_c.rope_(x, sin, cos, 0, 1, 32, None, False)
    assert (host(x) == 1).all()


@pytest.mark.gpu
def test_interleaved_tables_are_told_apart(cupy):
    x = np.random.default_rng(11).standard_normal((1, 4, 1, 32)).astype(np.float16)
    for scale in (1.0, 0.5, 1.0):
        sin, cos = (np.repeat(host(t)[:, :16], 2, axis=1) * np.float16(scale) for t in tables("numpy"))
        inside, *placed = (cupy.asarray(array) for array in (x, sin, cos))
        for _ in range(2):  # the second time, what was found before serves
            inside[...] = cupy.asarray(x)
            ext_c.rope_(inside, *placed, 1, 1, 32, None, False)
            exact = exact_rope(x, sin, cos, np.arange(1, 5)[None], "gptj")
            assert np.abs(float64(inside.get()) - exact).max() < 2**-9


# --- cache, files, numbers --------------------------------------------------------------------------------------------


@on_both
def test_a_range_rounded_up_past_the_end_is_cut_there(library):
    """With 32 values to a token, callers round ranges to 16 tokens, and the cache may end within."""
    rng = np.random.default_rng(12)
    x = rng.standard_normal((1, 20, 1, 32)).astype(np.float16)
    place = lambda array: move(library, array.copy())  # noqa: E731
    codes, scales = place(np.zeros((1, 20, 1, 16), np.uint8)), place(np.zeros((1, 20, 1, 1), np.float16))
    more = place(np.zeros((1, 20, 1, 16), np.uint8)), place(np.zeros((1, 20, 1, 1), np.float16))
    ext_c.fp16_to_q_kv(place(x), codes, scales, place(x), *more, 1, 16, 16, 0, None, None, 4)
    assert host(codes)[0, 16:].any(axis=(1, 2)).all() and not host(codes)[0, :16].any()
    assert host(more[0]).tobytes() == host(codes).tobytes()
    with pytest.raises(ValueError, match="tokens 16 to 48, but the cache has 20"):
        ext_c.fp16_to_q_kv(place(x), codes, scales, place(x), *more, 1, 16, 32, 0, None, None, 4)


@on_both
@pytest.mark.parametrize("scale", [30.0, -30.0, 5])
def test_softcap_is_even_in_its_scale(library, scale):
    x = np.random.default_rng(13).standard_normal((3, 5)).astype(np.float32) * 40
    inside = move(library, x.copy())
    ext_c.softcap_(inside, scale)
    assert np.allclose(host(inside), scale * np.tanh(float64(x) / scale), rtol=1e-6)
    for wrong in (0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must (not be 0|be a finite number)"):
            ext_c.softcap_(inside, wrong)


@on_both
def test_norms_let_inf_and_nan_show(library):
    x = np.ones((3, 8), np.float16)
    x[0, 2], x[1, 3] = np.inf, np.nan
    y = move(library, np.zeros((3, 8), np.float16))
    with np.errstate(all="ignore"):
        ext_c.rms_norm(move(library, x), move(library, np.ones(8, np.float16)), y, 1e-6)
    assert np.isnan(host(y)[1]).all() and np.isnan(host(y)[0, 2]) and (host(y)[0, :2] == 0).all() and (host(y)[2] == 1).all()


def test_repeated_annealing_explores_anew():
    rng = np.random.default_rng(14)
    slots = [[(int(10 * (i + 1)), float(e)) for i, e in enumerate(sorted(rng.random(8), reverse=True))] for _ in range(30)]
    found = {tuple(ext_c.sim_anneal(slots, 1200, 2.0, 0.9, 0.5, 20, 2.0)[1]) for _ in range(5)}
    assert len(found) > 1


# --- the edge ---------------------------------------------------------------------------------------------------------


@on_both
def test_what_is_only_read_may_have_any_strides(library):
    rng = np.random.default_rng(15)
    a, b = rng.standard_normal((8, 4)).astype(np.float16), rng.standard_normal((6, 8)).astype(np.float16)
    c = move(library, np.zeros((4, 6), np.float16))
    ext_c.gemm_half_half_half(move(library, a).T, move(library, b).T, c, 1.0, 0.0, False)
    assert near(c, float64(a).T @ float64(b).T)
    whole = move(library, np.zeros((4, 12), np.float16))
    with pytest.raises(ValueError, match="c is written in place, so it must be C-contiguous"):
        ext_c.gemm_half_half_half(move(library, a).T, move(library, b).T, whole[:, ::2], 1.0, 0.0, False)


def test_read_only_arrays_are_not_written():
    x = np.ones(4, np.float16)
    x.flags.writeable = False
    with pytest.raises(ValueError, match="x is read-only and would be written"):
        ext_c.softcap_(x, 3.0)
    y = np.zeros((1, 4), np.float16)
    ext_c.rms_norm(x[None], x, y, 0.0)
    assert (y == 1).all()


def test_arguments_by_name_and_missing_ones():
    y = np.zeros((1, 2), np.float16)
    ext_c.rms_norm(x=np.float16([[3, 4]]), w=np.ones(2, np.float16), y=y, epsilon=0.0)
    assert y[0, 0] == np.float16(3 / np.sqrt(12.5))
    with pytest.raises(TypeError, match="rms_norm: missing a required argument: 'epsilon'"):
        ext_c.rms_norm(y, y[0], y)
    with pytest.raises(TypeError, match="make_q_matrix: missing a required argument: 'temp_dq'"):
        ext_c.make_q_matrix(*[None] * 10)


if HAS_TORCH:

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    def test_parameters_are_read_and_tensors_written(device):
        import torch

        weight = torch.nn.Parameter(torch.full((8,), 2.0, dtype=torch.float16, device=device))  # requires a gradient
        x = torch.ones((3, 8), dtype=torch.float16, device=device)
        with torch.inference_mode():
            x = x + 0
            ext_c.rms_norm_(x, weight, 0.0)
        assert x.cpu().tolist() == [[2.0] * 8] * 3
        leaf = torch.ones(8, dtype=torch.float16, device=device, requires_grad=True)
        with pytest.raises(ValueError, match="x requires a gradient"):
            ext_c.softcap_(leaf, 3.0)
        view = torch.ones((8, 4), dtype=torch.float16, device=device)[:, ::2]
        with pytest.raises(ValueError, match="x is written in place, so it must be C-contiguous"):
            ext_c.softcap_(view, 3.0)

    def test_a_group_map_comes_back_as_a_tensor():
        import torch

        found = ext_c.make_group_map(torch.tensor([8, 0, 4, 8], dtype=torch.int16), 16)
        assert isinstance(found, torch.Tensor) and found.dtype == torch.int16
        assert found[:4].tolist() == [0, 32, 0, 31] and found[-2:].tolist() == [1, 1]

    @pytest.mark.gpu
    def test_work_is_queued_on_torchs_current_stream():
        import torch

        x, stream = torch.ones((1 << 22,), dtype=torch.float32, device="cuda"), torch.cuda.Stream()
        ext_c.softcap_(x, 1.0)  # compiled
        torch.cuda.synchronize()
        x.fill_(0.0)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            x.fill_(100.0)
            ext_c.softcap_(x, 2.0)
            y = x * 2
        stream.synchronize()
        assert y.min().item() == y.max().item() == 4.0
