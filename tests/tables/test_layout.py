"""Headers are believed only as far as they agree with themselves and with the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from memlane.tables import RowFormat, TableFormatError, TableLayout, write_table


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    path = tmp_path / "plain.safetensors"
    save_file({"values": torch.arange(12.0).reshape(4, 3), "other": torch.zeros(5)}, path)
    return path


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def test_finds_a_table_among_other_tensors(plain: Path) -> None:
    layout = TableLayout.from_safetensors(plain, "values")
    assert (layout.rows, layout.width, layout.dtype, layout.stride) == (4, 3, RowFormat.FLOAT32, 12)
    raw = plain.read_bytes()[layout.offset : layout.offset + layout.nbytes]
    assert np.frombuffer(raw, np.float32).tolist() == list(range(12))


@pytest.mark.parametrize("row_format", list(RowFormat))
def test_written_tables_are_page_aligned_safetensors(tmp_path: Path, row_format: RowFormat) -> None:
    path = tmp_path / "t.safetensors"
    written = write_table(path, "values", 10, 6, row_format, torch.randn(10, 6).split(3))
    assert written.offset % 4096 == 0
    assert TableLayout.from_safetensors(path, "values", row_format, 6) == written
    assert load_file(path)["values"].numel() * load_file(path)["values"].element_size() == written.nbytes
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "dtype", "width", "message"),
    [
        ("nothing", None, None, "no tensor 'nothing'"),
        ("values", "bfloat16", None, "stored as BF16"),
        ("values", "int8", 3, "stored as U8"),
        ("values", None, 4, "3 columns"),
        ("other", None, None, "a table is"),
    ],
)
def test_refuses_what_the_header_contradicts(
    plain: Path, name: str, dtype: str | None, width: int | None, message: str
) -> None:
    with pytest.raises(TableFormatError, match=message):
        TableLayout.from_safetensors(plain, name, dtype, width)


def test_quantised_rows_need_a_width_that_fits(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_table(path, "values", 4, 6, "int4", [torch.randn(4, 6)])
    for arguments in [("int4", None), ("int4", 8), ("int8", 6), ("fp8", 6), ("int4", 5), (None, 6)]:
        with pytest.raises(TableFormatError):
            TableLayout.from_safetensors(path, "values", *arguments)


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 60, -1])
def test_refuses_a_truncated_file(plain: Path, cut: int) -> None:
    plain.write_bytes(plain.read_bytes()[:cut])
    with pytest.raises(TableFormatError, match=r"plain\.safetensors"):
        TableLayout.from_safetensors(plain, "values")


def test_refuses_a_longer_file(plain: Path) -> None:
    plain.write_bytes(plain.read_bytes() + b"\0")
    with pytest.raises(TableFormatError, match="longer"):
        TableLayout.from_safetensors(plain, "values")


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe",
        [],
        {"values": 3},
        {"values": {"dtype": "F32", "shape": [2, 2]}},
        {"values": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0]}},
        {"values": {"dtype": "F32", "shape": [2, -2], "data_offsets": [0, 16]}},
        {"values": {"dtype": "F32", "shape": [2.0, 2], "data_offsets": [0, 16]}},
        {"values": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16, 0]}},
        {"values": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 16]}},
        {"values": {"dtype": 7, "shape": [2, 2], "data_offsets": [0, 16]}},
        {"values": {"dtype": "F32", "shape": None, "data_offsets": [0, 16]}},
        {"values": {"dtype": "F32", "shape": [1 << 61, 1 << 61], "data_offsets": [0, 16]}},
    ],
)
def test_refuses_malformed_headers(tmp_path: Path, header: object) -> None:
    path = write_raw(tmp_path / "t.safetensors", header, bytes(16))
    with pytest.raises(TableFormatError, match=r"t\.safetensors"):
        TableLayout.from_safetensors(path, "values")


def test_random_damage_is_an_error_of_ours_or_harmless(plain: Path) -> None:
    good = plain.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(500):
        damaged = bytearray(good)
        for at in rng.integers(0, 140, rng.integers(1, 4)):
            damaged[at] = rng.integers(0, 256)
        plain.write_bytes(bytes(damaged))
        try:
            layout = TableLayout.from_safetensors(plain, "values")
        except TableFormatError:
            continue
        assert layout.offset + layout.nbytes <= len(good)


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    for chunks in ([torch.randn(3, 6)], [torch.randn(5, 6)], [torch.randn(4, 7)]):
        with pytest.raises(TableFormatError):
            write_table(tmp_path / "t.safetensors", "values", 4, 6, "float32", chunks)
    assert list(tmp_path.iterdir()) == []
