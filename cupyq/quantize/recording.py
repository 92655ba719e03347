"""What the linear layers of a decoder layer read: shown while it runs, alone or beside the layer of the original model."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np

from cupyq._arrays import bfloat16, namespace
from cupyq.errors import UnsupportedError
from cupyq.layers import DecoderLayer, Linear, MoE, ParallelDecoderLayer
from cupyq.ops.qmatmul import InputNorm
from cupyq.ops.routing import route

Feed = Callable[[Any], Any]
"""Takes x [tokens, K], of the walk's dtype, to be read during the call only."""

BesideFeed = Callable[[Any, "Beside"], Any]
"""Takes x as a Feed does, and what the original model has at the same tokens."""


@dataclass(frozen=True, eq=False)
class LayerInput:
    """What one or more Linear layers of a decoder layer read: q, k and v the same, gate and up the same."""

    linears: tuple[Linear, ...]
    expert: int | None
    """Of a mixture of experts: which one's. It reads only the rows that the router sends to it."""
    owner: Any
    """The part of the layer that holds the first of the linears, under the name `attribute`."""
    attribute: str

    @property
    def name(self) -> str:
        """The first linear's, such as "model.layers.0.self_attn.q_proj"."""
        return self.linears[0].name

    @property
    def k(self) -> int:
        return self.linears[0].k


@dataclass(frozen=True, eq=False)
class Beside:
    """The original model at the tokens of an input x of the other one, all to be read during the call only."""

    original: Any
    """Of x's dtype and shape: what the same linear layers read there."""
    weights: Any
    """float32 [tokens]: 1 / (mean square of the original's residual + eps), as a norm makes errors in it small or large. Of the
    residual that the input is made of, or that the linear layer's outputs are part of."""
    gap: Any
    """float32 [tokens, hidden]: the original's residual less this one's, to which the outputs will be added; None where they
    are not added, or not as they are."""


def layer_inputs(layer: DecoderLayer) -> list[LayerInput]:
    """The inputs of a layer's linear layers, routers left out, in the order they are computed; each linear is in one."""
    if layer.attention is None:
        raise ValueError("layer has lost its weights, as the walk went on to the next one: use it before")
    is_mixture = isinstance(layer.mlp, MoE)
    inputs = [_input(layer.attention, "q", "k", "v"), _input(layer.attention, "o")]
    for number, mlp in enumerate(layer.mlp.experts if is_mixture else [layer.mlp]):
        expert = number if is_mixture else None
        inputs += [_input(mlp, "gate", "up", expert=expert), _input(mlp, "down", expert=expert)]
    return inputs


def _input(owner: Any, *attributes: str, expert: int | None = None) -> LayerInput:
    found = [attribute for attribute in attributes if getattr(owner, attribute) is not None]
    return LayerInput(tuple(getattr(owner, attribute) for attribute in found), expert, owner, found[0])


MEND = "the model's weights are damaged, or its activations too large for float16: then take dtype='bfloat16'"


def words(array: Any) -> Any:
    """An array's bits: CuPy stores bfloat16, but does not compute with it, nor copy what is not in one piece."""
    return array.view(f"u{array.itemsize}")


def is_finite(array: Any) -> bool:
    if array.dtype == bfloat16:
        return not bool((words(array) & np.uint16(0x7F80) == np.uint16(0x7F80)).any())
    return bool(namespace(array=array).isfinite(array).all())


def fed(feed: Callable[..., Any], x: Any, *others: Any, name: str) -> int:
    """Hand feed x [tokens, K], and what there is beside it -> how many tokens."""
    if not is_finite(x):
        raise ValueError(f"the input of {name} has values that are not finite; {MEND}")
    feed(x, *others)
    return len(x)


class Stop(Exception):
    """The last feed has what it wants: the rest of the layer need not be computed."""


class _Watched(Linear):
    """A Linear that shows what it reads and what it makes of it."""

    def __init__(self, linear: Linear, reads: Feed | None = None, makes: Feed | None = None):
        self.__dict__.update(vars(linear))
        self._reads, self._makes = reads, makes

    def __call__(self, x, out=None, dtype=None, adapters=None, *, before=None, **options):
        if isinstance(before, InputNorm):
            x, before = before.applied(x), None
        if self._reads is not None:
            self._reads(x)
        y = super().__call__(x, out, dtype, adapters, before=before, **options)
        if self._makes is not None:
            self._makes(y)
        return y


class Recorder:
    """A context in which a layer's linear layers hand what they read to feeds."""

    def __init__(self, layer: DecoderLayer, feeds: Mapping[str, Feed], stops: bool):
        inputs = layer_inputs(layer)
        unknown = feeds.keys() - {read.name for read in inputs}
        if unknown:
            names = ", ".join(read.name for read in inputs)
            raise ValueError(f"feeds has {min(unknown)!r}, expected names of inputs of this layer: {names}")
        self._wanted: Sequence[LayerInput] = [read for read in inputs if read.name in feeds]
        for linear in (linear for read in self._wanted for linear in read.linears):
            if linear.is_quantized:
                raise UnsupportedError(f"{linear.name} is quantized already ({linear.kind}): take the original model")
        self._layer, self._feeds, self._stops = layer, feeds, stops
        self._own: list[tuple[Any, str, Linear]] = []  # what is to be put back
        self._routed: tuple[Any, Any] | None = None
        self.tokens = dict.fromkeys((read.name for read in self._wanted), 0)

    def __enter__(self) -> Self:
        mlp = self._layer.mlp
        if any(read.expert is not None for read in self._wanted) and namespace(weight=mlp.router.weight) is not np:
            self._watch(mlp, "router", makes=self._note_route)
        for read in self._wanted:
            self._watch(read.owner, read.attribute, reads=lambda x, read=read: self._hand_on(read, x))
        return self

    def _watch(self, owner: Any, attribute: str, **callbacks: Any) -> None:
        linear = getattr(owner, attribute)
        self._own.append((owner, attribute, linear))
        setattr(owner, attribute, _Watched(linear, **callbacks))

    def __exit__(self, *error: Any) -> None:
        for owner, attribute, linear in self._own:
            setattr(owner, attribute, linear)
        self._own.clear()
        self._routed = None

    def _note_route(self, logits: Any) -> None:
        moe = self._layer.mlp
        self._routed = route(logits, moe.top_k, renormalize=moe.renormalize)

    def _hand_on(self, read: LayerInput, x: Any) -> None:
        x = x.reshape(-1, x.shape[-1])
        if read.expert is not None and self._routed is not None:  # on a GPU an expert computes all rows, not its own alone
            weights, chosen = self._routed
            xp = namespace(x=x)
            own = xp.flatnonzero(((chosen == read.expert) & (weights != 0)).any(axis=1))
            x = words(x)[own].view(x.dtype)
        if len(x):
            self.tokens[read.name] += fed(self._feeds[read.name], x, name=read.name)
        if self._stops and read is self._wanted[-1]:
            raise Stop


class _Announced:
    """A part of a layer that says when it begins."""

    def __init__(self, part: Any, on_begin: Callable[[], Any]):
        self._part, self._on_begin = part, on_begin

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self._on_begin()
        return self._part(*arguments, **options)


class PairRecorder:
    """Two layers on the same batches: what the original reads and makes is kept until the other one reads the same."""

    def __init__(
        self,
        layer: DecoderLayer,
        original: DecoderLayer,
        feeds: Mapping[str, BesideFeed],
        run: Callable[[DecoderLayer, Any], Any],
        eps: float,
    ):
        self._layer, self._original, self._feeds = layer, original, feeds
        self._run, self._eps = run, eps
        self._is_parallel = isinstance(layer, ParallelDecoderLayer)
        reads = {read.name: read for read in layer_inputs(layer)}
        experts = [name for name in feeds if name in reads and reads[name].expert is not None]
        if experts:
            raise ValueError(f"feeds has {experts[0]!r}, an expert: the two models may send it different tokens")
        self._reads = reads
        last = max((list(reads).index(name) for name in feeds if name in reads), default=0)
        self._last = list(reads.values())[last].attribute

    def record(self, hidden: Any, original_hidden: Any) -> dict[str, int]:
        """Of one batch, of which `hidden` is changed -> tokens of each feed."""
        residuals, inputs = self._of_original(original_hidden)

        def feed(name: str, x: Any) -> None:
            self._feeds[name](x, self._beside(self._reads[name], inputs[name], residuals, hidden))

        recorder = Recorder(self._layer, {name: partial(feed, name) for name in self._feeds}, stops=True)
        with recorder, contextlib.suppress(Stop):
            self._run(self._layer, hidden)
        return recorder.tokens

    def _of_original(self, start: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """(its residual at the layer's start, between attention and MLP and at the end, what its linear layers read), as far as
        they are asked for."""
        layer, hidden, inputs = self._original, start.copy(), {}
        residuals = {"start": start}

        def note_middle() -> None:
            residuals["middle"] = hidden.copy()
            if self._last == "o" and not self._is_parallel:
                raise Stop

        def keep(name: str, x: Any) -> None:
            inputs[name] = words(x).copy().view(x.dtype)

        feeds = {name: partial(keep, name) for name in self._feeds}
        # The residual behind a layer's last product is asked for too.
        with Recorder(layer, feeds, stops=self._last not in ("o", "down")), contextlib.suppress(Stop):
            own = layer.mlp
            try:
                layer.mlp = _Announced(own, note_middle)
                self._run(layer, hidden)
            finally:
                layer.mlp = own
        residuals["end"] = hidden
        return residuals, inputs

    def _beside(self, read: LayerInput, original: Any, residuals: Mapping[str, Any], hidden: Any) -> Beside:
        layer, gap = self._layer, None
        counted = {"o": "end" if self._is_parallel else "middle", "down": "end"}.get(read.attribute)
        if counted is None:
            counted = "start" if self._is_parallel or read.owner is layer.attention else "middle"
        elif getattr(layer, "attention_post_norm" if read.attribute == "o" else "mlp_post_norm", None) is None:
            gap = residuals["start" if read.attribute == "o" else "middle"] - hidden
            gap = gap.reshape(-1, gap.shape[-1])
        residual = residuals[counted].reshape(-1, hidden.shape[-1])
        weights = 1 / ((residual * residual).mean(axis=1) + np.float32(self._eps))
        return Beside(original, weights, gap)
