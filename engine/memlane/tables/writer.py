"""Writes one table as a safetensors file, row by row, with its data on a page border. Atomic: all or nothing.

| 8: header length | header (JSON), padded with spaces to a page | row 0 | row 1 | ... | checksums of the rows' blocks |
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from memlane.tables.checksums import BlockChecksums
from memlane.tables.errors import TableFormatError
from memlane.tables.layout import BLOCK, PAGE, RowFormat, TableLayout, checksum_name
from memlane.tables.quantize import encode_rows

__all__ = ["write_table"]

_SYNC_BYTES = 256 << 20  # written back this often, so that dirty pages never pile up


def write_table(
    path: str | os.PathLike[str],
    name: str,
    rows: int,
    width: int,
    dtype: RowFormat | str,
    chunks: Iterable[Tensor],
) -> TableLayout:
    """Writes `rows` rows of `width` numbers as tensor `name` and returns where they lie.

    chunks: the rows in order, as float tensors [n, width] (encoded here) or as stored bytes, uint8 [n, stride].
    The file appears under its name when it is complete and on disk; a stopped call leaves nothing behind but, after
    a kill, a file ending in ".partial". TableFormatError: a chunk of the wrong shape, too few or too many rows.
    """
    path, row_format = Path(path), RowFormat(dtype)
    stride = row_format.stride(width)
    shape = [rows, stride if row_format.is_quantised else width]
    nbytes, blocks = rows * stride, -(-rows * stride // BLOCK)
    tensors = {
        name: {"dtype": row_format.safetensors_dtype, "shape": shape, "data_offsets": [0, nbytes]},
        checksum_name(name): {
            "dtype": "U32",
            "shape": [blocks],
            "data_offsets": [nbytes, nbytes + 4 * blocks],
        },
    }
    metadata = {"format": "pt", "row_format": row_format.value, "width": str(width)}
    header = json.dumps({"__metadata__": metadata, **tensors}, separators=(",", ":")).encode()
    header = header.ljust(-(len(header) + 8) % PAGE + len(header))
    partial = path.with_name(path.name + ".partial")
    checksums = BlockChecksums()
    try:
        with partial.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            written = unsynced = 0
            for chunk in chunks:
                stored = chunk if chunk.dtype == torch.uint8 else encode_rows(chunk, row_format)
                if stored.dim() != 2 or stored.shape[1] != stride:
                    raise TableFormatError(
                        f"{path}: a chunk of shape {list(chunk.shape)}; rows are {width} numbers wide"
                    )
                written += stored.shape[0]
                unsynced += stored.numel()
                data = stored.contiguous().numpy().reshape(-1)
                checksums.update(data)
                file.write(data.data)
                if unsynced >= _SYNC_BYTES:
                    file.flush()
                    os.fdatasync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                    unsynced = 0
            if written != rows:
                raise TableFormatError(f"{path}: {written} rows were given, {rows} promised")
            file.write(checksums.finish().astype("<u4", copy=False).data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    offset = 8 + len(header)
    return TableLayout(name, path, offset, rows, width, row_format, stride, offset + nbytes)
