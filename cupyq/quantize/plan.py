"""A run before its work begins: what it is asked for, what it works with, and all that can be refused by then."""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cupyq import _device
from cupyq._progress import bar
from cupyq._version import VERSION
from cupyq.errors import FormatError
from cupyq.formats.safetensors import Checkpoint
from cupyq.models.names import RenamedCheckpoint, renamed
from cupyq.quantize import memory, writer
from cupyq.quantize.calibration import calibration_rows, spread
from cupyq.quantize.layouts import HEAD_LAYOUTS, Layout
from cupyq.quantize.measurement import Measurement
from cupyq.quantize.request import Request
from cupyq.quantize.walk import HEAD, LayerWalk
from cupyq.quantize.work import WorkFolder

_NUMPY_FLOPS = 3e12  # worth spending on comparing the models where there is no GPU
_USABLE = 0.9  # of a GPU's memory
_MODEL = ("model.", HEAD, "visual.", "vision_tower.", "multi_modal_projector.")  # how names of its tensors begin


class Plan:
    """What one run is asked for and works with; `check` adds the tokens and numbers that follow from its files."""

    ids: np.ndarray
    """The calibration rows, int32 [rows, length]."""
    evaluation: tuple[np.ndarray, str] | None
    """(Windows of tokens, what they are from) to compare the models on, or None."""
    budget: int
    """Bits that the decoder may take."""
    settings: dict[str, Any]
    """Everything that decides what is written; the source and the texts by their digests."""

    def __init__(
        self,
        request: Request,
        source: Path,
        work: WorkFolder,
        checkpoint: Checkpoint,
        walk: LayerWalk,
        *,
        shows: bool,
        say: Callable[[str], Any],
    ):
        self.request, self.source, self.work = request, source, work
        self.checkpoint, self.walk, self.shows, self.say = checkpoint, walk, shows, say
        self.xp = walk.xp
        self.shapes: dict[str, tuple[int, int]] = walk.shapes()
        self.decoder = [name for name in self.shapes if name != HEAD]
        self.names = self.decoder if request.is_gptq else [*self.decoder, HEAD]  # of the linear layers to be quantized
        self._parts = walk.parts()
        by_name = RenamedCheckpoint(checkpoint, walk.config.architecture.renames)
        self._model_names = {by_name.stored_name(name): name for name in by_name.names}
        names = [stored for stored, name in self._model_names.items() if name.startswith(_MODEL)]
        self.stored = [name for name in writer.model_files(checkpoint, names) if not self._is_mask(name)]
        coded = {tensor.name for name in self.names if name in self._parts for tensor in self._parts[name].tensors.values()}
        # Old writers of GPTQ store a bias of zeros for layers that have none: it goes with the weight.
        coded |= {f"{name.removesuffix('.weight')}.bias" for name in coded}
        self._coded = {by_name.stored_name(name) for name in coded}

    def check(self, calibration: Any, measurement: Measurement | None, evaluate: Any) -> None:
        """Refuse what will not do, cheap checks first; say how much memory the work will take."""
        self._check_tensors()
        self.budget = self._budget()
        if measurement is not None:
            measurement.check_names(self.decoder)
        self.ids = self._calibration_ids(calibration)
        self.evaluation = self._evaluation(evaluate)
        self._check_room()
        peak = self.peak_bytes(measures=measurement is None and not self.request.is_gptq)
        self.say(f"peak memory: about {peak / 1e9:.2f} GB on {self._device_name()}")
        self.settings = self._settings(measurement)
        if measurement is not None:
            measurement.check_source(self.settings["source_sha256"])

    def _check_tensors(self) -> None:
        for name in self.stored:
            if not self.is_replaced(name):
                writer.check_dtype(self.checkpoint.file(name).path, name, self.checkpoint.info(name).dtype)
        for name in self.names:
            k, n = self.shapes[name]
            if k % 32 or (n % 32 and name != HEAD):
                raise FormatError(
                    f"{self.source}: {name} is a matrix of {k} x {n}, expected multiples of 32: it cannot be quantized"
                )

    def _budget(self) -> int:
        weights = sum(math.prod(self.shapes[name]) for name in self.decoder)
        if self.request.is_gptq:
            return sum(self.request.gptq_bits(*self.shapes[name]) for name in self.decoder)
        sizes = [[self.storage_bits(name, layout) for layout in self.request.menu] for name in self.decoder]
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
        count, length = self.request.windows, self.ids.shape[1]
        if self.xp is np:
            flops = 4 * length * sum(map(math.prod, self.shapes.values()))  # of one window in both models
            count = min(count, int(_NUMPY_FLOPS / flops))
        elif self._comparison_bytes() > _USABLE * _device.current().memory_bytes:
            count = 0
        if not count:
            if self.request.windows:
                self.say("source and result will not be compared: both at once are too large for this machine")
            return None
        if path is None:
            return spread(self.ids, count), "calibration text"
        return calibration_rows(path, self.source, rows=count, length=length, seed=0), Path(path).name

    def _check_room(self) -> None:
        copied = self.checkpoint.total_bytes(name for name in self.stored if not self.is_replaced(name))
        # Quantized tensors lie in the working folder and in the shards at the end.
        writer.check_room(self.work.path, 2 * self._quantized_bytes() + copied, self.work.present_bytes)

    def _settings(self, measurement: Measurement | None) -> dict[str, Any]:
        with self.bar(self.checkpoint.total_bytes(self.stored), "checking") as advance:
            source_sha256 = writer.scan_weights(self.checkpoint, self.stored, advance)
        return self.request.settings | {
            "cupyq": VERSION,
            "rows": len(self.ids),
            "length": self.ids.shape[1],
            "calibration_sha256": _sha256(self.ids),
            "source_sha256": source_sha256,
            "config_sha256": _sha256(np.frombuffer((self.source / "config.json").read_bytes(), np.uint8)),
            "measurement_sha256": None if measurement is None else measurement.sha256,
            "evaluation_sha256": None if self.evaluation is None else _sha256(self.evaluation[0]),
            "dtype": str(self.walk.dtype),
            "batch_tokens": self.walk.batch_tokens,
            "device": self._device_name(),  # others may sum in another order
        }

    # --- sizes ---

    def storage_bits(self, name: str, layout: Layout) -> int:
        return layout.storage_bits(*self.shapes[name], has_bias=name in self._parts and "bias" in self._parts[name].tensors)

    def is_replaced(self, name: str) -> bool:
        """Whether this tensor of the source becomes codes, as one weight or as several, or is the bias of what does."""
        return name in self._coded

    def _is_mask(self, name: str) -> bool:
        return self._model_names[name].startswith("mask.")

    def written_name(self, name: str) -> str:
        """The name that a tensor of the source, or of the model, has in the folder written: there exllamav2 and cupyq look for
        it."""
        return renamed(self._model_names.get(name, name), self.walk.config.architecture.written)

    def _quantized_bytes(self) -> int:
        head = 0 if self.request.is_gptq else self.storage_bits(HEAD, HEAD_LAYOUTS[self.request.head_bits])
        return (self.budget + head) // 8

    def _comparison_bytes(self) -> int:
        return memory.comparison_bytes(self.walk, self.shapes, self.ids.shape[1], self._quantized_bytes())

    def peak_bytes(self, measures: bool) -> int:
        """An estimate of the most memory in use at a time: of the GPU, or without one, of the host; `measures`: that is to be
        done."""
        work = memory.work_bytes(self.walk, self.shapes, self.ids, self.request, self.keeps_on_host, measures)
        return work if self.evaluation is None else max(work, self._comparison_bytes())

    def _hidden_bytes(self) -> int:
        return 2 * 4 * self.ids.size * self.walk.config.hidden_size  # quantizing takes them twice

    def keeps_on_host(self, size: int) -> bool:
        """Whether hidden states of so many bytes would take a quarter of the GPU."""
        return self.xp is not np and size > _device.current().memory_bytes / 4

    def layer_sizes(self) -> list[int]:
        """Weights of each layer."""
        return [sum(math.prod(self.shapes[name]) for name in names) for names in self.layer_names()]

    def layer_names(self) -> list[list[str]]:
        """Linear layers of the decoder, of each of its layers."""
        found: list[list[str]] = [[] for _ in range(len(self.walk))]
        for name in self.decoder:
            found[int(name.split(".")[2])].append(name)
        return found

    # --- for all that follow ---

    def embed(self) -> Any:
        """Hidden states of all calibration rows before the first layer."""
        return self.walk.embed(self.ids, on_host=self.keeps_on_host(self._hidden_bytes()))

    def bar(self, total: int, label: str, unit: str = "B") -> contextlib.AbstractContextManager[Callable[[int], Any]]:
        return bar(total, label, unit=unit, hide=not self.shows)

    def release(self) -> None:
        """Give memory back: blocks of one layer's sizes are of no use to the next one's."""
        if self.xp is not np:
            self.xp.get_default_memory_pool().free_all_blocks()

    def _device_name(self) -> str:
        return "the host, NumPy" if self.xp is np else _device.current().name


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(json.dumps([str(array.dtype), list(array.shape)]).encode() + array.tobytes()).hexdigest()
