"""Attention without the attention itself, what comes before and after it: qattn of ops.md's index.

tp_attn_forward_paged_ and tp_attn_forward_ are in _tp.py.
"""

from cupyq._arrays import check, float16, int32, namespace
from cupyq.ext._arrays import entry, integer, number, refuse_any_overlap
from cupyq.ext._handles import handles
from cupyq.ext._projection import Projection, Residual, check_loras, make_norm, set_loras
from cupyq.ext._rotation import Rotation
from cupyq.layers import HeadNorm
from cupyq.ops._common import refuse_overlap

_ROPE_STYLES = (None, "gptj", "neox")  # rope_style 0, 1, 2


class _Block:
    """What a handle of make_q_attn stands for."""

    def __init__(self, projections, norm, residual, head_norms, *, heads, kv_heads, head_dim, rope_style, rotary_dim):
        self.q, self.k, self.v, self.o = projections
        self.norm, self.residual = norm, residual
        self.q_norm, self.k_norm = head_norms
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rope_style, self.rotary_dim = rope_style, rotary_dim


_WEIGHTS = ("layernorm", "layernorm_bias", "q_norm", "k_norm", "post_layernorm", "post_layernorm_bias")


@entry(
    optional=_WEIGHTS,
    unused=("temp_state", "temp_dq", "max_rows", "max_seq_len", "use_graphs"),
    flags=("layernorm_is_rms", "headnorm_is_rms", "has_residual", "residual_fp32"),
)
def make_q_attn(
    layernorm,
    layernorm_bias,
    layernorm_is_rms,
    headnorm_is_rms,
    norm_epsilon,
    q_proj,
    k_proj,
    v_proj,
    o_proj,
    temp_state,
    temp_dq,
    max_rows,
    hidden_size,
    num_heads,
    num_kv_heads,
    head_dim,
    max_seq_len,
    has_residual,
    rope_style,
    sincos_size,
    q_norm,
    k_norm,
    post_layernorm,
    post_layernorm_bias,
    residual_fp32,
    use_graphs,
):
    """A handle for an attention block: norms float16 or None, projections by their make_q_matrix handles

    rope_style 0 none, 1 GPT-J, 2 NeoX; sincos_size: width of the sin and cos tables. The block keeps the norms' tensors
    and the matrices, which may be freed. Scratch tensors, max_rows, max_seq_len and use_graphs are not used.
    """
    hidden = integer(hidden_size, "hidden_size", low=1)
    heads, kv_heads = integer(num_heads, "num_heads", low=1), integer(num_kv_heads, "num_kv_heads", low=1)
    head_dim, eps = integer(head_dim, "head_dim", low=1), number(norm_epsilon, "norm_epsilon")
    if integer(rope_style, "rope_style") not in (0, 1, 2):
        raise ValueError(f"rope_style must be 0 (none), 1 (GPT-J) or 2 (NeoX), got {rope_style}")
    shapes = {
        "q_proj": (q_proj, hidden, heads * head_dim),
        "k_proj": (k_proj, hidden, kv_heads * head_dim),
        "v_proj": (v_proj, hidden, kv_heads * head_dim),
        "o_proj": (o_proj, heads * head_dim, hidden),
    }
    projections = []
    for name, (handle, k, n) in shapes.items():
        projection = Projection(handle, name)
        if (projection.k, projection.n) != (k, n):
            raise ValueError(f"{name} must be a matrix of shape ({k}, {n}), got ({projection.k}, {projection.n})")
        projections.append(projection)
    namespace(
        layernorm=layernorm,
        layernorm_bias=layernorm_bias,
        q_norm=q_norm,
        k_norm=k_norm,
        post_layernorm=post_layernorm,
        post_layernorm_bias=post_layernorm_bias,
        **{name: projection.matrix for name, projection in zip(shapes, projections, strict=True)},
    )
    kind = "rms" if headnorm_is_rms else "layer"
    head_norms = []
    for name, weight, count in (("q_norm", q_norm, heads), ("k_norm", k_norm, kv_heads)):
        if weight is not None:
            check(weight, name, dtype=float16, shape=(count, head_dim))
        head_norms.append(None if weight is None else HeadNorm(weight, eps=eps, kind=kind))
    norm = make_norm(layernorm, layernorm_bias, layernorm_is_rms, eps, dim=hidden, name="layernorm")
    post_norm = make_norm(post_layernorm, post_layernorm_bias, layernorm_is_rms, eps, dim=hidden, name="post_layernorm")
    block = _Block(
        projections,
        norm,
        Residual(has_residual, post_norm, residual_fp32),
        head_norms,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rope_style=_ROPE_STYLES[rope_style],
        rotary_dim=integer(sincos_size, "sincos_size", low=0),
    )
    return handles.add("q_attn", block)


@entry
def free_q_attn(handle):
    """Forget the handle."""
    handles.free(handle, "q_attn", "handle")


@entry(
    arrays=("x", "q_temp", "k_temp", "v_temp"),
    optional=("past_lens", "sin", "cos"),
    writes=("q_temp", "k_temp", "v_temp"),
    unused=("loras_temp",),
)
def q_attn_forward_1(
    handle, x, batch_size, q_len, past_len, past_lens, q_temp, k_temp, v_temp, sin, cos, loras, loras_temp
):  # fmt: skip
    """q_temp, k_temp, v_temp = the projections of norm(x), q and k with their head norms and RoPE; x stays

    x [batch_size * q_len, hidden], float16, or float32 where the block was made with residual_fp32; the three results
    float16, of any shape with batch_size * q_len rows of the projection's width; past_len and past_lens as `rope_` takes
    past_len and offsets; loras: ids of the adapters to use, of those registered.
    """
    block = handles.get(handle, "q_attn", "handle")
    batch, seq = integer(batch_size, "batch_size", low=0), integer(q_len, "q_len", low=0)
    rows = _rows(block.residual.check(x, block.q.k), "x", batch * seq)
    outputs = {"q": (block.q, q_temp), "k": (block.k, k_temp), "v": (block.v, v_temp)}
    namespace(x=x, handle=block.q.matrix, q_temp=q_temp, k_temp=k_temp, v_temp=v_temp, past_lens=past_lens, sin=sin, cos=cos)
    for name, (projection, target) in outputs.items():
        check(target, f"{name}_temp", dtype=float16)
        if target.size != batch * seq * projection.n:
            raise ValueError(f"{name}_temp must have {batch * seq} rows of {projection.n} values, got shape {target.shape}")
    refuse_any_overlap(x=x, q_temp=q_temp, k_temp=k_temp, v_temp=v_temp)
    for name, (_, target) in outputs.items():
        refuse_overlap(target, f"{name}_temp", past_lens=past_lens, sin=sin, cos=cos)
    loras = check_loras(loras)
    rotation = None
    if block.rope_style is not None:
        rotation = _rotation(block, sin, cos, past_len, past_lens, batch, seq)
    if rows.size == 0:
        return
    hidden = block.residual.normed(rows, block.norm)
    for projection, target in outputs.values():
        projection(hidden, loras, out=target.reshape(batch * seq, projection.n))
    q = q_temp.reshape(batch, seq, block.heads, block.head_dim)
    k = k_temp.reshape(batch, seq, block.kv_heads, block.head_dim)
    for norm, heads in ((block.q_norm, q), (block.k_norm, k)):
        if norm is not None:
            norm(heads)
        if rotation is not None:
            rotation(heads)


def _rotation(block, sin, cos, past_len, past_lens, batch, seq):
    if sin is None or cos is None:
        raise ValueError("sin and cos are needed, since the block was made with a rope_style")
    if sin.shape[-1:] != (block.rotary_dim,):
        raise ValueError(f"sin must have {block.rotary_dim} columns, as sincos_size said, got shape {sin.shape}")
    if past_lens is not None:
        check(past_lens, "past_lens", dtype=int32, shape=(batch,))
    return Rotation(sin, cos, past_len, past_lens, batch=batch, seq=seq, head_dim=block.head_dim, style=block.rope_style)


def _rows(array, name, rows):
    if array.shape[0] != rows:
        raise ValueError(f"{name} must have batch_size * q_len = {rows} rows, got {array.shape[0]}")
    return array


@entry(arrays=("x", "attn_output"), writes=("x",), unused=("loras_temp",))
def q_attn_forward_2(handle, x, attn_output, batch_size, q_len, loras, loras_temp):
    """x = (x +) attn_output Wo (+ bias), or x += post_norm(attn_output Wo (+ bias)), in place

    attn_output float16 [batch_size * q_len, heads * head_dim]. The product is summed in fp32 and rounded once, with x
    added. Adapters of o_proj are added before a post-norm, as the model that was trained has them.
    """
    block = handles.get(handle, "q_attn", "handle")
    count = integer(batch_size, "batch_size", low=0) * integer(q_len, "q_len", low=0)
    rows = _rows(block.residual.check(x, block.o.n), "x", count)
    namespace(x=x, handle=block.o.matrix, attn_output=attn_output)
    check(attn_output, "attn_output", dtype=float16)
    if attn_output.size != count * block.o.k:
        raise ValueError(f"attn_output must have {count} rows of {block.o.k} values, got shape {attn_output.shape}")
    refuse_any_overlap(x=x, attn_output=attn_output)
    loras = check_loras(loras)
    if rows.size:
        block.residual.add(rows, attn_output.reshape(count, block.o.k), block.o, loras)


@entry
def q_attn_set_loras(handle, q_a, q_b, k_a, k_b, v_a, v_b, o_a, o_b):
    """Replace the block's adapters; returns the largest rank

    Dicts from an id to A' float16 [K, rank] and B' float16 [rank, N], for each projection; the tensors are kept.
    """
    block = handles.get(handle, "q_attn", "handle")
    return set_loras([(block.q, "q", q_a, q_b), (block.k, "k", k_a, k_b), (block.v, "v", v_a, v_b), (block.o, "o", o_a, o_b)])


def set_flash_attn_func():
    """Nothing, as in exllamav2: a hook that is kept for those who call it."""
