"""A strict reader of safetensors files: header checked against the file, tensors as read-only views of a memory map.

    bytes 0..7          header length L, unsigned little-endian
    bytes 8..8+L-1      UTF-8 JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__"
    bytes 8+L..         tensor data, little-endian, row-major, without holes, overlaps or trailing bytes

Nothing in a file is trusted: whatever is wrong becomes a one-line FormatError that names the file and the tensor. A
file must not shrink while it is open, as with any memory map. Format: huggingface/safetensors, README.md and lib.rs.
"""

import contextlib
import gc
import json
import mmap
import os
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self

import ml_dtypes
import numpy as np

from cupyq.errors import FormatError

MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader
MAX_DIMENSIONS = 32
# Bounds on time and memory before JSON is parsed: 1.3 million tensors of up to 16 dimensions pass.
_MAX_HEADER_COMMAS, _MAX_HEADER_BRACKETS = 24_000_000, 4_000_000
_MAX_INT64 = (1 << 63) - 1
_PIECE_BYTES = 8 << 20

_DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "F32": np.dtype("<f4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F64": np.dtype("<f8"),
}

_DAMAGED = "the file is damaged or cut short; download or convert it again"


class TensorInfo(NamedTuple):
    """Where a tensor lies: bytes [start, end) of the file, counted from the start of the file."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class SafetensorsFile:
    """One open safetensors file; a context manager.

    `names` in header order, `metadata` (str -> str), `info(name)`, `array(name)`, `read_into(name, buffer)`, `read_piece`.
    Arrays stay valid after `close()`: they hold the map.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            # Looked at before it is opened: opening a FIFO would wait for a writer.
            mode = self.path.stat().st_mode
            if not stat.S_ISREG(mode):
                self._refuse(f"a {'folder' if stat.S_ISDIR(mode) else 'special file'}, expected a safetensors file")
            file = open(self.path, "rb", buffering=0)
        except (OSError, ValueError) as error:
            if isinstance(error, FormatError):
                raise
            reason = getattr(error, "strerror", None) or str(error)
            raise FormatError(f"{self.path}: cannot be opened ({reason}); check the path") from error
        try:
            size = os.fstat(file.fileno()).st_size
            header_bytes = self._read_header_length(file.read(8), size)
            with _collector_at_rest(header_bytes):
                header = self._parse_header(_read_exactly(file, header_bytes))
                self.metadata = self._check_metadata(header.pop("__metadata__", {}))
                self._infos = self._check_entries(header, 8 + header_bytes, size)
            try:
                self._map: mmap.mmap | None = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            except ValueError:
                self._refuse(f"shorter than the {size} bytes it had when it was opened; wait until it is written")
        except OSError as error:
            file.close()
            raise FormatError(f"{self.path}: cannot be read ({error.strerror or error})") from error
        except BaseException:
            file.close()
            raise
        self._file = file
        self.names: tuple[str, ...] = tuple(self._infos)

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Arrays that were handed out keep the memory map alive until they are gone."""
        self._map = None
        self._file.close()

    def info(self, name: str) -> TensorInfo:
        """TensorInfo of a tensor; FormatError if the file has none of this name."""
        info = self._infos.get(name)
        if info is None:
            raise FormatError(f"{self.path}: no tensor {_show(name)} among its {len(self._infos)}")
        return info

    def array(self, name: str) -> np.ndarray:
        """The tensor as a read-only array: a view of the memory map, or a copy where the data is not aligned."""
        info = self.info(name)
        data = self._open_map()
        count = info.nbytes // info.dtype.itemsize
        array = np.frombuffer(data, np.uint8, info.nbytes, info.start) if count else np.empty(0, np.uint8)
        if info.start % info.dtype.alignment:
            array = array.copy()
        if info.dtype == np.bool_ and count and array.max() > 1:
            self._refuse(f"BOOL data holds the byte {array.max()}, expected 0 or 1; {_DAMAGED}", name)
        array = array.view(info.dtype).reshape(info.shape)
        array.setflags(write=False)
        return array

    def read_into(self, name: str, buffer: Any, threads: int = 4) -> None:
        """Read the bytes of a tensor into `buffer`: writable, C-contiguous, of exactly `info(name).nbytes` bytes.

        Reads go straight to the buffer (pinned memory, for instance) in pieces of 8 MiB on `threads` threads.
        """
        info = self.info(name)
        target = _writable_bytes(buffer)
        if target.nbytes != info.nbytes:
            raise ValueError(f"buffer: {target.nbytes} bytes, expected {info.nbytes}, the size of tensor {_show(name)}")
        if threads < 1:
            raise ValueError(f"threads: {threads}, expected 1 or more")

        def read(begin: int) -> None:
            self.read_piece(name, begin, target[begin : begin + _PIECE_BYTES])

        pieces = range(0, info.nbytes, _PIECE_BYTES)
        if len(pieces) < 2 or threads == 1:
            for begin in pieces:
                read(begin)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(read, pieces))

    def read_piece(self, name: str, begin: int, buffer: Any) -> None:
        """Fill `buffer`, writable and C-contiguous, with the bytes of a tensor from its byte `begin` on, on this thread.

        Where the system can, by a call that needs no page faults and reports, as a FormatError, what a memory map answers
        with a signal: a file cut short meanwhile, a medium that fails.
        """
        info, data, target = self.info(name), self._open_map(), _writable_bytes(buffer)
        if not 0 <= begin <= begin + target.nbytes <= info.nbytes:
            raise ValueError(
                f"begin: {begin} and {target.nbytes} bytes of buffer, expected a piece of the {info.nbytes} bytes of "
                f"tensor {_show(name)}"
            )
        done = 0
        if not hasattr(os, "preadv"):  # Windows
            target[...] = np.frombuffer(data, np.uint8, target.nbytes, info.start + begin)
            done = target.nbytes
        try:
            while done < target.nbytes:
                count = os.preadv(self._file.fileno(), [target[done:].data], info.start + begin + done)
                if count <= 0:
                    self._refuse(f"ends {target.nbytes - done} bytes early; {_DAMAGED}", name)
                done += count
        except OSError as error:
            raise FormatError(f"{self.path}: tensor {_show(name)}: cannot be read ({error.strerror})") from error

    def _open_map(self) -> mmap.mmap:
        if self._map is None:
            raise ValueError(f"{self.path}: the file was closed; open it again")
        return self._map

    def _refuse(self, what: str, name: str | None = None) -> NoReturn:
        raise FormatError(f"{self.path}: {what}" if name is None else f"{self.path}: tensor {_show(name)}: {what}")

    def _read_header_length(self, prefix: bytes, size: int) -> int:
        if size < 8 or len(prefix) < 8:
            self._refuse(f"{size} bytes long, expected a safetensors file of 10 or more; {_DAMAGED}")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            self._refuse(f"header length {length}, expected at most {MAX_HEADER_BYTES}; not a safetensors file?")
        if length < 2 or 8 + length > size:
            self._refuse(f"header length {length}, expected 2 to {size - 8} in a file of {size} bytes; {_DAMAGED}")
        return length

    def _parse_header(self, raw: bytes) -> dict[str, Any]:
        if raw[:1] != b"{":
            self._refuse(f"header starts with {raw[:1]!r}, expected '{{'; {_DAMAGED}")
        commas, brackets = raw.count(b","), raw.count(b"[") + raw.count(b"{")
        if commas > _MAX_HEADER_COMMAS or brackets > _MAX_HEADER_BRACKETS:
            self._refuse(
                f"header has {commas} commas and {brackets} brackets, expected at most {_MAX_HEADER_COMMAS} and "
                f"{_MAX_HEADER_BRACKETS}; split the file"
            )

        def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            entries = dict(pairs)
            if len(entries) != len(pairs):
                seen: set[str] = set()
                for name, _ in pairs:
                    if name in seen:
                        self._refuse(f"the header names it twice; {_DAMAGED}", name)
                    seen.add(name)
            return entries

        def constant(text: str) -> NoReturn:
            raise ValueError(f"{text} is not JSON")

        try:
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
        except FormatError:
            raise
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.path}: header is not UTF-8 at byte {8 + error.start}; {_DAMAGED}") from error
        except RecursionError as error:
            raise FormatError(f"{self.path}: header JSON is nested too deeply; {_DAMAGED}") from error
        except ValueError as error:
            raise FormatError(f"{self.path}: header is not JSON ({error}); {_DAMAGED}") from error
        return header

    def _check_metadata(self, metadata: Any) -> dict[str, str]:
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            self._refuse("__metadata__ in the header is not a map of strings to strings; write it again with strings")
        return metadata

    def _check_entries(self, header: dict[str, Any], data_start: int, size: int) -> dict[str, TensorInfo]:
        """TensorInfo of every tensor, after checks of each entry alone and of all offsets together."""
        infos = {name: self._check_entry(name, entry, data_start, size) for name, entry in header.items()}
        end = data_start
        previous = None
        for info in sorted(infos.values(), key=lambda info: (info.start, info.end)):
            if info.start < end and previous is not None:
                self._refuse(f"overlaps tensor {_show(previous.name)}; {_DAMAGED}", info.name)
            if info.start > end:
                self._refuse(f"a hole of {info.start - end} bytes lies before it; write the file again", info.name)
            end, previous = info.end, info
        if end != size:
            self._refuse(f"{size - end} bytes follow the last tensor, expected none; {_DAMAGED}")
        return infos

    def _check_entry(self, name: str, entry: Any, data_start: int, size: int) -> TensorInfo:
        if not name.isascii():
            try:
                name.encode("utf-8")
            except UnicodeEncodeError:
                self._refuse(f"the name holds half a surrogate pair; {_DAMAGED}", name)
        if type(entry) is not dict:
            self._refuse(f"header entry is not a JSON object; {_DAMAGED}", name)
        try:
            dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        except KeyError as error:
            self._refuse(f"header entry lacks {error}; {_DAMAGED}", name)
        dtype = _DTYPES.get(dtype_name) if type(dtype_name) is str else None
        if dtype is None:
            self._refuse(f"dtype {_show(dtype_name)}, expected one of {', '.join(_DTYPES)}", name)
        if type(shape) is not list or len(shape) > MAX_DIMENSIONS:
            self._refuse(f"shape {_show(shape)}, expected a list of at most {MAX_DIMENSIONS} sizes", name)
        count = extent = 1  # extent: the product without the zeros, which NumPy limits too
        for dim in shape:
            if type(dim) is not int or not 0 <= dim <= _MAX_INT64:
                self._refuse(f"shape {_show(shape)}, expected sizes from 0 to 2^63 - 1", name)
            count *= dim
            extent *= dim or 1
        if extent * dtype.itemsize > _MAX_INT64:
            self._refuse(f"shape {_show(shape)} of {dtype_name} passes 2^63 bytes; {_DAMAGED}", name)
        if type(offsets) is not list or len(offsets) != 2 or type(offsets[0]) is not int or type(offsets[1]) is not int:
            self._refuse(f"data_offsets {_show(offsets)}, expected two whole numbers; {_DAMAGED}", name)
        begin, end = offsets
        if not 0 <= begin <= end <= size - data_start:
            self._refuse(f"data_offsets {_show(offsets)}, expected 0 <= begin <= end <= {size - data_start}; {_DAMAGED}", name)
        if end - begin != count * dtype.itemsize:
            self._refuse(
                f"data_offsets span {end - begin} bytes, but shape {_show(shape)} of {dtype_name} takes "
                f"{count * dtype.itemsize}; {_DAMAGED}",
                name,
            )
        return TensorInfo(name, dtype, tuple(shape), data_start + begin, data_start + end)


class Checkpoint:
    """All tensors of all *.safetensors files directly in a folder; a context manager.

    Index files are not read: converters leave stale ones behind. Files whose name starts with a dot are passed over.
    FormatError if there is no file, and where a tensor is asked for that two files hold. (Not before: model folders
    also carry files of test data, whose names may meet without harm.)
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            kind = "a file" if self.folder.exists() else "missing"
            raise FormatError(f"{self.folder}: {kind}, expected a folder with *.safetensors files; check the path")
        paths = sorted(path for path in self.folder.glob("*.safetensors") if not path.name.startswith("."))
        if not paths:
            raise FormatError(
                f"{self.folder}: no *.safetensors file; convert the model to safetensors: PyTorch pickles (.bin, .pt) "
                "are never read, as they can run code"
            )
        self.files: list[SafetensorsFile] = []
        self._owner: dict[str, SafetensorsFile] = {}
        self._second_owner: dict[str, SafetensorsFile] = {}
        try:
            for path in paths:
                file = SafetensorsFile(path)
                self.files.append(file)
                for name in file.names:
                    if self._owner.setdefault(name, file) is not file:
                        self._second_owner[name] = file
        except BaseException:
            self.close()
            raise
        self.names: tuple[str, ...] = tuple(self._owner)

    def __contains__(self, name: object) -> bool:
        return name in self._owner

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close every file; arrays that were handed out stay valid."""
        for file in self.files:
            file.close()

    def file(self, name: str) -> SafetensorsFile:
        """The file that holds a tensor; FormatError if none does, or more than one."""
        owner = self._owner.get(name)
        if owner is None:
            count = len(self.files)
            raise FormatError(f"{self.folder}: no tensor {_show(name)} in its {count} *.safetensors")
        if name in self._second_owner:
            raise FormatError(
                f"{owner.path}: tensor {_show(name)} is also in {self._second_owner[name].path.name}; "
                "remove the file that does not belong"
            )
        return owner

    def info(self, name: str) -> TensorInfo:
        """See `SafetensorsFile.info`."""
        return self.file(name).info(name)

    def array(self, name: str) -> np.ndarray:
        """See `SafetensorsFile.array`."""
        return self.file(name).array(name)

    def read_into(self, name: str, buffer: Any, threads: int = 4) -> None:
        """See `SafetensorsFile.read_into`."""
        self.file(name).read_into(name, buffer, threads)

    def read_piece(self, name: str, begin: int, buffer: Any) -> None:
        """See `SafetensorsFile.read_piece`."""
        self.file(name).read_piece(name, begin, buffer)

    def total_bytes(self, names: Iterable[str]) -> int:
        """Sum of the sizes of the named tensors, for a progress bar."""
        return sum(self.info(name).nbytes for name in names)


@contextlib.contextmanager
def _collector_at_rest(header_bytes: int) -> Iterator[None]:
    """No garbage collection while a large header is read: its millions of live objects would be walked again and again.

    For 1,000,000 tensors 7 s instead of 13 s (one core of a shared x86 server). Small headers gain nothing.
    """
    pause = header_bytes > 4 << 20 and gc.isenabled()
    if pause:
        gc.disable()
    try:
        yield
    finally:
        if pause:
            gc.enable()


def _read_exactly(file: Any, count: int) -> bytes:
    """`count` bytes, or fewer at the end of the file; one raw read may return less than asked for."""
    parts = []
    while count > 0 and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _writable_bytes(buffer: Any) -> np.ndarray:
    """uint8 view of a writable contiguous buffer or array (bfloat16 arrays, too, which lack the buffer protocol)."""
    if isinstance(buffer, np.ndarray):
        if not (buffer.flags.c_contiguous and buffer.flags.writeable):
            raise ValueError("buffer: a read-only or strided array, expected a writable C-contiguous one")
        return buffer.reshape(-1).view(np.uint8)
    view = memoryview(buffer)
    if view.readonly or not view.c_contiguous:
        raise ValueError("buffer: read-only or strided, expected a writable C-contiguous buffer")
    return np.frombuffer(view, np.uint8) if view.nbytes else np.empty(0, np.uint8)


def _show(value: Any) -> str:
    """A value from a file, on one line and not too long, whatever its size and depth."""
    if isinstance(value, dict):
        return "{...}" if value else "{}"
    if isinstance(value, list):
        shown = ["[...]" if isinstance(item, list) else _show(item) for item in value[:8]]
        return f"[{', '.join(shown)}{', ...' if len(value) > 8 else ''}]"
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
