"""The engine process: `python -m memlane.worker ADDRESS`, with its EngineConfig as one line of JSON on stdin.

    main thread       │ drain socket │ ── step ── │ send deltas │ drain socket │ ── step ── │ …   idle: waits on the socket
    heartbeat thread                   · · stats                                 · · stats

It connects to the PAIR socket that its parent bound and speaks the messages of memlane.ipc. Stats are its heartbeat:
ten a second while requests run, also within a long step, and one a second when idle. A step that is stuck looks
different from a long one by `Stats.step_seconds`, the age of the step under way; one that is stuck while holding the
interpreter falls silent. What is too old is for the parent to judge.

Signals: SIGINT and SIGTERM are ignored, since both reach the whole process group, and the parent decides how to end:
by `Drain`, or by SIGKILL. If the parent dies, the kernel kills this process (on Linux, when the *thread* that started
it ends: start it from one that lives as long as the server).

Exit status: 0 after Drain, 1 after Fatal.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

import msgspec
import zmq

from memlane.config import EngineConfig
from memlane.errors import ConfigError, ErrorKind, MemlaneError, RequestError
from memlane.ipc import Abort, Add, Deltas, Drain, Fatal, FromEngine, Ready, decode_to_engine, encode
from memlane.request import Failure, FinishReason, TokenDelta

if TYPE_CHECKING:
    from memlane.engine import Engine

__all__ = ["Worker", "main"]

logger = logging.getLogger("memlane.worker")  # not __main__

BUSY_INTERVAL = 0.1  # seconds between Stats while requests run
IDLE_SLICE = 0.01  # seconds that a message may have to wait for what is done in idle moments
IDLE_INTERVAL = 0.9  # when idle; at least one a second is promised
_LINGER_MS = 5000  # how long the last messages may take to leave when the process ends
_PR_SET_PDEATHSIG = 1


class Worker:
    """Drives one engine from one socket.

    The socket belongs to the main thread, except while a step is under way: then the heartbeat thread may send. The
    hand-over is `_step_started`, changed and looked at under the lock.
    """

    def __init__(self, engine: Engine, socket: zmq.Socket[bytes]) -> None:
        self.engine, self.socket = engine, socket
        self._draining = False
        self._lock = threading.Lock()
        self._step_started: float | None = None
        self._busy = threading.Event()  # set while there are requests: else the heartbeat thread sleeps
        self._ended = False
        self._step_tokens: deque[int] = deque()
        self._stats_sent = 0.0

    def run(self) -> int:
        """Serve until drained (0) or broken (1); the exit status."""
        self.send(self._ready())
        heartbeat = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        heartbeat.start()
        try:
            return self._serve()
        finally:
            self._ended = True
            self._busy.set()
            heartbeat.join()

    def _serve(self) -> int:
        while not (self._draining and not self.engine.unfinished):
            if not self.engine.unfinished:
                self._busy.clear()
                self._send_stats()
                self._wait()
            self._receive()
            if self.engine.unfinished:
                self._busy.set()
                if not self._step():
                    return 1
        self._send_stats()
        return 0

    def send(self, message: FromEngine) -> None:
        self.socket.send(encode(message))

    def _ready(self) -> Ready:
        engine = self.engine
        stats = engine.stats()
        return Ready(
            model_directory=str(engine.model.directory),
            vocab_size=engine.model.config.vocab_size,
            max_model_len=engine.max_model_len,
            kv_blocks=stats.kv_blocks_total,
            block_size=engine.scheduler.block_size,
            choices=engine.choices,
            resident_bytes=stats.resident_bytes,
        )

    def _wait(self) -> None:
        """Until a message comes: do what waited for such a moment, then sleep; tell once in a while that we live."""
        while self.engine.use_idle_time(IDLE_SLICE):
            if self.socket.poll(0):
                return
            if time.monotonic() - self._stats_sent >= BUSY_INTERVAL:
                self._send_stats()
        while not self.socket.poll(int(IDLE_INTERVAL * 1000)):
            self._send_stats()
            self.engine.use_idle_time(0.0)

    def _receive(self) -> None:
        """Act on every message that is there."""
        while self.socket.poll(0):
            message = decode_to_engine(self.socket.recv())
            if isinstance(message, Add):
                self._add(message)
            elif isinstance(message, Abort):
                self._send_deltas(self.engine.abort(message.request_ids))
            else:
                assert isinstance(message, Drain)
                logger.info("draining: %d sequences unfinished", self.engine.unfinished)
                self._draining = True

    def _add(self, message: Add) -> None:
        try:
            if self._draining:
                raise RequestError("the engine is shutting down", kind=ErrorKind.NOT_READY)
            self.engine.add(message)
        except RequestError as error:
            failure = Failure(error.kind, str(error))
            self._send_deltas(
                [TokenDelta(request_id=message.request_id, finish_reason=FinishReason.ERROR, failure=failure)]
            )

    def _step(self) -> bool:
        """One step of the engine. False if it broke so badly that the process must end."""
        with self._lock:
            self._step_started = time.monotonic()
        alive = True
        try:
            deltas = self.engine.step()
        except Exception:
            logger.exception("a step failed")
            deltas, alive = self._recover()
        with self._lock:
            self._step_started = None
        self._step_tokens.append(self.engine.last_step_tokens)
        self._send_deltas(deltas)
        if not alive:
            self.send(Fatal("the engine's state is inconsistent after a failed step; see its log"))
        elif time.monotonic() - self._stats_sent >= BUSY_INTERVAL:
            self._send_stats()
        return alive

    def _recover(self) -> tuple[list[TokenDelta], bool]:
        """Fail what was in flight. Says whether the engine may go on."""
        ids = list(self.engine.sequences)
        try:
            deltas = self.engine.fail_all("a step of the engine failed; see its log")
            self.engine.check_integrity()
        except Exception:
            logger.exception("the engine cannot go on")
            failure = Failure(ErrorKind.INTERNAL, "the engine broke down; see its log")
            lost = FinishReason.ERROR
            return [TokenDelta(request_id=name, finish_reason=lost, failure=failure) for name in ids], False
        return deltas, True

    def _send_deltas(self, deltas: list[TokenDelta]) -> None:
        if deltas:
            self.send(Deltas(deltas))

    def _send_stats(self) -> None:
        started = self._step_started
        tokens = [self._step_tokens.popleft() for _ in range(len(self._step_tokens))]
        now = time.monotonic()
        stats = self.engine.stats()
        age = 0.0 if started is None else now - started
        self.send(msgspec.structs.replace(stats, step_tokens=tokens, step_seconds=age))
        self._stats_sent = now

    def _beat(self) -> None:
        """The heartbeat thread: speaks for the main thread while that is inside a step."""
        while self._busy.wait() and not self._ended:
            time.sleep(BUSY_INTERVAL)
            with self._lock:
                late = time.monotonic() - self._stats_sent >= BUSY_INTERVAL
                if self._step_started is not None and late:
                    self._send_stats()


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the process; returns its exit status."""
    options = _parse(arguments)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _die_with_parent(options.parent)
    # Before torch is loaded: OpenMP threads that spin while they wait stall each other on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    logging.basicConfig(
        level=options.log_level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.sndhwm = socket.rcvhwm = 0  # a full queue would block a step; requests in flight bound it anyway
    socket.linger = _LINGER_MS
    socket.connect(options.socket)
    try:
        return _serve(options.config if options.config is not None else sys.stdin.readline(), socket)
    finally:
        socket.close()
        context.term()


def _serve(config: str, socket: zmq.Socket[bytes]) -> int:
    try:
        engine = _load(config)
    except MemlaneError as error:
        logger.error("%s", error)
        socket.send(encode(Fatal(str(error))))
        return 1
    except Exception as error:
        logger.exception("the engine cannot start")
        socket.send(encode(Fatal(f"the engine cannot start: {type(error).__name__}: {error}")))
        return 1
    try:
        return Worker(engine, socket).run()
    except Exception as error:
        logger.exception("the engine ends")
        socket.send(encode(Fatal(f"the engine ends: {type(error).__name__}: {error}")))
        return 1
    finally:
        engine.close()


def _load(text: str) -> Engine:
    try:
        config = msgspec.json.decode(text, type=EngineConfig)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"engine config: {error}") from error
    from memlane.engine import Engine  # here, because it loads torch

    return Engine(config)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m memlane.worker", description="The engine process of memlane."
    )
    parser.add_argument("socket", help="ZeroMQ address of the parent's PAIR socket")
    parser.add_argument("--config", help="EngineConfig as JSON [one line read from stdin]")
    parser.add_argument(
        "--parent", type=int, help="process id of the parent: end at once if it is gone already"
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    return parser.parse_args(arguments)


def _die_with_parent(parent: int | None) -> None:
    """Ask the kernel to kill this process when its parent dies. `parent`: notice if that has happened already."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        raise SystemExit(f"memlane.worker: the parent {parent} is gone")


if __name__ == "__main__":
    sys.exit(main())
