"""The files of a quantized model: tensors in shards, config.json, tokenizer; and what can be refused before any work.

Every file appears whole or not at all: it is written under another name, brought to the disk, and renamed. A process
killed at any moment leaves complete files, and some with names that start with `TEMPORARY`, which nobody reads.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cupyq._json_file import read_json
from cupyq.errors import FormatError
from cupyq.formats.safetensors import Checkpoint, SafetensorsFile
from cupyq.models.config import ModelConfig

TEMPORARY = ".writing-"
SHARD_BYTES = 8192 << 20

DTYPE_NAMES = {"int16": "I16", "int32": "I32", "float16": "F16", "bfloat16": "BF16", "float32": "F32"}
"""What readers of EXL2 and GPTQ accept in a safetensors file."""

_SPARE_BYTES = 64 << 20  # headers, reports, tokenizer: never refuse a disk for these, nor trust it without them
_WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz"}
_REWRITTEN = {"config.json", "quantize_config.json"}
_INDEX, _INDEX_BYTES = "model.safetensors.index.json", 256 << 20
_PIECE = 16 << 20


@dataclass(frozen=True)
class OutputTensor:
    """A tensor of the model to be written; `read` gives its array, so that one at a time is in memory."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))

    @classmethod
    def stored(cls, file: SafetensorsFile | Checkpoint, name: str) -> "OutputTensor":
        """A tensor that already lies in a file."""
        info = file.info(name)
        return cls(name, info.dtype, tuple(info.shape), lambda: file.array(name))


# --- before any work --------------------------------------------------------------------------------------------------


def check_paths(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> tuple[Path, Path]:
    """(source, out) as absolute paths. ValueError where they lie in one another or `out` cannot be made; FormatError where
    `source` is no folder. That `out` exists is for the caller to judge, who knows whether a finished run left it."""
    source, out = Path(source).resolve(), Path(out).resolve()
    if not source.is_dir():
        what = "a file" if source.exists() else "no such folder"
        raise FormatError(f"{source}: {what}, expected a model folder with config.json and *.safetensors")
    if out == source:
        raise ValueError(f"OUT {out} is the folder of the model to be quantized: choose another")
    if out.is_relative_to(source):
        raise ValueError(f"OUT {out} lies inside IN {source}, whose files it would join: choose a folder outside")
    if source.is_relative_to(out):
        raise ValueError(f"OUT {out} holds IN {source}: choose another folder")
    if source.is_relative_to(partial_folder(out)):
        raise ValueError(f"IN {source} lies in {partial_folder(out)}, the working folder for this OUT: choose another OUT")
    parent = next(folder for folder in out.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"OUT {out} cannot be made: {parent} is not a folder that may be written to")
    return source, out


def check_shards(checkpoint: Checkpoint) -> None:
    """FormatError where an index names a file that is not there for tensors that no other file holds: a download that was
    interrupted. An index none of whose files is there was left behind by a conversion, and says nothing."""
    for path in sorted(checkpoint.folder.glob("*.safetensors.index.json")):
        try:
            index = read_json(path, hint="", most_bytes=_INDEX_BYTES)
            files = {str(tensor): str(file) for tensor, file in index["weight_map"].items()}
        except (ValueError, KeyError, AttributeError):
            continue  # what it would say is in the files too
        # By their names alone: an index may say "../..", and nothing outside of the folder is looked at.
        beside = {file.name for file in checkpoint.folder.iterdir()}
        present = {file for file in files.values() if file in beside and (checkpoint.folder / file).is_file()}
        missing = sorted({file for tensor, file in files.items() if file not in present and tensor not in checkpoint})
        if present and missing:
            more = f", like {len(missing) - 1} more," if len(missing) > 1 else ""
            where = f"{path.parent}{os.sep}{missing[0]}: missing{more}"  # a name of any form: shown, not followed
            raise FormatError(f"{where} though {path.name} names it; download the model again")


def partial_folder(out: Path) -> Path:
    """Where the work for `out` is done: beside it, so that a rename ends it."""
    return out.with_name(f"{out.name}.partial")


def check_room(folder: Path, needed: int, present: int = 0) -> None:
    """ValueError unless the disk of `folder` has room for `needed` bytes, of which `present` are written."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    wanted = max(0, needed - present) + _SPARE_BYTES
    if free < wanted:
        raise ValueError(
            f"{folder}: {free / 1e9:.2f} GB free on its disk, expected {wanted / 1e9:.2f} GB for the model and the working "
            "files: make room or choose another disk"
        )


def scan_weights(checkpoint: Checkpoint, names: Sequence[str], on_bytes: Callable[[int], Any] = lambda count: None) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the tensors; FormatError names the first that holds NaN or Inf.

    One pass over the files, tensors on threads: hashing lets go of the interpreter. on_bytes(count) after each tensor.
    """

    def scan(name: str) -> tuple[str, str | None]:
        info, array = checkpoint.info(name), checkpoint.array(name)
        digest = hashlib.sha256(f"{name} {info.dtype} {list(info.shape)}\n".encode())
        found = None
        flat = array.reshape(-1)
        for begin in range(0, flat.size, _PIECE):
            piece = flat[begin : begin + _PIECE]
            digest.update(piece.view(np.uint8).data)
            if found is None:
                found = _not_finite(piece, begin, info.shape)
        return digest.hexdigest(), found

    total = hashlib.sha256()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            for name, (digest, found) in zip(names, pool.map(scan, names), strict=True):
                if found is not None:
                    where = f"{checkpoint.file(name).path}: tensor {name!r}"
                    raise FormatError(f"{where}: {found}; a damaged weight cannot be quantized, download the model again")
                total.update(digest.encode())
                on_bytes(checkpoint.info(name).nbytes)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return total.hexdigest()


def _not_finite(piece: np.ndarray, begin: int, shape: Sequence[int]) -> str | None:
    """'NaN at [row, column]' of the first value that is not finite, judged by its exponent's bits; None if there is none."""
    exponents = {"float16": (np.uint16, 0x7C00), "bfloat16": (np.uint16, 0x7F80), "float32": (np.uint32, 0x7F800000)}
    if piece.dtype.name not in exponents:
        return None
    integer, mask = exponents[piece.dtype.name]
    wrong = (piece.view(integer) & integer(mask)) == integer(mask)
    if not wrong.any():
        return None
    first = int(np.argmax(wrong))
    index = [int(i) for i in np.unravel_index(begin + first, shape)]
    return f"{'NaN' if np.isnan(np.float32(piece[first])) else 'infinity'} at {index}"


# --- files that appear whole ------------------------------------------------------------------------------------------


def write_atomically(path: Path, parts: Iterable[bytes | np.ndarray]) -> None:
    """`path` holding the bytes of the parts, one after another; whatever was there is replaced.

    OSError, with the mend, where the disk takes no more; then nothing of it is left.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    pieces = (np.ascontiguousarray(p).reshape(-1).view(np.uint8).data if isinstance(p, np.ndarray) else p for p in parts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        mend = f"{error.strerror}; what was done before is kept: mend this, then go on with --resume"
        raise OSError(error.errno, mend, str(path)) from error


def _sync_folder(folder: Path) -> None:
    """Bring a rename to the disk; systems that cannot open a folder do so by themselves."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def write_json(path: Path, data: Any) -> None:
    """`data` as JSON, indented; floats by their shortest text that reads back as the same number."""
    write_atomically(path, [(json.dumps(data, indent=1, allow_nan=False) + "\n").encode()])


def write_safetensors(path: Path, tensors: Iterable[OutputTensor], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file with one tensor in memory at a time, which its own library cannot do.

    Wide dtypes come first, so that every tensor is aligned to its dtype; names are sorted with numbers as numbers.
    FormatError for a dtype that readers of quantized models do not take.
    """
    ordered = sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, natural_key(tensor.name)))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for tensor in ordered:
        dtype = check_dtype(path, tensor.name, tensor.dtype)
        end = begin + tensor.nbytes
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterable[bytes | np.ndarray]:
        yield len(text).to_bytes(8, "little") + text
        for tensor in ordered:
            array = tensor.read()
            if array.dtype != tensor.dtype or array.shape != tensor.shape:
                found = f"{array.dtype} {list(array.shape)}"
                raise FormatError(f"tensor {tensor.name!r}: {found}, expected {tensor.dtype} {list(tensor.shape)}")
            yield array

    write_atomically(path, parts())


def check_dtype(path: Path, name: str, dtype: np.dtype) -> str:
    """The dtype's name in a safetensors file; FormatError for one that readers of quantized models do not take."""
    found = DTYPE_NAMES.get(dtype.name)
    if found is None:
        expected = ", ".join(DTYPE_NAMES)
        raise FormatError(f"{path}: tensor {name!r}: dtype {dtype}, expected one of {expected}, as readers of EXL2 take")
    return found


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """`write_safetensors` of arrays in memory."""
    given = [OutputTensor(name, a.dtype, a.shape, lambda a=a: a) for name, a in tensors.items()]  # type: ignore[misc]
    write_safetensors(path, given, metadata)


def natural_key(name: str) -> tuple[tuple[int, str], ...]:
    """Sorts layers.9 before layers.10."""
    parts = re.split(r"(\d+)", name)
    return tuple((int(part), "") if part.isdigit() and part.isascii() else (-1, part) for part in parts)


# --- the model's folder -----------------------------------------------------------------------------------------------


def shards_of(tensors: Iterable[OutputTensor], limit: int = SHARD_BYTES) -> list[list[OutputTensor]]:
    """The tensors by name, cut into files of at most `limit` bytes each, a larger tensor alone in one."""
    shards: list[list[OutputTensor]] = []
    room = -1
    for tensor in sorted(tensors, key=lambda tensor: natural_key(tensor.name)):
        if room < tensor.nbytes:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def write_model(
    folder: Path,
    source: Path,
    tensors: Sequence[OutputTensor],
    quantization: Mapping[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
    on_bytes: Callable[[int], Any] = lambda count: None,
) -> None:
    """A model folder: `tensors` in shards, config.json of `source` with its quantization_config, the tokenizer and the rest.

    EXL2 shards are called output-..., GPTQ's model-... with an index, as the readers of each expect. Files that are already
    there were written by an earlier run of the same job, and are left. The same arguments give the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    is_gptq = quantization["quant_method"] == "gptq"
    shards = shards_of(tensors, shard_bytes)
    stem = "model" if is_gptq else "output"
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        index |= {tensor.name: name for tensor in shard}
        if not (folder / name).exists():
            write_safetensors(folder / name, shard, {"format": "pt"})
        on_bytes(sum(tensor.nbytes for tensor in shard))
    if is_gptq and len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors)
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    for path in files_to_copy(source):
        with open(path, "rb") as file:
            write_atomically(folder / path.name, iter(lambda file=file: file.read(_PIECE), b""))  # type: ignore[misc]
    config = read_json(source / "config.json", hint="copy it again")
    config["quantization_config"] = dict(quantization)
    write_json(folder / "config.json", config)
    if is_gptq:
        write_json(folder / "quantize_config.json", dict(quantization))


def files_to_copy(source: Path) -> list[Path]:
    """Tokenizer, generation settings, licence: all files of the folder that hold no weights and are not written anew."""
    kept = []
    for path in sorted(source.iterdir()):
        is_weight = path.suffix.lower() in _WEIGHT_SUFFIXES or path.name.endswith(".index.json")
        if path.is_file() and not is_weight and path.name not in _REWRITTEN and not path.name.startswith("."):
            kept.append(path)
    return kept


def exl2_config(version: str, bits: float, head_bits: int, calibration: Mapping[str, Any]) -> dict[str, Any]:
    """`quantization_config` of an EXL2 model. Readers look at the tensors; people, at this."""
    return {
        "quant_method": "exl2",
        "version": version,
        "bits": float(bits),
        "head_bits": head_bits,
        "calibration": dict(calibration),
        "quantizer": f"cupyq {version}",
    }


def gptq_config(version: str, bits: int, group_size: int, is_symmetric: bool, act_order: bool) -> dict[str, Any]:
    """`quantization_config` of a GPTQ model, as AutoGPTQ, GPTQModel and transformers read it: v1 zeros, head unquantized."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": group_size,
        "desc_act": act_order,
        "sym": is_symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "true_sequential": True,
        "meta": {"quantizer": [f"cupyq:{version}"]},
    }


def model_files(checkpoint: Checkpoint, names: Iterable[str]) -> list[str]:
    """Names of all tensors in the files that hold any of `names`: a folder may also hold test data, which is no weight."""
    files = {checkpoint.file(name).path for name in names}
    return [name for file in checkpoint.files if file.path in files for name in file.names]


def refuse_quantized(config: ModelConfig, checkpoint: Checkpoint) -> None:
    """FormatError where the source is quantized already."""
    for name in checkpoint.names:
        if name.rpartition(".")[2] in ("q_weight", "qweight"):
            raise FormatError(
                f"{checkpoint.file(name).path}: tensor {name!r} is quantized already; quantize the original, unquantized model"
            )
    if config.quantization is not None:
        raise FormatError(f"{config.path}: has a quantization_config; quantize the original, unquantized model")
