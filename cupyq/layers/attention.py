"""Self-attention: projections, head norms, RoPE, cache, and the output projection."""

from dataclasses import dataclass
from typing import Any

from cupyq._arrays import float16
from cupyq.layers.joined import JoinedLinear, matrices_of
from cupyq.ops.activation import clamp
from cupyq.ops.attention import attention
from cupyq.ops.kv_append import kv_append
from cupyq.ops.qkv_append import qkv_append
from cupyq.ops.qmatmul import qmatmul
from cupyq.ops.rope import rope


@dataclass
class Step:
    """Where the tokens of one forward pass stand; the same for every layer."""

    sin: Any
    """float32 [context, rotary_dim / 2], and cos; None where no layer rotates by them."""
    cos: Any
    positions: Any
    """int32 [batch], of each row's first token."""
    cache: Any = None
    """KVCache or PagedKVCache, or None where the tokens see each other only."""
    kv_lengths: Any = None
    """int32 [batch], keys after this step."""
    adapters: Any = None
    """The LoRA adapters of each request, a Selection, or None."""
    workspace: Any = None
    """float32, zero when first used, of `qmatmul_workspace_size` for the largest product; None: each allocates its own."""
    attention_workspace: Any = None
    """float32, zero when first used, of `attention_workspace_size`, or None."""


class Attention:
    """o(softmax(cap(q . k * scale)) v), causal; heads share keys and values in groups.

    q, k, v, o are Linear layers; q_norm and k_norm are HeadNorms or None; `window`: how many positions a query sees, its
    own included, or None; `sinks`: float32 [heads], as ops.attention takes them, or None; `rope_style`: "neox", "gptj" or
    None for no rotation; `clip`: q, k and v are kept between minus this and this, or None; `tables`: (sin, cos) of this layer
    in place of step's, or None. Where tables are narrower than half of head_dim, the first columns of each head turn and the
    others stay. A cache may hold numbers or codes, in one piece or in pages; float32 goes into codes by way of float16.
    Quantized q, k and v are one product where there is a cache, and what follows it, RMSNorms of heads, rotation and
    appending, one launch.
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
        sinks=None,
        q_norm=None,
        k_norm=None,
        rope_style="neox",
        clip=None,
        tables=None,
    ):
        if rope_style not in ("neox", "gptj", None):
            raise ValueError(f'rope_style must be "neox", "gptj" or None, got {rope_style!r}')
        self.q, self.k, self.v, self.o = q, k, v, o
        self.layer, self.head_dim, self.scale, self.window, self.softcap = layer, head_dim, scale, window, softcap
        self.sinks, self.q_norm, self.k_norm, self.rope_style = sinks, q_norm, k_norm, rope_style
        self.clip, self.tables = clip, tables
        self._joined = JoinedLinear(q, k, v)

    def __call__(self, x, step, *, norm=None, residual=None):
        """x [batch, seq, hidden] -> the same shape; or, with a residual, into it what is added to it.

        Writes this layer's part of step.cache, if there is one. norm: an InputNorm to be applied to x first.
        """
        cache, block_table = step.cache, None
        joined = self._fused(step)
        if joined is not None:
            q = self._project_and_append(x, step, joined, norm)
        else:
            if norm is not None:
                x = norm.applied(x)
            q, k, v = self.project(x, step)
            if cache is not None:
                if cache.is_narrower:
                    q, k, v = (array.astype(float16) for array in (q, k, v))
                kv_append(k, v, cache.k[self.layer], cache.v[self.layer], step.positions, block_table=cache.block_table)
        if cache is not None:
            k, v, block_table = cache.k[self.layer], cache.v[self.layer], cache.block_table
        mixed = attention(
            q,
            k,
            v,
            scale=self.scale,
            window=self.window,
            softcap=self.softcap,
            sinks=self.sinks,
            kv_lengths=step.kv_lengths,
            block_table=block_table,
            workspace=step.attention_workspace,
        )
        if cache is not None and cache.is_narrower:
            mixed = mixed.astype(cache.dtype)
        return self.output(mixed, step, residual)

    def _fused(self, step):
        """q, k and v as one matrix where one product and one launch more can do `project` and the appending, else None."""
        norms = [norm for norm in (self.q_norm, self.k_norm) if norm is not None]
        is_known = all(norm.kind == "rms" and norm.bias is None for norm in norms)
        is_alike = len({(norm.eps, norm.weight.dtype) for norm in norms}) <= 1
        if step.cache is None or step.cache.is_narrower or self.clip is not None or not (is_known and is_alike):
            return None
        return self._joined.matrix_for((self.q, self.k, self.v), step.adapters)

    def _project_and_append(self, x, step, joined, norm):
        """q; k and v are in the cache."""
        tables, cache = self._tables(step), step.cache
        heads = {"q_norm": self.q_norm, "k_norm": self.k_norm}
        head_norms = {name: head_norm.weight for name, head_norm in heads.items() if head_norm is not None}
        if head_norms:
            head_norms["eps"] = (self.q_norm or self.k_norm).eps
        qkv = qmatmul(x, joined, before=norm, workspace=step.workspace)
        return qkv_append(
            qkv, cache.k[self.layer], cache.v[self.layer], *tables, step.positions,
            heads=self.q.n // self.head_dim, style=self.rope_style, block_table=cache.block_table, **head_norms,
        )  # fmt: skip

    def project(self, x, step):
        """q [batch, seq, heads, head_dim] and k, v [batch, seq, kv_heads, head_dim] of x [batch, seq, hidden].

        q and k are normed and turned: what attention takes and a cache keeps.
        """
        batch, seq, _ = x.shape
        q, k, v = (
            projection(x, adapters=step.adapters, workspace=step.workspace).reshape(batch, seq, -1, self.head_dim)
            for projection in (self.q, self.k, self.v)
        )
        if self.clip is not None:
            q, k, v = (clamp(array, self.clip, out=array) for array in (q, k, v))
        if self.q_norm is not None:
            q = self.q_norm(q)
        if self.k_norm is not None:
            k = self.k_norm(k)
        if self.rope_style is not None:
            tables = self._tables(step)
            q = rope(q, *tables, step.positions, style=self.rope_style, out=q)
            k = rope(k, *tables, step.positions, style=self.rope_style, out=k)
        return q, k, v

    def _tables(self, step):
        """(sin, cos), or (None, None) where this layer does not rotate."""
        if self.rope_style is None:
            return None, None
        if self.tables is not None:
            return self.tables
        if step.sin is None:
            raise ValueError(f"step.sin is None, but layer {self.layer} rotates: pass tables, as rope_tables makes them")
        return step.sin, step.cos

    def output(self, mixed, step, residual=None):
        """[batch, seq, hidden] of attention's result, [batch, seq, heads, head_dim]; or, with a residual, into it."""
        batch, seq = mixed.shape[:2]
        mixed = mixed.reshape(batch, seq, -1)
        return self.o(mixed, adapters=step.adapters, residual=residual, out=residual, workspace=step.workspace)

    def linears(self):
        return [self.q, self.k, self.v, self.o]

    def matrices(self):
        """Quantized matrices of its products, joined ones included."""
        return matrices_of(self.linears(), self._joined)
