"""Tables on file systems that fail, or cannot do all that ext4 on a disk can. What fails here is real, not injected."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from mounts import FaultyMount, faulty_mount, mounted
from torch import Tensor

from memlane.tables import RowReadError, TableLayout, ValueTable, write_table
from memlane.tables.source import FileIO, FileSource, SlotMemory

ROWS, WIDTH = 400, 1024  # fp32: a row is a page, so that faults hit one row
WAYS: list[tuple[bool, FileIO]] = [(True, "auto"), (True, "buffered"), (False, "auto"), (False, "buffered")]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A folder with a table in it, and its rows."""
    values = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("stored")
    write_table(folder / "table", "values", ROWS, WIDTH, "float32", [values])
    return folder, values


@pytest.fixture(params=["takes O_DIRECT", "refuses O_DIRECT"])
def mount(
    request: pytest.FixtureRequest, stored: tuple[Path, Tensor], tmp_path: Path
) -> Iterator[FaultyMount]:
    options = ["refuse-direct"] if request.param.startswith("refuses") else []
    with faulty_mount(stored[0], tmp_path / "mount", *options) as mount:
        yield mount


def layout_at(folder: Path) -> TableLayout:
    return TableLayout.from_safetensors(folder / "table", "values")


def fault(layout: TableLayout, row: int, do: str, count: int = 1, **more: float) -> dict[str, object]:
    begin = layout.offset + row * layout.stride
    return {"begin": begin, "end": begin + count * layout.stride, "do": do, **more}


class Slots:
    """Memory for all rows of the table, filled with a pattern that no read may leave in place of data."""

    def __init__(self, layout: TableLayout) -> None:
        self.memory = SlotMemory.of(ROWS, layout.stride)
        self.rows = self.memory.arena.array().reshape(ROWS, layout.stride)
        self.rows[:] = 0xA5

    def read(self, source: FileSource, rows: np.ndarray, slots: np.ndarray | None = None) -> list[int]:
        """Into slots of the rows' own numbers where none are given; the rows that failed."""
        places = (rows if slots is None else slots).astype(np.int32)
        try:
            source.read(rows.astype(np.int64), places, self.memory)
        except RowReadError as error:
            return error.rows
        return []

    def holds(self, values: Tensor, rows: np.ndarray, slots: np.ndarray | None = None) -> bool:
        return np.array_equal(
            self.rows[rows if slots is None else slots].view(np.float32), values[rows].numpy()
        )


@pytest.mark.parametrize("way", WAYS, ids=lambda way: f"uring={way[0]}-{way[1]}")
def test_every_fault_in_every_way_of_reading(
    mount: FaultyMount, stored: tuple[Path, Tensor], way: tuple[bool, FileIO]
) -> None:
    values, layout = stored[1], layout_at(mount.path)
    source = FileSource(layout, allow_uring=way[0], io=way[1], deadline=0.3, merge_gap=0)
    everything = np.arange(ROWS)
    out = Slots(layout)
    assert out.read(source, everything) == []
    assert out.holds(values, everything)

    mount.rules(fault(layout, 100, "eio", 2), fault(layout, 300, "eio"))
    out = Slots(layout)
    assert out.read(source, everything) == [100, 101, 300]
    good = np.setdiff1d(everything, [100, 101, 300])
    assert out.holds(values, good)
    assert (out.rows[[100, 101, 300]] == 0xA5).all()

    before = source.retries
    mount.rules(fault(layout, 0, "short", ROWS, value=8192))  # of longer reads: each goes on a page border
    assert out.read(source, everything) == []
    assert out.holds(values, everything)
    assert source.retries > before
    if source.backend.endswith("buffered"):  # direct reads may not go on in the middle of a page
        mount.rules(fault(layout, 0, "short", ROWS, value=1000))
        out = Slots(layout)
        assert out.read(source, np.arange(20, 30)) == []
        assert out.holds(values, np.arange(20, 30))

    # More than the kernel's threads for blocking reads would be by themselves.
    hung = np.arange(200, 240, 2)
    mount.rules(*(fault(layout, row, "hang") for row in hung.tolist()))
    out = Slots(layout)
    rows = np.concatenate([np.arange(50, 60, 2), hung, np.arange(350, 360, 2)])
    slots = np.arange(len(rows))
    read = source.start(rows, slots.astype(np.int32), out.memory)
    assert not read.wait(0.05)
    started = time.monotonic()
    with pytest.raises(RowReadError, match="ETIMEDOUT") as caught:
        read.finish()
    assert time.monotonic() - started < 3
    assert caught.value.rows == hung.tolist()
    good = ~np.isin(rows, hung)
    assert out.holds(values, rows[good], slots[good])
    assert mount.held == len(hung)
    # Their slots go to other rows, which stay when the hung reads end after all.
    others = np.arange(0, 2 * len(hung), 2)
    places = slots[~good]
    assert out.read(source, others, places) == []
    mount.release()
    time.sleep(0.1)
    assert mount.held == 0
    assert out.holds(values, others, places)
    assert out.read(source, hung, places) == []
    assert out.holds(values, hung, places)
    assert source.in_flight == 0

    mount.rules(fault(layout, 200, "hang"))
    source.start(np.array([200]), np.array([0], np.int32), out.memory)
    until = time.monotonic() + 5
    while not mount.held and time.monotonic() < until:
        time.sleep(0.01)
    started = time.monotonic()
    source.close()
    assert time.monotonic() - started < 3, "closing waits for a read that hangs"
    before_release = out.rows.copy()
    mount.release()
    time.sleep(0.1)
    np.testing.assert_array_equal(out.rows, before_release)


def test_the_way_of_reading_is_what_the_file_system_takes(
    stored: tuple[Path, Tensor], tmp_path: Path
) -> None:
    with faulty_mount(stored[0], tmp_path / "a") as mount:
        assert FileSource(layout_at(mount.path)).backend.endswith("+direct")
    with faulty_mount(stored[0], tmp_path / "b", "refuse-direct") as mount:
        source = FileSource(layout_at(mount.path))
        assert source.backend.endswith("+buffered")
        assert "O_DIRECT: Invalid argument" in source.reader.reason


def test_slow_reads_are_in_flight_together(stored: tuple[Path, Tensor], tmp_path: Path) -> None:
    """Latency is what a network file system has most of: 64 reads of 0.1 s each, not one after the other."""
    for name, option in [("a", "takes-direct"), ("b", "refuse-direct")]:
        with faulty_mount(stored[0], tmp_path / name, option) as mount:
            layout = layout_at(mount.path)
            for uring in (True, False):
                source = FileSource(layout, allow_uring=uring, merge_gap=0)
                mount.rules(fault(layout, 0, "wait", ROWS, value=0.1))
                out, rows = Slots(layout), np.arange(0, 128, 2)
                started = time.monotonic()
                assert out.read(source, rows) == []
                assert time.monotonic() - started < 1.5
                assert out.holds(stored[1], rows)
                mount.rules()
                source.close()


@pytest.mark.parametrize("uring", [True, False])
def test_a_table_whose_reads_hang(mount: FaultyMount, stored: tuple[Path, Tensor], uring: bool) -> None:
    values, layout = stored[1], layout_at(mount.path)
    table = ValueTable.open(layout, "disk", 20 * layout.stride, allow_uring=uring, deadline=0.4)
    mount.rules(fault(layout, 100, "hang"), fault(layout, 50, "eio"))
    ids = torch.tensor([[1, 2], [100, 3], [4, 5], [50, 6]])
    with pytest.raises(RowReadError) as caught:
        table.weighted_sum(ids, torch.ones(4, 2))
    assert (caught.value.rows, caught.value.tokens) == ([50, 100], [1, 3])
    table.check_integrity()
    for batch in torch.arange(120, 180).split(12):  # more than the cache holds: slots change hands
        assert torch.equal(table.gather(batch), values[batch])
        table.check_integrity()
    mount.release()
    assert torch.equal(table.gather(torch.tensor([100, 50])), values[[100, 50]])
    assert torch.equal(table.gather(torch.arange(168, 180)), values[168:180])
    mount.rules(fault(layout, 100, "hang"))
    lookup = table.begin(torch.tensor([[300], [100]]))
    started = time.monotonic()
    lookup.close()  # waits for its reads, until they are given up
    table.close()
    assert time.monotonic() - started < 5
    assert table.stats().in_flight == 0


@pytest.mark.parametrize("uring", [True, False])
def test_warming_a_table_whose_reads_hang(
    mount: FaultyMount, stored: tuple[Path, Tensor], uring: bool
) -> None:
    """Somebody who only looks in without waiting still sees them given up."""
    values, layout = stored[1], layout_at(mount.path)
    table = ValueTable.open(layout, "disk", 20 * layout.stride, allow_uring=uring, deadline=0.3)
    mount.rules(fault(layout, 100, "hang"))
    table.start_warming(np.array([3, 100, 7]))
    until = time.monotonic() + 5
    while table.warm_some(0.0) and time.monotonic() < until:
        time.sleep(0.01)
    assert table.stats().warming_rows == 0
    assert table.stats().warmed_rows == 2
    table.check_integrity()
    mount.release()
    assert torch.equal(table.gather(torch.tensor([100, 3, 7])), values[[100, 3, 7]])
    table.close()


def test_a_file_system_that_goes_away(stored: tuple[Path, Tensor], tmp_path: Path) -> None:
    with faulty_mount(stored[0], tmp_path / "mount") as mount:
        layout = layout_at(mount.path)
        table = ValueTable.open(layout, "disk", 20 * layout.stride, deadline=20)
        table.gather(torch.arange(10))
    with pytest.raises(RowReadError) as caught:
        table.gather(torch.arange(100, 110))
    assert caught.value.rows == list(range(100, 110))
    assert torch.equal(table.gather(torch.arange(10)), stored[1][:10])  # cached rows outlive it
    table.check_integrity()
    table.close()


def read_whole(folder: Path, values: Tensor) -> set[str]:
    """Random batches of a table in every way of reading; the ways."""
    layout = layout_at(folder)
    ways = set()
    generator = torch.Generator().manual_seed(1)
    for uring, io in WAYS:
        table = ValueTable.open(layout, "disk", 30 * layout.stride, allow_uring=uring, io=io)
        for _ in range(10):
            ids = torch.randint(0, ROWS, (50,), generator=generator)
            assert torch.equal(table.gather(ids), values[ids])
        table.check_integrity()
        ways.add(table.stats().backend)
        table.close()
    return ways


def test_a_memory_file_system(stored: tuple[Path, Tensor]) -> None:
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        pytest.skip("a file system of its own is not available: no /dev/shm")
    folder = shared / f"memlane-faults-{os.getpid()}"
    shutil.copytree(stored[0], folder)
    try:
        assert {way.split("+")[0] for way in read_whole(folder, stored[1])} >= {"threads"}
    finally:
        shutil.rmtree(folder)


def test_an_ext4_of_its_own_that_is_full(stored: tuple[Path, Tensor], tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    maker = shutil.which("mkfs.ext4", path="/usr/sbin:/sbin:/usr/bin")
    if maker is None:
        pytest.skip("a file system of its own is not available: no mkfs.ext4")
    subprocess.run([maker, "-q", str(image)], check=True, capture_output=True)
    with mounted(tmp_path / "ext4", "-o", "loop", str(image)) as folder:
        shutil.copy(stored[0] / "table", folder)
        assert any(way.endswith("+buffered") for way in read_whole(folder, stored[1]))
        with pytest.raises(OSError, match="No space"):
            write_table(
                folder / "another", "values", 10_000, WIDTH, "float32",
                (torch.zeros(100, WIDTH) for _ in range(100)),
            )  # fmt: skip
        assert sorted(path.name for path in folder.iterdir()) == ["lost+found", "table"], "all or nothing"
        read_whole(folder, stored[1])
