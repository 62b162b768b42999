"""Writing our own form: streamed in pieces, atomic, checksummed.

Everything goes into a hidden sibling of the destination, config.json last; a rename makes it the destination. Stopped at
any moment, what is left is a hidden folder without config.json, which nothing takes for a model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from memlane.checkpoints.directory import (
    CHECKSUMS,
    CONFIG,
    DENSE,
    hot_rows_name,
    read_config,
    sha256,
    table_file_name,
)  # fmt: skip
from memlane.checkpoints.forms import open_checkpoint
from memlane.checkpoints.safetensors_file import SafetensorsWriter, TensorSpec, sync
from memlane.checkpoints.source import (
    Checkpoint,
    DenseTensor,
    FloatRows,
    TableSource,
    check_shapes,
    row_format_of,
)
from memlane.checkpoints.tensors import MemoryTensor
from memlane.errors import CheckpointError, ConfigError
from memlane.models.config import ROW_FORMATS, ModelConfig
from memlane.tables import RowFormat, decode_rows, encode_rows
from memlane.tables.checksums import BlockChecksums
from memlane.tables.layout import BLOCK, checksum_name

__all__ = ["convert", "save"]

# Of rows in fp32; conversion holds a few of these at a time, whatever the table's size.
_CHUNK_BYTES = 8 << 20

_PLAIN = {
    RowFormat.FLOAT32: torch.float32,
    RowFormat.BFLOAT16: torch.bfloat16,
    RowFormat.FLOAT16: torch.float16,
}


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    rows: str | None = None,
    tokenizer: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write the checkpoint `src` of any known form as a model directory `dst`, and return that.

    rows: format of the tables' rows ("int8", "int4", "fp8", "bfloat16", ...); None keeps the source's.
    tokenizer: a tokenizer file or folder for checkpoints that come without theirs.
    overwrite: replace `dst` if it is a model directory; otherwise an existing non-empty `dst` is an error.
    Raises CheckpointError, after which `dst` is as it was.
    """
    checkpoint = open_checkpoint(src, tokenizer)
    if rows is not None and rows not in ROW_FORMATS:
        raise ConfigError(f"rows must be one of {', '.join(ROW_FORMATS)}, got {rows!r}")
    return _write(checkpoint, Path(dst), rows, overwrite, progress)


def save(
    dst: str | Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tables: Mapping[str, Tensor],
    *,
    rows: str | None = None,
    hot_rows: Mapping[str, NDArray[np.int64]] | None = None,
    write_tokenizer: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a model that is in memory: `weights` as Transformer.state_dict() has them, tables [rows, width] by name.

    hot_rows: per table its row ids, most read first. write_tokenizer: called with the directory being written.
    """
    dst = Path(dst)
    dense = tuple(DenseTensor(name, tuple(w.shape), (MemoryTensor(w),)) for name, w in weights.items())
    sources = tuple(FloatRows(n, MemoryTensor(t), row_format_of(dst, n, t.dtype)) for n, t in tables.items())
    check_shapes(dst, config, dense, sources)
    with tempfile.TemporaryDirectory() as scratch:
        files = {name: Path(scratch) / f"{name}.npy" for name in hot_rows or {}}
        for name, ids in (hot_rows or {}).items():
            np.save(files[name], np.asarray(ids, dtype=np.int64))
        checkpoint = Checkpoint(dst, "memlane", config, dense, sources, files, write_tokenizer)
        return _write(checkpoint, dst, rows, overwrite, progress=False)


def _write(checkpoint: Checkpoint, dst: Path, rows: str | None, overwrite: bool, progress: bool) -> Path:
    dst = dst.expanduser().absolute()
    _check_destination(dst, overwrite)
    try:
        dst.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{dst.name}.partial-", dir=dst.parent))
        try:
            work.chmod(0o777 & ~_umask())
            _fill(checkpoint, work, rows, progress)
            _replace(work, dst)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            error.filename or dst, f"cannot be written: {error.strerror or error}"
        ) from error
    return dst


def _check_destination(dst: Path, overwrite: bool) -> None:
    if not dst.exists() or (dst.is_dir() and not any(dst.iterdir())):
        return
    if not overwrite:
        raise CheckpointError(dst, "exists already; choose another destination or ask to overwrite it")
    try:
        read_config(dst)
    except CheckpointError as error:
        raise CheckpointError(
            dst, f"will not be overwritten, it is not a model directory ({error.defect})"
        ) from error


def _fill(checkpoint: Checkpoint, work: Path, rows: str | None, progress: bool) -> None:
    config = _with_row_format(checkpoint, rows)
    sums: dict[str, str] = {}
    total = sum(t.rows * _target(config).stride(t.width) for t in checkpoint.tables)
    total += sum(_spec(tensor).nbytes for tensor in checkpoint.dense)
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=not progress) as bar:
        # widest dtype first: every tensor then starts at a multiple of its item size
        dense = sorted(checkpoint.dense, key=lambda tensor: -tensor.dtype.itemsize)
        with SafetensorsWriter(work / DENSE, [_spec(tensor) for tensor in dense]) as writer:
            for tensor in dense:
                writer.write(tensor.load())
                bar.update(_spec(tensor).nbytes)
        sums[DENSE] = writer.sha256
        for table in checkpoint.tables:
            sums[table_file_name(table.name)] = _write_table(table, _target(config), work, bar)
    for table_name, path in checkpoint.hot_rows.items():
        name = hot_rows_name(table_name, len(checkpoint.tables))
        _check_hot_rows(path, config)
        shutil.copyfile(path, work / name)
    if checkpoint.write_tokenizer is not None:
        checkpoint.write_tokenizer(work)
    generation = {"bos_token_id": config.bos_token_id, "eos_token_id": list(config.eos_token_ids)}
    (work / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    unfinished = work / (CONFIG + ".unfinished")
    unfinished.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    for file in sorted(work.iterdir()):
        sums.setdefault(file.name.removesuffix(".unfinished"), sha256(file))
    (work / CHECKSUMS).write_text(json.dumps(dict(sorted(sums.items())), indent=2) + "\n")
    for file in work.iterdir():
        _sync_path(file)
    unfinished.rename(work / CONFIG)
    _sync_path(work)


def _with_row_format(checkpoint: Checkpoint, rows: str | None) -> ModelConfig:
    config, memory = checkpoint.config, checkpoint.config.memory
    if memory is None:
        return config
    formats = {table.row_format for table in checkpoint.tables}
    if rows is None and len(formats) > 1:
        raise CheckpointError(
            checkpoint.directory, f"its tables are of formats {sorted(formats)}: choose one with rows"
        )
    return dataclasses.replace(config, memory=dataclasses.replace(memory, row_format=rows or formats.pop()))


def _target(config: ModelConfig) -> RowFormat:
    return RowFormat.FLOAT32 if config.memory is None else RowFormat(config.memory.row_format)


def _spec(tensor: DenseTensor) -> TensorSpec:
    return TensorSpec(tensor.name, tensor.dtype, tensor.shape)


def _write_table(table: TableSource, target: RowFormat, work: Path, bar: tqdm[NoReturn]) -> str:
    """Write one table file and return its SHA-256."""
    path = work / table_file_name(table.name)
    plain = _PLAIN.get(target)
    columns = table.width if plain is not None else target.stride(table.width)
    rows = TensorSpec(table.name, plain or torch.uint8, (table.rows, columns))
    sums = TensorSpec(checksum_name(table.name), torch.uint32, (-(-rows.nbytes // BLOCK),))
    metadata = {"row_format": target.value, "width": str(table.width)}
    checksums = BlockChecksums()
    with SafetensorsWriter(path, [rows, sums], metadata) as writer:
        for chunk in table.chunks(max(1, _CHUNK_BYTES // (4 * table.width))):
            encoded = _encode(chunk, RowFormat(table.row_format), target, table.width).contiguous()
            checksums.update(encoded.view(torch.uint8).reshape(-1).numpy())
            writer.write(encoded)
            bar.update(encoded.nbytes)
        writer.write(torch.from_numpy(checksums.finish()))
    return writer.sha256


def _encode(chunk: Tensor, source: RowFormat, target: RowFormat, width: int) -> Tensor:
    """Rows in another format. Rows that have it already are passed on untouched."""
    if source is target:
        return chunk
    values = decode_rows(chunk, source, width) if source.is_quantised else chunk.float()
    return values.to(_PLAIN[target]) if target in _PLAIN else encode_rows(values, target)


def _check_hot_rows(path: Path, config: ModelConfig) -> None:
    """Raise CheckpointError unless the file holds row ids of a table."""
    rows = config.memory.rows if config.memory is not None else 0
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(path, f"is not a .npy file of row ids: {error}") from error
    if ids.ndim != 1 or ids.dtype != np.int64:
        raise CheckpointError(
            path, f"holds {ids.dtype} {list(ids.shape)}, expected int64 row ids in one dimension"
        )
    for start in range(0, len(ids), 1 << 20):
        part = ids[start : start + (1 << 20)]
        if part.min() < 0 or part.max() >= rows:
            raise CheckpointError(path, f"holds row ids outside the table's {rows} rows")


def _replace(work: Path, dst: Path) -> None:
    """Make `work` the destination. An older model there is moved aside first and removed last."""
    with contextlib.suppress(OSError):
        dst.rmdir()  # an empty one
    old = work.with_name(work.name + ".old") if dst.exists() else None
    if old is not None:
        dst.rename(old)
    try:
        work.rename(dst)
    except OSError:
        if old is not None:
            old.rename(dst)
        raise
    _sync_path(dst.parent)
    if old is not None:
        shutil.rmtree(old)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
