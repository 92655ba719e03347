"""Self-attention: projections, head norms, RoPE, cache, and the output projection."""

from dataclasses import dataclass
from typing import Any

from cupyq.ops.attention import attention
from cupyq.ops.kv_append import kv_append
from cupyq.ops.norm import head_norm
from cupyq.ops.rope import rope


@dataclass
class Step:
    """Where the tokens of one forward pass stand; the same for every layer."""

    sin: Any
    """float32 [context, head_dim / 2], and cos."""
    cos: Any
    positions: Any
    """int32 [batch], of each row's first token."""
    cache: Any = None
    """KVCache, or None where the tokens see each other only."""
    kv_lengths: Any = None
    """int32 [batch], keys after this step."""
    max_kv_length: int | None = None


class Attention:
    """o(softmax(cap(q . k * scale)) v), causal; heads share keys and values in groups.

    q, k, v, o are Linear layers; q_norm and k_norm are RMS weights [head_dim] or None; `window`: how many positions
    a query sees, its own included, or None.
    """

    def __init__(self, q, k, v, o, *, layer, head_dim, scale, window=None, softcap=None, q_norm=None, k_norm=None, eps=1e-6):
        self.q, self.k, self.v, self.o = q, k, v, o
        self.layer, self.head_dim, self.scale, self.window, self.softcap = layer, head_dim, scale, window, softcap
        self.q_norm, self.k_norm, self.eps = q_norm, k_norm, eps

    def __call__(self, x, step):
        """x [batch, seq, hidden] -> the same shape. Writes this layer's part of step.cache, if there is one."""
        batch, seq, _ = x.shape
        q, k, v = (project(x).reshape(batch, seq, -1, self.head_dim) for project in (self.q, self.k, self.v))
        if self.q_norm is not None:
            q = head_norm(q, self.q_norm, eps=self.eps, out=q)
            k = head_norm(k, self.k_norm, eps=self.eps, out=k)
        q = rope(q, step.sin, step.cos, step.positions, out=q)
        k = rope(k, step.sin, step.cos, step.positions, out=k)
        if step.cache is not None:
            k_cache, v_cache = step.cache.k[self.layer], step.cache.v[self.layer]
            kv_append(k, v, k_cache, v_cache, step.positions)
            k, v = k_cache, v_cache
        mixed = attention(
            q,
            k,
            v,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            kv_lengths=step.kv_lengths,
            max_kv_length=step.max_kv_length,
        )
        return self.o(mixed.reshape(batch, seq, -1))

    def linears(self):
        return [self.q, self.k, self.v, self.o]
