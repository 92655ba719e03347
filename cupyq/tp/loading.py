"""A model folder to a rank's model: the loader of models/, which keeps and reads this rank's part of each linear layer."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from cupyq.errors import BackendError
from cupyq.formats.safetensors import Checkpoint
from cupyq.formats.stored import stored_tensors
from cupyq.layers import Linear
from cupyq.models import ModelConfig, upload
from cupyq.models.loader import Blueprint, choose_dtype, read_config
from cupyq.models.parts import Part, Plan
from cupyq.models.upload import Wanted
from cupyq.models.warmup import compile_kernels
from cupyq.tp.bootstrap import check_same, model_digest
from cupyq.tp.comm import Comm
from cupyq.tp.layers import SummedLinear
from cupyq.tp.model import RankModel, Share
from cupyq.tp.plan import TPPlan
from cupyq.tp.reading import linear_tensors, read_columns, read_rows
from cupyq.tp.split import stored_features, take_columns, take_rows

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
        parts = (split.heads, split.inner, split.experts, split.vocab)
        check_same(comm, {"dtype": activations, "max_seq_len": config.max_seq_len, "weights": parts})
        with comm.on_device():
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
        self._heads, self._kv_heads = split.heads[rank], split.kv_heads[rank]
        heads, kv_heads = split.head_columns(rank), split.kv_columns(rank)
        self._columns = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads, "lm_head": split.vocab[rank]}
        self._gates = [name for name in (row.gate, row.up) if name is not None]
        self._features: dict[str, range | np.ndarray] = {}  # of each MLP, by the key of its down projection

    def _is_of_expert(self, key: str) -> bool:
        row = self.config.architecture
        return row.has_experts and f".{row.mlp}.{row.experts}." in key

    def _inner(self, key: str) -> range:
        """Inner features of an MLP, counted as its down projection stores them."""
        return (self.split.experts if self._is_of_expert(key) else self.split.inner)[self.comm.rank]

    def maker(self, key: str, make: Callable[[dict[str, Any]], Linear]) -> Callable[[dict[str, Any]], Any]:
        name = _last(key)
        if name in ("q_proj", "o_proj") and not self._heads or name in ("k_proj", "v_proj") and not self._kv_heads:
            return lambda tensors: None
        if name == "o_proj" or (name == self.config.architecture.down and not self._is_of_expert(key)):
            return lambda tensors: SummedLinear(make(tensors), self.comm)
        return make

    def held(self, key: str, k: int, n: int) -> tuple[int, int]:
        name = _last(key)
        if name in self._gates:
            return k, len(self._inner(key))
        if name == self.config.architecture.down:
            return len(self._inner(key)), n
        if name == "o_proj":
            return len(self._columns["q_proj"]), n
        return k, len(self._columns.get(name, range(n)))

    def head_norm(self, key: str, heads: int) -> Part:
        part = super().head_norm(key, heads)
        if self.config.architecture.has_norm_per_head:
            mine, build = self._heads if _last(key) == "q_norm" else self._kv_heads, part.build
            part.build = lambda tensors: build({name: array[mine.start : mine.stop] for name, array in tensors.items()})
        return part

    def _stored_width(self, key: str) -> int:
        """Outputs of the head, those included that a quantizer has padded it with."""
        names = stored_tensors(self.checkpoint, key)
        if not names:
            return self.config.vocab_size
        return int(self.checkpoint.info(f"{key}.{names[0]}").shape[1 if self._is_quantized(key) else 0])

    def shares(self) -> dict[str, Share]:
        """What this rank has of every linear layer."""
        sizes = {"lm_head": (self.config.hidden_size, self.config.vocab_size)}  # also where it is tied
        for part in self.parts:
            sizes |= part.linears
        return {key: self._share(key, *size) for key, size in sizes.items()}

    def _share(self, key: str, k: int, n: int) -> Share:
        name, row = _last(key), self.config.architecture
        if name == "lm_head":
            mine, n = self._columns[name], self._stored_width(key)  # what pads it is the last rank's
            return Share(k, n, columns=range(mine.start, n if self.comm.rank == self.comm.ranks - 1 else mine.stop))
        if name in self._gates:
            return Share(k, n, columns=self._features_of(f"{key.rpartition('.')[0]}.{row.down}"))
        if name == row.down:
            return Share(k, n, rows=self._features_of(key))
        if name == "o_proj":
            return Share(k, n, rows=self._columns["q_proj"])
        return Share(k, n, columns=self._columns.get(name))

    def _features_of(self, down: str) -> range | np.ndarray:
        """The inner features of an MLP: any may be a rank's, and those of a range of stored rows pad nothing."""
        mine = self._inner(down)
        if not self._is_quantized(down):
            return mine
        if down not in self._features:
            tensors = linear_tensors(self.checkpoint, down)
            chosen = stored_features(tensors, mine, group_size=self._group_size, name=down)
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
        if part.take_apart is None:
            tensors = self._on_device(tensors, part.tensors)
        return part, tensors

    def _on_device(self, tensors: dict[str, np.ndarray], wanted: Mapping[str, Wanted]) -> dict[str, Any]:
        if self.xp is np:
            return tensors
        stay = {short for short, tensor in wanted.items() if tensor.on_host} | {"g_idx", "row_input"}
        return {short: array if short in stay else self.xp.asarray(array) for short, array in tensors.items()}

    def taken_apart(self, part: Part, tensors: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
        """On the host, and of each layer what is this rank's."""
        for (key, size), own in zip(part.linears.items(), part.take_apart(tensors), strict=True):
            share = self._share(key, *size)
            if share.is_empty:
                yield {}
                continue
            if share.columns is not None:
                own = take_columns(own, share.columns, group_size=self._group_size, name=key)
            if share.rows is not None:
                own = take_rows(own, share.rows, group_size=self._group_size, name=key)
            yield self._on_device(own, part.tensors)

    def _tensors_of(self, part: Part) -> dict[str, np.ndarray]:
        """This rank's tensors of a part, on the host; of those that are to be taken apart, all."""
        if part.take_apart is not None or part.key not in part.linears:
            return self._whole(part)
        share = self._share(part.key, *part.linears[part.key])
        if share.columns is share.rows is None:
            return self._whole(part)
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

    def _whole(self, part: Part) -> dict[str, np.ndarray]:
        ((_, whole),) = upload.read(self.checkpoint, [part], np)
        return whole


def _last(key: str) -> str:
    return key.rpartition(".")[2]
