"""MLPs and mixtures of experts behind handles: qmlp of ops.md's index. tp_mlp_forward_ is in _tp.py."""

from cupyq import ops
from cupyq._arrays import check, float16, namespace
from cupyq.ext._arrays import entry, integer, number, settle
from cupyq.ext._handles import handles
from cupyq.ext._projection import Projection, Residual, check_loras, make_norm, set_loras
from cupyq.layers import MLP, Linear, MoE
from cupyq.layers.mlp import activate


class _Block:
    """What a handle of make_q_mlp stands for."""

    def __init__(self, gate, up, down, norm, residual, activation):
        self.gate, self.up, self.down = gate, up, down
        self.norm, self.residual, self.activation = norm, residual, activation


def _activation(act_gelu):
    return "gelu_tanh" if act_gelu else "silu"


@entry(
    optional=("layernorm", "layernorm_bias", "post_layernorm", "post_layernorm_bias"),
    unused=("temp_state", "temp_a", "temp_b", "temp_dq", "max_rows", "use_graphs"),
    flags=("layernorm_is_rms", "act_gelu", "has_residual", "residual_fp32"),
)
def make_q_mlp(
    layernorm,
    layernorm_bias,
    layernorm_is_rms,
    norm_epsilon,
    gate,
    up,
    down,
    temp_state,
    temp_a,
    temp_b,
    temp_dq,
    max_rows,
    act_gelu,
    has_residual,
    post_layernorm,
    post_layernorm_bias,
    residual_fp32,
    use_graphs,
):
    """A handle for an MLP: norms float16 or None, projections by their make_q_matrix handles, gate 0 where there is none

    The block keeps the norms' tensors and the matrices, which may be freed. Scratch tensors, max_rows and use_graphs are
    not used: any number of rows works.
    """
    eps = number(norm_epsilon, "norm_epsilon")
    is_ungated = type(gate) is int and gate == 0
    gate = None if is_ungated else Projection(gate, "gate")
    up, down = Projection(up, "up"), Projection(down, "down")
    for name, projection, shape in (("gate", gate, (up.k, up.n)), ("down", down, (up.n, up.k))):
        if projection is not None and (projection.k, projection.n) != shape:
            raise ValueError(f"{name} must be a matrix of shape {shape}, as up says, got ({projection.k}, {projection.n})")
    namespace(
        layernorm=layernorm,
        layernorm_bias=layernorm_bias,
        post_layernorm=post_layernorm,
        post_layernorm_bias=post_layernorm_bias,
        gate=gate and gate.matrix,
        up=up.matrix,
        down=down.matrix,
    )
    norm = make_norm(layernorm, layernorm_bias, layernorm_is_rms, eps, dim=up.k, name="layernorm")
    post_norm = make_norm(post_layernorm, post_layernorm_bias, layernorm_is_rms, eps, dim=up.k, name="post_layernorm")
    residual = Residual(has_residual, post_norm, residual_fp32)
    return handles.add("q_mlp", _Block(gate, up, down, norm, residual, _activation(act_gelu)))


@entry
def free_q_mlp(handle):
    """Forget the handle."""
    handles.free(handle, "q_mlp", "handle")


@entry(arrays=("x",), writes=("x",), unused=("loras_temp",))
def q_mlp_forward_(handle, x, loras, loras_temp):
    """x = (x +) mlp(norm(x)), or x += post_norm(mlp(norm(x))), in place; mlp(h) = (act(h Wg) * (h Wu)) Wd, or act(h Wu) Wd

    x [..., hidden], float16, or float32 where the block was made with residual_fp32; loras: ids of the adapters to use, of
    those registered. The last product is summed in fp32 and rounded once, with x added; adapters of `down` are added
    before a post-norm.
    """
    block = handles.get(handle, "q_mlp", "handle")
    rows = block.residual.check(x, block.up.k)
    namespace(x=x, handle=block.up.matrix)
    loras = check_loras(loras)
    if rows.size == 0:
        return
    hidden = block.residual.normed(rows, block.norm)
    up = block.up(hidden, loras)
    if block.gate is None:
        inner = activate(block.activation, up)
    else:
        inner = activate(block.activation, block.gate(hidden, loras), up)
    block.residual.add(rows, inner, block.down, loras)


@entry
def q_mlp_set_loras(handle, gate_a, gate_b, up_a, up_b, down_a, down_b):
    """Replace the MLP's adapters; returns the largest rank. Dicts as in `q_attn_set_loras`"""
    block = handles.get(handle, "q_mlp", "handle")
    return set_loras([(block.gate, "gate", gate_a, gate_b), (block.up, "up", up_a, up_b), (block.down, "down", down_a, down_b)])


# --- mixture of experts -----------------------------------------------------------------------------------------------


class _MoEBlock:
    """What a handle of make_q_moe_mlp stands for."""

    def __init__(self, norm, moe, matrix):
        self.norm, self.moe = norm, moe
        self.matrix = matrix  # one of them: where the block is, and the hidden size


@entry(
    arrays=("layernorm", "gate"),
    optional=("layernorm_bias",),
    unused=("temp_state", "temp_gathered_state", "temp_a", "temp_b", "temp_logits", "temp_dq", "max_rows"),
    flags=("layernorm_is_rms", "act_gelu"),
)
def make_q_moe_mlp(
    layernorm,
    layernorm_bias,
    layernorm_is_rms,
    norm_epsilon,
    gate,
    num_experts,
    num_experts_per_token,
    w1,
    w2,
    w3,
    temp_state,
    temp_gathered_state,
    temp_a,
    temp_b,
    temp_logits,
    temp_dq,
    max_rows,
    act_gelu,
):
    """A handle for a mixture of experts: gate float16 [E, hidden] is the router, w1, w2, w3 lists of E make_q_matrix handles

    w1 gate, w3 up, w2 down. Any number of experts and of rows. The block keeps the tensors and the matrices, which may be
    freed. Scratch tensors and max_rows are not used.
    """
    experts = integer(num_experts, "num_experts", low=1)
    top_k = integer(num_experts_per_token, "num_experts_per_token", low=1)
    if top_k > experts:
        raise ValueError(f"num_experts_per_token must be at most num_experts {experts}, got {top_k}")
    matrices = {}
    for name, given in (("w1", w1), ("w2", w2), ("w3", w3)):
        if not isinstance(given, (list, tuple)) or len(given) != experts:
            raise ValueError(f"{name} must be a list of {experts} handles, one per expert")
        matrices[name] = [handles.get(h, "q_matrix", f"{name}[{i}]").matrix for i, h in enumerate(given)]
    hidden, inter = matrices["w1"][0].shape
    for name, shape in (("w1", (hidden, inter)), ("w2", (inter, hidden)), ("w3", (hidden, inter))):
        for i, matrix in enumerate(matrices[name]):
            if matrix.shape != shape:
                raise ValueError(f"{name}[{i}] must be a matrix of shape {shape}, as w1[0] says, got {matrix.shape}")
    namespace(
        layernorm=layernorm,
        layernorm_bias=layernorm_bias,
        gate=gate,
        **{f"{name}[{i}]": matrix for name, group in matrices.items() for i, matrix in enumerate(group)},
    )
    check(gate, "gate", dtype=float16, shape=(experts, hidden))
    norm = make_norm(
        layernorm, layernorm_bias, layernorm_is_rms, number(norm_epsilon, "norm_epsilon"), dim=hidden, name="layernorm"
    )  # fmt: skip
    mlps = [
        MLP(Linear(gate_proj), Linear(up_proj), Linear(down_proj), _activation(act_gelu))
        for gate_proj, down_proj, up_proj in zip(*matrices.values(), strict=True)
    ]
    block = _MoEBlock(norm, MoE(Linear(gate), mlps, top_k), matrices["w1"][0])
    settle(block.matrix.xp)
    return handles.add("q_moe_mlp", block)


@entry
def free_q_moe_mlp(handle):
    """Forget the handle."""
    handles.free(handle, "q_moe_mlp", "handle")


@entry(arrays=("x",), writes=("x",))
def q_moe_mlp_forward_(handle, x):
    """x += sum over the experts chosen for each row of weight * expert(norm(x)), in place

    x float16 [..., hidden]. The weights are the softmax over the chosen experts' router logits. The sum over the experts
    is fp32 and rounded once, with x added.
    """
    block = handles.get(handle, "q_moe_mlp", "handle")
    check(x, "x", dtype=float16, last=block.matrix.k)
    namespace(x=x, handle=block.matrix)
    rows = x.reshape(-1, block.matrix.k)
    if rows.size:
        ops.add(rows, block.moe(block.norm(rows, dtype=float16)), out=rows)
