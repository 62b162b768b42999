"""The engine process: its loop over a socket with a tiny model, and the real process from its start to its end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import tiny
import zmq
from tiny import greedy, greedy_naive, prompt, request, tokens

from memlane import worker
from memlane.checkpoints import convert
from memlane.config import EngineConfig
from memlane.engine import Engine
from memlane.errors import ErrorKind
from memlane.ipc import (
    Abort,
    Add,
    Deltas,
    Drain,
    Fatal,
    FromEngine,
    Ready,
    Stats,
    ToEngine,
    decode_from_engine,
    encode,
)
from memlane.request import FinishReason, TokenDelta
from memlane.worker import Worker

DATA = Path(__file__).parents[1] / "data" / "lingua" / "a_memplus"


class Parent:
    """The HTTP side's end of the socket."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self.socket = context.socket(zmq.PAIR)
        self.socket.linger = 0
        self.socket.bind(address)

    def send(self, *messages: ToEngine) -> None:
        for message in messages:
            self.socket.send(encode(message))

    def receive(self, seconds: float = 10) -> FromEngine:
        assert self.socket.poll(int(1000 * seconds)), f"the engine was silent for {seconds} s"
        return decode_from_engine(self.socket.recv())

    def until(self, wanted: Callable[[FromEngine], bool], seconds: float = 30) -> FromEngine:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            message = self.receive(seconds)
            if wanted(message):
                return message
        raise AssertionError("what was waited for did not come")

    def answers(self, count: int) -> dict[str, list[TokenDelta]]:
        """Deltas by request until `count` requests have ended."""
        found: dict[str, list[TokenDelta]] = {}
        while sum(deltas[-1].finish_reason is not None for deltas in found.values()) < count:
            message = self.receive()
            if isinstance(message, Deltas):
                for delta in message.deltas:
                    found.setdefault(delta.request_id, []).append(delta)
        return found


class InThread:
    """A worker over `engine` in a thread, and its parent."""

    def __init__(self, engine: Engine) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.parent = Parent(context, "inproc://engine")
        self.status: int | None = None
        self._thread = threading.Thread(target=self._run, args=(engine, context))
        self._thread.start()
        assert isinstance(self.parent.receive(), Ready)

    def _run(self, engine: Engine, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        socket = context.socket(zmq.PAIR)
        socket.connect("inproc://engine")
        self.status = Worker(engine, socket).run()
        socket.close()

    def join(self) -> int | None:
        self._thread.join(10)
        assert not self._thread.is_alive()
        return self.status


@contextmanager
def running(engine: Engine) -> Iterator[InThread]:
    """Drains it at the end, and expects that to work."""
    it = InThread(engine)
    try:
        yield it
    finally:
        it.parent.send(Drain())
        assert it.join() == 0
        it.parent.socket.close()


def failure(delta: TokenDelta) -> ErrorKind:
    assert delta.finish_reason is FinishReason.ERROR
    assert delta.failure is not None
    return delta.failure.kind


@pytest.mark.parametrize("lookahead", [False, True])
def test_answers_and_stats_while_it_answers(lookahead: bool) -> None:
    with running(tiny.engine(lookahead=lookahead)) as it:
        it.parent.send(*(request(f"{i}", prompt(9, i)) for i in range(3)))
        found = it.parent.answers(3)
        for i in range(3):
            assert tokens(found[f"{i}"]) == greedy_naive(prompt(9, i), 12)
        stats = it.parent.until(lambda m: isinstance(m, Stats) and m.generation_tokens == 36)
        assert isinstance(stats, Stats)
        assert stats.prompt_tokens == 27


@pytest.mark.parametrize("lookahead", [False, True])
def test_step_tokens_are_told_once(lookahead: bool) -> None:
    with running(tiny.engine(lookahead=lookahead)) as it:
        it.parent.send(request("a", prompt(9)))
        told: list[int] = []
        while sum(told) < 9 + 11:
            message = it.parent.receive()
            if isinstance(message, Stats):
                told += message.step_tokens
        assert told == [9] + [1] * 11


def test_refused_requests_get_an_answer() -> None:
    with running(tiny.engine()) as it:
        it.parent.send(request("empty", []), request("good", prompt(3)))
        found = it.parent.answers(2)
        assert failure(found["empty"][-1]) is ErrorKind.INVALID_REQUEST
        assert found["good"][-1].finish_reason is FinishReason.LENGTH


def test_abort() -> None:
    e = tiny.engine()
    with running(e) as it:
        it.parent.send(request("a", prompt(3), greedy(max_tokens=None)), Abort(["a", "unknown"]))
        assert it.parent.answers(1)["a"][-1].finish_reason is FinishReason.ABORT
    e.check_integrity()


def test_drain_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    it = InThread(tiny.engine())
    it.parent.send(request("a", prompt(3)), Drain(), request("late", prompt(3)))
    found = it.parent.answers(2)
    assert tokens(found["a"]) == greedy_naive(prompt(3), 12)
    assert failure(found["late"][-1]) is ErrorKind.NOT_READY
    assert it.join() == 0


def test_idle_engines_say_once_a_second_that_they_live() -> None:
    with running(tiny.engine()) as it:
        for _ in range(3):
            assert isinstance(it.parent.receive(1.5), Stats)


def test_stats_come_ten_times_a_second_while_requests_run(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = Engine(EngineConfig(model=str(model), placement="disk", row_cache="4KiB"))
    step = e.step
    monkeypatch.setattr(e, "step", lambda: time.sleep(0.02) or step())
    with running(e) as it:
        it.parent.send(request("a", [1, 2, 3], greedy(max_tokens=60)))
        begun = time.monotonic()
        during: list[Stats] = []
        ended = False
        while not ended:
            message = it.parent.receive(1.0)
            if isinstance(message, Deltas):
                ended = message.deltas[-1].finish_reason is not None
            elif isinstance(message, Stats) and message.running:
                during.append(message)
        seconds = time.monotonic() - begun
        assert 3 <= len(during) <= 11 * seconds + 1, "each costs the HTTP side a little"
        for counter in ("requested_rows", "hits", "misses", "bytes_read"):
            counts = [stats.tables[0].counters[counter] for stats in during]
            assert counts == sorted(counts)
            assert counts[0] < counts[len(counts) // 2] < counts[-1], f"{counter} did not grow meanwhile"
    e.close()


def test_a_long_step_shows_its_age(monkeypatch: pytest.MonkeyPatch) -> None:
    e = tiny.engine()
    step, release = e.step, threading.Event()
    monkeypatch.setattr(e, "step", lambda: step() if release.wait(60) else [])
    with running(e) as it:
        it.parent.send(request("a", prompt(3)))
        for age in (0.2, 0.5):
            it.parent.until(lambda m, age=age: isinstance(m, Stats) and m.step_seconds > age, 10)
        release.set()
        assert tokens(it.parent.answers(1)["a"]) == greedy_naive(prompt(3), 12)


def fail_once(e: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the third step break in the middle."""
    run, calls = e.runner.run, iter(range(1000))

    def broken(*args: object, **options: object) -> object:
        if next(calls) == 2:
            raise ZeroDivisionError
        return run(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(e.runner, "run", broken)


def test_an_unforeseen_error_fails_what_was_in_flight_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    e = tiny.engine(max_num_seqs=2)
    fail_once(e, monkeypatch)
    with running(e) as it:
        it.parent.send(*(request(f"{i}", prompt(9, i)) for i in range(3)))
        found = it.parent.answers(3)
        assert [failure(found[f"{i}"][-1]) for i in range(3)] == [ErrorKind.INTERNAL] * 3
        it.parent.send(request("next", prompt(9)))
        assert tokens(it.parent.answers(1)["next"]) == greedy_naive(prompt(9), 12)


def test_an_engine_whose_books_are_wrong_says_so_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    e = tiny.engine()
    fail_once(e, monkeypatch)
    monkeypatch.setattr(e, "check_integrity", lambda: 1 / 0)
    it = InThread(e)
    it.parent.send(request("a", prompt(9)))
    assert failure(it.parent.answers(1)["a"][-1]) is ErrorKind.INTERNAL
    it.parent.until(lambda m: isinstance(m, Fatal))
    assert it.join() == 1


# The real process.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(DATA, tmp_path_factory.mktemp("worker") / "model", progress=False)


@pytest.fixture
def address() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="ml-")  # socket paths must be short
    yield f"ipc://{folder}/engine"
    shutil.rmtree(folder)


START = """
import subprocess, sys
p = subprocess.Popen([sys.executable, "-m", "memlane.worker", sys.argv[1]], stdin=subprocess.PIPE)
p.stdin.write(sys.argv[2].encode() + b"\\n"); p.stdin.flush()
print(p.pid, flush=True); p.wait()
"""


def start(address: str, config: EngineConfig) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, "-m", "memlane.worker", address], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(config) + b"\n")
    process.stdin.flush()
    return process


def test_life_of_a_process(model: Path, address: str) -> None:
    parent = Parent(zmq.Context(), address)
    process = start(address, EngineConfig(model=str(model), placement="disk", row_cache="4KiB"))
    ready = parent.receive(60)
    assert isinstance(ready, Ready)
    assert (Path(ready.model_directory), ready.vocab_size, ready.max_model_len) == (model, 300, 64)
    assert ready.resident_bytes > 0
    parent.send(Add(request_id="a", prompt_token_ids=[1, 2, 3], params=greedy(max_tokens=30)))
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    assert len(tokens(parent.answers(1)["a"])) == 30
    stats = parent.until(lambda m: isinstance(m, Stats) and m.generation_tokens == 30)
    assert isinstance(stats, Stats)
    assert stats.tables[0].tier == "disk"
    assert stats.tables[0].counters["bytes_read"] > 0
    parent.send(Drain())
    assert process.wait(10) == 0


def test_a_corrupt_checkpoint_is_fatal_and_named(model: Path, address: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    table = broken / "table-values.safetensors"
    os.truncate(table, table.stat().st_size // 2)
    parent = Parent(zmq.Context(), address)
    process = start(address, EngineConfig(model=str(broken)))
    fatal = parent.receive(60)
    assert isinstance(fatal, Fatal)
    assert str(table) in fatal.message
    assert process.wait(10) == 1


def test_a_frame_that_is_no_message_is_fatal(model: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    parent = Parent(context, "inproc://engine")
    socket = context.socket(zmq.PAIR)
    socket.connect("inproc://engine")
    parent.socket.send(b"hello")
    assert worker._serve(msgspec.json.encode(EngineConfig(model=str(model))).decode(), socket) == 1
    fatal = parent.until(lambda m: isinstance(m, Fatal))
    assert isinstance(fatal, Fatal)
    assert fatal.message.startswith("the engine ends: ValidationError: ")
    socket.close()
    parent.socket.close()


@pytest.mark.parametrize("config", ['{"model": "x", "speed": 9}', '{"model": "/nowhere"}', "[", ""])
def test_a_bad_config_is_fatal(config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(worker, "_die_with_parent", lambda _: None)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with tempfile.TemporaryDirectory(prefix="ml-") as folder:
        parent = Parent(context, f"ipc://{folder}/engine")
        assert worker.main([f"ipc://{folder}/engine", "--config", config]) == 1
        assert isinstance(parent.receive(), Fatal)


def test_the_death_of_the_parent_ends_it(model: Path, address: str) -> None:
    grandparent = Parent(zmq.Context(), address)
    config = msgspec.json.encode(EngineConfig(model=str(model))).decode()
    parent = subprocess.Popen([sys.executable, "-c", START, address, config], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert isinstance(grandparent.receive(60), Ready)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/stat").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < deadline, "the engine outlived its parent"
        time.sleep(0.02)
