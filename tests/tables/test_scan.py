"""Scanning a table: every damaged block is found and named, nothing else is."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeTable
from safetensors.torch import save_file

from memlane.tables import RowFormat, TableLayout, write_table
from memlane.tables.scan import BadBlocks, RowSpan, read_through, scan_table

DIFFERS = "differs from its checksum"


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that small tables take several."""
    monkeypatch.setattr("memlane.tables.scan._PIECE_BYTES", 3 * 4096)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 16]))


@pytest.mark.parametrize("row_format", list(RowFormat))
def test_a_sound_table(make_table: MakeTable, row_format: RowFormat) -> None:
    layout, _ = make_table(3000, 48, row_format)
    done: list[int] = []
    scan = scan_table(layout, done.append)
    assert (scan.has_checksums, scan.bad_blocks, scan.bad_scales) == (True, (), ())
    assert sum(done) == layout.nbytes
    assert len(done) > 4


@pytest.mark.parametrize("row_format", ["float32", "int8", "int4"])
def test_each_flipped_byte_is_named_with_its_rows(make_table: MakeTable, row_format: str) -> None:
    rng = np.random.default_rng(5)
    layout, _ = make_table(3000, 48, row_format)
    whole = layout.path.read_bytes()
    for at in [0, layout.nbytes - 1, *rng.integers(0, layout.nbytes, 20).tolist()]:
        layout.path.write_bytes(whole)
        flip(layout.path, layout.offset + at)
        (bad,) = scan_table(layout).bad_blocks
        assert (bad.first, bad.last, bad.defect) == (at // 4096, at // 4096, DIFFERS)
        assert bad.rows.first <= at // layout.stride <= bad.rows.last
        assert bad.rows.first * layout.stride <= bad.first * 4096
        assert (bad.rows.last + 1) * layout.stride >= min((bad.last + 1) * 4096, layout.nbytes)


def test_neighbouring_blocks_are_one_finding(make_table: MakeTable) -> None:
    layout, _ = make_table(1024, 64, "float32")  # 16 rows a block, 64 blocks
    for block in (2, 3, 7):
        flip(layout.path, layout.offset + 4096 * block + 5)
    flip(layout.path, layout.offset + layout.nbytes)  # the checksum of block 0 itself
    assert scan_table(layout).bad_blocks == (
        BadBlocks(0, 0, RowSpan(0, 15), DIFFERS),
        BadBlocks(2, 3, RowSpan(32, 63), DIFFERS),
        BadBlocks(7, 7, RowSpan(112, 127), DIFFERS),
    )


@pytest.mark.parametrize("row_format", ["int8", "int4"])
@pytest.mark.parametrize("width", [6, 48, 9000])
def test_scales_that_are_not_finite(tmp_path: Path, row_format: str, width: int) -> None:
    rows = 40 if width == 9000 else 1500
    stride = RowFormat(row_format).stride(width)
    stored = torch.randint(0, 256, (rows, stride), dtype=torch.uint8)
    scales = torch.randn(rows).half()
    scales[[0, 7, 8, 9, 30]] = torch.tensor([torch.inf, torch.nan, -torch.inf, torch.nan, torch.inf]).half()
    scales[[11, 12]] = torch.tensor([65504.0, -65504.0]).half()  # the largest there are
    stored[:, -2:] = scales[:, None].view(torch.uint8)
    layout = write_table(tmp_path / "t.safetensors", "values", rows, width, row_format, [stored])
    scan = scan_table(layout)
    assert scan.bad_scales == (RowSpan(0, 0), RowSpan(7, 9), RowSpan(30, 30))
    assert scan.bad_blocks == ()


def test_without_checksums_only_what_cannot_be_read_is_found(tmp_path: Path) -> None:
    save_file({"values": torch.randn(3000, 48)}, tmp_path / "t.safetensors")
    layout = TableLayout.from_safetensors(tmp_path / "t.safetensors", "values")
    flip(layout.path, layout.offset + 5)
    scan = scan_table(layout)
    assert (scan.has_checksums, scan.bad_blocks) == (False, ())


def test_unreadable_sectors_cost_their_blocks_alone(
    make_table: MakeTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, _ = make_table(1024, 64, "float32")
    bad = range(layout.offset + 5 * 4096, layout.offset + 7 * 4096)
    preadv = os.preadv

    def failing(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if offset < bad.stop and offset + len(buffers[0]) > bad.start:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(descriptor, [buffers[0][:1000]], offset)  # and short reads everywhere else

    monkeypatch.setattr(os, "preadv", failing)
    flip(layout.path, layout.offset + 4 * 4096)
    assert scan_table(layout).bad_blocks == (
        BadBlocks(4, 4, RowSpan(64, 79), DIFFERS),
        BadBlocks(5, 6, RowSpan(80, 111), "cannot be read: Input/output error"),
    )


def test_a_table_cut_off_while_it_is_read(make_table: MakeTable) -> None:
    layout, _ = make_table(1024, 64, "float32")
    with layout.path.open("r+b") as file:
        file.truncate(layout.offset + 10 * 4096 + 100)
    pieces = list(read_through(layout.path, layout.offset, layout.nbytes))
    cut = [piece.begin // 4096 + block for piece in pieces for block in piece.unreadable]
    assert cut == list(range(10, 64))
    assert pieces[-1].unreadable[0] == "cannot be read: the file ends before it"
