"""A rank's model: the ordinary one, of its part of the layers, with the logits of all ranks joined."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyq._copies import to_host
from cupyq._kernels import is_tracing
from cupyq.layers import Linear
from cupyq.layers.lora import LowRank
from cupyq.models import Model
from cupyq.tp.comm import Comm, gather_bytes
from cupyq.tp.layers import NoHeads, SummedMoE, leave_sums_to_norms
from cupyq.tp.plan import TPPlan


@dataclass(frozen=True)
class Share:
    """What a rank has of a linear layer of k inputs and n outputs."""

    k: int
    n: int
    columns: range | np.ndarray | None = None
    """Its outputs; None: all."""
    rows: range | np.ndarray | None = None
    """Its inputs; None: all."""

    @property
    def is_empty(self) -> bool:
        return any(part is not None and len(part) == 0 for part in (self.columns, self.rows))


class RankModel(Model):
    """What `tp.load_model` makes: a Model to call as any other, on every rank with the same arguments in the same order.

    Logits and tokens are those of the whole model, and the same bits on all ranks; so are seeds that nobody chose. Caches hold
    the KV heads of this rank, `kv_heads` of them. `linear_layers` and `bits_per_weight` tell of this rank's part, `config` and
    `parameters` of the whole. An error on one rank ends the others' work: `with comm:` around all of it sees to that.
    """

    def __init__(self, *, comm: Comm, plan: TPPlan, shares: Mapping[str, Share], **parts: Any):
        """shares: of every linear layer, by its key in the checkpoint. parts: what Model takes."""
        super().__init__(**parts)
        self.comm, self.plan, self.is_part = comm, plan, comm.ranks > 1
        self.kv_heads = len(plan.kv_heads[comm.rank])
        self._shares = shares
        self._vocab_sizes = [len(part) for part in plan.vocab]
        self._vocab_sizes[-1] += shares["lm_head"].n - self.config.vocab_size
        self._absent = {
            key.removeprefix("model."): Linear(self.xp.empty((0, 0), self.dtype), name=key)
            for key, share in shares.items()
            if share.is_empty
        }
        if self.head.weight is self.embedding:
            mine = plan.vocab[comm.rank]
            stored = self.head.stored_dtype
            self.head = Linear(self.embedding[mine.start : mine.stop], None, self.head.name, stored)
        for layer in self.layers:
            if layer.attention.q is None:
                layer.attention = NoHeads(comm)
            if hasattr(layer.mlp, "router"):
                layer.mlp = SummedMoE(layer.mlp, comm)
        self.norm = leave_sums_to_norms(self.layers, self.norm, comm)

    def _arrays_of(self, projection: str, linear: Linear, pair: LowRank) -> tuple[np.ndarray, np.ndarray]:
        share = self._shares["lm_head" if projection == "lm_head" else f"model.{projection}"]
        pair.check(share.k, self.config.vocab_size if projection == "lm_head" else share.n)
        a, b = pair.arrays(self.dtype, share.n)
        if share.columns is not None:
            b = np.ascontiguousarray(b[:, np.asarray(share.columns, np.int64)])
        if share.rows is not None:
            a = np.ascontiguousarray(a[np.asarray(share.rows, np.int64)])
        return a, b

    def _linears_by_projection(self) -> dict[str, Linear]:
        return super()._linears_by_projection() | self._absent

    def _joined(self, logits: Any) -> Any:
        if self.comm.ranks == 1:
            return logits
        if is_tracing():
            return self.xp.empty((*logits.shape[:-1], sum(self._vocab_sizes)), logits.dtype)
        return self.comm.all_gather(logits, axis=-1, sizes=self._vocab_sizes)

    def new_seed(self) -> int:
        seed = super().new_seed()
        if is_tracing():
            return seed
        word = self.xp.asarray(np.array([seed], np.uint32).view(np.int32))
        self.comm.broadcast(word)
        return int(self._on_host(word).view(np.uint32)[0])

    def _on_host(self, array: Any) -> np.ndarray:
        self.comm.wait()
        return to_host(array)

    def agreed(self, flag: bool) -> bool:
        return any(map(any, gather_bytes(self.comm, np.int32(flag).tobytes())))

    def check(self) -> None:
        self.comm.check()

    def adopt(self, graph: Any) -> Any:
        return self.comm.adopt(graph)

    def launch(self, graph: Any) -> None:
        self.comm.launch(graph)
