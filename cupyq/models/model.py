"""A decoder and its ends: token ids in, logits out."""

import functools
import os
import secrets
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cupyq import _fork
from cupyq._arrays import float32, is_cupy
from cupyq.layers import DecoderLayer, KVCache, Linear, PagedKVCache, RMSNorm, Step
from cupyq.layers.cache import check_cache_kind
from cupyq.layers.lora import LowRank, Selection
from cupyq.models.adapters import AdapterTable
from cupyq.models.config import ModelConfig
from cupyq.models.decoder import Decoder
from cupyq.models.sampler import MAX_SEED, SamplerSettings
from cupyq.models.warmup import compile_kernels
from cupyq.ops._common import whole_number
from cupyq.ops.activation import softcap
from cupyq.ops.attention import attention_workspace_size
from cupyq.ops.elementwise import add
from cupyq.ops.embedding import embedding
from cupyq.ops.qmatmul import FUSED_ROWS, qmatmul_workspace_size
from cupyq.ops.qmatmul_config import COUNTERS

PREFILL_CHUNK = 2048
"""Tokens of a row that pass through the layers at once when there is a cache: bounds the memory of activations."""


class LinearInfo(NamedTuple):
    """One linear layer, as `Model.linear_layers` lists it."""

    name: str
    shape: tuple[int, int]
    """(K, N): inputs and outputs."""
    kind: str
    """exl2, gptq, or the dtype of an unquantized weight."""
    bits_per_weight: float
    """Scales, zeros and permutation included."""
    storage_bits: int


class Model:
    """A loaded model; see `load_model`. `config`, `xp` (numpy or cupy), `backend`, `dtype` of the activations."""

    def __init__(
        self,
        *,
        config: ModelConfig,
        xp: Any,
        dtype: np.dtype,
        embedding: Any,
        layers: Sequence[DecoderLayer],
        norm: RMSNorm,
        head: Linear,
        sin: Any,
        cos: Any,
        parameters: int,
        places: Any = None,
    ):
        """places: the embedding of learned positions, or None."""
        self.config, self.xp, self.dtype = config, xp, dtype
        self.embedding, self.layers, self.norm, self.head = embedding, list(layers), norm, head
        self.sin, self.cos, self.places = sin, cos, places
        self.parameters = parameters
        """Weights of the whole model; tied ones count once."""
        self.kv_heads = config.num_key_value_heads
        """Of its attention and its caches."""
        self._adapters = AdapterTable(xp)
        self._compiled_caches = {"fp16"}  # kinds whose kernels are compiled; `load_model` sees to the first
        # The residual is kept divided by what would multiply all that layers add to it: norms take that out again.
        self._embedding_scale = config.embedding_scale / config.residual_scale

    @property
    def backend(self) -> str:
        return "numpy" if self.xp is np else "cupy"

    # --- what it is made of ---

    def linear_layers(self) -> Iterator[LinearInfo]:
        """Every linear layer of the decoder in order, then the head; routers are not listed."""
        for linear in (*self._decoder_linears(), self.head):
            shape = (linear.k, linear.n)
            yield LinearInfo(linear.name, shape, linear.kind, linear.bits_per_weight, linear.storage_bits)

    def _decoder_linears(self) -> list[Linear]:
        return [linear for layer in self.layers for linear in layer.linears()]

    @property
    def bits_per_weight(self) -> float:
        """Mean over the decoder's linear layers, scales and permutation included; embedding and head do not count."""
        linears = self._decoder_linears()
        return sum(linear.storage_bits for linear in linears) / sum(linear.k * linear.n for linear in linears)

    @property
    def format(self) -> str:
        """exl2, gptq, or the dtype of unquantized weights; "mixed" where the decoder's layers differ."""
        kinds = {linear.kind for linear in self._decoder_linears()}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    # --- adapters ---

    @property
    def adapters(self) -> list[str]:
        """Names of the loaded LoRA adapters, in the order they were loaded."""
        return self._adapters.names

    def load_adapter(self, folder: str | os.PathLike[str], name: str | None = None, scaling: float = 1.0) -> str:
        """Load a LoRA adapter from a PEFT folder, beside those already loaded -> its name (default: the folder's).

        The folder holds adapter_config.json and adapter_model.safetensors; `scaling` multiplies what its config says.
        Any projection of the decoder, its experts and routers included, and lm_head may have a part, of any rank. The
        adapter takes effect where `forward` is told so. FormatError names file and tensor or key, UnsupportedError what
        of PEFT cupyq does not do; ValueError for a name that is taken. Where an error is raised, nothing has changed.
        """
        name = self._adapters.load(folder, name, scaling, self._linears_by_projection(), self._arrays_of)
        if self.xp is not np:
            try:
                compile_kernels(self, name)
            except BaseException:
                self.unload_adapter(name)
                raise
        return name

    def unload_adapter(self, name: str) -> None:
        """Forget a loaded adapter; ValueError where none has this name."""
        self._adapters.unload(name, self._linears_by_projection())

    def select_adapters(self, adapters: Any, batch: int) -> Selection | None:
        """What `forward` takes as `adapters`, looked up; the same object as long as nothing is loaded or unloaded."""
        return self._adapters.select(adapters, batch)

    def _arrays_of(self, projection: str, linear: Linear, pair: LowRank) -> tuple[np.ndarray, np.ndarray]:
        """An adapter's a [K, rank] and b [rank, N] for a Linear, after the check that they are for such a one."""
        pair.check(linear.k, self.config.vocab_size if projection == "lm_head" else linear.n)
        return pair.arrays(self.dtype, linear.n)

    def _linears_by_projection(self) -> dict[str, Linear]:
        routers = [layer.mlp.router for layer in self.layers if hasattr(layer.mlp, "router")]
        return {linear.name.removeprefix("model."): linear for linear in (*self._decoder_linears(), *routers, self.head)}

    # --- running it ---

    def new_cache(self, batch: int = 1, capacity: int | None = None, kind: str = "fp16") -> KVCache:
        """An empty cache for `batch` rows of up to `capacity` tokens (default: the model's max_seq_len).

        kind: "fp16", which stands for the model's own dtype, or codes: "fp8", "e4m3", "q4", "q6", "q8" (see `KVCache`). On
        a GPU the first cache of a kind compiles its kernels. UnsupportedError for a kind that cannot hold this head_dim.
        """
        limit = self.config.max_seq_len
        capacity = limit if capacity is None else whole_number(capacity, "capacity", 1)
        if capacity > limit:
            raise ValueError(f"capacity must be at most {limit}, the model's context, got {capacity}")
        self.prepare_cache(kind)
        return KVCache(self.xp, batch=batch, capacity=capacity, **self._cache_options(kind))

    def new_paged_cache(
        self, pages: int, batch: int = 1, max_pages: int | None = None, *, page_size: int = 256, kind: str = "fp16"
    ) -> PagedKVCache:
        """An empty cache of `pages` pages, which `batch` rows draw from, each up to `max_pages` of them.

        max_pages: default, what the model's context takes. kind: as `new_cache` takes it. Rows of one batch may have
        different lengths, and share the pages of a common beginning: see `PagedKVCache`.
        """
        limit = self.config.max_seq_len
        if max_pages is None:
            max_pages = -(-limit // whole_number(page_size, "page_size", 1))
        self.prepare_cache(kind)
        sizes = {"pages": pages, "batch": batch, "max_pages": max_pages, "page_size": page_size, "capacity": limit}
        return PagedKVCache(self.xp, **sizes, **self._cache_options(kind))

    def _cache_options(self, kind: str) -> dict[str, Any]:
        return {
            "layers": len(self.layers),
            "kv_heads": self.kv_heads,
            "head_dim": self.config.head_dim,
            "dtype": self.dtype,
            "kind": kind,
            "workspaces": {name: self.xp.zeros(size, float32) for name, size in self._workspace_sizes.items() if size},
        }

    def prepare_cache(self, kind: str) -> None:
        """Compile the kernels of caches of this kind, if that is still to be done."""
        check_cache_kind(kind)
        if self.xp is not np and kind not in self._compiled_caches:
            self._compiled_caches.add(kind)  # now, as finding the kernels takes a cache
            try:
                compile_kernels(self, cache=kind)
            except BaseException:
                self._compiled_caches.remove(kind)
                raise

    @functools.cached_property
    def _workspace_sizes(self) -> dict[str, int]:
        """float32 values of the workspaces of a Step, large enough for all layers; none on NumPy."""
        if self.xp is np:
            return {}
        return {
            "workspace": max((qmatmul_workspace_size(matrix, FUSED_ROWS) for matrix in self._matrices()), default=0),
            "attention_workspace": attention_workspace_size(self.config.head_dim),
        }

    @functools.cached_property
    def _values_per_row(self) -> int:
        """What a row beyond FUSED_ROWS adds to the workspace of the products."""
        sizes = [[qmatmul_workspace_size(matrix, FUSED_ROWS + more) for more in (0, 1)] for matrix in self._matrices()]
        return max(larger - smaller for smaller, larger in sizes)

    def _matrices(self) -> list[Any]:
        """Of all layers, and of the head where it is quantized."""
        matrices = [matrix for layer in self.layers for matrix in layer.matrices()]
        return [*matrices, self.head.weight] if self.head.is_quantized else matrices

    def decoder(
        self,
        batch: int = 1,
        max_len: int | None = None,
        *,
        settings: SamplerSettings | None = None,
        seed: int | None = None,
        adapters: Any = None,
        graph: bool = True,
        cache: str | PagedKVCache = "fp16",
    ) -> Decoder:
        """Continues `batch` texts of up to `max_len` tokens (default: the model's max_seq_len), a step as one CUDA graph.

        settings: how tokens are drawn (default: SamplerSettings()); seed, or settings.seed, decides which (default: a new
        one): text b is drawn with seed + b. adapters: as `forward` takes them, for all steps. graph=False launches the
        kernels of a step one by one, as NumPy models always run: the same bits, with more work for the host. cache: what keys
        and values are kept in, a kind as `new_cache` takes it; or a PagedKVCache of `batch` rows, which the decoder then has
        to itself.

            decoder = model.decoder(settings=SamplerSettings.greedy())
            first = decoder.start([prompt])  # int32 [1], on the GPU
            more = decoder.run(100)  # int32 [1, 100]; the host has waited for nothing yet

        Raises TypeError / ValueError for sizes, settings and adapters the model cannot take.
        """
        return Decoder(self, batch, max_len, settings=settings, seed=seed, adapters=adapters, graph=graph, cache=cache)

    def forward(
        self, ids: Any, cache: KVCache | PagedKVCache | None = None, *, last_only: bool = False, adapters: Any = None
    ) -> Any:
        """Logits, float32 [batch, seq, vocab_size]; seq is 1, the last position, with `last_only`.

        ids: whole numbers [batch, seq], or [seq] for one row; a list or a NumPy array, whose ids are checked here, or a
        CuPy array, whose ids are not (that would wait for the GPU): an id outside the vocabulary makes its row NaN.
        cache: ids continue what it holds, and are added to it; rows of a PagedKVCache may hold different numbers of tokens, and
        get the pages they need. Without one, ids are whole texts.
        adapters: the LoRA adapters to use. One choice for all rows: None, a name, a tuple of names, or a dict of names and
        the weights of their deltas; or a list with one such choice for each row.
        Raises TypeError / ValueError for wrong ids, a cache of another model or batch, more ids than fit, and adapters that
        are not loaded.
        """
        ids = self.checked_ids(ids)
        batch, seq = ids.shape
        selection = self._adapters.select(adapters, batch)
        if cache is None:
            if seq > self.config.max_seq_len:
                limit = self.config.max_seq_len
                raise ValueError(f"ids: {seq} tokens per row, but the model's context is {limit}: shorten them")
            positions = self.xp.zeros(batch, np.int32)
            workspaces = self._workspaces(ids.size, {})
            step = Step(self.sin, self.cos, positions, adapters=selection, **workspaces)
            return self.logits(self.hidden(ids, step), step, last_only)
        self.check_cache(cache, batch)
        cache.make_room(seq)
        with cache.kept_on_error():
            return self._forward_in_chunks(ids, cache, last_only, selection)

    def _forward_in_chunks(self, ids: Any, cache: KVCache | PagedKVCache, last_only: bool, selection: Selection | None) -> Any:
        batch, seq = ids.shape
        if seq <= PREFILL_CHUNK:
            return self.logits(*self._append(ids, cache, selection), last_only)
        logits = None if last_only else self.xp.empty((batch, seq, self.config.vocab_size), float32)
        for begin in range(0, seq, PREFILL_CHUNK):
            end = min(begin + PREFILL_CHUNK, seq)
            hidden, step = self._append(self.xp.ascontiguousarray(ids[:, begin:end]), cache, selection)
            if logits is not None:
                logits[:, begin:end] = self.logits(hidden, step, False)
        return self.logits(hidden, step, True) if logits is None else logits

    def _append(self, ids: Any, cache: KVCache | PagedKVCache, selection: Selection | None) -> tuple[Any, Step]:
        """Hidden states of new tokens, whose keys and values are added to the cache; and the step they made."""
        new = ids.shape[1]
        step = self.step(cache, new, cache.positions, cache.kv_lengths(new), selection)
        hidden = self.hidden(ids, step)
        cache.advance(new)
        return hidden, step

    # --- its parts, for those who keep the books themselves: no checks, and on a GPU nothing that waits for it ---

    def step(
        self,
        cache: KVCache | PagedKVCache,
        new: int,
        positions: Any,
        kv_lengths: Any,
        selection: Selection | None,
    ) -> Step:
        """The Step that adds `new` tokens to each row of a cache, which has room; the others are its fields."""
        workspaces = self._workspaces(cache.batch * new, cache.workspaces)
        return Step(self.sin, self.cos, positions, cache, kv_lengths, selection, **workspaces)

    def _workspaces(self, rows: int, kept: dict[str, Any]) -> dict[str, Any]:
        """For a Step of so many rows: those that are kept, but beyond FUSED_ROWS a larger one for its products."""
        if rows <= FUSED_ROWS or not self._workspace_sizes.get("workspace"):
            return kept
        # A workspace for all of them is emptied once; each product's own would be a launch more, and overlap with nothing.
        size = self._workspace_sizes["workspace"] + (rows - FUSED_ROWS) * self._values_per_row
        workspace = self.xp.empty(size, float32)
        workspace[:COUNTERS] = 0
        return {**kept, "workspace": workspace}

    def hidden(self, ids: Any, step: Step) -> Any:
        """The residual after the last layer, float32 [batch, seq, hidden_size], of int32 ids [batch, seq] at this step.

        Of a model of which others hold parts, it may be one of them still: for `logits`, once.
        """
        hidden = embedding(ids, self.embedding, scale=self._embedding_scale, dtype=float32)
        if self.places is not None:
            places = step.positions[:, None] + self.xp.arange(ids.shape[1], dtype=np.int32)
            hidden = add(hidden, embedding(places, self.places, dtype=float32), out=hidden)
        for layer in self.layers:
            hidden = layer(hidden, step, self.dtype)
        return hidden

    def logits(self, hidden: Any, step: Step, last_only: bool = False) -> Any:
        """float32 [batch, seq, vocab_size] of a residual; `last_only`: of its last position."""
        if last_only:
            hidden = self.xp.ascontiguousarray(hidden[:, -1:])
        norm = self.norm.of_product(hidden, self.dtype)
        x = self.norm(hidden, self.dtype) if norm is None else hidden
        logits = self._joined(self.head(x, dtype=float32, adapters=step.adapters, before=norm, workspace=step.workspace))
        if logits.shape[-1] != self.config.vocab_size:  # quantizers pad the head to a multiple of 32 columns
            logits = self.xp.ascontiguousarray(logits[..., : self.config.vocab_size])
        if self.config.logit_softcap is not None:
            logits = softcap(logits, self.config.logit_softcap, out=logits)
        return logits

    # --- what a model of which others hold parts does in another way ---

    is_part = False
    """Whether others hold parts of this model, and must be asked to do what it does."""

    def _joined(self, logits: Any) -> Any:
        """All columns of logits, of which this model's head made its part."""
        return logits

    def new_seed(self) -> int:
        """A seed that nobody chose, the same for all who run this model together."""
        return secrets.randbelow(MAX_SEED + 1)

    def agreed(self, flag: bool) -> bool:
        """Whether any of those who run this model together says so: each asks, and waits for the others."""
        return flag

    def check(self) -> None:
        """BackendError where one of those who run this model together has failed."""

    def adopt(self, graph: Any) -> Any:
        """What `launch` takes for a CUDA graph of this model's work."""
        return graph

    def launch(self, graph: Any) -> None:
        """Queue a graph that was adopted on the current stream."""
        graph.launch()

    # --- checks at the edge ---

    def checked_ids(self, ids: Any) -> Any:
        """int32 [batch, seq] of this model's library, from what `forward` takes as ids."""
        if self.xp is not np:
            _fork.refuse()
        on_gpu = is_cupy(ids)
        if on_gpu and self.xp is np:
            raise TypeError("ids is a CuPy array and the model runs on NumPy: pass ids.get()")
        if not on_gpu:
            try:
                ids = np.asarray(ids)
            except (TypeError, ValueError) as error:
                found = type(ids).__name__
                raise TypeError(f"ids must be whole numbers [batch, seq], got a {found} ({error})") from None
        if ids.size == 0:
            raise ValueError(f"ids is empty, shape {ids.shape}: at least one token per row is needed")
        if ids.dtype.kind not in "iu":
            raise TypeError(f"ids must be whole numbers, got dtype {ids.dtype}")
        if ids.ndim not in (1, 2):
            raise ValueError(f"ids must have shape [batch, seq] or [seq], got {ids.shape}")
        ids = ids.reshape(-1, ids.shape[-1])
        if not on_gpu:
            vocab = self.config.vocab_size
            outside = (ids < 0) | (ids >= vocab)
            if outside.any():
                row, position = np.unravel_index(int(outside.argmax()), ids.shape)
                raise ValueError(f"ids: {ids[row, position]} at [{row}, {position}], expected 0 to {vocab - 1}")
        return self.xp.ascontiguousarray(self.xp.asarray(ids, np.int32))

    def check_cache(self, cache: Any, batch: int) -> None:
        """TypeError / ValueError unless `cache` is one for this model and a batch of so many rows."""
        if not isinstance(cache, (KVCache, PagedKVCache)):
            raise TypeError(f"cache must be a KVCache, as model.new_cache() makes, got {type(cache).__name__}")
        wanted = (len(self.layers), self.kv_heads, self.config.head_dim)
        found = (cache.layers, cache.kv_heads, cache.head_dim)
        if found != wanted or cache.xp is not self.xp or cache.dtype != self.dtype:
            raise ValueError(
                f"cache is another model's: {found} layers, heads and head_dim in {cache.xp.__name__} "
                f"{cache.dtype}; expected {wanted} in {self.xp.__name__} {self.dtype}; use its new_cache()"
            )
        if cache.batch != batch:
            raise ValueError(f"cache has {cache.batch} rows and ids {batch}: make one with new_cache(batch={batch})")
