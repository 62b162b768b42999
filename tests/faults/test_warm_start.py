"""Warm starts through a real server: what the last run knew is used, whatever ended it, and never at a price."""

from __future__ import annotations

import io
import logging
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import demo
import numpy as np
import pytest
import torch
from demo import PAGE, TABLE, Asked
from mounts import faulty_mount, mounted
from running import REAL, Server

from memlane.config import EngineConfig
from memlane.engine import Engine
from memlane.models.loading import TableOptions, load_model

DISK = ("--placement", "disk", "--threads", "1", "--row-cache", "25%")
SLOTS = 65_536 // 4
ROWS_A_TOKEN = 2 * 2 * 16  # layers, heads, rows of each


@pytest.fixture(scope="module")
def asked() -> Asked:
    return demo.ask([list(range(700, 720))], 8)[0]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return demo.copy_of_demo(tmp_path / "demo")


def metric(server: Server, name: str) -> float:
    return server.metric(f"memlane:{name}", table="values", tier="disk")


def misses_of(server: Server, asked: Asked) -> float:
    """Of a request, by rows asked for."""
    before = metric(server, "table_cache_misses_total")
    expected = metric(server, "table_rows_requested_total")
    expected += (len(asked.prompt) + len(asked.answer) - 1) * ROWS_A_TOKEN
    assert asked.is_answered_by(server)
    server.until(lambda: metric(server, "table_rows_requested_total") == expected)
    return metric(server, "table_cache_misses_total") - before


def states(cache: Path) -> list[Path]:
    return sorted((cache / "warm").iterdir())


def warnings(server: Server) -> list[str]:
    return [line for line in server.log.splitlines() if " WARNING " in line]


def test_what_the_last_run_knew(model: Path, asked: Asked, tmp_path: Path) -> None:
    with Server(model, *DISK, "--warm-start", "saved", command=REAL) as server:
        server.ready(60)
        assert metric(server, "table_warmed_rows_total") == 0
        assert misses_of(server, asked) >= len(asked.rows), "a cold cache misses each row at least once"
        assert server.terminate() == 0
    (state,) = states(tmp_path / "cache")
    assert set(np.load(state).tolist()) == asked.rows

    with Server(model, *DISK, "--warm-start", "saved", "--warm-wait", command=REAL) as server:
        server.ready(60)
        assert "warmed by what the cache held last time" in server.log
        assert metric(server, "table_warmed_rows_total") == len(asked.rows)
        assert metric(server, "table_warming_rows") == 0
        assert misses_of(server, asked) == 0
        assert server.terminate() == 0

    before = state.stat().st_mtime_ns
    engine = open_engine(model, warm_start="off", pin_rows="10%", warm_wait=True)
    stats = engine.model.tables["values"].stats()
    assert stats.pinned_slots == stats.used_slots == stats.warmed_rows == SLOTS // 10
    use(engine, asked)
    engine.close()
    assert [path.stat().st_mtime_ns for path in states(tmp_path / "cache")] == [before]

    flags = ("--warm-start", "hot-rows", "--pin-rows", "260KB", "--warm-wait")
    with Server(model, *DISK, *flags, command=REAL) as server:
        server.ready(60)
        assert "warmed by hot_rows" in server.log
        assert metric(server, "table_warmed_rows_total") == SLOTS == metric(server, "table_cache_used_slots")
        assert metric(server, "table_cache_pinned_slots") == 2000
        assert misses_of(server, asked) < len(asked.rows)
        assert warnings(server) == []
        assert server.terminate() == 0
    assert len(states(tmp_path / "cache")) == 1
    hot = np.load(model / "hot_rows.npy")[:2000]
    assert set(np.load(state)[:2000].tolist()) == set(hot.tolist()), "pinned rows are kept longest"


def test_killed_and_stopped_in_the_middle_of_a_warm_start(tmp_path: Path, model: Path, asked: Asked) -> None:
    """The table lies where reads can be made to hang; requests during that are answered, and right."""
    stored = tmp_path / "stored"
    stored.mkdir()
    (model / TABLE).rename(stored / TABLE)
    layout = demo.layout(stored)
    hang = {"begin": layout.offset + PAGE, "end": layout.offset + layout.nbytes, "do": "hang"}
    with faulty_mount(stored, tmp_path / "mount") as mount:
        (model / TABLE).symlink_to(mount.path / TABLE)
        engine = open_engine(model, warm_start="saved")
        use(engine, asked)
        engine.close()
        (state,) = states(tmp_path / "cache")
        saved = state.read_bytes()

        for end in (signal.SIGKILL, signal.SIGTERM):
            mount.rules(hang)
            with Server(model, *DISK, "--warm-start", "saved", command=REAL) as server:
                server.ready(60)
                server.until(lambda s=server: metric(s, "table_warming_rows") == len(asked.rows))
                assert mount.held > 0
                mount.rules()  # what hangs goes on hanging; other reads do not
                assert misses_of(server, asked) >= len(asked.rows) // 2
                assert metric(server, "table_warming_rows") > 0
                engine = server.engine_pid()
                server.process.send_signal(end)
                if end is signal.SIGTERM:
                    assert server.process.wait(20) == 0
                mount.release()  # a process cannot end while the kernel reads for it
                server.process.wait(20)
                server.until(lambda pid=engine: not Path(f"/proc/{pid}").exists())
            assert [path.name for path in states(tmp_path / "cache")] == [state.name]
            assert set(np.load(state).tolist()) == set(np.load(io.BytesIO(saved)).tolist())

        engine = open_engine(model, warm_start="saved", warm_wait=True)
        use(engine, asked)
        assert engine.model.tables["values"].stats().misses == 0
        engine.close()


def open_engine(model: Path, **options: object) -> Engine:
    return Engine(EngineConfig(model=str(model), placement="disk", threads=1, **options))  # type: ignore[arg-type]


def use(engine: Engine, asked: Asked) -> None:
    assert demo.answer(engine, asked.prompt, demo.greedy(max_tokens=len(asked.answer))) == asked.answer
    engine.check_integrity()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def npz(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, array)
    return file.getvalue()


GOOD = npy(np.arange(1000, dtype=np.uint32))
DAMAGED = {
    "empty": b"",
    "text": b"not rows\n" * 100,
    "cut": GOOD[:-1],
    "cut in its header": GOOD[:60],
    "longer": GOOD + b"\0\0\0\0",
    "another header": GOOD.replace(b"1000", b"9999"),
    "a header that asks for all memory": GOOD.replace(b"(1000,)", b"(1<<59,)"),
    "an unfinished header": GOOD.replace(b"(1000,)", b"((((((("),
    "another type": npy(np.arange(1000, dtype=np.int64)),
    "a matrix": npy(np.arange(1000, dtype=np.uint32).reshape(10, 100)),
    "rows that the table lacks": npy(np.array([65_536], np.uint32)),
    "several arrays": npz(np.arange(1000, dtype=np.uint32)),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_state_is_as_good_as_none(
    tmp_path: Path, asked: Asked, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    engine = open_engine(demo.DEMO)
    use(engine, asked)
    engine.close()
    (state,) = states(tmp_path / "cache")
    state.write_bytes(content)
    caplog.clear()
    engine = open_engine(demo.DEMO)
    assert [str(state) in record.message for record in caplog.records if record.levelno > logging.INFO] == [
        True
    ]
    assert engine.model.tables["values"].stats().warming_rows > 1000, "hot_rows.npy takes its place"
    use(engine, asked)
    engine.close()
    assert np.load(state).dtype == np.uint32, "the next state replaces it"


def no_such_place(path: Path) -> None:
    path.parent.mkdir()
    path.symlink_to("/proc/memlane")


def a_file(path: Path) -> None:
    path.parent.mkdir()
    path.write_text("in the way")


@pytest.mark.parametrize("make", [no_such_place, a_file])
def test_a_state_that_cannot_be_written(
    tmp_path: Path,
    asked: Asked,
    make: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    make(tmp_path / "cache" / "warm")
    engine = open_engine(demo.DEMO, warm_start="hot-rows")
    use(engine, asked)
    engine.close()
    (warning,) = [record for record in caplog.records if record.levelno > logging.INFO]
    assert "is not saved" in warning.message


def test_a_full_disk(tmp_path: Path, model: Path, asked: Asked) -> None:
    with (
        mounted(tmp_path / "cache", "-t", "tmpfs", "-o", "size=16k", "none") as cache,
        Server(model, *DISK, "--warm-wait", command=REAL) as server,
    ):
        server.ready(60)
        misses_of(server, asked)
        assert server.terminate() == 0
        (warning,) = warnings(server)
        assert "No space left on device" in warning
        assert states(cache) == [], "no part of a state is left behind"


def test_the_state_belongs_to_the_file_that_was_served(tmp_path: Path, model: Path, asked: Asked) -> None:
    engine = open_engine(model)
    other = model / "other"
    shutil.copy(model / TABLE, other)
    os.utime(other, (1, 1))
    other.replace(model / TABLE)
    use(engine, asked)
    engine.close()
    assert len(states(tmp_path / "cache")) == 1
    engine = open_engine(model, warm_start="saved")
    assert engine.model.tables["values"].stats().warming_rows == 0, "another file has a state of its own"
    engine.close()


def test_what_a_gpu_was_warmed_up_with_replaces_no_state(tmp_path: Path, model: Path, asked: Asked) -> None:
    """Stopped before anybody asked for anything, it leaves what the last run knew."""
    engine = open_engine(model)
    use(engine, asked)
    engine.close()
    (state,) = states(tmp_path / "cache")
    before = state.stat().st_mtime_ns
    loaded = load_model(model, tables=TableOptions(placement="disk", cache_bytes=1 << 20))
    loaded.tables["values"].gather(torch.arange(9))
    assert loaded.tables["values"].stats().calls == 1
    Engine(EngineConfig(model=str(model), placement="disk", warm_start="saved"), loaded).close()
    assert state.stat().st_mtime_ns == before
