"""A model folder in, a quantized one out: measure, allocate bits, quantize, write, report.

    measure    the unquantized model, a layer at a time: every linear layer under each layout of the menu -> its error
    allocate   the layouts with the least sum of weighted errors within the bits asked for
    quantize   the model again, beside itself: each layer with its layout, for the inputs that its already quantized part
               makes, so that outputs come near those of the original
    write      shards, config.json, tokenizer; compare with the source; report

What is done lies in OUT.partial (see `work`), each file written whole or not at all. What follows is computed from these files
and the source alone, so a run that was killed at any moment and resumed writes the same bytes as one that was left in
peace. The folder OUT appears when all is done.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupyq import _device
from cupyq._progress import bar
from cupyq.errors import FormatError
from cupyq.formats.safetensors import Checkpoint
from cupyq.models.config import ModelConfig
from cupyq.quantize import gather, writer
from cupyq.quantize.calibration import calibration_rows
from cupyq.quantize.hessian import Hessian
from cupyq.quantize.layouts import HEAD_LAYOUTS, MENU, Layout
from cupyq.quantize.linear import quantize_linear, quantize_linear_gptq, round_linear
from cupyq.quantize.measurement import Measurement, measure_input, read_json, weighted
from cupyq.quantize.memory import peak_bytes
from cupyq.quantize.recording import LayerInput, layer_inputs
from cupyq.quantize.report import Comparison, LinearReport, bits_per_weight, compare, read_report, summary, write_report
from cupyq.quantize.request import Request
from cupyq.quantize.sensitivity import sensitivity
from cupyq.quantize.walk import LayerWalk, replace
from cupyq.quantize.work import WorkFolder, check_settings, decoded

HEAD = "lm_head"
DAMPING = 0.01
SWEEPS = 4  # of coordinate descent over each weight; more hardly gain anything
MOST_WEIGHTS_WITH_HESSIAN = 10**9
"""Of a head. Larger ones are rounded plainly: float32 copies of them, which the recursion takes, fit no GPU."""

_NUMPY_FLOPS = 3e12  # worth spending on comparing the models where there is no GPU


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
    menu: Sequence[Layout] = MENU,
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
    shorter) are taken; `seed` says which. menu: the layouts to choose from; measured_layouts: measure so many of them and
    interpolate the errors of the others (default: all). sensitivity_tokens: so many calibration tokens tell what an error of
    each layer does to the predictions (see `sensitivity`); 0: errors count by their share of the layer's output.
    measurement: that of an earlier run, OUT/measurement.json, of any number of bits: it saves measuring. damping: share of the
    mean diagonal that is added to a Hessian's.
    format="gptq": 2, 3, 4 or 8 bits everywhere, in groups of `group_size` rows (-1: one), is_symmetric or with zeros of their
    own, act_order: rows by falling activations; the head stays as it is.
    resume: go on with what a killed run left in OUT.partial, to the same bytes; other settings are refused. progress: bars on
    stderr, where that is a terminal. evaluate: a text to compare `out` with `source` on, over `windows` windows (default: the
    calibration's first; 0: no comparison). say: takes lines for people (default: none is said). backend, dtype: as
    `load_model` takes them; batch_tokens: tokens that pass a layer at once, which bounds its activations.
    The same arguments on the same machine give the same bytes.
    ValueError, FormatError or UnsupportedError, before any work, for paths, sizes, text, weights or room on the disk that
    will not do.
    """
    began = time.perf_counter()
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
        menu=tuple(menu),
        measured_layouts=measured_layouts,
        sensitivity_tokens=sensitivity_tokens,
        damping=damping,
        windows=windows,
        shard_bytes=shard_bytes,
    )
    source, out = writer.check_paths(source, out)
    work = WorkFolder(out)
    if out.exists() and not (resume and read_report(out) is not None):
        raise ValueError(f"OUT {out} exists: choose another folder, or delete it")
    if work.path.exists() and not resume:
        raise ValueError(f"{work.path} is there, of a run that did not end: pass --resume (resume=True) to go on, or delete it")
    config = ModelConfig.from_file(source)
    with Checkpoint(source) as checkpoint:
        writer.refuse_quantized(config, checkpoint)
        with LayerWalk(source, backend, dtype=dtype, batch_tokens=batch_tokens) as walk:
            job = _Job(request, source, out, work, checkpoint, walk, progress, say or (lambda line: None))
            layers, comparison = job.run(calibration, measurement, evaluate)
    return Result(out, bits_per_weight(layers), time.perf_counter() - began, layers, comparison)


class _Job:
    """One run: what it was asked for and what it works with."""

    def __init__(
        self,
        request: Request,
        source: Path,
        out: Path,
        work: WorkFolder,
        checkpoint: Checkpoint,
        walk: LayerWalk,
        shows: bool,
        say: Callable[[str], Any],
    ):
        self.request, self.source, self.out, self.work = request, source, out, work
        self.checkpoint, self.walk, self.shows, self.say = checkpoint, walk, shows, say
        self.xp = walk.xp
        self.shapes: dict[str, tuple[int, int]] = walk.shapes()
        self.decoder = [name for name in self.shapes if name != HEAD]
        self.names = self.decoder if request.is_gptq else [*self.decoder, HEAD]  # of the linear layers to be quantized
        self.stored = writer.model_files(checkpoint, (name for name in checkpoint.names if name.startswith(("model.", HEAD))))

    def run(self, calibration: Any, measurement: Any, evaluate: Any) -> tuple[list[LinearReport], Comparison | None]:
        self._check_tensors()
        budget = self._check_bits()
        self.ids = self._calibration_ids(calibration)
        evaluation = self._evaluation(evaluate)
        self._check_room(budget)
        self.say(f"peak memory: about {self.peak_bytes() / 1e9:.2f} GB on {_device_name(self.xp)}")
        settings = self._settings(measurement, evaluation)
        if self.out.exists():  # killed between the last two steps, or resumed once too often
            found = read_report(self.out)
            if found is None:
                raise ValueError(f"OUT {self.out} exists: choose another folder, or delete it")
            check_settings(self.out, found[0], settings)
            self.work.remove()
            return found[1], found[2]
        with self.work.locked():
            self.work.begin(settings)
            chosen = {} if self.request.is_gptq else self._allocate(measurement, settings["source_sha256"], budget)
            self._quantize(chosen)
            layers = [self.work.report(name) for name in self.names]
            comparison = self._write(layers, settings, evaluation)
        os.replace(self.work.model, self.out)
        self.work.remove()
        for line in summary(layers, comparison):
            self.say(line)
        return layers, comparison

    # --- what can be known first ---

    def _check_tensors(self) -> None:
        for name in self.stored:
            if not self._is_replaced(name):
                writer.check_dtype(self.checkpoint.file(name).path, name, self.checkpoint.info(name).dtype)
        for name in self.names:
            k, n = self.shapes[name]
            if k % 32 or (n % 32 and name != HEAD):
                raise FormatError(
                    f"{self.source}: {name} is a matrix of {k} x {n}, expected multiples of 32: it cannot be quantized"
                )

    def _storage_bits(self, name: str, layout: Layout) -> int:
        return layout.storage_bits(*self.shapes[name], has_bias=f"{name}.bias" in self.checkpoint)

    def _check_bits(self) -> int:
        """The bits that the decoder may take."""
        weights = sum(math.prod(self.shapes[name]) for name in self.decoder)
        if self.request.is_gptq:
            return sum(self.request.gptq_bits(*self.shapes[name]) for name in self.decoder)
        sizes = [[self._storage_bits(name, layout) for layout in self.request.menu] for name in self.decoder]
        least, most = sum(map(min, sizes)) / weights, sum(map(max, sizes)) / weights
        low, high = (math.ceil(1000 * bits) / 1000 for bits in (least, most))
        if not low <= self.request.bits <= high:
            reach = f"{low:.3f} to {high:.3f}"
            raise ValueError(f"bits must be from {reach} for this model and menu of layouts, got {self.request.bits:g}")
        return int(self.request.bits * weights)

    def _calibration_ids(self, path: Any) -> np.ndarray:
        context = self.walk.config.max_seq_len
        length = self.request.length or min(2048, context)
        if length > context:
            raise ValueError(f"length must be at most {context}, the model's context, got {length}")
        return calibration_rows(path, self.source, rows=self.request.rows, length=length, seed=self.request.seed)

    def _evaluation(self, path: Any) -> tuple[np.ndarray, str] | None:
        """(windows of tokens, what they are from) to compare the models on, or None."""
        count, length = self.request.windows, self.ids.shape[1]
        if self.xp is np:
            flops = 4 * length * sum(map(math.prod, self.shapes.values()))  # of one window in both models
            count = min(count, int(_NUMPY_FLOPS / flops))
        elif 1.6 * self.checkpoint.total_bytes(self.stored) > _device.current().memory_bytes:
            count = 0
        if not count:
            if self.request.windows:
                self.say("source and result will not be compared: both at once are too large for this machine")
            return None
        if path is None:
            return self.ids[:count], "calibration text"
        return calibration_rows(path, self.source, rows=count, length=length, seed=0), Path(path).name

    def _check_room(self, budget: int) -> None:
        head = 0 if self.request.is_gptq else self._storage_bits(HEAD, HEAD_LAYOUTS[self.request.head_bits])
        copied = self.checkpoint.total_bytes(name for name in self.stored if not self._is_replaced(name))
        # Quantized tensors lie in the working folder and in the shards at the end.
        writer.check_room(self.work.path, 2 * (budget + head) // 8 + copied, self.work.present_bytes)

    def _is_replaced(self, name: str) -> bool:
        key, _, short = name.rpartition(".")
        return key in self.names and short == "weight"

    def _settings(self, measurement: Any, evaluation: tuple[np.ndarray, str] | None) -> dict[str, Any]:
        """Everything that decides what is written; the source and the texts by their digests."""
        with bar(self.checkpoint.total_bytes(self.stored), "checking", hide=not self.shows) as advance:
            source_sha256 = writer.scan_weights(self.checkpoint, self.stored, advance)
        return self.request.settings | {
            "cupyq": _version(),
            "rows": len(self.ids),
            "length": self.ids.shape[1],
            "calibration_sha256": _sha256(self.ids),
            "source_sha256": source_sha256,
            "config_sha256": _sha256(np.frombuffer((self.source / "config.json").read_bytes(), np.uint8)),
            "measurement_sha256": None if measurement is None else _sha256(np.fromfile(measurement, np.uint8)),
            "evaluation_sha256": None if evaluation is None else _sha256(evaluation[0]),
            "dtype": str(self.walk.dtype),
            "batch_tokens": self.walk.batch_tokens,
            "device": _device_name(self.xp),  # others may sum in another order
        }

    def peak_bytes(self) -> int:
        """An estimate of the most memory in use at a time: of the GPU, or without one, of the host."""
        return peak_bytes(self.walk, {name: self.shapes[name] for name in self.names}, self.ids, self.request)

    def _layer_sizes(self) -> list[int]:
        sizes = [0] * len(self.walk)
        for name in self.decoder:
            sizes[int(name.split(".")[2])] += math.prod(self.shapes[name])
        return sizes

    # --- measuring ---

    def _embed(self) -> Any:
        """Hidden states of all calibration rows; on the host where they would take a quarter of the GPU."""
        size = 2 * 4 * self.ids.size * self.walk.config.hidden_size  # quantizing takes them twice
        return self.walk.embed(self.ids, on_host=self.xp is not np and size > _device.current().memory_bytes / 4)

    def _allocate(self, given: Any, source_sha256: str, budget: int) -> dict[str, Layout]:
        """The layout of every linear layer of the decoder; what it was chosen from is written down."""
        if given is None:
            sensitivities = self._sensitivities() if self.request.sensitivity_tokens else None
            measurement = Measurement(self.request.menu, weighted(self._measure(), self.ids.size, sensitivities))
        else:
            measurement = Measurement.from_file(Path(given), source_sha256, self.decoder)
        writer.write_json(self.work.measurement, measurement.to_json(source_sha256))
        return measurement.allocate(self._storage_bits, budget)

    def _sensitivities(self) -> dict[str, float]:
        """What an error of each linear layer of the decoder does to the predictions."""
        path = self.work.sensitivity
        if not path.exists():
            ids = self.ids[: max(1, self.request.sensitivity_tokens // self.ids.shape[1])]
            copies = 7 * len(self.walk) + 1  # of the hidden states
            size = 4 * copies * ids.size * self.walk.config.hidden_size
            on_host = self.xp is not np and size > _device.current().memory_bytes / 4
            with bar(len(self.walk), "sensitivity", unit=" layers", hide=not self.shows) as advance:
                found = sensitivity(self.walk, ids, seed=self.request.seed, on_host=on_host, on_layer=lambda index: advance(1))
            _release(self.xp)
            writer.write_json(path, found)
        return read_json(path)

    def _measure(self) -> dict[str, Any]:
        """What `measure_input` gives, of every linear layer of the decoder."""
        count, sizes = len(self.walk), self._layer_sizes()
        missing = [index for index in range(count) if not self.work.measured(index).exists()]
        if missing:
            hidden = self._embed()
            with self._weights_bar(sum(sizes), "measuring") as advance:
                for index, layer in self.walk.layers():
                    if index in missing:
                        self._measure_layer(index, layer, hidden, advance)
                    else:
                        advance(sizes[index])
                    if index == missing[-1]:
                        break
                    self.walk.run(layer, hidden)
        found: dict[str, Any] = {}
        for index in range(count):
            found |= read_json(self.work.measured(index))
        return found

    def _measure_layer(self, index: int, layer: Any, hidden: Any, advance: Callable[[int], Any]) -> None:
        measured: dict[str, Any] = {}
        for chunk in gather.chunks(layer_inputs(layer)):
            hessians = gather.gather(self.walk, layer, chunk, hidden)
            for read in chunk:
                hessian, tokens = hessians.pop(read.name)
                options = (self.request.menu, self.request.measured_layouts, self.request.damping)
                measured |= measure_input(read, hessian, tokens, *options)
                advance(sum(linear.k * linear.n for linear in read.linears))
        writer.write_json(self.work.measured(index), measured)
        _release(self.xp)

    def _weights_bar(self, total: int, label: str) -> Any:
        return bar(total, label, unit=" weights", hide=not self.shows)

    # --- quantizing ---

    def _quantize(self, chosen: Mapping[str, Layout]) -> None:
        """Every linear layer into a file of its own; of those that have one, the weights are put in place."""
        if self.work.has(*self.names):
            return
        hidden = self._embed()
        originals = hidden.copy()
        with self._weights_bar(sum(math.prod(self.shapes[name]) for name in self.names), "quantizing") as advance:
            for _, layer, original in self.walk.pairs():
                for stage in gather.stages(layer_inputs(layer)):
                    for chunk in gather.chunks(stage):
                        self._quantize_inputs(layer, hidden, original, originals, chunk, chosen)
                        advance(sum(linear.k * linear.n for read in chunk for linear in read.linears))
                self.walk.run(layer, hidden)
                self.walk.run(original, originals)
                _release(self.xp)
            if HEAD in self.names and not self.work.has(HEAD):
                self._quantize_head(hidden, originals)

    def _quantize_inputs(
        self, layer: Any, hidden: Any, original: Any, originals: Any, reads: Sequence[LayerInput], chosen: Mapping[str, Layout]
    ) -> None:
        """The linear layers of inputs that do not depend on one another; then each has its quantized weights.

        original, originals: the same layer with its own weights, and the hidden states that only such layers made.
        """
        if not self.work.has(*(linear.name for read in reads for linear in read.linears)):
            hessians = gather.gather_beside(self.walk, layer, reads, hidden, original, originals)
            for read in reads:
                hessian, tokens = hessians.pop(read.name)
                missing = [linear for linear in read.linears if not self.work.has(linear.name)]
                is_ordered = self.request.act_order or not self.request.is_gptq
                if missing:
                    prepared = hessian.prepare(self.request.damping, act_order=is_ordered, keeps_matrix=True)
                for linear in missing:
                    quantized, layout = self._quantized(linear, prepared, chosen)
                    self._save(linear, quantized, layout, hessian, tokens)
        for read in reads:
            for linear in read.linears:
                # Of the file, as in a run that finds it there.
                replace(linear, self._decoded(linear.name, self.work.arrays(linear.name)))

    def _quantized(self, linear: Any, prepared: Any, chosen: Mapping[str, Layout]) -> tuple[Any, str]:
        """(QuantizedLinear, name of its layout)."""
        request, weight, name = self.request, prepared.corrected(linear.weight.T), linear.name
        if not request.is_gptq:
            layout = chosen[name]
            return quantize_linear(weight, prepared, layout, sweeps=SWEEPS, name=name), layout.name
        bits, size = int(request.bits), request.group_size
        options = (bits, size, request.is_symmetric, request.act_order)
        quantized = quantize_linear_gptq(weight, prepared, *options, sweeps=SWEEPS, name=name)
        return quantized, f"{bits}g{size if size > 0 else linear.k}"

    def _quantize_head(self, hidden: Any, originals: Any) -> None:
        head = self.walk.head()
        linear, layout = head.head, HEAD_LAYOUTS[self.request.head_bits]
        hessian = Hessian(linear.k, self.xp, name=HEAD)
        tokens = self.walk.record_head(head, hidden, hessian.add, originals)
        if linear.k * linear.n > MOST_WEIGHTS_WITH_HESSIAN:
            quantized = round_linear(linear.weight.T, hessian.diagonal, layout, damping=self.request.damping, name=HEAD)
        else:
            prepared = hessian.prepare(self.request.damping, keeps_matrix=True)
            quantized = quantize_linear(prepared.corrected(linear.weight.T), prepared, layout, sweeps=SWEEPS, name=HEAD)
        self._save(linear, quantized, layout.name, hessian, tokens)

    def _save(self, linear: Any, quantized: Any, layout: str, hessian: Hessian, tokens: int) -> None:
        """The file of a linear layer, after a look whether its tensors stand for the weights that were chosen."""
        name, tensors, bits = linear.name, dict(quantized.tensors), quantized.storage_bits
        if linear.bias is not None:
            bias = self.checkpoint.array(f"{name}.bias").astype(np.float32)
            if np.abs(bias).max(initial=0) >= 65520:
                raise FormatError(
                    f"{self.source}: tensor '{name}.bias': values above 65504, which a quantized layer cannot have"
                )
            tensors["bias"] = bias.astype(np.float16)
            bits += 16 * linear.n
        if not bool((self._decoded(name, tensors) == quantized.values).all()):
            raise RuntimeError(f"{name}: the tensors made of it do not stand for the weights that were chosen")
        output = gather.mean_square(hessian, linear.weight.T)
        self.work.save(tensors, LinearReport(name, linear.k, linear.n, layout, bits, quantized.error, output, tokens))

    def _decoded(self, name: str, tensors: Mapping[str, np.ndarray]) -> Any:
        options = {"bits": int(self.request.bits), "group_size": self.request.group_size} if self.request.is_gptq else {}
        return decoded(tensors, name, self.shapes[name][1], self.xp, options)

    # --- writing ---

    def _write(
        self, layers: Sequence[LinearReport], settings: Mapping[str, Any], evaluation: tuple[np.ndarray, str] | None
    ) -> Comparison | None:
        """The model's folder, whole but for its name."""
        request, folder = self.request, self.work.model
        tensors = [tensor for name in self.names for tensor in self.work.tensors(name)]
        written = {tensor.name for tensor in tensors}
        for name in self.stored:
            if name not in written and not self._is_replaced(name):
                tensors.append(writer.OutputTensor.stored(self.checkpoint, name))
        if request.is_gptq:
            gptq = (int(request.bits), request.group_size, request.is_symmetric, request.act_order)
            config = writer.gptq_config(_version(), *gptq)
        else:
            calibration = {"rows": len(self.ids), "length": self.ids.shape[1], "dataset": settings["calibration_sha256"]}
            config = writer.exl2_config(_version(), request.bits, request.head_bits, calibration)
        with bar(sum(tensor.nbytes for tensor in tensors), "writing", hide=not self.shows) as advance:
            writer.write_model(folder, self.source, tensors, config, shard_bytes=request.shard_bytes, on_bytes=advance)
        if not request.is_gptq:
            writer.write_atomically(folder / self.work.measurement.name, [self.work.measurement.read_bytes()])
        comparison = None if evaluation is None else self._compare(*evaluation)
        title = f"{self.source.name}: {request.format.upper()}, {bits_per_weight(layers):.3f} bits per weight"
        write_report(folder, layers, settings, title, comparison)
        return comparison

    def _compare(self, windows: np.ndarray, text: str) -> Comparison:
        _release(self.xp)
        backend = "numpy" if self.xp is np else "cupy"
        with bar(len(windows), "comparing", unit=" windows", hide=not self.shows) as advance:
            return compare(
                self.source, self.work.model, windows, text, backend=backend, dtype=self.walk.dtype, on_windows=advance
            )


def _release(xp: Any) -> None:
    """Blocks of one layer's sizes are of no use to the next one's."""
    if xp is not np:
        xp.get_default_memory_pool().free_all_blocks()


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(json.dumps([str(array.dtype), list(array.shape)]).encode() + array.tobytes()).hexdigest()


def _device_name(xp: Any) -> str:
    return "the host, NumPy" if xp is np else _device.current().name


def _version() -> str:
    try:
        return importlib.metadata.version("cupyq")
    except importlib.metadata.PackageNotFoundError:  # a source tree that was not installed
        return "0"
