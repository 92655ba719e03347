"""One layer of a decoder: attention, and MLP or MoE, after norms and added to the residual.

The residual h is float32 whatever the model: sums over many layers would lose bits in 16, and Gemma's outgrow fp16.
Where a part says so, the norm before it writes in the order its quantized matrix has its rows in; where there is no
post-norm, a part's last product adds itself to h.
"""

from functools import partial


class DecoderLayer:
    """h += post(attention(pre(h))), then h += post(mlp(pre(h))); the post-norms may be None."""

    def __init__(self, attention, mlp, *, attention_norm, mlp_norm, attention_post_norm=None, mlp_post_norm=None):
        self.attention, self.mlp = attention, mlp
        self.attention_norm, self.mlp_norm = attention_norm, mlp_norm
        self.attention_post_norm, self.mlp_post_norm = attention_post_norm, mlp_post_norm

    def __call__(self, hidden, step, dtype):
        """hidden float32 [batch, seq, hidden_size], changed in place; `dtype` is that of the activations in between."""
        order = self.attention.input_order(_rows(hidden), step)
        x = self.attention_norm(hidden, dtype, order=order)
        _add_to(hidden, _attention(self.attention, x, order, step), self.attention_post_norm)
        order = self.mlp.input_order(_rows(hidden), step.adapters)
        x = self.mlp_norm(hidden, dtype, order=order)
        _add_to(hidden, _mlp(self.mlp, x, order, step), self.mlp_post_norm)
        return hidden

    def linears(self):
        return [*self.attention.linears(), *self.mlp.linears()]

    def matrices(self):
        """Quantized matrices of its products, joined ones included."""
        return [*self.attention.matrices(), *self.mlp.matrices()]


class ParallelDecoderLayer:
    """h += attention(n) + mlp(n), with n = norm(h) for both."""

    def __init__(self, attention, mlp, *, norm):
        self.attention, self.mlp, self.norm = attention, mlp, norm

    def __call__(self, hidden, step, dtype):
        """hidden float32 [batch, seq, hidden_size], changed in place; `dtype` is that of the activations in between."""
        order = self.attention.input_order(_rows(hidden), step)
        mlp_order = self.mlp.input_order(_rows(hidden), step.adapters)
        x = self.norm(hidden, dtype, order=order)
        y = x if mlp_order is order else self.norm(hidden, dtype, order=mlp_order)
        _add_to(hidden, _attention(self.attention, x, order, step))
        _add_to(hidden, _mlp(self.mlp, y, mlp_order, step))
        return hidden

    linears, matrices = DecoderLayer.linears, DecoderLayer.matrices


def _rows(hidden):
    return hidden.size // hidden.shape[-1]


def _attention(attention, x, order, step):
    """attention(x, step), to be called with or without a residual."""
    return partial(attention, x, step, **({} if order is None else {"is_ordered": True}))


def _mlp(mlp, x, order, step):
    """As `_attention`, for an MLP or MoE."""
    options = {} if order is None else {"is_ordered": True}
    return partial(mlp, x, adapters=step.adapters, workspace=step.workspace, **options)


def _add_to(hidden, part, post_norm=None):
    if post_norm is None:
        part(residual=hidden)
    else:
        post_norm(part(), residual=hidden, out=hidden)
