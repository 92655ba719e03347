"""What the attention kernels are told: the sizes, options and tables of one checked call."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class AttentionProblem:
    """One call of attention(), checked: what each kernel's launch(problem, q, k, v, out, workspace) reads.

    q and out are [batch, seq, heads, head_dim], or, with query_starts, [tokens, heads, head_dim]. k and v are arrays
    [pages, page_size, kv_heads, head_dim] of q's dtype, or CacheCodes of that shape. Without a block table page b is
    sequence b whole: page_size is the capacity (any number), pages the rows of the arrays (at least batch), max_pages 1.
    """

    batch: int  # sequences
    most_queries: int  # of one sequence: seq; with query_starts all tokens of q, the only bound the host knows
    heads: int
    kv_heads: int  # a divisor of heads
    head_dim: int  # a multiple of 8 from 8 to 256
    capacity: int  # keys that a sequence may have: max_pages * page_size
    page_size: int  # with a block table a power of two
    max_pages: int  # columns of block_table, or 1
    pages: int  # rows of k and v
    causal: bool
    window: int | None  # keys that a query sees, its own included, from 1 on; None for all
    scale: float  # positive, finite
    softcap: float | None  # positive, finite; None for none
    kv_lengths: Any = None  # int32 [batch] on the device: valid keys, to be clamped to 0..capacity; None: all of capacity
    block_table: Any = None  # int32 [batch, max_pages] on the device, to be clamped to 0..pages - 1; None: contiguous
    query_starts: Any = None  # int32 [batch + 1] on the device: sequence b owns rows query_starts[b]..query_starts[b + 1]
    sinks: Any = None  # float32 [heads] on the device: a logit per head, after scale and softcap, without a value

    @property
    def group(self):
        """Query heads per kv head."""
        return self.heads // self.kv_heads

    @property
    def is_paged(self):
        return self.block_table is not None

    @property
    def kernel_window(self):
        """The window as kernels take it: a number of keys that is at least every length where there is none."""
        return max(self.capacity, 1) if self.window is None else min(self.window, max(self.capacity, 1))

    @property
    def kernel_softcap(self):
        """The softcap as kernels take it: 0 for none."""
        return 0.0 if self.softcap is None else self.softcap
