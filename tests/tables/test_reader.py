"""Every way of reading gives the file's bytes or an error that names the rows; never zeros, never half a row."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memlane.native import Arena, RowReader, SlotStates

OFFSET, STRIDE, ROWS = 12_345, 700, 900  # unaligned; rows straddle pages; 630 KB
WAYS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows"
    path.write_bytes(np.random.default_rng(0).bytes(OFFSET + ROWS * STRIDE))
    return path


def open_reader(file: Path, way: tuple[bool, bool], **options: Any) -> RowReader:
    uring, direct = way
    return RowReader(os.fspath(file), OFFSET, STRIDE, ROWS, allow_uring=uring, allow_direct=direct, **options)


@pytest.fixture(params=WAYS, ids=lambda way: f"uring={way[0]}-direct={way[1]}")
def reader(request: pytest.FixtureRequest, file: Path) -> RowReader:
    return open_reader(file, request.param)


class Out:
    """Slots for rows, filled with a pattern that no read may leave in place of data."""

    def __init__(self, count: int) -> None:
        self.arena = Arena(count * STRIDE)
        self.rows = self.arena.array().reshape(count, STRIDE)
        self.rows[:] = 0xA5
        self.states = SlotStates(count)


def read(reader: RowReader, rows: np.ndarray, slots: np.ndarray, out: Out) -> tuple[np.ndarray, np.ndarray]:
    """(positions of the rows that failed, their errors); every slot's state agrees with them."""
    positions, errors = reader.finish(reader.start(rows, slots, out.arena, out.states))
    assert out.states.failed(slots).tolist() == positions.tolist()
    return positions, errors


def stored(file: Path) -> np.ndarray:
    return np.frombuffer(file.read_bytes()[OFFSET:], np.uint8).reshape(ROWS, STRIDE)


def batches(seed: int, count: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield np.sort(rng.choice(ROWS, rng.integers(0, ROWS + 1), replace=False))


def test_reads_what_the_file_holds(reader: RowReader, file: Path) -> None:
    expected = stored(file)
    rng = np.random.default_rng(1)
    total = 0
    for rows in batches(2, 15):
        slots = rng.permutation(ROWS).astype(np.int32)[: len(rows)]
        out = Out(ROWS)
        positions, _ = read(reader, rows, slots, out)
        assert len(positions) == 0
        np.testing.assert_array_equal(out.rows[slots], expected[rows])
        untouched = np.setdiff1d(np.arange(ROWS), slots)
        assert (out.rows[untouched] == 0xA5).all()
        total += len(rows) * STRIDE
    assert reader.in_flight == 0
    assert reader.bytes_read >= total / 2  # merged reads may bring rows that share pages at once


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("depth", "gap"), [(4, 0), (16, 1 << 20), (1024, 4096)])
def test_any_depth_and_gap(file: Path, way: tuple[bool, bool], depth: int, gap: int) -> None:
    reader = open_reader(file, way, depth=depth, merge_gap=gap)
    rows, out = np.arange(0, ROWS, 7), Out(ROWS)
    assert len(read(reader, rows, rows.astype(np.int32), out)[0]) == 0
    np.testing.assert_array_equal(out.rows[rows], stored(file)[rows])


def test_neighbours_are_read_together(file: Path) -> None:
    reader = open_reader(file, (True, True))
    rows = np.arange(ROWS)
    read(reader, rows, rows.astype(np.int32), Out(ROWS))
    assert reader.reads <= ROWS * STRIDE // (512 << 10) + 2
    assert reader.bytes_read < 1.1 * ROWS * STRIDE + 65_536


@pytest.mark.parametrize("gap", [0, 1 << 20])
def test_a_bad_block_fails_its_rows_only(file: Path, gap: int) -> None:
    for way in WAYS:
        reader = open_reader(file, way, merge_gap=gap)
        reader.inject_fault(100, 102, errno.EIO, -1)
        for rows in [np.arange(ROWS), np.array([99, 100, 103]), np.array([98, 102])]:
            out = Out(ROWS)
            positions, errors = read(reader, rows, rows.astype(np.int32), out)
            bad = rows[positions]
            # A row is read from the start of its first page on: rows behind a bad one in its page share its fate.
            first_byte = (OFFSET + rows * STRIDE) // 4096 * 4096
            touched = (first_byte < OFFSET + 103 * STRIDE) & (rows >= 100)
            assert bad.tolist() == rows[touched].tolist()
            assert set(errors.tolist()) == {errno.EIO}
            good = np.setdiff1d(rows, bad)
            np.testing.assert_array_equal(out.rows[good], stored(file)[good])
            assert (out.rows[bad] == 0xA5).all()
        reader.inject_fault(0, 0, 0, 0)
        assert len(read(reader, np.arange(90, 110), np.arange(20, dtype=np.int32), Out(20))[0]) == 0


@pytest.mark.parametrize("error", [errno.EAGAIN, errno.EINTR, 0])
def test_passing_faults_are_retried(reader: RowReader, file: Path, error: int) -> None:
    reader.inject_fault(400, 410, error, 2)
    rows, out = np.arange(300, 500), Out(200)
    positions, _ = read(reader, rows, np.arange(200, dtype=np.int32), out)
    assert len(positions) == 0
    np.testing.assert_array_equal(out.rows, stored(file)[300:500])
    assert reader.retries == 2


def test_a_file_truncated_while_open(reader: RowReader, file: Path) -> None:
    expected = stored(file).copy()
    keep = 500  # whole rows; the 501st is cut in its middle
    os.truncate(file, OFFSET + keep * STRIDE + STRIDE // 2)
    for rows in [np.arange(ROWS), np.arange(490, 510), np.array([499, 500]), np.array([899])]:
        out = Out(ROWS)
        positions, errors = read(reader, rows, rows.astype(np.int32), out)
        assert rows[positions].tolist() == rows[rows >= keep].tolist()
        assert (errors == 0).all()
        good = rows[rows < keep]
        np.testing.assert_array_equal(out.rows[good], expected[good])
        assert (out.rows[rows[positions]] == 0xA5).all()
    file.write_bytes(bytes(OFFSET) + expected.tobytes())  # whole again: the next call works
    assert len(read(reader, np.arange(ROWS), np.arange(ROWS, dtype=np.int32), Out(ROWS))[0]) == 0


def test_files_that_cannot_be_opened(tmp_path: Path, file: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_reader(tmp_path / "missing", (True, True))
    with pytest.raises((IsADirectoryError, ValueError)):
        open_reader(tmp_path, (True, True))
    os.truncate(file, OFFSET + ROWS * STRIDE - 1)
    with pytest.raises(ValueError, match=rf"its table needs {OFFSET + ROWS * STRIDE}"):
        open_reader(file, (True, True))


def test_arguments_are_checked(reader: RowReader) -> None:
    out = Out(4)
    for rows, slots in [
        ([5, 4], [0, 1]),
        ([4, 4], [0, 1]),
        ([-1], [0]),
        ([ROWS], [0]),
        ([1], [4]),
        ([1], [-1]),
        ([1], []),
    ]:
        with pytest.raises(ValueError, match=r"row|slot"):
            read(reader, np.array(rows, np.int64), np.array(slots, np.int32), out)
    assert (out.rows == 0xA5).all()


def test_memory_file_systems_fall_back(file: Path) -> None:
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        pytest.skip("O_DIRECT is not available to refuse: no memory file system")
    copy = shared / f"memlane-test-{os.getpid()}"
    try:
        copy.write_bytes(file.read_bytes())
        reader = open_reader(copy, (True, True))
        out = Out(ROWS)
        assert len(read(reader, np.arange(ROWS), np.arange(ROWS, dtype=np.int32), out)[0]) == 0
        np.testing.assert_array_equal(out.rows, stored(file))
        assert reader.backend.endswith("+direct") or "O_DIRECT" in reader.reason
    finally:
        copy.unlink(missing_ok=True)


def test_rows_larger_than_a_merged_read(tmp_path: Path) -> None:
    stride, rows = 100_003, 30
    path = tmp_path / "wide"
    content = np.random.default_rng(5).integers(0, 256, (rows, stride), dtype=np.uint8)
    path.write_bytes(content.tobytes())
    for uring, direct in WAYS:
        reader = RowReader(os.fspath(path), 0, stride, rows, allow_uring=uring, allow_direct=direct)
        arena = Arena(rows * stride)
        request = reader.start(
            np.arange(rows), np.arange(rows, dtype=np.int32)[::-1].copy(), arena, SlotStates(rows)
        )
        assert len(reader.finish(request)[0]) == 0
        np.testing.assert_array_equal(arena.array().reshape(rows, stride)[::-1], content)


def test_the_chosen_way_is_named(file: Path) -> None:
    names = {way: open_reader(file, way).backend for way in WAYS}
    assert names[False, False] == "threads+buffered"
    assert names[False, True].startswith("threads+")
    assert "not asked for" in open_reader(file, (False, False)).reason
    assert all(
        name in {"io_uring+direct", "io_uring+buffered", "threads+direct", "threads+buffered"}
        for name in names.values()
    )


def test_requests_run_beside_each_other(reader: RowReader, file: Path) -> None:
    expected, rng = stored(file), np.random.default_rng(7)
    for _ in range(10):
        order = rng.permutation(ROWS)
        parts = [np.sort(part) for part in np.split(order, np.sort(rng.integers(0, ROWS, 3)))]
        out = Out(ROWS)
        requests = [reader.start(part, part.astype(np.int32), out.arena, out.states) for part in parts]
        for place in rng.permutation(len(parts)).tolist():  # finished in any order
            assert len(reader.finish(requests[place])[0]) == 0
            np.testing.assert_array_equal(out.rows[parts[place]], expected[parts[place]])
            assert requests[place].settled == len(parts[place])
        assert reader.in_flight == 0


def test_a_large_request_goes_on_by_itself(reader: RowReader, file: Path) -> None:
    """More reads than fit in flight are kept going without anybody waiting for them."""
    many = open_reader(file, ("uring" in reader.backend, reader.direct), depth=2, merge_gap=0)
    rows, out = np.arange(0, ROWS, 13), Out(ROWS)
    request = many.start(rows, rows.astype(np.int32), out.arena, out.states)
    until = time.monotonic() + 10
    while request.settled < len(rows) - 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert request.settled >= len(rows) - 2
    assert len(many.finish(request)[0]) == 0


def test_a_reader_closed_with_reads_under_way(file: Path) -> None:
    for way in WAYS:
        for _ in range(20):
            reader, out = open_reader(file, way, depth=8, merge_gap=0), Out(ROWS)
            rows = np.arange(0, ROWS, 3)
            request = reader.start(rows, rows.astype(np.int32), out.arena, out.states)
            del reader
            assert request.settled <= len(rows)


@pytest.mark.parametrize("way", WAYS)
def test_a_read_that_hangs_is_given_up(file: Path, way: tuple[bool, bool]) -> None:
    reader, out = open_reader(file, way, deadline=0.2, merge_gap=0), Out(ROWS)
    reader.inject_fault(500, 501, -1, -1)
    rows = np.array([3, 400, 500, 501, 700])
    request = reader.start(rows, rows.astype(np.int32), out.arena, out.states)
    assert not reader.wait(request, 0.02)
    started = time.monotonic()
    positions, errors = reader.finish(request)
    assert time.monotonic() - started < 5
    assert rows[positions].tolist() == [500, 501]
    assert set(errors.tolist()) == {errno.ETIMEDOUT}
    np.testing.assert_array_equal(out.rows[[3, 400, 700]], stored(file)[[3, 400, 700]])
    assert (out.rows[[500, 501]] == 0xA5).all()
    assert reader.in_flight == 0
    assert len(read(reader, np.array([5, 6]), np.array([5, 6], np.int32), out)[0]) == 0  # the others go on
    reader.inject_fault(0, 0, 0, 0)
    time.sleep(0.1)
    assert (out.rows[[500, 501]] == 0xA5).all()  # what comes too late is thrown away
    assert len(read(reader, rows, rows.astype(np.int32), out)[0]) == 0
    np.testing.assert_array_equal(out.rows[rows], stored(file)[rows])


@pytest.mark.parametrize("way", WAYS)
def test_reads_that_never_get_their_turn_are_given_up(file: Path, way: tuple[bool, bool]) -> None:
    reader, out = open_reader(file, way, deadline=0.2, depth=2, merge_gap=0), Out(ROWS)
    reader.inject_fault(0, ROWS - 1, -1, -1)
    rows = np.arange(0, ROWS, 30)
    positions, errors = read(reader, rows, rows.astype(np.int32), out)
    assert len(positions) == len(rows)
    assert set(errors.tolist()) == {errno.ETIMEDOUT}


def test_buffers_the_kernel_does_not_know_read_the_same(file: Path) -> None:
    reader, out = open_reader(file, (True, True), fixed_buffers=False), Out(ROWS)
    rows = np.arange(0, ROWS, 3)
    assert len(read(reader, rows, rows.astype(np.int32), out)[0]) == 0
    np.testing.assert_array_equal(out.rows[rows], stored(file)[rows])
