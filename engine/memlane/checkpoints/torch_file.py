"""Files written by torch.save, read without torch.load: the structure as data, tensors as places in the file.

zip archive (entries stored, not compressed)
  <root>/data.pkl          the structure; tensors refer to storages by key
  <root>/data/<key>        raw little-endian bytes of one storage
  <root>/byteorder         "little"
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from memlane.checkpoints.pickles import StateDict, load_pickle
from memlane.checkpoints.tensors import StoredTensor, row_major
from memlane.errors import CheckpointError

__all__ = ["read_torch_file"]

_STORAGES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORAGES.values()}


@dataclass(frozen=True)
class _Storage:
    offset: int
    size: int
    dtype: torch.dtype
    crc32: int | None


def read_torch_file(path: Path, start: int = 0, length: int | None = None) -> Any:
    """What torch.save wrote to bytes [start, start + length) of `path`, with a StoredTensor for every tensor.

    Raises CheckpointError if the file is missing, truncated, of the old non-zip form, or names anything but tensors,
    containers and numbers.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            end = size if length is None else start + length
            if not 0 <= start <= end <= size:
                raise CheckpointError(path, f"truncated: bytes {start} to {end} wanted, the file has {size}")
            window = _Window(file, start, end)
            return _read_archive(path, window, start)
    except (
        zipfile.BadZipFile,
        struct.error,
        NotImplementedError,
        ValueError,
        OverflowError,
        EOFError,
    ) as error:
        raise CheckpointError(path, f"truncated or not a file of torch.save: {error}") from error
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror or error}") from error


def _read_archive(path: Path, window: _Window, start: int) -> Any:
    with zipfile.ZipFile(window) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(pickles) != 1:
            raise CheckpointError(path, "not a file of torch.save: no data.pkl in it")
        root = pickles[0].removesuffix("data.pkl")
        order = entries.get(root + "byteorder")
        if order is not None and window.read_at(_data_offset(window, order), order.file_size) != b"little":
            raise CheckpointError(path, "written on a big-endian machine, which is not supported")
        info = entries[pickles[0]]
        structure = window.read_at(_data_offset(window, info), info.file_size)

    def storage(pid: Any) -> _Storage:
        kind, dtype, key, _, numel = pid
        entry = entries.get(f"{root}data/{key}")
        if kind != "storage" or not isinstance(dtype, torch.dtype) or entry is None:
            raise CheckpointError(path, f"truncated: storage {key!r} is not in the file")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != numel * dtype.itemsize:
            raise CheckpointError(path, f"corrupt: storage {key!r} does not hold {numel} numbers of {dtype}")
        offset = _data_offset(window, entry)
        if offset + entry.file_size > window.size:
            raise CheckpointError(path, f"truncated: storage {key!r} reaches beyond the end of the file")
        return _Storage(
            start + offset, entry.file_size, dtype, entry.CRC or None
        )  # 0: written without checksums

    def rebuild_tensor(storage: _Storage, first: int, shape: Any, stride: Any, *_: Any) -> StoredTensor:
        shape, stride = tuple(map(int, shape)), tuple(map(int, stride))
        item = storage.dtype.itemsize
        last = first + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if min((first, *shape, *stride), default=0) < 0 or (
            math.prod(shape) and (last + 1) * item > storage.size
        ):
            raise CheckpointError(path, f"corrupt: a {shape} tensor reaches beyond its storage")
        whole = stride == row_major(shape) and math.prod(shape) * item == storage.size
        return StoredTensor(
            path,
            storage.offset + first * item,
            storage.dtype,
            shape,
            stride,
            storage.crc32 if whole else None,
        )

    names: dict[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): StateDict,
        ("torch", "Size"): tuple,
        ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    }
    names |= {("torch", name): dtype for name, dtype in (_STORAGES | _DTYPES).items()}
    return load_pickle(path, structure, names, storage)


def _data_offset(window: _Window, info: zipfile.ZipInfo) -> int:
    """Where an entry's bytes start: behind its local header, whose extra field (torch's alignment padding) varies."""
    header = window.read_at(info.header_offset, 30)
    signature, name_length, extra_length = struct.unpack("<4s22xHH", header)
    if signature != b"PK\x03\x04":
        raise zipfile.BadZipFile(f"no local header for {info.filename}")
    return info.header_offset + 30 + int(name_length) + int(extra_length)


class _Window(io.RawIOBase):
    """Bytes [start, end) of an open file as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self._file, self._start, self.size, self._at = file, start, end - start, 0

    def read_at(self, offset: int, size: int) -> bytes:
        self._file.seek(self._start + offset)
        data = self._file.read(max(0, min(size, self.size - offset)))
        if len(data) != size:
            raise zipfile.BadZipFile(f"{size} bytes wanted at byte {offset}")
        return data

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.size - self._at))
        self._file.seek(self._start + self._at)
        data = self._file.read(count)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise OSError("seek before the start")
        self._at = base + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
