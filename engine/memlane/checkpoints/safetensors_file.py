"""Reading and writing .safetensors a tensor (or a piece of one) at a time, with data starting on a page boundary.

    | header length, u64 | JSON header, padded with spaces to a multiple of 4096 - 8 | data, tensor after tensor |

The library's own writer wants whole tensors in memory and aligns data to 8 bytes; rows read with O_DIRECT want 4096.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from memlane.checkpoints.tensors import StoredTensor
from memlane.errors import CheckpointError

__all__ = ["SafetensorsWriter", "TensorSpec", "read_header"]

PAGE = 4096
_SYNC_BYTES = 256 << 20  # written back this often, so that dirty pages never pile up
_MAX_HEADER = 100_000_000  # the limit of the safetensors library

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U32": torch.uint32, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes the tensors of `specs` in order, in pieces of any size; the finished file is synced and its SHA-256 known.

    with SafetensorsWriter(path, specs) as writer:
        writer.write(piece) ...
    writer.sha256
    """

    def __init__(
        self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None
    ) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        at = 0
        for spec in specs:
            header[spec.name] = {
                "dtype": _NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes],
            }  # fmt: skip
            at += spec.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-(8 + len(encoded)) % PAGE)
        self.path = path
        self._left = at
        self._unsynced = 0
        self._hash = hashlib.sha256()
        self._file = path.open("xb")
        self._put(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, piece: Tensor) -> None:
        """Append a contiguous piece of the tensor whose turn it is."""
        if piece.numel():
            data = piece.contiguous().reshape(-1).view(torch.uint8).numpy().data
            self._left -= len(data)
            self._put(data)

    @property
    def sha256(self) -> str:
        """Of everything written so far, as hex."""
        return self._hash.hexdigest()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                if self._left:
                    raise ValueError(
                        f"{self.path}: {self._left} bytes of the announced tensors were not written"
                    )
                sync(self._file)

    def _put(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._file.write(data)
        self._unsynced += len(data)
        if self._unsynced >= _SYNC_BYTES:
            sync(self._file)
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._unsynced = 0


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a .safetensors file. Raises CheckpointError unless the header fits the file exactly."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise CheckpointError(path, f"truncated, or not a safetensors file: {size} bytes")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"corrupt header: {error}") from error
    data = 8 + length
    tensors, end = {}, 0
    try:
        for name, entry in header.items():
            if name != "__metadata__":
                tensors[name], stop = _entry(path, name, entry, data)
                end = max(end, stop)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(path, f"corrupt header: {error!r}") from error
    if data + end != size:
        defect = "truncated" if data + end > size else "too long"
        raise CheckpointError(path, f"{defect}: {size} bytes, the header tells of {data + end}")
    return tensors


def _entry(path: Path, name: str, entry: Any, data: int) -> tuple[StoredTensor, int]:
    dtype, shape, (start, stop) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if any(type(n) is not int or n < 0 for n in (*shape, start, stop)):
        raise ValueError(f"impossible shape or place of {name}")
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} of {dtype} {shape} does not take {stop - start} bytes")
    return StoredTensor.contiguous(path, data + start, dtype, shape), stop


def sync(file: Any) -> None:
    """Flush an open file, or an open directory's descriptor, to the device."""
    if not isinstance(file, int):
        file.flush()
        file = file.fileno()
    os.fsync(file)
