"""CRC32C against known values and its plain twin; checksums written beside tables, and refused where they cannot fit."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_crc32c import block_sums
from plain_crc32c import crc32c as plain_crc32c
from safetensors.torch import load_file, save_file

from memlane.native import crc32c, crc32c_blocks, crc32c_tables, crc32c_variant
from memlane.tables import RowFormat, TableFormatError, TableLayout, write_table
from memlane.tables.checksums import BlockChecksums, block_checksums, read_checksums, rows_of_blocks

# "123456789" is the usual check value; the others are RFC 3720, appendix B.4.
KNOWN = [
    (b"", 0),
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
]


def random_bytes(rng: np.random.Generator, size: int) -> np.ndarray:
    return rng.integers(0, 256, size, dtype=np.uint8)


@pytest.mark.parametrize(
    ("data", "expected"), KNOWN, ids=lambda v: v[:4].hex() if isinstance(v, bytes) else ""
)
def test_known_values(data: bytes, expected: int) -> None:
    array = np.frombuffer(data, np.uint8)
    assert (crc32c(array), crc32c_tables(array), plain_crc32c(data)) == (expected,) * 3


def test_every_way_of_computing_agrees() -> None:
    assert crc32c_variant() in ("sse4.2", "armv8", "tables")
    rng = np.random.default_rng(1)
    memory = random_bytes(rng, 20_064)
    sizes = [*range(20), 383, 384, 385, 4079, 4080, 4095, 4096, 4097, *rng.integers(0, 20_001, 1000)]
    for size in sizes:
        at = rng.integers(0, 64)  # any alignment
        data = memory[at : at + size]
        assert crc32c(data) == crc32c_tables(data), (size, at)
    for size in [383, 384, 385, 4080, 4096, *rng.integers(0, 20_001, 20)]:
        assert crc32c(memory[3 : 3 + size]) == plain_crc32c(memory[3 : 3 + size].tobytes())


@pytest.mark.parametrize("block", [1, 7, 4096])
@pytest.mark.parametrize("size", [0, 1, 4096, 10_000])
def test_blocks_are_those_of_each_piece(block: int, size: int) -> None:
    data = random_bytes(np.random.default_rng(size), size)
    sums = crc32c_blocks(data, block)
    assert sums.dtype == np.uint32
    assert sums.tolist() == [crc32c(data[at : at + block]) for at in range(0, size, block)]


def test_what_is_not_a_byte_vector_is_refused() -> None:
    for wrong in (np.zeros(4, np.int32), np.zeros((2, 2), np.uint8), np.zeros(8, np.uint8)[::2]):
        with pytest.raises(TypeError):
            crc32c_blocks(wrong, 4096)
    with pytest.raises(ValueError, match="block must be positive"):
        crc32c_blocks(np.zeros(4, np.uint8), 0)


def test_pieces_of_any_size_give_the_same_checksums() -> None:
    rng = np.random.default_rng(2)
    for _ in range(30):
        data = random_bytes(rng, int(rng.integers(0, 40_000)))
        stream, at = BlockChecksums(), 0
        while at < len(data):
            step = int(rng.choice([1, 100, 4095, 4096, 4097, 9000]))
            stream.update(data[at : at + step])
            stream.update(data[:0])
            at += step
        assert stream.finish().tolist() == block_checksums(data).tolist()


@pytest.mark.parametrize("row_format", list(RowFormat))
@pytest.mark.parametrize("rows", [0, 1, 333, 2001])
def test_written_tables_carry_the_checksums_of_their_blocks(
    tmp_path: Path, row_format: RowFormat, rows: int
) -> None:
    path = tmp_path / "t.safetensors"
    chunks = torch.randn(rows, 6).split(100) if rows else ()
    layout = write_table(path, "values", rows, 6, row_format, chunks)
    assert TableLayout.from_safetensors(path, "values", row_format, 6) == layout
    hash(layout)
    raw = path.read_bytes()[layout.offset : layout.offset + layout.nbytes]
    stored = read_checksums(layout)
    assert stored is not None
    assert stored.dtype == np.uint32
    assert stored.tolist() == block_sums(raw)
    tensors = load_file(path)  # the library takes the file, wherever the checksums begin
    assert tensors["values.crc32c"].tolist() == stored.tolist()
    assert tensors["values"].view(torch.uint8).numpy().tobytes() == raw


def test_a_table_without_checksums_is_a_table(tmp_path: Path) -> None:
    save_file({"values": torch.randn(5, 3)}, tmp_path / "t.safetensors")
    layout = TableLayout.from_safetensors(tmp_path / "t.safetensors", "values")
    assert layout.checksum_offset is None
    assert read_checksums(layout) is None


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        (
            torch.zeros(2, dtype=torch.int32),
            r"'values\.crc32c' is I32 \[2\]; the checksums of 'values' are U32 \[2\]",
        ),
        (torch.zeros(3, dtype=torch.uint32), r"is U32 \[3\]; the checksums of 'values' are U32 \[2\]"),
        (torch.zeros(2, 1, dtype=torch.uint32), r"is U32 \[2, 1\]"),
        (torch.zeros(2, dtype=torch.uint32), "starts at byte .* which is not on a page"),
    ],
)
def test_checksums_that_cannot_belong_to_the_table_are_refused(
    tmp_path: Path, sums: torch.Tensor, message: str
) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"values": torch.zeros(1500, 1), "values.crc32c": sums}, path)
    with pytest.raises(TableFormatError, match=rf"t\.safetensors: .*{message}"):
        TableLayout.from_safetensors(path, "values")


def test_checksums_may_lie_before_the_rows(tmp_path: Path) -> None:
    rows = random_bytes(np.random.default_rng(3), 5000)
    header = json.dumps(
        {
            "values.crc32c": {"dtype": "U32", "shape": [2], "data_offsets": [0, 8]},
            "values": {"dtype": "F32", "shape": [1250, 1], "data_offsets": [8, 5008]},
        }
    ).encode()
    header = header.ljust(4096 - 8 - 8)
    sums = np.array(block_sums(rows.tobytes()), "<u4").tobytes()
    path = tmp_path / "t.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + sums + rows.tobytes())
    layout = TableLayout.from_safetensors(path, "values")
    assert (layout.offset, layout.checksum_offset) == (4096, 4088)
    stored = read_checksums(layout)
    assert stored is not None
    assert stored.tolist() == block_sums(rows.tobytes())


def test_checksums_cut_off_after_opening(tmp_path: Path) -> None:
    layout = write_table(tmp_path / "t.safetensors", "values", 4000, 6, "float32", [torch.randn(4000, 6)])
    raw = layout.path.read_bytes()
    layout.path.write_bytes(raw[:-4])
    with pytest.raises(TableFormatError, match="23 of 24 checksums are there"):
        read_checksums(layout)


def test_rows_of_blocks_are_those_with_bytes_there() -> None:
    rng = np.random.default_rng(4)
    base = TableLayout("values", Path("t"), 4096, 1, 1, RowFormat.FLOAT32, 4)
    for _ in range(200):
        stride, rows = int(rng.integers(1, 10_000)), int(rng.integers(1, 40))
        layout = dataclasses.replace(base, rows=rows, stride=stride)
        first, last = sorted(rng.integers(0, layout.blocks, 2).tolist())
        blocks = range(first * 4096, (last + 1) * 4096)
        wanted = [r for r in range(rows) if r * stride < blocks.stop and (r + 1) * stride > blocks.start]
        assert list(rows_of_blocks(layout, first, last)) == wanted
