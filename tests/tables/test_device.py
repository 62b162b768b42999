"""What a device costs is measured once, remembered, and turned into the gap that is read through."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from memlane.native import RowReader
from memlane.tables import RowFormat, TableLayout
from memlane.tables import device as device_module
from memlane.tables.device import DeviceSpeed, device_speed, measure


@pytest.fixture
def layout(tmp_path: Path) -> TableLayout:
    path = tmp_path / "table"
    path.write_bytes(np.random.default_rng(0).bytes(24 << 20))
    return TableLayout("values", path, 0, 24 << 10, 512, RowFormat.BFLOAT16, 1024)


def test_the_gap_is_where_two_reads_cost_as_much_as_one() -> None:
    ssd = DeviceSpeed(read_seconds=20e-6, byte_seconds=1e-9)  # 20 us a read, 1 GB/s
    assert ssd.merge_gap == 20_000 // 4096 * 4096
    assert ssd.bytes_per_second == pytest.approx(0.963e9, rel=1e-2)
    assert ssd.reads_per_second == pytest.approx(1 / 24.1e-6, rel=1e-2)
    assert DeviceSpeed(1e-3, 1e-9).merge_gap == 256 << 10  # half of the longest read
    assert DeviceSpeed(0.0, 1e-9).merge_gap == 4096
    assert DeviceSpeed(1e-6, 0.0).merge_gap == 256 << 10


def test_a_real_file_is_measured(layout: TableLayout) -> None:
    for io in ("auto", "buffered"):
        speed = measure(layout.path, io, seed=0)  # type: ignore[arg-type]
        assert 100 < speed.reads_per_second < 1e8
        assert 1e6 < speed.bytes_per_second < 1e12
        assert 4096 <= speed.merge_gap <= 256 << 10


def test_it_is_measured_once(
    layout: TableLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    remembered = tmp_path / "cache" / "devices.json"
    caplog.set_level(logging.INFO)
    assert device_speed(layout, remembered) is None  # a small table
    assert not remembered.exists()
    monkeypatch.setattr(device_module, "_WORTH_MEASURING", 0)
    first = device_speed(layout, remembered)
    assert first is not None
    assert "measured now" in caplog.text
    monkeypatch.setattr(device_module, "measure", lambda *_: pytest.fail("measured twice"))
    assert device_speed(layout, remembered) == first
    assert "as measured before" in caplog.text
    with pytest.raises(pytest.fail.Exception):
        device_speed(layout, remembered, "buffered")  # another way of reading has another speed


@pytest.mark.parametrize("content", ["", "[]", '{"8:1 auto": 3}', '{"8:1 auto": {"read_seconds": "x"}}'])
def test_a_damaged_memory_is_measured_anew(
    layout: TableLayout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr(device_module, "_WORTH_MEASURING", 0)
    remembered = tmp_path / "devices.json"
    remembered.write_text(content)
    assert device_speed(layout, remembered) is not None
    assert len(json.loads(remembered.read_text())) == 1


def test_a_memory_that_cannot_be_written_is_only_logged(
    layout: TableLayout, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device_module, "_WORTH_MEASURING", 0)
    assert device_speed(layout, Path("/dev/null/devices.json")) is not None
    assert "cannot be remembered" in caplog.text


def test_dense_batches_are_streamed(layout: TableLayout) -> None:
    """The same batch, ever fewer reads as the gap grows: at the end whole extents of 512 KiB."""
    rows = np.arange(0, layout.rows, 16)  # every fourth page
    reads = []
    for gap in (0, 12 << 10, 64 << 10):
        reader = RowReader(str(layout.path), 0, layout.stride, layout.rows, merge_gap=gap)
        reads.append(reader.plan(rows))
    assert reads[0] == len(rows)
    assert reads[1] == reads[2] == pytest.approx((24 << 20) // (512 << 10), abs=2)
