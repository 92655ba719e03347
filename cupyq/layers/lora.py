"""LoRA adapters: read from PEFT folders, laid side by side for each projection, chosen per request."""

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cupyq._arrays import bfloat16, float16, float32, namespace
from cupyq._json_file import read_json
from cupyq.errors import FormatError, UnsupportedError
from cupyq.formats.safetensors import SafetensorsFile
from cupyq.layers.name_pattern import NamePattern
from cupyq.ops.lora import lora

_SMALLEST_BIAS = 1e-6  # writers leave zeros, and what is left of them after training with no gradient


@dataclass(frozen=True)
class Selection:
    """Which adapters each request of a batch uses, and how much of each."""

    weights: Any
    """float32 [requests, adapters], where the model's arrays are; rows of a batch belong to the requests in equal shares."""
    active: frozenset[int]
    """The columns of `weights` that are not all 0: known on the host, so that layers without these adapters do nothing."""


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """The adapters of one projection, side by side along the rank axis: what `ops.lora` takes. Never changes."""

    a: Any
    """[K, ranks]"""
    b: Any
    """[ranks, N], the scale of each adapter multiplied in"""
    rank_adapter: Any
    """int32 [ranks], where a and b are"""
    columns: tuple[int, ...]
    """The same numbers on the host."""

    @classmethod
    def of(cls, a: Any, b: Any, adapter: int) -> "LoraWeights":
        """One adapter, that of column `adapter` of a Selection's weights; a [K, rank] and b [rank, N] are kept, not copied."""
        return cls._with_columns(a, b, (adapter,) * a.shape[1])

    @classmethod
    def _with_columns(cls, a: Any, b: Any, columns: tuple[int, ...]) -> "LoraWeights":
        return cls(a, b, namespace(a=a).asarray(np.array(columns, np.int32)), columns)

    @functools.cached_property
    def adapters(self) -> frozenset[int]:
        return frozenset(self.columns)

    def joined(self, other: "LoraWeights") -> "LoraWeights":
        """These adapters and then those of `other`, in new arrays."""
        a, b = _beside(self.a, other.a, 1), _beside(self.b, other.b, 0)
        return self._with_columns(a, b, self.columns + other.columns)

    def without(self, adapter: int) -> "LoraWeights | None":
        """New arrays without one adapter, whose ranks lie together; None where no other is left."""
        begin, count = self.columns.index(adapter), self.columns.count(adapter)
        end = begin + count
        if count == len(self.columns):
            return None
        a, b = _beside(self.a[:, :begin], self.a[:, end:], 1), _beside(self.b[:begin], self.b[end:], 0)
        return self._with_columns(a, b, self.columns[:begin] + self.columns[end:])

    def add_to(self, y: Any, x: Any, selection: Selection) -> None:
        """y [..., N] += what the selected adapters make of x [..., K]; y is rounded once more."""
        k, n = len(self.a), self.b.shape[1]
        lora(y.reshape(-1, n), x.reshape(-1, k), self.a, self.b, self.rank_adapter, selection.weights)


def _beside(left: Any, right: Any, axis: int) -> Any:
    """Two matrices of one dtype in one new C-contiguous array. As words, since CuPy does not calculate with bfloat16."""
    shape = [left.shape[0], left.shape[1]]
    shape[axis] += right.shape[axis]
    result = namespace(left=left).empty(shape, left.dtype)
    words = np.dtype(f"u{result.itemsize}")
    at = left.shape[axis]
    first, second = (np.s_[:, :at], np.s_[:, at:]) if axis else (np.s_[:at], np.s_[at:])
    result.view(words)[first] = left.view(words)
    result.view(words)[second] = right.view(words)
    return result


@dataclass(frozen=True, eq=False)
class LowRank:
    """One projection of an adapter, as its file holds it: A [rank, K] and B [N, rank]; the delta is scale * B A."""

    path: Path
    name_a: str
    name_b: str
    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def check(self, k: int, n: int) -> None:
        """FormatError unless this fits a projection of k inputs and n outputs."""
        for name, found, expected in ((self.name_a, self.a.shape, (self.rank, k)), (self.name_b, self.b.shape, (n, self.rank))):
            if found != expected:
                raise FormatError(
                    f"{self.path}: tensor {name!r}: shape {list(found)}, expected {list(expected)}; "
                    "the adapter was trained on another model"
                )

    def arrays(self, dtype: np.dtype, padded_n: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """a [K, rank] and scale * b [rank, N], C-contiguous, of `dtype`: the scale is applied in float32, before rounding.

        padded_n: columns of zeros are added to b up to so many. FormatError for values that are not finite in `dtype`.
        """
        a = _converted(self.a.T, 1.0, dtype, self.path, self.name_a)
        b = _converted(self.b.T, self.scale, dtype, self.path, self.name_b)
        if padded_n is not None and padded_n != b.shape[1]:
            wide = np.zeros((self.rank, padded_n), dtype)
            wide[:, : b.shape[1]] = b
            b = wide
        return a, b


def _converted(matrix: np.ndarray, scale: float, dtype: np.dtype, path: Path, name: str) -> np.ndarray:
    values = matrix.astype(np.float32, order="C")
    with np.errstate(over="ignore", invalid="ignore"):
        values *= np.float32(scale)
        result = values.astype(dtype)
    if not np.isfinite(result.astype(np.float32)).all():
        raise FormatError(
            f"{path}: tensor {name!r}: values that are not finite, or beyond the range of {dtype} once scaled by {scale:g}"
        )
    return result


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter of PEFT's: which projections it changes, and by what."""

    name: str
    """Of its folder."""
    path: Path
    """Of its tensors."""
    projections: dict[str, LowRank]
    """By projection, such as "layers.0.self_attn.q_proj" or "lm_head"."""

    @classmethod
    def from_peft(cls, folder: str | os.PathLike[str], scaling: float = 1.0) -> "Adapter":
        """Read adapter_config.json and adapter_model.safetensors; tensors stay in the file until they are used.

        Delta of a projection: s * B A with s = scaling * lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora, where
        rank_pattern and alpha_pattern may give a projection an r and a lora_alpha of its own.
        FormatError names file and key or tensor; UnsupportedError what of PEFT cupyq does not do: DoRA, trained biases,
        whole modules saved beside the adapter, and the like. Source: huggingface/peft, tuners/lora and utils/other.py.
        """
        if isinstance(scaling, bool) or not isinstance(scaling, (int, float)) or not math.isfinite(scaling):
            raise ValueError(f"scaling must be a finite number, got {scaling!r}")
        folder = Path(folder)
        config = _Config(folder)
        path = folder / "adapter_model.safetensors"
        if not path.is_file() and (folder / "adapter_model.bin").is_file():
            raise UnsupportedError(
                f"{folder}: adapter_model.bin is a pickle, which can run code and is never read; convert it: "
                "save_file(torch.load('adapter_model.bin', weights_only=True), 'adapter_model.safetensors'), with save_file of "
                "safetensors.torch"
            )
        with SafetensorsFile(path) as file:
            found = _sorted_tensors(file)
            projections: dict[str, LowRank] = {}
            for module, sides in found.items():
                projection = _projection(path, module, next(iter(sides.values())))
                if projection in projections:
                    raise FormatError(f"{path}: tensor {sides['A']!r}: a second pair for {projection}, expected one")
                projections[projection] = _low_rank(file, config, module, sides, float(scaling))
        if not projections:
            raise FormatError(f"{path}: no tensor named '*.lora_A.weight'; not a LoRA adapter?")
        return cls(folder.resolve().name, path, projections)


_PREFIX = "base_model.model."


def _sorted_tensors(file: SafetensorsFile) -> dict[str, dict[str, str]]:
    """{module: {"A": tensor name, "B": tensor name}} of the LoRA pairs of a file; others are refused or of no effect."""
    found: dict[str, dict[str, str]] = {}
    for name in file.names:
        module, _, last = name.rpartition(".")
        if module.endswith((".lora_A", ".lora_B")) and last == "weight":
            found.setdefault(module[: -len(".lora_A")], {})[module[-1]] = name
        elif "bias" in name.split(".")[-2:]:
            if not np.all(np.abs(file.array(name).astype(np.float32)) <= _SMALLEST_BIAS):  # NaN is refused too
                _refuse(file, name, "a trained bias; train with bias='none', or merge the adapter into its model")
        elif ".modules_to_save." in name:
            _refuse(file, name, "a module saved whole (modules_to_save); merge the adapter into its model")
        elif last.startswith("lora_embedding_") or "embed_tokens" in name:
            _refuse(file, name, "belongs to the embedding, which takes no adapter; merge the adapter into its model")
        elif "lora_magnitude_vector" in name:
            _refuse(file, name, "belongs to DoRA, which rescales the weights; merge the adapter into its model")
        elif not name.endswith((".original_module.weight", ".base_layer.weight")):  # copies of the model's own weights
            _refuse(file, name, "not part of a LoRA pair (lora_A.weight, lora_B.weight)")
    for module, sides in found.items():
        for side, other in ("AB", "BA"):
            if side not in sides:
                raise FormatError(f"{file.path}: tensor {sides[other]!r}: without its '{module}.lora_{side}.weight'")
    return found


def _refuse(file: SafetensorsFile, name: str, what: str) -> NoReturn:
    raise UnsupportedError(f"{file.path}: tensor {name!r}: {what}")


def _projection(path: Path, module: str, name: str) -> str:
    """ "layers.0.mlp.up_proj" of "base_model.model.model.layers.0.mlp.up_proj"."""
    begin = module.find("model.layers.")
    if begin >= 0:
        return module[begin + len("model.") :]
    if module.rpartition(".")[2] == "lm_head":
        return "lm_head"
    raise UnsupportedError(f"{path}: tensor {name!r}: expected a name with 'model.layers.<number>.' or 'lm_head' in it")


def _low_rank(file: SafetensorsFile, config: "_Config", module: str, sides: dict[str, str], scaling: float) -> LowRank:
    a, b = file.array(sides["A"]), file.array(sides["B"])
    rank, scale = config.rank_and_scale(module.removeprefix(_PREFIX))
    for name, array, axis in ((sides["A"], a, 0), (sides["B"], b, 1)):
        if array.dtype not in (float16, bfloat16, float32):
            raise UnsupportedError(f"{file.path}: tensor {name!r}: dtype {array.dtype}, expected float16, bfloat16 or float32")
        if array.ndim != 2 or array.shape[axis] != rank:
            expected = f"[{rank}, inputs]" if axis == 0 else f"[outputs, {rank}]"
            raise FormatError(
                f"{file.path}: tensor {name!r}: shape {list(array.shape)}, expected {expected}, as {config.path.name} says"
            )
    return LowRank(file.path, sides["A"], sides["B"], a, b, scale * scaling)


# --- adapter_config.json ----------------------------------------------------------------------------------------------

# Keys that change more than low-rank deltas do, and what they stand for.
_UNSUPPORTED = {
    "use_dora": "DoRA, which rescales the weights",
    "fan_in_fan_out": "weights stored as [inputs, outputs]",
    "modules_to_save": "modules saved whole beside the adapter",
    "trainable_token_indices": "trained rows of the embedding",
    "layer_replication": "layers used more than once",
    "alora_invocation_tokens": "adapters that begin in the middle of a text",
    "use_qalora": "QA-LoRA, which pools the inputs",
    "target_parameters": "adapters of bare parameters",
}
# Initialisations that take the adapter's first value out of the model's weights, which then are no longer the model's.
_CHANGES_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MOST_WORK, _MOST_READING = 100_000_000, 2_000_000  # of matching names and of reading expressions: some seconds of either


class _Config:
    """adapter_config.json: what the scale of each projection depends on; the rest is checked and forgotten."""

    def __init__(self, folder: Path):
        self.path = folder / "adapter_config.json"
        self._data = read_json(self.path, hint="a PEFT folder holds an adapter_config.json: copy the adapter again")
        kind = self._data.get("peft_type", "LORA")
        if kind != "LORA":
            raise UnsupportedError(f"{self.path}: 'peft_type' is {ascii(kind)[:100]}, expected 'LORA'")
        for key, meaning in _UNSUPPORTED.items():
            if self._data.get(key):
                raise UnsupportedError(f"{self.path}: {key!r} is set: {meaning}; merge the adapter into its model instead")
        start = self._data.get("init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(_CHANGES_WEIGHTS):
            raise UnsupportedError(
                f"{self.path}: 'init_lora_weights' is {start[:100]!r}, which changes the model's own weights; convert the "
                "adapter with save_pretrained(..., path_initial_model_for_weight_conversion=...)"
            )
        self._rank = self._number("r", self._data.get("r"), whole=True)
        self._alpha = self._number("lora_alpha", self._data.get("lora_alpha"))
        self._is_rank_stabilised = self._data.get("use_rslora") or False
        if not isinstance(self._is_rank_stabilised, bool):
            self._refuse("use_rslora", self._is_rank_stabilised, "true or false")
        self._ranks = self._pattern("rank_pattern", whole=True)
        self._alphas = self._pattern("alpha_pattern")
        self._work, self._cost = 0, sum(expression.cost for expression, _ in (*self._ranks, *self._alphas))

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Of a module, by its name in the model: "model.layers.0.self_attn.q_proj"."""
        self._work += len(module) * self._cost
        if self._work > _MOST_WORK:
            self._refuse_work(len(self._ranks) + len(self._alphas))
        try:
            rank, alpha = _matched(self._ranks, module, self._rank), _matched(self._alphas, module, self._alpha)
        except ValueError as error:
            raise FormatError(f"{self.path}: 'rank_pattern' and 'alpha_pattern' meet {error}") from None
        return rank, alpha / (math.sqrt(rank) if self._is_rank_stabilised else rank)

    def _number(self, key: str, value: Any, whole: bool = False) -> Any:
        kinds = (int,) if whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds) or not abs(value) <= 1e9 or (whole and value < 1):
            self._refuse(key, value, "a whole number from 1 on" if whole else "a number")
        return value

    def _pattern(self, key: str, whole: bool = False) -> list[tuple[NamePattern, Any]]:
        """The patterns in order, as PEFT reads them: the whole name, or its end after a dot, as a regular expression."""
        patterns = self._data.get(key) or {}
        if not isinstance(patterns, dict):
            self._refuse(key, patterns, "an object of patterns and numbers")
        compiled: list[tuple[NamePattern, Any]] = []
        work = 0
        for pattern, value in patterns.items():
            try:
                expression = NamePattern(pattern)
            except ValueError as error:
                self._refuse(key, pattern, f"regular expressions as its keys ({error})")
            work += 100 + expression.cost
            if work > _MOST_READING:
                self._refuse_work(len(patterns))
            compiled.append((expression, self._number(f"{key}.{pattern}", value, whole)))
        return compiled

    def _refuse_work(self, count: int) -> NoReturn:
        raise UnsupportedError(
            f"{self.path}: {count} expressions in 'rank_pattern' and 'alpha_pattern' take too long; write plain names, or fewer"
        )

    def _refuse(self, key: str, value: Any, expected: str) -> NoReturn:
        shown = ascii(value) if len(ascii(value)) <= 100 else f"{ascii(value)[:100]}..."
        raise FormatError(f"{self.path}: {key!r} is {shown}, expected {expected}")


def _matched(patterns: Sequence[tuple[NamePattern, Any]], module: str, default: Any) -> Any:
    return next((value for expression, value in patterns if expression.matches(module)), default)
