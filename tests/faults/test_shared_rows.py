"""Processes that share a table in memory: killed while loading, all starting at once, out of room. All of it is real."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from mounts import mounted
from sharing import PIECES, STRIDE, User, digest

import memlane
from memlane import LLM, SamplingParams
from memlane.tables import TableError, TableLayout, write_table
from memlane.tables.host_rows import HostRows
from memlane.tables.shared_memory import SHM, SharedMemory
from memlane.tables.source import FileSource

ROWS, WIDTH = 3000, 64

Start = Callable[..., User]


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> TableLayout:
    values = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    return write_table(
        tmp_path_factory.mktemp("stored") / "table", "values", ROWS, WIDTH, "float32", [values]
    )


@pytest.fixture
def shm(tmp_path: Path) -> Path:
    (tmp_path / "shm").mkdir()
    return tmp_path / "shm"


@pytest.fixture
def start(layout: TableLayout, shm: Path) -> Iterator[Start]:
    users: list[User] = []

    def begin(directory: Path = shm) -> User:
        users.append(User(layout, directory))
        return users[-1]

    yield begin
    for user in users:
        user.kill()


def left(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()]


def test_many_at_once_load_one_copy(start: Start, shm: Path, layout: TableLayout) -> None:
    users = [start() for _ in range(5)]
    said: dict[int, Any] = {}

    def drive(number: int) -> None:
        said[number] = users[number].outcome()

    drivers = [Thread(target=drive, args=(number,)) for number in range(5)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert sorted(word for word, _ in said.values()) == ["found"] * 4 + ["loaded"]
    assert {content for _, content in said.values()} == {digest(layout)}
    assert len(left(shm)) == 1
    for user in users:
        assert len(left(shm)) == 1
        user.close()
    assert not left(shm)


def test_a_loader_killed_in_the_middle(start: Start, shm: Path, layout: TableLayout) -> None:
    first = start()
    first.load(PIECES // 2)
    others = [start() for _ in range(3)]
    assert all(user.is_quiet() for user in others)  # they wait
    first.kill()
    said: dict[int, Any] = {}
    drivers = [Thread(target=lambda n=n: said.update({n: others[n].outcome()})) for n in range(3)]  # type: ignore[misc]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join()
    assert sorted(word for word, _ in said.values()) == ["found", "found", "loaded"]
    assert {content for _, content in said.values()} == {digest(layout)}
    for user in others:
        user.close()
    assert not left(shm)


def test_a_loader_that_fails_leaves_it_to_the_next(start: Start, shm: Path, layout: TableLayout) -> None:
    first = start()
    first.load(3)
    other = start()
    assert other.is_quiet()
    assert first.hear() == "piece"
    first.pipe.send(False)
    assert other.outcome() == ("loaded", digest(layout))
    other.close()
    assert not left(shm)


def test_what_a_crash_leaves(start: Start, shm: Path, layout: TableLayout) -> None:
    half = start()
    half.load(4)
    half.kill()
    assert len(left(shm)) == 1
    whole = start()
    assert whole.outcome() == ("loaded", digest(layout))  # what was half there is not used
    whole.kill()
    assert len(left(shm)) == 1
    again = start()
    assert again.hear() == ("found", digest(layout))  # what was whole is, and nothing is read
    again.close()
    assert not left(shm)


def test_a_forked_child_takes_nothing_along(start: Start, shm: Path, layout: TableLayout) -> None:
    parent = start()
    assert parent.outcome()[0] == "loaded"
    parent.pipe.send("fork")
    assert parent.hear() == 0
    assert len(left(shm)) == 1
    other = start()
    assert other.outcome() == ("found", digest(layout))
    parent.close()
    assert len(left(shm)) == 1
    other.close()
    assert not left(shm)


def test_the_end_of_a_process_closes(shm: Path) -> None:
    code = f"""
from pathlib import Path
from memlane.tables.shared_memory import SHM, SharedMemory
memory = SharedMemory("key", 10, lambda arena: None, "memory", Path({str(shm)!r}))
assert memory.path.exists()
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
    assert not left(shm)


@pytest.mark.parametrize("seed", range(3))
def test_users_that_come_and_go(start: Start, shm: Path, layout: TableLayout, seed: int) -> None:
    """Beginnings, ends and kills in any order: whoever sees the table sees it whole, and nothing is left at the end."""
    rng, expected = random.Random(seed), digest(layout)
    loading: list[User] = []
    using: list[User] = []
    for _ in range(60):
        what = rng.choice(["start", "go on", "go on", "go on", "kill", "close"])
        if what == "start" and len(loading) + len(using) < 5:
            loading.append(start())
        elif what == "go on" and loading:
            user = rng.choice(loading)
            if user.is_quiet(0.01):
                continue
            said = user.hear()
            if said == "piece":
                user.pipe.send(True)
            else:
                assert said[1] == expected
                loading.remove(user)
                using.append(user)
        elif what == "kill" and loading + using:
            user = rng.choice(loading + using)
            user.kill()
            (loading if user in loading else using).remove(user)
        elif what == "close" and using:
            using.pop(rng.randrange(len(using))).close()
    for user in loading:  # only what loads or waits is left, and closing it all leaves nothing
        user.kill()
    for user in using:
        user.close()
    last = start()
    assert last.outcome()[1] == expected
    last.close()
    assert not left(shm)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """1 MiB of memory as a file system; the table takes 0.8."""
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=1m,huge=never", "none") as path:
        yield path


def test_no_room(start: Start, small: Path, layout: TableLayout) -> None:
    (small / "something").write_bytes(bytes(512 << 10))
    said = start(small).outcome()
    assert "table values: 804.0 KiB of shared memory are needed" in said
    assert f"{small} has 512.0 KiB free of 1.0 MiB" in said
    assert "--shm-size" in said
    assert left(small) == ["something"]
    (small / "something").unlink()
    user = start(small)
    assert user.outcome() == ("loaded", digest(layout))
    user.close()


def test_room_that_somebody_else_takes_meanwhile(
    layout: TableLayout, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look at what is free does not hold it: the file system's own refusal must be heard, before rows are written."""
    (small / "something").write_bytes(bytes(512 << 10))
    monkeypatch.setattr(SharedMemory, "_free", lambda self: 1 << 30)
    source = FileSource(layout)
    with pytest.raises(TableError, match="shm-size"):
        HostRows(layout, source, stride=STRIDE, shared=True, directory=small)
    assert source.reads == 0
    assert left(small) == ["something"]


def test_what_nobody_uses_makes_room(start: Start, layout: TableLayout, small: Path) -> None:
    crashed = start(small)
    assert crashed.outcome()[0] == "loaded"
    crashed.kill()
    old = left(small)
    status = layout.path.stat()
    os.utime(
        layout.path, ns=(status.st_atime_ns, status.st_mtime_ns + 1000)
    )  # another table to all appearances
    user = start(small)
    assert user.outcome() == ("loaded", digest(layout))
    in_use = left(small)
    assert len(in_use) == 1
    assert in_use != old
    os.utime(layout.path, ns=(status.st_atime_ns, status.st_mtime_ns + 2000))
    assert "shm-size" in start(small).outcome()
    assert left(small) == in_use
    user.close()
    assert not left(small)


def test_two_models_share_their_tables(tmp_path: Path) -> None:
    """The option reaches the tables; in the machine's own /dev/shm."""
    demo = shutil.copytree(Path(memlane.__file__).parent / "demo", tmp_path / "demo")
    before = set(left(SHM))
    with (
        LLM(demo, placement="host", shared_tables=True) as first,
        LLM(demo, placement="host", shared_tables=True) as second,
    ):
        (new,) = set(left(SHM)) - before
        assert new.startswith(f"memlane-{os.geteuid()}-")
        params = SamplingParams(temperature=0, max_tokens=16)
        answers = [m.generate(["What is U+2603?"], params, use_tqdm=False) for m in (first, second)]
        assert [a[0].outputs[0].text for a in answers] == ["SNOWMAN"] * 2
    assert set(left(SHM)) == before
