"""The working folder of a quantization: what is done, in files that appear whole, and what is computed from them.

    OUT.partial/job.json                       the settings, which a resumed run must share
    OUT.partial/lock                           held while a process is at work
    OUT.partial/sensitivity.json               what an error of each linear layer does to the predictions
    OUT.partial/measured/layer-00000.json      errors of a layer's linear layers
    OUT.partial/measurement.json               both, of all
    OUT.partial/linears/<name>.safetensors     tensors of a quantized linear layer; what the report says of it, as metadata
    OUT.partial/model/                         the folder that becomes OUT

The folder goes when OUT is there.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cupyq._json_file import parse_json, read_json
from cupyq.errors import FormatError
from cupyq.formats.safetensors import SafetensorsFile
from cupyq.ops.qmatrix import QMatrix
from cupyq.ops.reconstruct import reconstruct
from cupyq.quantize import writer
from cupyq.quantize.report import LinearReport

_DELETE = "delete the file, and its layer is quantized again"
_ON_HOST = ("q_groups", "q_invperm", "q_scale_max", "g_idx")


class WorkFolder:
    """Paths and files of one job."""

    def __init__(self, out: Path):
        self.path = writer.partial_folder(out)
        self.model = self.path / "model"
        self.measurement, self.sensitivity = self.path / "measurement.json", self.path / "sensitivity.json"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One process at a time: a lock of the system, which a killed process does not leave behind.

        ValueError where another one holds it, and for a folder that is nobody's work: it would be deleted at the end.
        """
        if self.path.exists() and self._is_of_others():
            raise ValueError(f"{self.path} holds no work of a quantization (no job.json): move it away, or choose another OUT")
        self.path.mkdir(parents=True, exist_ok=True)
        # Neither emptied, nor followed where it is a link, nor waited for where it is a pipe: another's folder may hold either.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            descriptor = os.open(self.path / "lock", flags, 0o666)
        except OSError as error:
            raise ValueError(f"{self.path / 'lock'}: cannot be opened ({error.strerror}): delete it") from None
        with open(descriptor, "rb") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except ImportError:  # Windows
                pass
            except OSError:
                raise ValueError(f"{self.path}: another process is at work there: wait for it, or end it") from None
            yield

    def _is_of_others(self) -> bool:
        if not self.path.is_dir():
            return True
        names = {path.name for path in self.path.iterdir() if not path.name.startswith(writer.TEMPORARY)}
        return "job.json" not in names and not names <= {"lock"}

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Note the settings; ValueError where the folder was begun with others."""
        path = self.path / "job.json"
        if path.exists():
            check_settings(self.path, read_json(path, hint=f"delete {self.path} to begin anew"), settings)
        else:
            writer.write_json(path, settings)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    @property
    def present_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    def measured(self, index: int) -> Path:
        """The file of a layer's errors."""
        return self.path / "measured" / f"layer-{index:05}.json"

    def linear(self, name: str) -> Path:
        """The file of a linear layer."""
        return self.path / "linears" / f"{name}.safetensors"

    def has(self, *names: str) -> bool:
        """Whether all these linear layers are quantized."""
        return all(self.linear(name).exists() for name in names)

    def save(self, tensors: Mapping[str, np.ndarray], report: LinearReport) -> None:
        values = {key: json.dumps(value) for key, value in vars(report).items()}
        writer.save_tensors(self.linear(report.name), tensors, values)

    def report(self, name: str) -> LinearReport:
        path = self.linear(name)
        with SafetensorsFile(path) as file:
            values = {key: parse_json(value, f"{path}: metadata", _DELETE) for key, value in file.metadata.items()}
        found = LinearReport.parse(values)
        if found is None or found.name != name:
            raise FormatError(f"{path}: its metadata is no report of {name}; {_DELETE}")
        return found

    def tensors(self, name: str) -> list[writer.OutputTensor]:
        """The tensors of a linear layer under their names in the model. Each opens its file when it is read: a model has more
        linear layers than a process may have files open."""
        path = self.linear(name)
        with SafetensorsFile(path) as file:
            infos = [file.info(short) for short in file.names]
        return [
            writer.OutputTensor(f"{name}.{info.name}", info.dtype, tuple(info.shape), partial(_read, path, info.name))
            for info in infos
        ]

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """The same, under their short names."""
        with SafetensorsFile(self.linear(name)) as file:
            return {short: file.array(short) for short in file.names}

    def weights(self, name: str, shape: tuple[int, int], xp: Any, options: Mapping[str, Any]) -> Any:
        """float16 [k, n] = shape: what the tensors stand for; see `decoded`."""
        path = self.linear(name)
        try:
            found = decoded(self.arrays(name), name, shape[1], xp, options)
        except FormatError as error:
            raise FormatError(str(error) if str(path) in str(error) else f"{path}: {error}; {_DELETE}") from None
        if tuple(found.shape) != shape:
            raise FormatError(f"{path}: a matrix of {list(found.shape)}, expected {list(shape)}; {_DELETE}")
        return found


def decoded(tensors: Mapping[str, np.ndarray], name: str, n: int, xp: Any, options: Mapping[str, Any]) -> Any:
    """float16 [K, n]: the weights that the run time will make of a layer's tensors; options: of `QMatrix.from_tensors`."""
    placed = {s: array if s in _ON_HOST else xp.asarray(array) for s, array in tensors.items() if s != "bias"}
    return reconstruct(QMatrix.from_tensors(placed, name=name, **options))[:, :n]


def check_settings(where: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """ValueError that names the first setting in which a run differs from the one that began."""
    for name in dict.fromkeys([*new, *old]):
        if old.get(name) != new.get(name):
            found, asked = (json.dumps(settings.get(name))[:100] for settings in (old, new))
            shown = f"{ascii(name)[1:-1][:60]} {found}"
            raise ValueError(f"{where} was begun with {shown}, not {asked}: resume with the same settings, or delete it")


def _read(path: Path, name: str) -> np.ndarray:
    with SafetensorsFile(path) as file:
        return file.array(name)
