"""One layer of a decoder: attention, then MLP or MoE, each between norms and added to the residual."""

from cupyq._arrays import float32
from cupyq.ops.elementwise import add


class DecoderLayer:
    """h += post(attention(pre(h))), then h += post(mlp(pre(h))); the post-norms may be None.

    The residual h is float32 whatever the model: sums over many layers would lose bits in 16, and Gemma's outgrow fp16.
    """

    def __init__(self, attention, mlp, *, attention_norm, mlp_norm, attention_post_norm=None, mlp_post_norm=None):
        self.attention, self.mlp = attention, mlp
        self.attention_norm, self.mlp_norm = attention_norm, mlp_norm
        self.attention_post_norm, self.mlp_post_norm = attention_post_norm, mlp_post_norm

    def __call__(self, hidden, step, dtype):
        """hidden float32 [batch, seq, hidden_size], changed in place; `dtype` is that of the activations in between."""
        _add_to(hidden, self.attention(self.attention_norm(hidden, dtype), step), self.attention_post_norm)
        _add_to(hidden, self.mlp(self.mlp_norm(hidden, dtype)), self.mlp_post_norm)
        return hidden

    def linears(self):
        return [*self.attention.linears(), *self.mlp.linears()]


def _add_to(hidden, y, post_norm):
    add(hidden, y if post_norm is None else post_norm(y, float32), out=hidden)
