"""Tensors that still lie in a file: shape and dtype are known, bytes are read on demand, whole or some rows at a time.

Reads are plain (no memory map): resident memory is what the caller holds, and a short file raises instead of faulting.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from memlane.errors import CheckpointError

__all__ = ["LazyTensor", "MemoryTensor", "Shard", "ShardedTensor", "StoredTensor"]


class LazyTensor(Protocol):
    """A tensor in a checkpoint. Every method that reads raises CheckpointError if the bytes are not there."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def load(self) -> Tensor:
        """The whole tensor, contiguous, owned by the caller."""

    def chunks(self, rows: int) -> Iterator[Tensor]:
        """Slices of at most `rows` along the first dimension, in order, together the whole tensor."""


@dataclass(frozen=True)
class MemoryTensor:
    """A tensor that is in memory already."""

    value: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def load(self) -> Tensor:
        return self.value.detach().cpu().contiguous()

    def chunks(self, rows: int) -> Iterator[Tensor]:
        yield from torch.split(self.value.detach(), rows)


@dataclass(frozen=True)
class StoredTensor:
    """A strided tensor at byte `offset` of a file. crc32: of the bytes it covers, where the format records one."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    crc32: int | None = None

    @classmethod
    def contiguous(cls, path: Path, offset: int, dtype: torch.dtype, shape: Sequence[int]) -> StoredTensor:
        """A row-major tensor."""
        return cls(path, offset, dtype, tuple(shape), row_major(shape))

    @property
    def is_contiguous(self) -> bool:
        return self.stride == row_major(self.shape) or math.prod(self.shape) == 0

    def load(self) -> Tensor:
        if not self.is_contiguous:
            return self._load_strided()
        out = torch.empty(self.shape, dtype=self.dtype)
        with _open(self.path) as file:
            crc = _read_into(file, self.path, self.offset, out)
        self._check(crc)
        return out

    def chunks(self, rows: int) -> Iterator[Tensor]:
        if not self.is_contiguous:
            yield from torch.split(self._load_strided(), rows)
            return
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        crc = 0
        with _open(self.path) as file:
            for start in range(0, self.shape[0], rows):
                count = min(rows, self.shape[0] - start)
                out = torch.empty(count, *self.shape[1:], dtype=self.dtype)
                crc = _read_into(file, self.path, self.offset + start * row_bytes, out, crc)
                yield out
        self._check(crc)

    def _load_strided(self) -> Tensor:
        span = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        flat = StoredTensor.contiguous(self.path, self.offset, self.dtype, (span,)).load()
        return flat.as_strided(self.shape, self.stride).contiguous()

    def _check(self, crc: int) -> None:
        if self.crc32 is not None and crc != self.crc32:
            raise CheckpointError(
                self.path, f"corrupt: the {self.shape} tensor at byte {self.offset} fails its checksum"
            )


@dataclass(frozen=True)
class Shard:
    """A block of a sharded tensor, at `offsets` of the whole."""

    offsets: tuple[int, ...]
    data: StoredTensor


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor cut into blocks that tile it. Blocks may lie in different files."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    shards: tuple[Shard, ...]

    def load(self) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype)
        for shard in self.shards:
            out[_block(shard.offsets, shard.data.shape)] = shard.data.load()
        return out

    def chunks(self, rows: int) -> Iterator[Tensor]:
        for start in range(0, self.shape[0], rows):
            stop = min(start + rows, self.shape[0])
            out = torch.empty(stop - start, *self.shape[1:], dtype=self.dtype)
            for shard in self.shards:
                first, height = shard.offsets[0], shard.data.shape[0]
                low, high = max(start, first), min(stop, first + height)
                if low < high:
                    block = _rows(shard.data, low - first, high - first)
                    out[_block((low - start, *shard.offsets[1:]), block.shape)] = block.load()
            yield out


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor, in elements."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _rows(tensor: StoredTensor, start: int, stop: int) -> StoredTensor:
    offset = tensor.offset + start * tensor.stride[0] * tensor.dtype.itemsize
    shape = (stop - start, *tensor.shape[1:])
    whole = shape == tensor.shape
    return StoredTensor(
        tensor.path, offset, tensor.dtype, shape, tensor.stride, tensor.crc32 if whole else None
    )


def _block(offsets: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(path, f"cannot be opened: {error.strerror}") from error


def _read_into(file: BinaryIO, path: Path, offset: int, out: Tensor, crc: int = 0) -> int:
    """Fill `out` from `offset` and return the running CRC-32 of its bytes."""
    if out.numel() == 0:
        return crc
    view = out.reshape(-1).view(torch.uint8).numpy().data
    done = 0
    try:
        file.seek(offset)
        while done < len(view):
            got = file.readinto(view[done:])  # type: ignore[attr-defined]
            if not got:
                raise CheckpointError(
                    path, f"truncated: {len(view)} bytes wanted at byte {offset}, {done} are there"
                )
            done += got
    except OSError as error:
        raise CheckpointError(path, f"cannot be read at byte {offset}: {error.strerror}") from error
    return zlib.crc32(view, crc)
