"""Every linear layer into a file of its own: the model once more, beside itself, each layer for what the ones before it make.

A layer's inputs are those that its already quantized predecessors make, and its outputs are to come near the original's.
What follows is computed from the files, also in the run that wrote them: a resumed one comes to the same bytes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from cupyq.errors import FormatError
from cupyq.quantize import gather
from cupyq.quantize.hessian import Hessian, Prepared
from cupyq.quantize.layouts import HEAD_LAYOUTS, Layout
from cupyq.quantize.linear import QuantizedLinear, quantize_linear, quantize_linear_gptq, round_linear
from cupyq.quantize.plan import Plan
from cupyq.quantize.recording import LayerInput, layer_inputs
from cupyq.quantize.report import LinearReport
from cupyq.quantize.walk import HEAD, replace
from cupyq.quantize.work import decoded

SWEEPS = 4  # of coordinate descent over each weight; more hardly gain anything
MOST_WEIGHTS_WITH_HESSIAN = 10**9
"""Of a head. Larger ones are rounded plainly: float32 copies of them, which the recursion takes, fit no GPU."""


def quantize(plan: Plan, layouts: Mapping[str, Layout], worths: Mapping[str, float]) -> None:
    """layouts: of the linear layers, EXL2 only. worths: what a unit of their errors counts, in nats, as far as it is known."""
    if not plan.work.has(*plan.names):
        _Quantization(plan, layouts, worths).run()


@dataclass
class _Pair:
    """A layer of both models: of the one that is being quantized, and of the original; and the hidden states before them."""

    layer: Any
    hidden: Any
    original: Any
    originals: Any


class _Quantization:
    def __init__(self, plan: Plan, layouts: Mapping[str, Layout], worths: Mapping[str, float]):
        self.plan, self.layouts, self.worths = plan, layouts, worths
        self.request, self.work, self.walk = plan.request, plan.work, plan.walk

    def run(self) -> None:
        plan, walk = self.plan, self.walk
        hidden = plan.embed()
        originals = hidden.copy()
        with plan.bar(sum(math.prod(plan.shapes[name]) for name in plan.names), "quantizing", " weights") as advance:
            for _, layer, original in walk.pairs():
                for stage in gather.stages(layer_inputs(layer)):
                    for count in self._quantize_stage(_Pair(layer, hidden, original, originals), stage):
                        advance(count)
                walk.run(layer, hidden)
                walk.run(original, originals)
                plan.release()
            if HEAD in plan.names and not self.work.has(HEAD):
                self._quantize_head(hidden, originals)

    def _quantize_stage(self, pair: _Pair, stage: Sequence[LayerInput]) -> Any:
        """The linear layers of inputs that do not depend on one another; then each has its quantized weights. Yields how many
        weights are done."""
        chunks = gather.chunks(stage)

        @cache
        def loans() -> Mapping[str, Any] | None:
            return gather.find_loans(self.walk, pair.layer, stage, pair.hidden) if len(chunks) > 1 else None

        for chunk in chunks:
            linears = [linear for read in chunk for linear in read.linears]
            if not self.work.has(*(linear.name for linear in linears)):
                self._quantize_inputs(pair, chunk, loans())
            for linear in linears:
                # Of the file, as in a run that finds it there.
                shape = self.plan.shapes[linear.name]
                replace(linear, self.work.weights(linear.name, shape, self.plan.xp, self._options()))
            yield sum(linear.k * linear.n for linear in linears)

    def _quantize_inputs(self, pair: _Pair, reads: Sequence[LayerInput], loans: Mapping[str, Any] | None) -> None:
        hessians = gather.gather_beside(self.walk, pair.layer, reads, pair.hidden, pair.original, pair.originals, loans)
        is_ordered = self.request.act_order or not self.request.is_gptq
        for read in reads:
            hessian, tokens = hessians.pop(read.name)
            missing = [linear for linear in read.linears if not self.work.has(linear.name)]
            if missing:
                prepared = hessian.prepare(self.request.damping, act_order=is_ordered, keeps_matrix=True)
            for linear in missing:
                self._save(linear, *self._quantized(linear, prepared), hessian, tokens)

    def _quantized(self, linear: Any, prepared: Prepared) -> tuple[QuantizedLinear, str]:
        """(What becomes of a linear layer, the name of its layout.)"""
        request, weight, name = self.request, prepared.corrected(linear.weight.T), linear.name
        if not request.is_gptq:
            layout = self.layouts[name]
            return quantize_linear(weight, prepared, layout, sweeps=SWEEPS, name=name), layout.name
        bits, size = int(request.bits), request.group_size
        options = (bits, size, request.is_symmetric, request.act_order)
        quantized = quantize_linear_gptq(weight, prepared, *options, sweeps=SWEEPS, name=name)
        return quantized, f"{bits}g{size if size > 0 else linear.k}"

    def _quantize_head(self, hidden: Any, originals: Any) -> None:
        head = self.walk.head()
        linear, layout = head.head, HEAD_LAYOUTS[self.request.head_bits]
        hessian = Hessian(linear.k, self.plan.xp, name=HEAD)
        tokens = self.walk.record_head(head, hidden, hessian.add, originals)
        if linear.k * linear.n > MOST_WEIGHTS_WITH_HESSIAN:
            quantized = round_linear(linear.weight.T, hessian.diagonal, layout, damping=self.request.damping, name=HEAD)
        else:
            prepared = hessian.prepare(self.request.damping, keeps_matrix=True)
            quantized = quantize_linear(prepared.corrected(linear.weight.T), prepared, layout, sweeps=SWEEPS, name=HEAD)
        self._save(linear, quantized, layout.name, hessian, tokens)

    def _save(self, linear: Any, quantized: QuantizedLinear, layout: str, hessian: Hessian, tokens: int) -> None:
        """The file of a linear layer, after a look whether its tensors stand for the weights that were chosen."""
        name, tensors, bits = linear.name, dict(quantized.tensors), quantized.storage_bits
        if linear.bias is not None:
            tensors["bias"] = self._bias(name)
            bits += 16 * linear.n
        if not bool((self._decoded(name, tensors) == quantized.values).all()):
            raise RuntimeError(f"{name}: the tensors made of it do not stand for the weights that were chosen")
        worth = self.worths.get(name)
        nats = None if worth is None else worth * quantized.error
        output = gather.mean_square(hessian, linear.weight.T)
        self.work.save(tensors, LinearReport(name, linear.k, linear.n, layout, bits, quantized.error, output, tokens, nats))

    def _bias(self, name: str) -> np.ndarray:
        bias = self.walk.bias(name).astype(np.float32)
        if np.abs(bias).max(initial=0) >= 65520:
            raise FormatError(f"{self.plan.source}: bias of {name}: values above 65504, which a quantized layer cannot have")
        return bias.astype(np.float16)

    def _decoded(self, name: str, tensors: Mapping[str, np.ndarray]) -> Any:
        return decoded(tensors, name, self.plan.shapes[name][1], self.plan.xp, self._options())

    def _options(self) -> dict[str, Any]:
        request = self.request
        return {"bits": int(request.bits), "group_size": request.group_size} if request.is_gptq else {}
