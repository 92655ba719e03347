"""What layouts are chosen from: the errors of every linear layer under them, measured a layer of the model at a time."""

from collections.abc import Callable
from typing import Any

from cupyq.quantize import gather, writer
from cupyq.quantize.calibration import spread
from cupyq.quantize.measurement import Measurement, measure_input, read_errors, read_worths, weighted
from cupyq.quantize.plan import Plan
from cupyq.quantize.recording import layer_inputs
from cupyq.quantize.sensitivity import sensitivity


def measured(plan: Plan) -> Measurement:
    """Of every linear layer of the decoder; what an earlier process measured is taken from the working folder."""
    worths = _sensitivities(plan) if plan.request.sensitivity_tokens else None
    linears = weighted(_errors(plan), plan.ids.size, worths)
    return Measurement(plan.request.menu, linears, "share" if worths is None else "nats", plan.settings["source_sha256"])


def _sensitivities(plan: Plan) -> dict[str, float]:
    """What an error of each linear layer of the decoder does to the predictions."""
    path, request, walk = plan.work.sensitivity, plan.request, plan.walk
    if not path.exists():
        ids = spread(plan.ids, max(1, request.sensitivity_tokens // plan.ids.shape[1]))
        copies = 7 * len(walk) + 1  # of the hidden states
        on_host = plan.keeps_on_host(4 * copies * ids.size * walk.config.hidden_size)
        with plan.bar(len(walk), "sensitivity", " layers") as advance:
            found = sensitivity(walk, ids, seed=request.seed, on_host=on_host, on_layer=lambda index: advance(1))
        plan.release()
        writer.write_json(path, found)
    return read_worths(path, plan.decoder)


def _errors(plan: Plan) -> dict[str, Any]:
    """What `measure_input` gives, of every linear layer of the decoder."""
    count, sizes, work = len(plan.walk), plan.layer_sizes(), plan.work
    missing = [index for index in range(count) if not work.measured(index).exists()]
    if missing:
        hidden = plan.embed()
        with plan.bar(sum(sizes), "measuring", " weights") as advance:
            for index, layer in plan.walk.layers():
                if index in missing:
                    _measure_layer(plan, index, layer, hidden, advance)
                else:
                    advance(sizes[index])
                if index == missing[-1]:
                    break
                plan.walk.run(layer, hidden)
    found: dict[str, Any] = {}
    for index, names in enumerate(plan.layer_names()):
        found |= read_errors(work.measured(index), names)
    return found


def _measure_layer(plan: Plan, index: int, layer: Any, hidden: Any, advance: Callable[[int], Any]) -> None:
    request, reads = plan.request, layer_inputs(layer)
    errors: dict[str, Any] = {}
    chunks = gather.chunks(reads)
    loans = gather.find_loans(plan.walk, layer, reads, hidden) if len(chunks) > 1 else None
    for chunk in chunks:
        hessians = gather.gather(plan.walk, layer, chunk, hidden, loans)
        for read in chunk:
            hessian, tokens = hessians.pop(read.name)
            errors |= measure_input(read, hessian, tokens, request.menu, request.measured_layouts, request.damping)
            advance(sum(linear.k * linear.n for linear in read.linears))
    writer.write_json(plan.work.measured(index), errors)
    plan.release()
