"""One layer of a decoder: attention, and MLP or MoE, after norms and added to the residual.

The residual h is float32 whatever the model: sums over many layers would lose bits in 16, and Gemma's outgrow fp16.
A norm that a quantized product can do itself is left to the part behind it; where there is no post-norm, a part's last
product adds itself to h.
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
        options = dict(adapters=step.adapters, workspace=step.workspace)
        _add_to(hidden, partial(self.attention, step=step), self.attention_norm, self.attention_post_norm, dtype)
        _add_to(hidden, partial(self.mlp, **options), self.mlp_norm, self.mlp_post_norm, dtype)
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
        x = self.norm(hidden, dtype)
        self.attention(x, step, residual=hidden)
        self.mlp(x, adapters=step.adapters, workspace=step.workspace, residual=hidden)
        return hidden

    linears, matrices = DecoderLayer.linears, DecoderLayer.matrices


def _add_to(hidden, part, norm, post_norm, dtype):
    """hidden += post_norm(part(norm(hidden))); post_norm may be None."""
    x, input_norm = hidden, norm.of_product(hidden, dtype)
    if input_norm is None:
        x = norm(hidden, dtype)
    if post_norm is None:
        part(x, norm=input_norm, residual=hidden)
    else:
        post_norm(part(x, norm=input_norm), residual=hidden, out=hidden)
