"""Self-attention: projections, head norms, RoPE, cache, and the output projection."""

from dataclasses import dataclass
from typing import Any

from cupyq.ops.attention import attention
from cupyq.ops.kv_append import kv_append
from cupyq.ops.rope import rope


@dataclass
class Step:
    """Where the tokens of one forward pass stand; the same for every layer."""

    sin: Any
    """float32 [context, rotary_dim / 2], and cos; None where no layer rotates."""
    cos: Any
    positions: Any
    """int32 [batch], of each row's first token."""
    cache: Any = None
    """KVCache, or None where the tokens see each other only."""
    kv_lengths: Any = None
    """int32 [batch], keys after this step."""
    max_kv_length: int | None = None
    adapters: Any = None
    """The LoRA adapters of each request, a Selection, or None."""


class Attention:
    """o(softmax(cap(q . k * scale)) v), causal; heads share keys and values in groups.

    q, k, v, o are Linear layers; q_norm and k_norm are HeadNorms or None; `window`: how many positions a query sees, its
    own included, or None; `rope_style`: "neox", "gptj" or None for no rotation. Where step's tables are narrower than
    half of head_dim, the first columns of each head turn and the others stay.
    """

    def __init__(
        self,
        q,
        k,
        v,
        o,
        *,
        layer,
        head_dim,
        scale,
        window=None,
        softcap=None,
        q_norm=None,
        k_norm=None,
        rope_style="neox",
    ):
        if rope_style not in ("neox", "gptj", None):
            raise ValueError(f'rope_style must be "neox", "gptj" or None, got {rope_style!r}')
        self.q, self.k, self.v, self.o = q, k, v, o
        self.layer, self.head_dim, self.scale, self.window, self.softcap = layer, head_dim, scale, window, softcap
        self.q_norm, self.k_norm, self.rope_style = q_norm, k_norm, rope_style

    def __call__(self, x, step):
        """x [batch, seq, hidden] -> the same shape. Writes this layer's part of step.cache, if there is one."""
        q, k, v = self.project(x, step)
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
        return self.output(mixed, step)

    def project(self, x, step):
        """q [batch, seq, heads, head_dim] and k, v [batch, seq, kv_heads, head_dim] of x [batch, seq, hidden].

        q and k are normed and turned: what attention takes and a cache keeps.
        """
        batch, seq, _ = x.shape
        q, k, v = (
            projection(x, adapters=step.adapters).reshape(batch, seq, -1, self.head_dim)
            for projection in (self.q, self.k, self.v)
        )
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        if self.rope_style is not None:
            if step.sin is None:
                raise ValueError(f"step.sin is None, but layer {self.layer} rotates: pass tables, as rope_tables makes them")
            q = rope(q, step.sin, step.cos, step.positions, style=self.rope_style, out=q)
            k = rope(k, step.sin, step.cos, step.positions, style=self.rope_style, out=k)
        return q, k, v

    def output(self, mixed, step):
        """[batch, seq, hidden] of attention's result, [batch, seq, heads, head_dim]."""
        batch, seq = mixed.shape[:2]
        return self.o(mixed.reshape(batch, seq, -1), adapters=step.adapters)

    def linears(self):
        return [self.q, self.k, self.v, self.o]
