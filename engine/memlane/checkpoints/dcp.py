"""torch.distributed.checkpoint folders, read without torch.distributed: no process group, no pickle executed.

.metadata              pickle: name -> shape, dtype and blocks; (name, block) -> file, offset, length
__<rank>_<n>.distcp    blocks, each a torch.save archive of its own at its offset
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from memlane.checkpoints.pickles import Record, StateDict, load_pickle, record_class
from memlane.checkpoints.tensors import LazyTensor, Shard, ShardedTensor, StoredTensor
from memlane.checkpoints.torch_file import read_torch_file
from memlane.errors import CheckpointError

__all__ = ["METADATA", "DcpFolder"]

METADATA = ".metadata"

_CHECKPOINT = "torch.distributed.checkpoint"
_DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float32",
        "float64",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    )
}


class _IndexKey(Record):
    """MetadataIndex: used as a dictionary key before its state arrives, so it hashes by identity."""


def _names() -> dict[tuple[str, str], Any]:
    records = {
        (f"{_CHECKPOINT}.metadata", name): record_class(name)
        for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
                     "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING")
    }  # fmt: skip
    return {
        **records,
        (f"{_CHECKPOINT}.metadata", "MetadataIndex"): _IndexKey,
        (f"{_CHECKPOINT}.filesystem", "_StorageInfo"): record_class("_StorageInfo"),
        # where older releases kept these
        ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"): record_class(
            "TensorProperties"
        ),
        ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"): record_class(
            "MemFormat"
        ),
        ("torch.serialization", "_get_layout"): str,
        ("torch", "Size"): tuple,
        ("pathlib", "PosixPath"): record_class("Path"),
        ("pathlib", "Path"): record_class("Path"),
        ("pathlib._local", "PosixPath"): record_class("Path"),  # Python 3.13
        ("collections", "OrderedDict"): StateDict,
        **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    }


class DcpFolder:
    """The tensors of one folder by name. Opening reads only .metadata; a tensor's files are touched by `tensor`."""

    def __init__(self, directory: Path) -> None:
        """Raises CheckpointError if .metadata is missing, malformed or hostile."""
        self.directory = directory
        self.path = directory / METADATA
        try:
            data = self.path.read_bytes()
        except OSError as error:
            raise CheckpointError(self.path, f"cannot be read: {error.strerror}") from error
        metadata = load_pickle(self.path, data, _names())
        try:
            self._entries = {
                str(name): entry.fields
                for name, entry in metadata.fields["state_dict_metadata"].items()
                if "chunks" in entry.fields  # not BytesStorageMetadata: plain Python values of the optimiser
            }
            self._places = {
                (key.fields["fqn"], tuple(key.fields.get("offset") or ())): info.fields
                for key, info in metadata.fields["storage_data"].items()
            }
        except (AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(
                self.path, f"not the metadata of a distributed checkpoint: {error}"
            ) from error

    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._entries)

    def tensor(self, name: str) -> LazyTensor:
        """The tensor of that name; checks that its blocks are present and tile it."""
        entry = self._entries[name]
        try:
            dtype, shape = _dtype(entry["properties"]), _ints(entry["size"])
            chunks = [(_ints(c.fields["offsets"]), _ints(c.fields["sizes"])) for c in entry["chunks"]]
        except (AttributeError, KeyError, TypeError, IndexError) as error:
            raise CheckpointError(self.path, f"the entry of {name} is malformed: {error}") from error
        if dtype is None or not _tile(shape, chunks):
            raise CheckpointError(self.path, f"the blocks of {name} do not make up its shape {shape}")
        shards = tuple(
            Shard(offsets, self._block(name, offsets, sizes, dtype))
            for offsets, sizes in chunks
            if math.prod(sizes)
        )
        if len(shards) == 1 and shards[0].data.shape == shape:
            return shards[0].data
        return ShardedTensor(dtype, shape, shards)

    def _block(
        self, name: str, offsets: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype
    ) -> StoredTensor:
        place = self._places.get((name, offsets))
        if place is None:
            raise CheckpointError(self.path, f"does not say where the block of {name} at {offsets} lies")
        file, start, length = (place.get(k) for k in ("relative_path", "offset", "length"))
        if not isinstance(file, str) or file in ("", ".", "..") or "/" in file or "\\" in file:
            raise CheckpointError(
                self.path, f"refused: block of {name} in {file!r}, which is not a file of this folder"
            )
        if not isinstance(start, int) or not isinstance(length, int) or start < 0 or length < 0:
            raise CheckpointError(self.path, f"the place of {name} in {file} is malformed")
        if place.get("transform_descriptors"):
            raise CheckpointError(self.path, f"block of {name} is stored compressed, which is not supported")
        tensor = read_torch_file(self.directory / file, start, length)
        if not isinstance(tensor, StoredTensor) or tensor.shape != sizes or tensor.dtype != dtype:
            raise CheckpointError(
                self.directory / file, f"the block of {name} at byte {start} is not what .metadata says"
            )
        return tensor


def _ints(values: Any) -> tuple[int, ...]:
    if not all(type(value) is int and value >= 0 for value in values):
        raise TypeError(f"{values!r} is not a shape")
    return tuple(values)


def _tile(shape: tuple[int, ...], blocks: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether blocks (offsets, sizes) lie inside `shape`, do not overlap, and fill it."""
    if any(len(part) != len(shape) for block in blocks for part in block):
        return False
    full = [list(zip(*block, strict=True)) for block in blocks if math.prod(block[1])]
    inside = all(at + size <= n for block in full for (at, size), n in zip(block, shape, strict=True))
    apart = all(
        any(a + m <= b or b + n <= a for (a, m), (b, n) in zip(first, second, strict=True))
        for first, second in itertools.combinations(full, 2)
    )
    return (
        inside and apart and sum(math.prod(size for _, size in block) for block in full) == math.prod(shape)
    )


def _dtype(properties: Record) -> torch.dtype | None:
    """The dtype of a TensorProperties record: its state is a tuple that starts with it, or a dict in some releases."""
    fields: Mapping[str, Any] = properties.fields
    dtype = fields.get("dtype") if fields else properties.args[0]
    return dtype if isinstance(dtype, torch.dtype) else None
