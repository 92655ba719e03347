"""A model folder to a rank's model: the loader of models/, which keeps and reads this rank's part of each linear layer."""

import os
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from cupyq.errors import BackendError
from cupyq.formats.safetensors import Checkpoint
from cupyq.models import ModelConfig, upload
from cupyq.models.loader import Blueprint, Part, Plan, choose_dtype, read_config
from cupyq.models.warmup import compile_kernels
from cupyq.tp.bootstrap import check_same, model_digest
from cupyq.tp.comm import Comm
from cupyq.tp.layers import SummedLinear
from cupyq.tp.model import RankModel, Share
from cupyq.tp.plan import TPPlan
from cupyq.tp.reading import linear_tensors, read_columns, read_rows
from cupyq.tp.split import stored_features

_AHEAD = 2  # parts that are read while one is built


def load_model(
    path: str | os.PathLike[str],
    comm: Comm,
    *,
    weights: Sequence[float] | None = None,
    dtype: Any = None,
    max_seq_len: int | None = None,
) -> RankModel:
    """This rank's part of the model in a folder; every rank calls it, with the same arguments.

    comm: says which rank this is, and where: on NumPy, or on a GPU. weights: one number for each rank, in proportion to what
    it is to hold; None: equal. dtype and max_seq_len: as `cupyq.load_model` takes them. The folder may be another copy on every
    host. Each rank reads its own part of the weights; on NumPy, too, that lies in memory then.
    Errors are those of `cupyq.load_model`, ValueError for more ranks than the model can be split over, and BackendError on
    every rank where they differ in model or arguments, which names them. An error on one rank ends the others' waiting.
    """
    try:
        activations = choose_dtype(dtype, comm.xp)
        config = read_config(path, max_seq_len)
        split = TPPlan.of(config, comm.ranks, weights)
        check_same(comm, {"model": model_digest(path)})  # first: another model has other sizes as well
        parts = (split.heads, split.inner, split.vocab)
        check_same(comm, {"dtype": activations, "max_seq_len": config.max_seq_len, "weights": parts})
        with comm._on_device():
            with Checkpoint(path) as checkpoint:
                plan = RankPlan(config, checkpoint, comm.xp, activations, comm, split)
                blueprint = Blueprint(plan)
                blueprint.load()
                model = blueprint.model(make=partial(RankModel, comm=comm, plan=split, shares=plan.shares()))
            if comm.xp is not np:
                compile_kernels(model)
        comm.barrier()
        return model
    except BaseException as error:
        comm.abort(error if isinstance(error, BackendError) else f"{type(error).__name__}: {error}")
        raise


class RankPlan(Plan):
    """The plan of a whole model, every name and shape of it checked, of which a rank's part is read and kept."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, xp: Any, activations: np.dtype, comm: Comm, split: TPPlan):
        super().__init__(config, checkpoint, xp, activations)
        self.comm, self.split = comm, split
        row, rank = config.architecture, comm.rank
        heads, kv_heads, inner = split.head_columns(rank), split.kv_columns(rank), split.inner[rank]
        self._columns = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads, row.gate: inner, row.up: inner}
        self._columns["lm_head"] = split.vocab[rank]
        self._rows = {"o_proj": heads, row.down: inner}
        self._sizes: dict[str, tuple[int, int]] = {}
        self._features: dict[str, range | np.ndarray] = {}  # of each MLP, by the key of its down projection

    def linear(self, key: str, k: int, n: int, has_bias: bool = False, is_padded: bool = False) -> Part:
        part = super().linear(key, k, n, has_bias, is_padded)
        self._sizes[key] = k, self._stored_width(key) if is_padded else n
        name, build = _last(key), part.build
        if not all(self.held(key, k, n)):
            part.build = lambda tensors: None
        elif name == "o_proj" or (name == self.config.architecture.down and not self.config.num_experts):
            part.build = lambda tensors: SummedLinear(build(tensors), self.comm)
        return part

    def held(self, key: str, k: int, n: int) -> tuple[int, int]:
        name = _last(key)
        return len(self._rows.get(name, range(k))), len(self._columns.get(name, range(n)))

    def _stored_width(self, key: str) -> int:
        """Outputs of the head, those included that a quantizer has padded it with."""
        for short, axis in (("q_weight", 1), ("qweight", 1), ("weight", 0)):
            if f"{key}.{short}" in self.checkpoint:
                return int(self.checkpoint.info(f"{key}.{short}").shape[axis])
        return self.config.vocab_size

    def shares(self) -> dict[str, Share]:
        """What this rank has of every linear layer."""
        sizes = {"lm_head": (self.config.hidden_size, self.config.vocab_size)} | self._sizes  # the first: where it is tied
        return {key: self._share(key, *size) for key, size in sizes.items()}

    def _share(self, key: str, k: int, n: int) -> Share:
        name, row = _last(key), self.config.architecture
        if name == "lm_head":
            mine = self._columns[name]  # what pads it is the last rank's
            return Share(k, n, columns=range(mine.start, n if self.comm.rank == self.comm.ranks - 1 else mine.stop))
        if name in (row.gate, row.up):
            return Share(k, n, columns=self._features_of(f"{key.rpartition('.')[0]}.{row.down}"))
        if name == row.down:
            return Share(k, n, rows=self._features_of(key))
        return Share(k, n, columns=self._columns.get(name), rows=self._rows.get(name))

    def _features_of(self, down: str) -> range | np.ndarray:
        """The inner features of an MLP: any may be a rank's, and those of a range of stored rows pad nothing."""
        if down not in self._features:
            mine = self._rows[_last(down)]
            tensors = linear_tensors(self.checkpoint, down)
            chosen = stored_features(tensors, mine.start, mine.stop, group_size=self._group_size, name=down)
            is_range = bool((np.diff(chosen) == 1).all())
            self._features[down] = range(int(chosen[0]), int(chosen[-1]) + 1) if is_range else chosen
        return self._features[down]

    @property
    def _group_size(self) -> int | None:
        quantization = self.config.quantization
        return quantization.group_size if quantization is not None and quantization.method == "gptq" else None

    def read(self, parts: Iterable[Part]) -> Generator[tuple[Part, dict[str, Any]], None, None]:
        waiting: deque[tuple[Part, Any]] = deque()
        with ThreadPoolExecutor(1, "cupyq-reading") as thread:
            for part in parts:
                waiting.append((part, thread.submit(self._tensors_of, part)))
                if len(waiting) > _AHEAD:
                    yield self._placed(*waiting.popleft())
            while waiting:
                yield self._placed(*waiting.popleft())

    def _placed(self, part: Part, coming: Any) -> tuple[Part, dict[str, Any]]:
        tensors = coming.result()
        if self.xp is np:
            return part, tensors
        stay = {short for short, wanted in part.tensors.items() if wanted.on_host} | {"g_idx", "row_input"}
        return part, {short: array if short in stay else self.xp.asarray(array) for short, array in tensors.items()}

    def _tensors_of(self, part: Part) -> dict[str, np.ndarray]:
        """This rank's tensors of a part, on the host."""
        share = self._share(part.key, *self._sizes[part.key]) if part.key in self._sizes else None
        if share is None or share.columns is share.rows is None:
            ((_, whole),) = upload.read(self.checkpoint, [part], np)
            return whole
        if share.is_empty:
            return {}
        if share.columns is not None:
            found = read_columns(self.checkpoint, part.key, share.columns, group_size=self._group_size)
        else:
            found = read_rows(self.checkpoint, part.key, share.rows, group_size=self._group_size)
        tensors = {}
        for short, array in found.items():
            wanted = part.tensors.get(short)
            if wanted is not None and wanted.dtype is not None and wanted.dtype != array.dtype:
                array = upload.converted(self.checkpoint, wanted.name, array, wanted.dtype)
            if wanted is not None or short in ("g_idx", "row_input"):  # those may be the part's alone
                tensors[short] = array
        return tensors


def _last(key: str) -> str:
    return key.rpartition(".")[2]
