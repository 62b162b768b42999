"""Whole tables in host memory: as stored or padded, a process's own or shared; pinned piece by piece."""

from __future__ import annotations

import logging
import os
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from memlane.kernels.row_memory import device_stride
from memlane.native import Arena
from memlane.tables import RowFormat, RowReadError, TableError, TableLayout, ValueTable
from memlane.tables.host_rows import HostRows
from memlane.tables.pinning import PinnedRange
from memlane.tables.progress import Progress, in_words
from memlane.tables.shared_memory import SharedMemory
from memlane.tables.source import FileSource

PAGE = 4096


def stored(layout: TableLayout) -> np.ndarray:
    """The rows as they lie in the file."""
    content = layout.path.read_bytes()[layout.offset : layout.offset + layout.nbytes]
    return np.frombuffer(content, np.uint8).reshape(layout.rows, layout.stride)


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name.startswith("memlane-"))


@pytest.fixture
def shm(tmp_path: Path) -> Path:
    """An ordinary folder does for what is not about memory running out."""
    (tmp_path / "shm").mkdir()
    return tmp_path / "shm"


def some_memory(directory: Path) -> SharedMemory:
    """Three pages and a bit, all sevens, unless something else is found."""
    return SharedMemory("key", 3 * PAGE + 5, lambda arena: arena.array().fill(7), "memory", directory)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("piece", [700, 1 << 20])
@pytest.mark.parametrize("dtype", list(RowFormat))
def test_holds_the_bytes_of_the_file(
    make_table: Any, shm: Path, dtype: RowFormat, piece: int, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "memlane.tables.host_rows._LOAD_BYTES", piece
    )  # the first: many pieces, the last short
    layout, _ = make_table(rows=301, width=50, dtype=dtype)
    source = FileSource(layout)
    for stride in (layout.stride, device_stride(layout.stride), device_stride(layout.stride) + 48):
        with HostRows(layout, source, stride=stride, shared=shared, directory=shm) as rows:
            data, row_format, width = rows.memory
            assert (data.shape, data.dtype) == ((301, stride), torch.uint8)
            assert (row_format, width, rows.nbytes) == (dtype.value, 50, 301 * stride)
            np.testing.assert_array_equal(data[:, : layout.stride].numpy(), stored(layout))
            assert not data[:, layout.stride :].any()
            assert rows.shared == shared
            assert bool(files(shm)) == shared
        assert not files(shm)
        np.testing.assert_array_equal(data[:, : layout.stride].numpy(), stored(layout))  # outlives the close


def test_an_empty_table_and_strides_that_are_too_short(make_table: Any, shm: Path) -> None:
    save_file({"values": torch.empty(0, 8)}, shm / "table")
    layout = TableLayout.from_safetensors(shm / "table", "values")
    for stride in (32, 48):
        with HostRows(layout, FileSource(layout), stride=stride, shared=True, directory=shm) as rows:
            assert rows.memory.data.shape == (0, stride)
            rows.pin(register=lambda address, nbytes: 1)  # nothing to be pinned
    layout, _ = make_table(rows=5, width=8)
    with pytest.raises(ValueError, match="do not fit"):
        HostRows(layout, FileSource(layout), stride=16)


@pytest.mark.parametrize("padded", [False, True])
def test_damage_is_found_while_loading(make_table: Any, shm: Path, padded: bool) -> None:
    layout, _ = make_table(rows=500, width=64, dtype="int8")
    with layout.path.open("r+b") as file:
        file.seek(layout.offset + 300 * layout.stride)
        file.write(b"\x55\xaa")
    stride = device_stride(layout.stride) if padded else None
    with pytest.raises(RowReadError, match="checksum") as caught:
        HostRows(layout, FileSource(layout), stride=stride, shared=True, directory=shm)
    assert 300 in caught.value.rows
    assert not files(shm)  # it would hold memory for nothing


def test_users_of_one_process_share_too_and_the_last_removes(make_table: Any, shm: Path) -> None:
    layout, _ = make_table(rows=50, width=8)
    source = FileSource(layout)
    first = HostRows(layout, source, shared=True, directory=shm)
    reads = source.reads
    second = HostRows(layout, source, shared=True, directory=shm)
    assert (first.loaded, second.loaded, source.reads) == (True, False, reads)
    first.memory.data[3, 0] ^= 1
    assert torch.equal(first.memory.data, second.memory.data)
    assert files(shm)[0].startswith(f"memlane-{os.geteuid()}-")
    first.close()
    first.close()
    assert files(shm)
    del second  # forgotten, not closed
    assert not files(shm)


def test_what_bytes_depend_on_names_the_memory(make_table: Any, shm: Path) -> None:
    layout, _ = make_table(rows=50, width=8)
    opened = [HostRows(layout, FileSource(layout), shared=True, directory=shm)]
    link = layout.path.with_name("link")
    link.symlink_to(layout.path)
    same = TableLayout.from_safetensors(link, "values")
    opened.append(HostRows(same, FileSource(same), shared=True, directory=shm))
    assert len(files(shm)) == 1
    opened.append(HostRows(layout, FileSource(layout), stride=48, shared=True, directory=shm))
    assert len(files(shm)) == 2
    opened.append(HostRows(layout, FileSource(layout, verify=False), shared=True, directory=shm))
    assert len(files(shm)) == 3
    status = layout.path.stat()
    os.utime(layout.path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    opened.append(HostRows(layout, FileSource(layout), shared=True, directory=shm))
    assert len(files(shm)) == 4
    for rows in opened:
        rows.close()
    assert not files(shm)


def test_a_file_that_changes_while_it_is_read(
    make_table: Any, shm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, _ = make_table(rows=50, width=8)
    source = FileSource(layout)

    def start(*arguments: Any) -> Any:
        os.utime(layout.path, ns=(0, 0))
        return FileSource.start(source, *arguments)

    monkeypatch.setattr(source, "start", start)
    with pytest.raises(TableError, match="changed while it was read"):
        HostRows(layout, source, shared=True, directory=shm)
    assert not files(shm)


def test_files_of_others_are_refused(make_table: Any, shm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with some_memory(shm) as memory:
        path = memory.path
    path.symlink_to("/etc/passwd")
    with pytest.raises(TableError, match="symbolic"):
        some_memory(shm)
    path.unlink()
    path.write_bytes(b"")
    status = os.fstat

    def of_another(opened: int) -> os.stat_result:
        found = list(status(opened))
        found[4] += 1
        return os.stat_result(found)

    monkeypatch.setattr(os, "fstat", of_another)
    with pytest.raises(TableError, match="somebody else"):
        some_memory(shm)
    assert path.exists()


@pytest.mark.parametrize("damage", ["no mark", "too short", "too long", "empty"])
def test_what_is_not_whole_is_filled_again(shm: Path, damage: str) -> None:
    with some_memory(shm) as memory:
        left = memory.path.read_bytes()
        path = memory.path
    size = len(left)
    assert size == 5 * PAGE
    left = b"\x55" * (size - PAGE) + left[size - PAGE :]
    left = {
        "no mark": left[:-PAGE] + bytes(PAGE),
        "too short": left[:-1],
        "too long": left + b"0",
        "empty": b"",
    }[damage]
    path.write_bytes(left)
    with some_memory(shm) as memory:
        assert memory.filled
        assert memory.arena.nbytes == 3 * PAGE + 5
        assert (memory.arena.array() == 7).all()


def test_what_is_whole_is_used_at_once(shm: Path) -> None:
    with some_memory(shm) as memory:
        left, path = memory.path.read_bytes(), memory.path
    path.write_bytes(b"\x08" * 3 * PAGE + left[3 * PAGE :])  # as after a crash
    with some_memory(shm) as memory:
        assert not memory.filled
        assert (memory.arena.array()[: 3 * PAGE] == 8).all()
    assert not files(shm)


def test_removed_by_hand_while_in_use(shm: Path) -> None:
    with some_memory(shm) as memory:
        memory.path.unlink()
        with some_memory(shm) as other:
            assert other.filled
            memory.close()
            assert files(shm) == [other.path.name]
        assert not files(shm)


@pytest.mark.parametrize("row_format", [RowFormat.BFLOAT16, RowFormat.INT4])
def test_tables_on_the_host_do_not_depend_on_whose_memory_it_is(
    make_table: Any, shm: Path, row_format: RowFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memlane.tables.host_rows.HostRows.__init__.__kwdefaults__", {
        **HostRows.__init__.__kwdefaults__, "directory": shm})  # fmt: skip
    layout, _ = make_table(rows=400, width=24, dtype=row_format)
    own, first = ValueTable.open(layout, "host"), ValueTable.open(layout, "host", shared=True)
    second = ValueTable.open(layout, "host", shared=True)
    assert len(files(shm)) == 1
    assert first.stats().bytes_read == own.stats().bytes_read
    assert second.stats().bytes_read == 0
    g = torch.Generator().manual_seed(0)
    for tokens, k in [(1, 1), (5, 30), (0, 3)]:
        ids, weights = torch.randint(0, 400, (tokens, k), generator=g), torch.randn(tokens, k, generator=g)
        expected = own.weighted_sum(ids, weights)
        assert torch.equal(first.weighted_sum(ids, weights), expected)
        assert torch.equal(second.weighted_sum(ids, weights), expected)
    first.close()
    first.close()
    assert torch.equal(second.gather(torch.arange(400)), own.gather(torch.arange(400)))
    second.close()
    assert not files(shm)
    with pytest.raises(TableError, match="closed"):
        first.gather(torch.arange(4))


class Cuda:
    """Stands for CUDA: which pages are registered; refuses the piece with number `refuse`."""

    def __init__(self, refuse: int | None = None, code: int = 2) -> None:
        self.calls: list[tuple[int, int]] = []
        self.registered: dict[int, int] = {}
        self._refuse, self._code = refuse, code

    def register(self, address: int, nbytes: int) -> int:
        assert address % PAGE == 0
        assert nbytes % PAGE == 0
        assert all(address >= b + n or b >= address + nbytes for b, n in self.registered.items())
        self.calls.append((address, nbytes))
        if len(self.calls) - 1 == self._refuse:
            return self._code
        self.registered[address] = nbytes
        return 0

    def unregister(self, address: int) -> int:
        return 0 if self.registered.pop(address, None) else 713


@pytest.mark.parametrize("nbytes", [0, 1, PAGE, 3 * PAGE, 3 * PAGE + 1, 10 * PAGE - 1])
def test_pins_every_page_once(nbytes: int) -> None:
    arena, cuda = Arena(nbytes), Cuda()
    with PinnedRange.of_arena(
        arena, register=cuda.register, unregister=cuda.unregister, piece_bytes=3 * PAGE
    ) as pinned:
        address = arena.array().ctypes.data if nbytes else 0
        pages = -(-nbytes // PAGE)
        expected = [(address + i * PAGE, min(3, pages - i) * PAGE) for i in range(0, pages, 3)]
        assert cuda.calls == expected
        assert (pinned.nbytes, pinned.pieces) == (nbytes, len(expected))
        assert dict(expected) == cuda.registered
    assert not cuda.registered
    pinned.close()
    assert pinned.pieces == 0


def test_pinned_memory_is_unpinned_before_it_goes(make_table: Any, shm: Path) -> None:
    layout, _ = make_table(rows=600, width=64)
    for shared in (False, True):
        cuda = Cuda()
        rows = HostRows(layout, FileSource(layout), shared=shared, directory=shm)
        rows.pin(register=cuda.register, unregister=cuda.unregister, piece_bytes=4 * PAGE)
        rows.pin(register=cuda.register, unregister=cuda.unregister)  # again: nothing
        assert rows.pinned
        assert sum(cuda.registered.values()) == -(-rows.nbytes // PAGE) * PAGE
        assert min(cuda.registered) == rows.memory.data.data_ptr()
        rows.close()
        assert not rows.pinned
        assert not cuda.registered
    cuda = Cuda()
    forgotten = PinnedRange.of_arena(Arena(PAGE), register=cuda.register, unregister=cuda.unregister)
    assert cuda.registered
    del forgotten
    assert not cuda.registered


def test_the_row_cache_of_a_table_on_disk_can_be_pinned(make_table: Any) -> None:
    layout, values = make_table(rows=600, width=64)
    table = ValueTable.open(layout, "disk", 100 * layout.stride)
    assert table.cache is not None
    cuda = Cuda()
    with PinnedRange.of_arena(
        table.cache.memory.arena, register=cuda.register, unregister=cuda.unregister
    ) as pinned:
        assert pinned.nbytes >= 100 * layout.stride
        assert torch.equal(table.gather(torch.arange(600)), values)
        assert list(cuda.registered) == [pinned.address]
    table.close()


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ((8 << 20, 16 << 20), "ulimit -l 8.0 MiB, at most 16.0 MiB"),
        ((PAGE, resource.RLIM_INFINITY), "ulimit -l 4.0 KiB, at most unlimited"),
        ((resource.RLIM_INFINITY, resource.RLIM_INFINITY), "not in the way (ulimit -l unlimited"),
    ],
)
def test_a_refusal_says_what_to_raise(
    limit: tuple[int, int], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: limit)
    arena = Arena(24 << 20)
    for refuse in (0, 1, 2):
        cuda = Cuda(refuse=refuse)
        with pytest.raises(TableError) as caught:
            PinnedRange.of_arena(
                arena, what="table values", register=cuda.register, unregister=cuda.unregister,
                piece_bytes=10 << 20,
            )  # fmt: skip
        assert not cuda.registered
        assert len(cuda.calls) == refuse + 1
        text = str(caught.value)
        assert says in text
        assert f"after {in_words(refuse * (10 << 20))} of 24.0 MiB: cudaErrorMemoryAllocation (2)" in text
        assert ("memlock=-1" in text) == ("not in the way" not in text)
    with pytest.raises(ValueError, match="multiples"):
        PinnedRange(arena.array().ctypes.data + 8, 100, register=cuda.register, unregister=cuda.unregister)


def test_memory_that_cannot_be_unpinned_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    cuda = Cuda()
    pinned = PinnedRange.of_arena(
        Arena(3 * PAGE), register=cuda.register, unregister=cuda.unregister, piece_bytes=PAGE
    )
    cuda.registered.pop(pinned.address + PAGE)
    pinned.close()
    assert not cuda.registered  # the others are
    assert "cudaErrorHostMemoryNotRegistered (713)" in caplog.text


def test_progress_says_how_far_and_how_long(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("memlane.tables.progress.time.monotonic", lambda: now)
    caplog.set_level(logging.INFO)
    progress = Progress("table values", "loaded", 10 << 30, interval=5)
    for _ in range(10):
        now += 2
        progress.advance(1 << 30)
    progress.finish()
    assert [record.message for record in caplog.records] == [
        "table values: 3.0 GiB of 10.0 GiB (30 %) loaded, 0.54 GB/s, 14 s left",
        "table values: 6.0 GiB of 10.0 GiB (60 %) loaded, 0.54 GB/s, 8 s left",
        "table values: 9.0 GiB of 10.0 GiB (90 %) loaded, 0.54 GB/s, 2 s left",
        "table values: 10.0 GiB loaded in 20.00 s (0.54 GB/s)",
    ]
