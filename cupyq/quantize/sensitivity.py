"""How much a linear layer's output error counts: what noise on its output does to the model's predictions.

For each linear layer of the decoder, averaged over tokens, in nats per unit of squared error:

    KL(p || p with noise on that layer's output) / (squared length of the noise)

Rounded weights add to a layer's output what is close to noise: hardly correlated with the output, and alike in all columns.
As long as errors are small, KL grows with their square. So this, times the squared output error of a quantized weight, is
about the KL that the weight causes, and what the weights of several layers cause adds up: it makes errors of different layers
comparable. Unlike an error relative to the layer's own output, it knows that early layers disturb all later ones.
Source: own measurements; KL as a square near its minimum: Kullback and Leibler, On Information and Sufficiency, 1951.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cupyq._arrays import bfloat16, float32, namespace
from cupyq.layers import Linear, MoE
from cupyq.quantize.hessian import to_float32
from cupyq.quantize.recording import layer_inputs
from cupyq.quantize.walk import LayerWalk

_LOGITS_BYTES = 128 << 20  # float64 log-probabilities of one set of tokens


def sensitivity(
    walk: LayerWalk,
    ids: Any,
    *,
    noise: float = 0.05,
    seed: int = 0,
    on_host: bool = False,
    on_layer: Callable[[int], Any] | None = None,
) -> dict[str, float]:
    """{name: KL per unit of squared output error} of every linear layer of the decoder, routers and head left out.

    KL is the mean over all tokens of `ids`, as `LayerWalk.embed` takes them; a few thousand tokens are enough. The error
    is the sum of squares over a layer's outputs, averaged over all tokens too. Experts of a mixture are disturbed together,
    one projection at a time, and share its number: an expert's error counts for the tokens sent to it and is 0 for others.
    noise: standard deviation of what is added to an output (where the layer adds itself to the residual, to that), as a share
    of the median token's root mean square; its signs come from `seed`. on_layer(index) is called after each layer.
    Work: with L layers of 7 linear layers, 3.5 L (L + 1) passes of the tokens through a layer, each read once. Memory: hidden
    states of the tokens, float32, 7 L + 1 times; `on_host` keeps them there.
    ValueError for noise not above 0 or above 0.5, and what `LayerWalk.run` raises.
    """
    if not 0 < noise <= 0.5:
        raise ValueError(f"noise must be above 0 and at most 0.5, a share of the outputs, got {noise!r}")
    original = walk.embed(ids, on_host=on_host)
    trials: list[_Trial] = []
    for index, layer in walk.layers():
        for trial in trials:
            walk.run(layer, trial.hidden)
        new = [_Trial(original.copy(), noisy) for noisy in _projections(layer, noise, (seed, index))]
        for trial in new:
            with trial.in_place():
                walk.run(layer, trial.hidden)
        experts = [read.name for read in layer_inputs(layer) if read.expert is not None]
        tokens = walk.run(layer, original, dict.fromkeys(experts, _ignore))
        for trial in new:
            trial.settle(tokens, math.prod(original.shape[:2]))
        trials += new
        if on_layer is not None:
            on_layer(index)
    found = {}
    for trial, divergence in zip(trials, _divergences(walk, original, trials), strict=True):
        # Next to no error means next to no output: then no error of a quantized weight matters either.
        count = max(divergence, 0.0) / trial.error if trial.error > 0 else 0.0
        found.update(dict.fromkeys(trial.names, count))
    return found


def _ignore(x: Any) -> None:
    """A feed, for the number of tokens alone."""


# --- noise ------------------------------------------------------------------------------------------------------------


class _Noisy(Linear):
    """A Linear whose outputs are disturbed by plus or minus `amount`."""

    def __init__(self, linear: Linear, share: float, seed: tuple[int, ...]):
        self.__dict__.update(vars(linear))
        self._share, self._bits = share, np.random.Generator(np.random.PCG64(seed))
        self.amount: float | None = None
        """Decided by the outputs of the first batch."""

    def __call__(self, *args, **options):
        y = super().__call__(*args, **options)
        xp = namespace(y=y)
        if self.amount is None:
            rows = to_float32(y).reshape(-1, self.n)
            # Of the median token, as a few may be hundreds of times larger than all others.
            squares = (rows * rows).mean(axis=1)
            self.amount = self._share * math.sqrt(np.median(squares if xp is np else squares.get()))
        # Bits from the host are an eighth of a byte for each value, and the same on every device.
        bits = np.frombuffer(self._bits.bytes(-(-y.size // 8)), np.uint8)
        signs = xp.unpackbits(xp.asarray(bits))[: y.size].reshape(y.shape).astype(float32)
        disturbed = to_float32(y) + (signs * np.float32(2) - np.float32(1)) * np.float32(self.amount)
        if y.dtype == bfloat16:  # CuPy does not compute with it: its bits are a float32's upper half
            words = (disturbed.view(np.uint32) + np.uint32(0x8000)) >> np.uint32(16)
            y.view(np.uint16)[...] = words.astype(np.uint16)
        else:
            y[...] = disturbed
        return y


@dataclass(eq=False)
class _Trial:
    """Hidden states of the model with noise on one projection of one layer: of one linear layer, or of those of all experts."""

    hidden: Any
    places: list[tuple[Any, str, _Noisy, str | None]]
    """Owner, attribute, what takes its place there, and the name of the LayerInput whose tokens an expert gets."""
    error: float = 0.0

    def __post_init__(self):
        self.names = [noisy.name for _, _, noisy, _ in self.places]

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        own = [getattr(owner, attribute) for owner, attribute, _, _ in self.places]
        try:
            for owner, attribute, noisy, _ in self.places:
                setattr(owner, attribute, noisy)
            yield
        finally:
            for (owner, attribute, _, _), linear in zip(self.places, own, strict=True):
                setattr(owner, attribute, linear)

    def settle(self, tokens: dict[str, int], total: int) -> None:
        """Work out the error, and let go of the layer's weights; tokens: how many each expert got."""
        for _, _, noisy, read in self.places:
            share = 1.0 if read is None else tokens[read] / total
            self.error += (noisy.amount or 0.0) ** 2 * noisy.n * share
        self.places = []


def _projections(layer: Any, share: float, seed: tuple[int, int]) -> Iterator[list[tuple[Any, str, _Noisy, str | None]]]:
    """The places of one _Trial after another."""
    mlps = layer.mlp.experts if isinstance(layer.mlp, MoE) else [layer.mlp]
    reads = {linear.name: read for read in layer_inputs(layer) for linear in read.linears}
    for number, (owners, attribute) in enumerate(
        [*(([layer.attention], name) for name in "qkvo"), *((mlps, name) for name in ("gate", "up", "down"))]
    ):
        places: list[tuple[Any, str, _Noisy, str | None]] = []
        for owner in owners:
            linear = getattr(owner, attribute)
            if linear is not None:
                read = reads[linear.name]
                noisy = _Noisy(linear, share, (*seed, number, len(places)))
                places.append((owner, attribute, noisy, None if read.expert is None else read.name))
        if places:
            yield places


# --- what becomes of it -----------------------------------------------------------------------------------------------


def _divergences(walk: LayerWalk, original: Any, trials: list[_Trial]) -> list[float]:
    """Mean KL of the predictions from hidden states after the last layer to those of each trial, a few tokens at a time."""
    head, width = walk.head(), walk.config.hidden_size
    hidden = [array.reshape(1, -1, width) for array in (original, *(trial.hidden for trial in trials))]
    tokens, at_once = hidden[0].shape[1], max(1, _LOGITS_BYTES // (8 * walk.config.vocab_size))
    sums = [0.0] * len(trials)
    for begin in range(0, tokens, at_once):
        step = walk.step(1)

        def log_probabilities(array, begin=begin, step=step):
            part = walk.xp.ascontiguousarray(walk.xp.asarray(array[:, begin : begin + at_once]))
            logits = head.logits(part, step).astype(np.float64)
            logits -= logits.max(axis=-1, keepdims=True)
            return logits - walk.xp.log(walk.xp.exp(logits).sum(axis=-1, keepdims=True))

        log_p = log_probabilities(hidden[0])
        p = walk.xp.exp(log_p)
        for number, array in enumerate(hidden[1:]):
            sums[number] += float((p * (log_p - log_probabilities(array))).sum())
    return [total / tokens for total in sums]
