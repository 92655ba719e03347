"""Quantized matrices behind handles: qmatrix of ops.md's index."""

from dataclasses import dataclass

import numpy as np

from cupyq import ops
from cupyq._arrays import check, float16
from cupyq._copies import to_host
from cupyq._foreign import accepts_dlpack
from cupyq.ext._arrays import entry, fill, integer, settle
from cupyq.ext._handles import handles
from cupyq.formats import exl2, gptq

_int16 = np.dtype(np.int16)
_OMITTED = object()
_ACT_ORDER_OUTPUTS = ("q_perm", "q_invperm")


@dataclass(frozen=True)
class HeldMatrix:
    """What a handle of make_q_matrix stands for."""

    matrix: ops.QMatrix


def make_q_matrix(
    q_weight,
    q_perm,
    q_invperm,
    q_scale,
    q_scale_max,
    q_groups,
    q_group_map,
    gptq_qzeros,
    gptq_scales,
    gptq_g_idx,
    bias=_OMITTED,
    temp_dq=_OMITTED,
    max_dq_rows=_OMITTED,
):
    """A handle for the quantized matrix of these tensors: EXL2 where q_scale is present, else GPTQ

    q_scale_max has been divided by 256 already. Tensors on a GPU are repacked there and not kept, those on the host are
    copied: the caller may free or change them afterwards. None is altered, unlike exllamav2, which reorders q_weight in
    place. GPTQ with gptq_g_idx writes the row order it implies to q_perm and q_invperm where these are given. temp_dq
    and max_dq_rows are not used: no scratch is needed.
    Called with 11 arguments, the last of which is temp_dq, this is LoRAX's function of the same name: no bias, and the
    GPTQ zero point is (stored + 1) & 15 where exllamav2 keeps the 16.
    """
    given = [argument is not _OMITTED for argument in (bias, temp_dq, max_dq_rows)]
    if not any(given):
        raise TypeError("make_q_matrix: missing a required argument: 'temp_dq'")
    is_lorax = sum(given) == 1 and not given[2]
    return _make(
        q_weight,
        q_perm,
        q_invperm,
        q_scale,
        q_scale_max,
        q_groups,
        q_group_map,
        gptq_qzeros,
        gptq_scales,
        gptq_g_idx,
        None if is_lorax or not given[0] else bias,
        "v1-wrapped" if is_lorax else "v1",
    )


def make_q_matrix_split(
    q_weight,
    q_perm,
    q_invperm,
    q_scale,
    q_scale_max,
    q_groups,
    q_group_map,
    gptq_qzeros,
    gptq_scales,
    gptq_g_idx,
    bias,
    temp_dq,
    max_dq_rows,
):
    """As make_q_matrix, for slices of an EXL2 matrix

    Column slices: q_weight[:, a:b], q_scale[:, a / 8 : b / 8] and the bias's. Row slices: whole groups, with q_groups
    counted anew, without permutation. make_q_matrix has altered nothing, so slices of its tensors are ordinary ones.
    """
    if not _is_absent(gptq_qzeros) or _is_absent(q_scale):
        raise ValueError("make_q_matrix_split takes EXL2 tensors (q_scale, ...), and these are GPTQ")
    return _make(
        q_weight,
        q_perm,
        q_invperm,
        q_scale,
        q_scale_max,
        q_groups,
        q_group_map,
        gptq_qzeros,
        gptq_scales,
        gptq_g_idx,
        bias,
        "v1",
    )


def _is_absent(tensor):
    return tensor is None or getattr(tensor, "is_meta", False)


def _implied_outputs(arguments):
    is_act_order = _is_absent(arguments["q_scale"]) and not _is_absent(arguments["gptq_g_idx"])
    return _ACT_ORDER_OUTPUTS if is_act_order else ()


_OPTIONAL = (
    "q_perm", "q_invperm", "q_scale", "q_scale_max", "q_groups", "q_group_map", "gptq_qzeros", "gptq_scales", "gptq_g_idx",
    "bias",
)  # fmt: skip


@entry(arrays=("q_weight",), optional=_OPTIONAL, writes=_implied_outputs)
def _make(
    q_weight,
    q_perm,
    q_invperm,
    q_scale,
    q_scale_max,
    q_groups,
    q_group_map,
    gptq_qzeros,
    gptq_scales,
    gptq_g_idx,
    bias,
    zeros,
):
    if q_scale is not None:
        tensors = _present(
            q_weight=q_weight,
            q_scale=q_scale,
            q_scale_max=q_scale_max,
            q_groups=q_groups,
            q_perm=q_perm,
            q_invperm=q_invperm,
            bias=bias,
        )
        # from_tensors divides by 256; times 256 / 256 each value stays itself, subnormals included.
        matrix = ops.QMatrix.from_tensors(tensors, prescale=256.0)
        if q_group_map is not None:  # says what q_groups says, of which only its length is looked at
            check(q_group_map, "q_group_map", dtype=_int16, shape=(2 * matrix.k,))
        settle(matrix.xp)
        return handles.add("q_matrix", HeldMatrix(matrix))
    tensors = _present(qweight=q_weight, qzeros=gptq_qzeros, scales=gptq_scales, g_idx=gptq_g_idx, bias=bias)
    matrix = ops.QMatrix.from_tensors(tensors, zeros=zeros)
    if gptq_g_idx is not None:
        _write_order(tensors, q_perm, q_invperm, matrix.k)
    settle(matrix.xp)
    return handles.add("q_matrix", HeldMatrix(matrix))


def _present(**tensors):
    """The tensors that are there; those on the host as copies, since a NumPy matrix is computed from them when needed."""
    found = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return {name: tensor.copy() if isinstance(tensor, np.ndarray) else tensor for name, tensor in found.items()}


def _write_order(tensors, q_perm, q_invperm, k):
    """What make_q_matrix leaves in the two tensors: the stored order of the rows, and its inverse, both unsigned 16-bit."""
    for name, target in (("q_perm", q_perm), ("q_invperm", q_invperm)):
        if target is not None:
            check(target, name, dtype=_int16, shape=(k,), writes=True)
    perm = gptq.validate_gptq(tensors | {"g_idx": to_host(tensors["g_idx"])}).perm
    perm = np.arange(k) if perm is None else perm
    for target, order in ((q_perm, perm), (q_invperm, np.argsort(perm))):
        if target is not None:
            fill(target, order.astype(np.uint16).view(np.int16))


@entry
def free_q_matrix(handle):
    """Forget the handle. Blocks made of the matrix keep it."""
    handles.free(handle, "q_matrix", "handle")


@entry(arrays=("output",), writes=("output",))
def reconstruct(handle, output):
    """output float16 [K, N] = the weights as the format defines them, bit for bit, in the model's row order"""
    ops.reconstruct(handles.get(handle, "q_matrix", "handle").matrix, out=output)


@entry(arrays=("a", "c"), writes=("c",))
def gemm_half_q_half(a, b_handle, c, force_cuda):
    """c = a W (+ bias) of the matrix behind b_handle; a float16 [M, K], c float16 [M, N]

    fp32 sums, one rounding, the same bits on every call. force_cuda has no effect: which way a product takes follows
    from its shape.
    """
    matrix = handles.get(b_handle, "q_matrix", "b_handle").matrix
    check(a, "a", dtype=float16, ndim=2)
    check(c, "c", dtype=float16, ndim=2)
    ops.qmatmul(a, matrix, out=c)


@entry(arrays=("in_", "out", "scales"), writes=("out", "scales"))
def matrix_fp16_to_q4(in_, out, scales):
    """out, scales = 4-bit codes and scales of in_, seen as one flat array in blocks of 64 (formats/kv_cache.py)

    in_ float16, its size a multiple of 64; out uint8 of half as many bytes; scales float16, one for every 32 values.
    """
    ops.encode_blocks(in_.reshape(-1), "q4", codes=out.reshape(-1), scales=scales.reshape(-1))


@entry(arrays=("in_", "scales", "out"), writes=("out",))
def matrix_q4_to_fp16(in_, scales, out):
    """out = the values of the codes and scales that matrix_fp16_to_q4 wrote"""
    ops.decode_blocks(in_.reshape(-1), scales.reshape(-1), "q4", out=out.reshape(-1))


@accepts_dlpack(writes=())
def make_group_map(q_groups, num_qrows):
    """int16 [2K], on the host: for each stored row its group, and how many rows of the group are left, counting it

    q_groups int16 [2 * groups] on the host; num_qrows: rows of q_weight.
    """
    if not isinstance(q_groups, np.ndarray):
        raise TypeError(f"q_groups must be an array on the host, got {type(q_groups).__module__}.{type(q_groups).__name__}")
    return exl2.group_map(exl2.exl2_layout(q_groups, integer(num_qrows, "num_qrows", low=1), 8))
