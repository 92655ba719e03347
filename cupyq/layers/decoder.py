"""One layer of a decoder: attention, and MLP or MoE, after norms and added to the residual.

The residual h is float32 whatever the model: sums over many layers would lose bits in 16, and Gemma's outgrow fp16.
"""

from cupyq.ops.elementwise import add


class DecoderLayer:
    """h += post(attention(pre(h))), then h += post(mlp(pre(h))); the post-norms may be None."""

    def __init__(self, attention, mlp, *, attention_norm, mlp_norm, attention_post_norm=None, mlp_post_norm=None):
        self.attention, self.mlp = attention, mlp
        self.attention_norm, self.mlp_norm = attention_norm, mlp_norm
        self.attention_post_norm, self.mlp_post_norm = attention_post_norm, mlp_post_norm

    def __call__(self, hidden, step, dtype):
        """hidden float32 [batch, seq, hidden_size], changed in place; `dtype` is that of the activations in between."""
        _add_to(hidden, self.attention(self.attention_norm(hidden, dtype), step), self.attention_post_norm)
        _add_to(hidden, self.mlp(self.mlp_norm(hidden, dtype), adapters=step.adapters), self.mlp_post_norm)
        return hidden

    def linears(self):
        return [*self.attention.linears(), *self.mlp.linears()]


class ParallelDecoderLayer:
    """h += attention(n) + mlp(n), with n = norm(h) for both."""

    def __init__(self, attention, mlp, *, norm):
        self.attention, self.mlp, self.norm = attention, mlp, norm

    def __call__(self, hidden, step, dtype):
        """hidden float32 [batch, seq, hidden_size], changed in place; `dtype` is that of the activations in between."""
        normed = self.norm(hidden, dtype)
        _add_to(hidden, self.attention(normed, step))
        _add_to(hidden, self.mlp(normed, adapters=step.adapters))
        return hidden

    def linears(self):
        return [*self.attention.linears(), *self.mlp.linears()]


def _add_to(hidden, y, post_norm=None):
    if post_norm is None:
        add(hidden, y, out=hidden)
    else:
        post_norm(y, residual=hidden, out=hidden)
