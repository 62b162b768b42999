"""Where row i of a table lies: file, offset, stride, number format. Reads headers; never reads rows.

file     | 8: header length | header (JSON) | other tensors | row 0 | row 1 | row 2 | ...
                                                            ^ offset        |<-stride->|

float32 bfloat16 float16   width numbers                                                stride = 4 or 2 * width
int8                       width codes | fp16 scale         value = code * scale        stride = width + 2
int4                       width/2 bytes | fp16 scale       value = (nibble - 8) * scale  stride = width/2 + 2
                           byte k: low nibble = column k, high nibble = column k + width/2; the scale is signed
fp8                        width codes | fp16 scale         value = e4m3(code) * scale  stride = width + 2
                           e4m3: sign, 4 exponent bits (bias 7), 3 of fraction; largest 448 (OCP FP8, "e4m3fn")
"""

from __future__ import annotations

import enum
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memlane.tables.errors import TableFormatError

__all__ = ["BLOCK", "PAGE", "RowFormat", "TableLayout", "checksum_name", "read_header"]

PAGE = 4096
BLOCK = (
    PAGE  # bytes of rows under one checksum: what a read of whole pages brings can then be verified as it is
)
_LONGEST_HEADER = 100 << 20


class RowFormat(enum.StrEnum):
    """How the numbers of a row are stored."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    INT8 = "int8"
    INT4 = "int4"
    FP8 = "fp8"

    @property
    def code(self) -> int:
        """The native core's number for this format."""
        return list(RowFormat).index(self)

    @property
    def is_quantised(self) -> bool:
        """Whether rows carry a scale of their own."""
        return self in (RowFormat.INT8, RowFormat.INT4, RowFormat.FP8)

    @property
    def safetensors_dtype(self) -> str:
        """dtype of the tensor that holds such rows; quantised rows are raw bytes."""
        plain = {RowFormat.FLOAT32: "F32", RowFormat.BFLOAT16: "BF16", RowFormat.FLOAT16: "F16"}
        return plain.get(self, "U8")

    def stride(self, width: int) -> int:
        """Bytes from one row to the next, for rows of `width` numbers."""
        if width <= 0 or (self is RowFormat.INT4 and width % 2):
            raise TableFormatError(f"{self.value} rows cannot have a width of {width}")
        match self:
            case RowFormat.FLOAT32:
                return 4 * width
            case RowFormat.INT8 | RowFormat.FP8:
                return width + 2
            case RowFormat.INT4:
                return width // 2 + 2
            case _:
                return 2 * width


@dataclass(frozen=True)
class TableLayout:
    """One table in one file. Row i is `stride` bytes at `offset + i * stride`; rows have no padding between them."""

    name: str
    path: Path
    offset: int
    rows: int
    width: int
    dtype: RowFormat
    stride: int
    checksum_offset: int | None = (
        None  # in the file; None where the table has no checksums (see checksums.py)
    )

    @property
    def nbytes(self) -> int:
        return self.rows * self.stride

    @property
    def blocks(self) -> int:
        """How many blocks of BLOCK bytes the rows fill; the last may be shorter."""
        return -(-self.nbytes // BLOCK)

    @classmethod
    def from_safetensors(
        cls,
        path: str | os.PathLike[str],
        tensor_name: str,
        dtype: RowFormat | str | None = None,
        width: int | None = None,
    ) -> TableLayout:
        """The table stored as tensor `tensor_name`. TableFormatError names the file and the defect; OSError if unreadable.

        dtype and width must be given for quantised rows (a U8 tensor [rows, stride]); for plain tensors [rows, width]
        they may be, and are then checked.
        """
        path = Path(path)
        header = read_header(path)
        entry = header.tensors.get(tensor_name)
        if entry is None:
            raise TableFormatError(
                f"{path}: no tensor {tensor_name!r}; it holds {sorted(header.tensors)[:8]}"
            )
        wanted = None if dtype is None else RowFormat(dtype)
        if wanted is None:
            plain = {"F32": RowFormat.FLOAT32, "BF16": RowFormat.BFLOAT16, "F16": RowFormat.FLOAT16}
            if entry.dtype not in plain:
                raise TableFormatError(
                    f"{path}: {tensor_name!r} is {entry.dtype}: say which row format its bytes hold"
                )
            wanted = plain[entry.dtype]
        if entry.dtype != wanted.safetensors_dtype:
            raise TableFormatError(
                f"{path}: {tensor_name!r} is {entry.dtype}; {wanted.value} rows are stored as {wanted.safetensors_dtype}"
            )
        if len(entry.shape) != 2:
            raise TableFormatError(
                f"{path}: {tensor_name!r} has shape {entry.shape}; a table is [rows, width]"
            )
        rows, columns = entry.shape
        if wanted.is_quantised:
            if width is None:
                raise TableFormatError(
                    f"{path}: the width of {tensor_name!r} ({wanted.value} rows) must be given"
                )
            expected = wanted.stride(width)
        else:
            width = columns if width is None else width
            expected = width
        if columns != expected:
            raise TableFormatError(
                f"{path}: {tensor_name!r} has {columns} columns; {wanted.value} rows of width {width} have {expected}"
            )
        checksums = _checksum_offset(path, tensor_name, header)
        return cls(tensor_name, path, entry.offset, rows, width, wanted, wanted.stride(width), checksums)


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: list[int]
    offset: int  # in the file
    nbytes: int


@dataclass(frozen=True)
class Header:
    """A safetensors header: tensors by name, and the file's own metadata."""

    tensors: Mapping[str, _Entry]
    metadata: Mapping[str, str]


_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def read_header(path: Path) -> Header:
    """Reads and checks the header of a safetensors file against itself and the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise TableFormatError(
                f"{path}: not a safetensors file (header of {length} bytes in a file of {size})"
            )
        text = file.read(length)
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise TableFormatError(f"{path}: the header is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise TableFormatError(f"{path}: the header is not a JSON object")
    metadata = parsed.pop("__metadata__", {})
    start = 8 + length
    tensors = {name: _entry(path, name, value, start) for name, value in parsed.items()}
    end = max((entry.offset + entry.nbytes for entry in tensors.values()), default=start)
    if end != size:
        fault = "truncated" if size < end else "longer than its header says"
        raise TableFormatError(f"{path}: {fault}: {size} bytes, its header describes {end}")
    return Header(tensors, metadata if isinstance(metadata, dict) else {})


def checksum_name(table: str) -> str:
    """Name of the tensor that holds the checksums of a table's blocks."""
    return table + ".crc32c"


def _checksum_offset(path: Path, table: str, header: Header) -> int | None:
    """Where the table's checksums lie in the file, None if it has none; TableFormatError if they cannot be its own."""
    sums, rows = header.tensors.get(checksum_name(table)), header.tensors[table]
    if sums is None:
        return None
    blocks = -(-rows.nbytes // BLOCK)
    if sums.dtype != "U32" or sums.shape != [blocks]:
        raise TableFormatError(
            f"{path}: {checksum_name(table)!r} is {sums.dtype} {sums.shape}; "
            f"the checksums of {table!r} are U32 {[blocks]}"
        )
    if rows.offset % PAGE:
        raise TableFormatError(
            f"{path}: {table!r} has checksums but starts at byte {rows.offset}, which is not on a page"
        )
    return sums.offset


def _entry(path: Path, name: str, value: Any, start: int) -> _Entry:
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError):
        raise TableFormatError(f"{path}: the header's entry for {name!r} is malformed") from None
    if (
        not isinstance(dtype, str)
        or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)
        or begin > end
    ):
        raise TableFormatError(f"{path}: the header's entry for {name!r} is malformed")
    elements = 1
    for n in shape:
        elements *= n
    if elements * _BYTES.get(dtype, 1) != end - begin and (dtype in _BYTES or dtype in ("U8", "I8", "BOOL")):
        raise TableFormatError(f"{path}: {name!r} is {dtype} {shape} but has {end - begin} bytes")
    return _Entry(dtype, list(shape), start + begin, end - begin)
