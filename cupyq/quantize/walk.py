"""A model one layer at a time: what its linear layers read, and what becomes of it with other weights in their place."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Self

import numpy as np

from cupyq._arrays import bfloat16, check, float32, is_cupy, namespace
from cupyq.errors import UnsupportedError
from cupyq.layers import DecoderLayer, Linear, Step
from cupyq.models.loader import open_blueprint
from cupyq.models.model import Model
from cupyq.models.parts import Part
from cupyq.quantize.hessian import to_float32
from cupyq.quantize.recording import (
    MEND,
    BesideFeed,
    Feed,
    PairRecorder,
    Recorder,
    Stop,
    fed,
    is_finite,
    words,
)

HEAD = "lm_head"
"""The head's name among linear layers."""


def replace(linear: Linear, values: Any) -> Any:
    """Put other weights in a Linear's place -> those it had, [K, N], which may be put back in the same way.

    values [K, N]: float16, bfloat16 or float32, NumPy's, or CuPy's on a GPU, copied there if need be; rounded to the
    dtype of the weight they replace: exact for what EXL2 and GPTQ stand for where that is float16 or float32. The bias
    stays. Neither the values, which may be kept as they are, nor the weights that were there are changed. ValueError for a
    quantized Linear, another shape, and values that are not finite in that dtype.
    """
    old = linear.weight
    if linear.is_quantized:
        raise ValueError(f"linear {linear.name!r} is quantized ({linear.kind}): only unquantized weights can be replaced")
    if values.shape != (linear.k, linear.n):
        raise ValueError(f"values of {linear.name!r} must have shape {(linear.k, linear.n)}, got {values.shape}")
    xp = namespace(weight=old)
    if xp is np and is_cupy(values):
        raise TypeError(f"values of {linear.name!r} is a CuPy array and the model runs on NumPy: pass values.get()")
    values = xp.asarray(values)
    if not (is_finite(values) and is_finite(values := _rounded(values, old.dtype))):
        raise ValueError(f"values of {linear.name!r} must be finite numbers within the range of {old.dtype}")
    linear.weight = xp.ascontiguousarray(words(values).T).view(old.dtype)
    return old.T


@np.errstate(over="ignore")
def _rounded(values: Any, dtype: np.dtype) -> Any:
    """Finite values in a dtype, to nearest, ties to even; infinite where they are beyond its range."""
    if values.dtype == dtype:
        return values
    values = to_float32(values)
    if dtype != bfloat16:
        return values.astype(dtype, copy=False)
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    return ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16).view(dtype)


class LayerWalk:
    """The model in a folder, of which one layer, or one end, is in memory at a time; a context manager.

        with LayerWalk(folder) as walk:
            hidden = walk.embed(ids)
            for index, layer in walk.layers():
                hessians = {read.name: Hessian(read.k, walk.xp) for read in layer_inputs(layer)}
                walk.record(layer, hidden, {name: hessian.add for name, hessian in hessians.items()})
                ...  # replace(linear, values)
                walk.run(layer, hidden)

    After the last layer `hidden` is what `Model.hidden` gives for the same ids, bit for bit where its batches are the walk's.
    backend, dtype: as `load_model` takes them. batch_tokens: tokens of the rows that pass a layer at once; at least one row
    does.
    Memory: a layer (or the embedding, or the head) in `dtype`, the hidden states of all rows, float32, and the
    activations of one batch. Hidden states stay where the model runs, unless `embed` is asked to keep them on the host:
    then a batch of them is on the GPU at a time.
    Raises what `load_model` raises.
    """

    def __init__(self, folder: str | os.PathLike[str], backend: str = "auto", *, dtype: Any = None, batch_tokens: int = 4096):
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens must be 1 or more, got {batch_tokens}")
        self._resources = contextlib.ExitStack()
        self._blueprint = self._resources.enter_context(open_blueprint(folder, backend, dtype=dtype))
        self.config, self.xp, self.dtype = self._blueprint.config, self._blueprint.xp, self._blueprint.activations
        self.batch_tokens = batch_tokens
        parts = (part for part in self._blueprint.plan.parts if part.take_apart is not None)
        self._apart = {name: part for part in parts for name in part.linears}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the model's files; hidden states and weights that were handed out stay valid."""
        self._resources.close()

    def __len__(self) -> int:
        """Layers of the model."""
        return self.config.num_hidden_layers

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(K, N) of every linear layer by name, routers left out, in order, the head last; nothing is read for it.

        UnsupportedError for a model that is quantized already.
        """
        found = {name: part.linears[name] for name, part in self.parts().items()}
        found.setdefault(HEAD, (self.config.hidden_size, self.config.vocab_size))
        return found

    def parts(self) -> dict[str, Part]:
        """What the same layers are made of: several of them of one part where they are stored as one; a tied head of none."""
        blueprint = self._blueprint
        parts = [part for layer in blueprint.layers for part in (*layer.attention, *layer.mlp)]
        parts += [blueprint.head] if blueprint.head is not None else []
        found: dict[str, Part] = {}
        for part in parts:
            if "weight" not in part.tensors:
                folder = blueprint.checkpoint.folder
                raise UnsupportedError(f"{folder}: {part.key} is quantized already: take the original model")
            found |= {key: part for key in part.linears if not self._is_router(key)}
        return found

    def bias(self, name: str) -> np.ndarray | None:
        """A linear layer's bias as it is stored, if it has one."""
        part = self.parts().get(name)
        if part is None or "bias" not in part.tensors:
            return None
        stored = {"bias": self._blueprint.checkpoint.array(part.tensors["bias"].name)}
        own = [stored] if part.take_apart is None else part.take_apart(stored)
        return dict(zip(part.linears, own, strict=True))[name]["bias"]

    @property
    def most_apart(self) -> int:
        """Numbers in the largest of the parts that linear layers are taken out of."""
        return max((part.parameters for part in self._apart.values()), default=0)

    def _is_router(self, key: str) -> bool:
        row = self.config.architecture
        return row.has_experts and key.endswith(f".{row.mlp}.{row.router}")

    # --- the ends ---

    def embed(self, ids: Any, *, on_host: bool = False) -> Any:
        """Hidden states before the first layer, float32 [rows, length, hidden_size], of ids as `Model.forward` takes them.

        on_host: as a NumPy array even where the model runs on a GPU.
        """
        model = self._blueprint.without_layers(embedding=True)
        ids = model.checked_ids(ids)
        rows, length = ids.shape
        if length > self.config.max_seq_len:
            raise ValueError(
                f"ids: {length} tokens per row, but the model's context is {self.config.max_seq_len}: shorten them"
            )
        shape = (rows, length, self.config.hidden_size)
        hidden = np.empty(shape, float32) if on_host else self.xp.empty(shape, float32)
        for part in _slices(rows, self._rows_at_once(length)):
            _assign(hidden[part], model.hidden(ids[part], self.step(part.stop - part.start)))
        return hidden

    def head(self) -> Model:
        """A Model of no layers: `norm`, `head`, whose weights may be replaced, and `logits(batch, walk.step(len(batch)))`.

        It stays in memory as long as it is referred to. Of tied models, the head is the embedding, read again.
        """
        return self._blueprint.without_layers(head=True)

    def record_head(self, head: Model, hidden: Any, feed: Callable[..., Any], original: Any = None) -> int:
        """Hand feed what the head reads of all rows of the hidden states after the last layer -> how many tokens.

        original: hidden states of the original model, if feed(x, x of those) is to have them too.
        """
        tokens = 0
        for part in zip(*(self.batches(states) for states in (hidden, original) if states is not None), strict=True):
            read = (head.norm(batch, self.dtype) for _, batch in part)
            tokens += fed(feed, *(x.reshape(-1, x.shape[-1]) for x in read), name=head.head.name)
        return tokens

    # --- the layers ---

    def layers(self, first: int = 0) -> Iterator[tuple[int, DecoderLayer]]:
        """(index, layer) of every layer from the first on, read when it is its turn.

        When the next one is asked for, the layer before it loses its weights, and is of no more use.
        """
        for index in range(first, len(self)):
            layer = self._layer(index)
            yield index, layer
            _release(layer)

    def pairs(self, first: int = 0) -> Iterator[tuple[int, DecoderLayer, DecoderLayer]]:
        """As `layers`, every layer twice: the weights of one may be replaced, the other stays the original."""
        for index in range(first, len(self)):
            layer, original = self._layer(index), self._layer(index)
            yield index, layer, original
            _release(layer)
            _release(original)

    def _layer(self, index: int) -> DecoderLayer:
        """A layer read now, whose weights can be let go one by one: all that share memory would stay as long as any of them."""
        layer = self._blueprint.layer(index)
        for linear in layer.linears():
            if linear.name in self._apart:
                linear.weight = words(linear.weight).copy().view(linear.weight.dtype)
        return layer

    def record(self, layer: DecoderLayer, hidden: Any, feeds: Mapping[str, Feed]) -> dict[str, int]:
        """Hand each feed of `feeds`, {LayerInput.name: feed}, what its linear layers read -> how many tokens each got.

        hidden: of all rows, as `embed` made and `run` left it; it is not changed. In every batch, feeds are called in the
        order of `layer_inputs`, and nothing is computed behind the last. An expert's feed gets the rows sent to that expert,
        and is not called for a batch with none: 0 tokens if there are none at all.
        ValueError for names that are not the layer's, and inputs that are not finite; UnsupportedError for one that is
        quantized.
        """
        return self._pass(layer, hidden, feeds, advance=False)

    def record_beside(
        self, layer: DecoderLayer, hidden: Any, original: DecoderLayer, original_hidden: Any, feeds: Mapping[str, BesideFeed]
    ) -> dict[str, int]:
        """As `record`, of two walks in step: feeds get what the original layer has at the same tokens too.

        original, original_hidden: the layer with its own weights, as of `pairs`, and the hidden states that only such layers
        made. Experts are not to be fed: a token may go to another one in the other model.
        """
        if not feeds:
            return {}
        eps = self.config.rms_norm_eps / self.config.residual_scale**2  # the residual is kept divided by that scale
        recorder = PairRecorder(layer, original, feeds, self._run, eps)
        tokens = dict.fromkeys(feeds, 0)
        for (target, batch), (_, other) in zip(self.batches(hidden), self.batches(original_hidden), strict=True):
            for name, count in recorder.record(batch.copy() if batch is target else batch, other).items():
                tokens[name] += count
        return tokens

    def run(self, layer: DecoderLayer, hidden: Any, feeds: Mapping[str, Feed] | None = None) -> dict[str, int]:
        """hidden := layer(hidden), in place, with the weights the layer now has; `feeds` as `record` takes them.

        ValueError where the result is not finite.
        """
        return self._pass(layer, hidden, feeds or {}, advance=True)

    def _pass(self, layer: DecoderLayer, hidden: Any, feeds: Mapping[str, Feed], advance: bool) -> dict[str, int]:
        recorder = Recorder(layer, feeds, stops=not advance)
        if not feeds and not advance:
            return {}
        with recorder:
            for target, batch in self.batches(hidden):
                if not advance and batch is target:
                    batch = batch.copy()
                with contextlib.suppress(Stop):
                    self._run(layer, batch)
                if advance:
                    if not is_finite(batch):
                        key = layer.attention.q.name.rsplit(".", 2)[0]
                        raise ValueError(f"{key} makes values that are not finite; {MEND}")
                    _assign(target, batch)
        return recorder.tokens

    def _run(self, layer: DecoderLayer, batch: Any) -> None:
        layer(batch, self.step(len(batch)), self.dtype)

    # --- batches ---

    def batches(self, hidden: Any) -> Iterator[tuple[Any, Any]]:
        """(rows of hidden, the same where the model runs) by batches: twice one view, unless hidden is on another device."""
        if self.xp is np and namespace(hidden=hidden) is not np:
            raise TypeError("hidden is a CuPy array and the model runs on NumPy: pass hidden.get()")
        check(hidden, "hidden", dtype=float32, shape=(None, None, self.config.hidden_size), writes=True)
        for rows in _slices(len(hidden), self._rows_at_once(hidden.shape[1])):
            part = hidden[rows]
            yield part, part if is_cupy(part) or self.xp is np else self.xp.asarray(part)

    def step(self, rows: int) -> Step:
        """Of a batch of so many rows, each a whole text."""
        return Step(self._blueprint.sin, self._blueprint.cos, self.xp.zeros(rows, np.int32))

    def _rows_at_once(self, length: int) -> int:
        return max(1, self.batch_tokens // max(length, 1))


def _slices(rows: int, at_once: int) -> list[slice]:
    return [slice(begin, min(begin + at_once, rows)) for begin in range(0, rows, at_once)]


def _assign(target: Any, values: Any) -> None:
    """target[...] = values, from a GPU to the host if need be."""
    if target is not values:
        target[...] = values.get() if is_cupy(values) and not is_cupy(target) else values


def _release(layer: DecoderLayer) -> None:
    """A caller's variable holds the layer until the next one is read, and two would be in memory."""
    for linear in layer.linears():
        linear.weight = linear.bias = None
    layer.attention = layer.mlp = None
