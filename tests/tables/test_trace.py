"""Recording rows and reading the record back: exact, bounded, and whatever the file goes through."""

from __future__ import annotations

import itertools
import logging
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from memlane.tables import ValueTable
from memlane.tables import trace as trace_module
from memlane.tables.trace import Record, RowRecorder, TracedTable, TraceFormatError, read_trace

ROWS = 5000
TABLES = (TracedTable("a", ROWS, 514, 1 << 20), TracedTable("b", 7, 64))


def draw(seed: int, count: int) -> list[Record]:
    rng = np.random.default_rng(seed)
    numbers = rng.integers(0, 2, count).tolist()
    return [
        Record(n, rng.integers(0, TABLES[n].rows, rng.integers(1, 300)).astype(np.uint32)) for n in numbers
    ]


def write(path: Path, records: list[Record], **options: int) -> RowRecorder:
    recorder = RowRecorder(path, TABLES, model="m", **options)
    for i, (table, ids) in enumerate(records):
        recorder.record(table, ids.astype(np.int32 if i % 2 else np.int64))
    recorder.close()
    return recorder


def same(read: list[Record], written: list[Record]) -> bool:
    return len(read) == len(written) and all(
        a.table == b.table and a.ids.dtype == np.uint32 and np.array_equal(a.ids, b.ids)
        for a, b in zip(read, written, strict=True)
    )


def blocks(path: Path) -> list[int]:
    """Where blocks begin, and the file's end."""
    data = path.read_bytes()
    at = data.index(b"\n", len(trace_module.MAGIC)) + 1
    found = [at]
    while at < len(data):
        at += 12 + struct.unpack_from("<I", data, at)[0]
        found.append(at)
    return found


def test_what_is_read_is_what_was_recorded(tmp_path: Path) -> None:
    records = draw(0, 1000)
    write(tmp_path / "t", records)
    trace = read_trace(tmp_path / "t")
    assert (trace.model, trace.tables) == ("m", TABLES)
    assert len(blocks(tmp_path / "t")) > 2, "more than one block is wanted here"
    for _ in range(2):
        assert same(list(trace), records)
        assert trace.torn is None


def test_empty_lookups_and_empty_records(tmp_path: Path) -> None:
    recorder = write(tmp_path / "t", [Record(0, np.empty(0, np.uint32))])
    assert list(read_trace(tmp_path / "t")) == []
    recorder.record(0, np.array([1]))
    recorder.close()
    assert not recorder.recording
    assert list(read_trace(tmp_path / "t")) == []


def test_ids_are_copied(tmp_path: Path) -> None:
    recorder = RowRecorder(tmp_path / "t", TABLES)
    ids = np.array([1, 2, 3], np.uint32)
    recorder.of("a")(ids.view(np.int32))
    ids[:] = 0
    recorder.close()
    assert [r.ids.tolist() for r in read_trace(tmp_path / "t")] == [[1, 2, 3]]


def test_a_file_cut_anywhere_gives_its_whole_blocks(tmp_path: Path) -> None:
    records = draw(1, 1200)
    write(tmp_path / "t", records)
    data, begins = (tmp_path / "t").read_bytes(), blocks(tmp_path / "t")
    cut = tmp_path / "cut"
    rng = np.random.default_rng(2)
    before = 0
    for begin, end in itertools.pairwise(begins):
        for at in (begin + 1, begin + 11, begin + 12, *rng.integers(begin + 13, end, 3).tolist(), end - 1):
            cut.write_bytes(data[:at])
            trace = read_trace(cut)
            assert same(list(trace), records[:before])
            assert trace.torn is not None
            assert f"{at - begin} of {at} bytes" in trace.torn
        cut.write_bytes(data[:end])
        trace = read_trace(cut)
        found = list(trace)
        before = len(found)
        assert same(found, records[:before])
        assert trace.torn is None
    assert before == len(records)


def test_damage_ends_the_record_before_its_block(tmp_path: Path) -> None:
    records = draw(3, 1200)
    write(tmp_path / "t", records)
    begins = blocks(tmp_path / "t")
    data = bytearray((tmp_path / "t").read_bytes())
    data[begins[1] + 100] ^= 1
    (tmp_path / "t").write_bytes(data)
    trace = read_trace(tmp_path / "t")
    found = list(trace)
    assert 0 < len(found) < len(records)
    assert same(found, records[: len(found)])
    assert trace.torn is not None


def test_ids_outside_the_table_are_damage(tmp_path: Path) -> None:
    recorder = RowRecorder(tmp_path / "t", TABLES)
    recorder.record(1, np.array([7]))
    recorder.close()
    trace = read_trace(tmp_path / "t")
    assert list(trace) == []
    assert trace.torn is not None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not a record"),
        (b"memlane rows\n", "malformed"),
        (b"memlane rows\n{}\n", "malformed"),
        (b"memlane rows\n[1]\n", "malformed"),
        (b'memlane rows\n{"version": 2, "tables": [], "model": ""}\n', "version 2"),
        (b'memlane rows\n{"version": 1, "tables": [{"name": "a"}], "model": ""}\n', "malformed"),
        (
            b'memlane rows\n{"version": 1, "tables": [{"name": "a", "rows": -1, "row_bytes": 2}], "model": ""}\n',
            "malformed",
        ),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(TraceFormatError, match=says):
        read_trace(tmp_path / "t")


def test_recording_ends_at_the_limit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = draw(4, 2000)
    with caplog.at_level(logging.WARNING):
        recorder = write(tmp_path / "t", records, limit=200_000)
    assert not recorder.recording
    assert (tmp_path / "t").stat().st_size <= 200_000
    assert [r.message for r in caplog.records] == [
        f"recording rows ends: {tmp_path / 't'} has reached its limit of 200000 bytes"
    ]
    trace = read_trace(tmp_path / "t")
    found = list(trace)
    assert 0 < len(found) < len(records)
    assert same(found, records[: len(found)])
    assert trace.torn is None


def test_a_full_disk_ends_recording_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = RowRecorder(tmp_path / "t", TABLES)
    assert recorder._file is not None
    full = Path("/dev/full").open("r+b")  # noqa: SIM115  # handed to the recorder, which closes it
    os.dup2(full.fileno(), recorder._file.fileno())
    full.close()
    with caplog.at_level(logging.WARNING):
        for table, ids in draw(5, 2000):
            recorder.record(table, ids)
        recorder.close()
    assert [r.message for r in caplog.records] == [
        f"recording rows ends: {tmp_path / 't'}: No space left on device"
    ]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("precious")
    with pytest.raises(FileExistsError):
        RowRecorder(tmp_path / "t", TABLES)
    assert (tmp_path / "t").read_text() == "precious"


def test_an_old_block_is_written_at_the_next_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(trace_module.time, "monotonic", lambda: now)
    recorder = RowRecorder(tmp_path / "t", TABLES)
    recorder.record(0, np.array([1]))
    assert list(read_trace(tmp_path / "t")) == []
    now += 6
    recorder.record(0, np.array([2]))
    assert [r.ids.tolist() for r in read_trace(tmp_path / "t")] == [[1], [2]]
    recorder.close()


@pytest.mark.parametrize("placement", ["host", "disk"])
def test_a_table_tells_its_recorder_what_was_served(make_table, placement: str) -> None:  # type: ignore[no-untyped-def]
    layout, _ = make_table(rows=200, width=16)
    asked: list[list[int]] = []
    table = ValueTable.open(layout, placement=placement, cache_bytes=layout.stride * 50)  # type: ignore[arg-type]
    table.recorder = lambda ids: asked.append(ids.tolist())
    ids = torch.randint(0, 200, (9, 30))
    table.warm(list(range(40)))
    table.weighted_sum(ids, torch.rand(9, 30))
    table.dot(ids[:2], torch.rand(2, 16))
    table.warm(list(range(3)))
    table.gather(ids[0])
    with pytest.raises(IndexError):
        table.gather(torch.tensor([3, 200]))
    assert asked == [ids.flatten().tolist(), ids[:2].flatten().tolist(), ids[0].tolist()]
    table.close()
