"""A model folder in, a quantized one out: measure, allocate bits, quantize, write, report.

    plan          what can be known and refused before any work
    choice        the unquantized model, a layer at a time: every linear layer under each layout of the menu -> its error;
                  then the layouts with the least sum of weighted errors within the bits asked for
    quantization  the model again, beside itself: each layer with its layout
    here          shards, config.json, tokenizer; compare with the source; report

What is done lies in OUT.partial (see `work`), each file written whole or not at all. What follows is computed from these files
and the source alone, so a run that was killed at any moment and resumed writes the same bytes as one that was left in
peace. The folder OUT appears when all is done.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cupyq._version import VERSION
from cupyq.formats.safetensors import Checkpoint
from cupyq.models.config import ModelConfig
from cupyq.quantize import choice, quantization, writer
from cupyq.quantize.layouts import MENU, Layout
from cupyq.quantize.measurement import Measurement
from cupyq.quantize.plan import Plan
from cupyq.quantize.report import Comparison, LinearReport, bits_per_weight, compare, read_report, summary, write_report
from cupyq.quantize.request import Request
from cupyq.quantize.walk import LayerWalk
from cupyq.quantize.work import WorkFolder, check_settings

DAMPING = 0.01


@dataclass(frozen=True)
class Result:
    """What `quantize_model` made."""

    folder: Path
    bits_per_weight: float
    """Mean over the decoder, as `Model.bits_per_weight`."""
    seconds: float
    """Of this run: less than the whole work where it was resumed."""
    layers: list[LinearReport]
    comparison: Comparison | None
    """None where the two models were not compared."""


def quantize_model(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bits: float,
    head_bits: int = 6,
    calibration: str | os.PathLike[str],
    rows: int = 100,
    length: int | None = None,
    seed: int = 0,
    backend: str = "auto",
    dtype: Any = None,
    format: str = "exl2",
    group_size: int = 128,
    is_symmetric: bool = True,
    act_order: bool = False,
    measurement: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    menu: Sequence[Layout] | None = None,
    measured_layouts: int | None = None,
    sensitivity_tokens: int = 4096,
    damping: float = DAMPING,
    evaluate: str | os.PathLike[str] | None = None,
    windows: int = 16,
    shard_bytes: int = writer.SHARD_BYTES,
    batch_tokens: int = 4096,
    say: Callable[[str], Any] | None = None,
) -> Result:
    """Quantize the unquantized model in folder `source` to a new folder `out`: EXL2 of `bits` bits per weight, or GPTQ.

    bits: mean over the decoder's linear layers, with scales and permutations; never exceeded. head_bits: 2, 3, 4, 5, 6 or 8.
    calibration: a .txt or .jsonl file, of which `rows` windows of `length` tokens (default: 2048, or the model's context if
    shorter) are taken; `seed` says which. menu: the layouts to choose from (default: `layouts.MENU`, or the measurement's);
    measured_layouts: measure so many of them and interpolate the errors of the others (default: all). sensitivity_tokens: so
    many calibration tokens, of rows spread evenly, tell what an error of each layer does to the predictions: `sensitivity`; 0:
    errors count by their share of the layer's output. measurement: that of an earlier run, OUT/measurement.json, of any number
    of bits: it saves measuring. damping: share of the mean diagonal that is added to a Hessian's.
    format="gptq": 2, 3, 4 or 8 bits everywhere, in groups of `group_size` rows (-1: one), is_symmetric or with zeros of their
    own, act_order: rows by falling activations; the head stays as it is.
    resume: go on with what a killed run left in OUT.partial, to the same bytes; other settings are refused. progress: bars on
    stderr, where that is a terminal. evaluate: a text to compare `out` with `source` on, over `windows` windows (default:
    calibration rows, spread evenly; 0: no comparison). say: takes lines for people (default: none is said). backend, dtype: as
    `load_model` takes them; batch_tokens: tokens that pass a layer at once, which bounds its activations.
    The same arguments on the same machine give the same bytes.
    ValueError, FormatError or UnsupportedError, before any work, for paths, sizes, text, weights or room on the disk that
    will not do.
    """
    began = time.perf_counter()
    measured = None if measurement is None else Measurement.from_file(Path(measurement))
    request = Request(
        bits=bits,
        head_bits=head_bits,
        rows=rows,
        length=length,
        seed=seed,
        format=format,
        group_size=group_size,
        is_symmetric=is_symmetric,
        act_order=act_order,
        menu=_menu(menu, measured),
        measured_layouts=measured_layouts,
        sensitivity_tokens=sensitivity_tokens,
        damping=damping,
        windows=windows,
        shard_bytes=shard_bytes,
    )
    if measured is not None and request.is_gptq:
        raise ValueError("measurement has no meaning for format 'gptq', of the same bits everywhere: leave it out")
    source, out = writer.check_paths(source, out)
    work = WorkFolder(out)
    if out.exists() and not (resume and read_report(out) is not None):
        raise _taken(out)
    if work.path.exists() and not resume:
        raise ValueError(f"{work.path} is there, of a run that did not end: pass --resume (resume=True) to go on, or delete it")
    config = ModelConfig.from_file(source)
    with Checkpoint(source) as checkpoint:
        writer.refuse_quantized(config, checkpoint)
        writer.check_shards(checkpoint)
        with LayerWalk(source, backend, dtype=dtype, batch_tokens=batch_tokens) as walk:
            plan = Plan(request, source, work, checkpoint, walk, shows=progress, say=say or (lambda line: None))
            plan.check(calibration, measured, evaluate)
            layers, comparison = _finished(plan, out) if out.exists() else _run(plan, out, measured)
    return Result(out, bits_per_weight(layers), time.perf_counter() - began, layers, comparison)


def _menu(given: Sequence[Layout] | None, measured: Measurement | None) -> tuple[Layout, ...]:
    """The layouts to choose from: those that were measured, or are to be."""
    if measured is None:
        return MENU if given is None else tuple(given)
    if given is not None and set(given) != set(measured.menu):
        found, asked = ("+".join(layout.name for layout in menu)[:60] for menu in (measured.menu, given))
        raise ValueError(f"menu: {asked}, but the measurement is of {found}: leave out one of them")
    return measured.menu


def _taken(out: Path) -> ValueError:
    return ValueError(f"OUT {out} exists: choose another folder, or delete it")


def _finished(plan: Plan, out: Path) -> tuple[list[LinearReport], Comparison | None]:
    """What a run found that was killed between the last two steps; or resumed once too often."""
    found = read_report(out)
    if found is None:
        raise _taken(out)
    settings, layers, comparison = found
    check_settings(out, settings, plan.settings)
    plan.work.remove()
    return layers, comparison


def _run(plan: Plan, out: Path, measured: Measurement | None) -> tuple[list[LinearReport], Comparison | None]:
    work = plan.work
    with work.locked():
        work.begin(plan.settings)
        if plan.request.is_gptq:
            quantization.quantize(plan, {}, {})
        else:
            if measured is None:
                measured = choice.measured(plan)
            writer.write_json(work.measurement, measured.to_json())
            layouts = measured.allocate(plan.decoder, plan.storage_bits, plan.budget)
            quantization.quantize(plan, layouts, measured.worths)
        layers = [work.report(name) for name in plan.names]
        comparison = _write(plan, layers)
    os.replace(work.model, out)
    work.remove()
    for line in summary(layers, comparison):
        plan.say(line)
    return layers, comparison


# --- writing ----------------------------------------------------------------------------------------------------------


def _write(plan: Plan, layers: Sequence[LinearReport]) -> Comparison | None:
    """The model's folder, whole but for its name."""
    request, work = plan.request, plan.work
    tensors = [tensor for name in plan.names for tensor in work.tensors(name)]
    kept = [name for name in plan.stored if not plan.is_replaced(name)]
    tensors += [writer.OutputTensor.stored(plan.checkpoint, name) for name in kept]
    tensors = [replace(tensor, name=plan.written_name(tensor.name)) for tensor in tensors]
    with plan.bar(sum(tensor.nbytes for tensor in tensors), "writing") as advance:
        writer.write_model(work.model, plan.source, tensors, _config(plan), shard_bytes=request.shard_bytes, on_bytes=advance)
    if not request.is_gptq:
        writer.write_atomically(work.model / work.measurement.name, [work.measurement.read_bytes()])
    comparison = None if plan.evaluation is None else _compare(plan, *plan.evaluation)
    title = f"{plan.source.name}: {request.format.upper()}, {bits_per_weight(layers):.3f} bits per weight"
    write_report(work.model, layers, plan.settings, title, comparison)
    return comparison


def _config(plan: Plan) -> dict[str, Any]:
    """`quantization_config`."""
    request, settings = plan.request, plan.settings
    if request.is_gptq:
        return writer.gptq_config(VERSION, int(request.bits), request.group_size, request.is_symmetric, request.act_order)
    calibration = {"rows": settings["rows"], "length": settings["length"], "dataset": settings["calibration_sha256"]}
    return writer.exl2_config(VERSION, request.bits, request.head_bits, calibration)


def _compare(plan: Plan, windows: np.ndarray, text: str) -> Comparison:
    plan.release()
    backend = "numpy" if plan.xp is np else "cupy"
    with plan.bar(len(windows), "comparing", " windows") as advance:
        return compare(plan.source, plan.work.model, windows, text, backend=backend, dtype=plan.walk.dtype, on_windows=advance)
