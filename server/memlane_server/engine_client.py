"""The HTTP side's view of the engine: submit sequences, read their deltas, survive its death.

    submit ─ Add ──▶ engine        one RequestStream per HTTP request,
    RequestStream ◀── Deltas ─     one sequence per prompt and choice
    cancel ─ Abort ▶

Everything here runs in the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Protocol

import msgspec

from memlane import ipc
from memlane.config import EngineConfig
from memlane.errors import EngineDiedError, ErrorKind, MemlaneError, RequestError
from memlane.request import RequestTiming, SamplingParams, TokenDelta
from memlane_server.engine_process import WORKER, EngineProcess

log = logging.getLogger(__name__)

FIRST_BACKOFF = 0.5  # seconds before the first restart; doubles up to the longest
LONGEST_BACKOFF = 30.0
MAX_FAILED_STARTS = 5  # in a row, after the engine had worked once: then only an operator can help
DRAIN_GRACE = 10.0  # seconds for an idle engine to end by itself


class State(StrEnum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    STOPPED = "stopped"


class EngineStartError(MemlaneError):
    """The engine cannot be brought up; the message says why."""


class Observer(Protocol):
    """Told what the engine reports. Must not block."""

    def engine_started(self, ready: ipc.Ready) -> None: ...
    def engine_stats(self, stats: ipc.Stats) -> None: ...
    def engine_ended(self) -> None: ...
    def sequence_timed(self, timing: RequestTiming) -> None: ...


class SequenceRequest(NamedTuple):
    """What the engine is asked for: one prompt, one choice."""

    prompt: list[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Output:
    """New tokens of sequence `index` of a request."""

    index: int
    delta: TokenDelta


class RequestStream:
    """The outputs of one request's sequences, in the order they arrive; ends when all have finished.

    Iterating raises the request's failure. Closing (leaving `async with`) cancels what still runs.
    """

    def __init__(self, client: EngineClient, sequence_ids: list[str]) -> None:
        self._client = client
        self._ids = sequence_ids
        self._open = set(range(len(sequence_ids)))
        self._queue: asyncio.Queue[Output | MemlaneError] = asyncio.Queue()

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Output:
        while self._open:
            item = await self._queue.get()
            if isinstance(item, MemlaneError):
                raise item
            if item.index not in self._open:
                continue  # cancelled meanwhile
            if item.delta.failure is not None:
                raise RequestError(item.delta.failure.message, kind=item.delta.failure.kind)
            if item.delta.finish_reason is not None:
                self._open.discard(item.index)
            return item
        raise StopAsyncIteration

    def put(self, item: Output | MemlaneError) -> None:
        self._queue.put_nowait(item)

    def cancel(self, index: int) -> None:
        """Stop one sequence; nothing more of it is delivered."""
        if index in self._open:
            self._open.discard(index)
            self._client.abort([self._ids[index]])

    def close(self) -> None:
        if self._open:
            self._client.abort([self._ids[i] for i in sorted(self._open)])
            self._open.clear()


@dataclass(frozen=True, slots=True)
class _Owner:
    stream: RequestStream
    index: int


class EngineClient:
    """Keeps one engine process alive and carries requests to it."""

    def __init__(
        self,
        config: EngineConfig,
        observer: Observer,
        *,
        on_ready: Callable[[ipc.Ready], None],
        max_sequences: int,
        silence: float,
        command: Sequence[str] = WORKER,
    ) -> None:
        """`on_ready` is called before requests are admitted; it may raise MemlaneError to refuse the model.
        `silence`: seconds without a message, or within one step, after which an engine counts as dead."""
        self.state = State.STARTING
        self.reason = "the model is being loaded"
        self._config = config
        self._observer = observer
        self._on_ready = on_ready
        self._max_sequences = max_sequences
        self._silence = silence
        self._command = command
        self._process: EngineProcess | None = None
        self._sequences: dict[str, _Owner] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._stop = asyncio.Event()

    # requests

    def submit(self, request_id: str, sequences: Sequence[SequenceRequest]) -> RequestStream:
        """Admit a request whole or refuse it: RequestError of kind NOT_READY or OVERLOADED."""
        if self.state is not State.READY or self._process is None:
            raise RequestError(f"the server is {self.state}: {self.reason}", kind=ErrorKind.NOT_READY)
        if len(sequences) > self._max_sequences:
            raise RequestError(
                f"the request asks for {len(sequences)} answers (prompts × n); "
                f"this server takes at most {self._max_sequences} at once"
            )
        if len(self._sequences) + len(sequences) > self._max_sequences:
            raise RequestError(
                f"{len(self._sequences)} of at most {self._max_sequences} requests are waiting or running",
                kind=ErrorKind.OVERLOADED,
            )
        ids = [f"{request_id}-{i}" for i in range(len(sequences))]
        stream = RequestStream(self, ids)
        for i, (sequence_id, sequence) in enumerate(zip(ids, sequences, strict=True)):
            self._sequences[sequence_id] = _Owner(stream, i)
            self._process.send(
                ipc.Add(request_id=sequence_id, prompt_token_ids=sequence.prompt, params=sequence.params)
            )
        self._idle.clear()
        return stream

    def abort(self, sequence_ids: list[str]) -> None:
        """They stay counted until the engine confirms: their KV blocks are in use until then."""
        alive = [i for i in sequence_ids if i in self._sequences]
        if alive and self._process is not None:
            self._process.send(ipc.Abort(alive))

    @property
    def in_flight(self) -> int:
        return len(self._sequences)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    # life and death

    async def run(self) -> None:
        """Start the engine, restart it when it dies, return after drain() or stop().

        Raises EngineStartError when the first start fails, or too many restarts in a row.
        """
        worked, failures, backoff = False, 0, FIRST_BACKOFF
        while not self._stopping:
            begun = time.monotonic()
            reason, ready = await self._one_life()
            self._fail_all(EngineDiedError(reason))
            if self._stopping:
                break
            worked |= ready
            failures = 0 if ready else failures + 1
            if not worked or failures >= MAX_FAILED_STARTS:
                self.state, self.reason = State.STOPPED, reason
                raise EngineStartError(reason)
            if ready and time.monotonic() - begun > 2 * LONGEST_BACKOFF:
                backoff = FIRST_BACKOFF
            self.state, self.reason = State.RESTARTING, reason
            log.error("%s; restarting it in %.1f s", reason, backoff)
            if self._config.record_rows is not None:
                log.warning("rows are not recorded any more: %s is kept as it is", self._config.record_rows)
                self._config = msgspec.structs.replace(self._config, record_rows=None)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), backoff)
            backoff = min(2 * backoff, LONGEST_BACKOFF)
        self.state, self.reason = State.STOPPED, "it was shut down"

    async def drain(self, patience: float) -> None:
        """Refuse new requests, give running ones `patience` seconds, fail the rest, end the engine."""
        ready = self.state is State.READY
        self._begin_stopping()
        if ready:
            try:
                async with asyncio.timeout(patience):
                    await self._idle.wait()
            except TimeoutError:
                log.warning("%d sequences did not finish in %.0f s and are aborted", self.in_flight, patience)
                self.abort(list(self._sequences))
                self._fail_all(RequestError("the server is shutting down", kind=ErrorKind.NOT_READY))
        process = self._process
        if process is None:
            return
        if ready:
            process.send(ipc.Drain())
            try:
                async with asyncio.timeout(DRAIN_GRACE):
                    await process.ended()
            except TimeoutError:
                log.warning("the engine did not end by itself within %.0f s", DRAIN_GRACE)
        process.kill()

    def kill(self) -> None:
        """End now: requests in flight fail."""
        self._begin_stopping()
        self._fail_all(RequestError("the server is shutting down", kind=ErrorKind.NOT_READY))
        if self._process is not None:
            self._process.kill()

    def _begin_stopping(self) -> None:
        self.state, self.reason = State.DRAINING, "it is shutting down"
        self._stop.set()

    @property
    def _stopping(self) -> bool:
        return self.state in (State.DRAINING, State.STOPPED)

    async def _one_life(self) -> tuple[str, bool]:
        """Run one engine process to its end. Returns why it ended, and whether it had been ready."""
        ready = False
        async with EngineProcess(self._config, self._command) as process:
            self._process = process
            try:
                while (message := await process.receive(self._silence if ready else None)) is not None:
                    match message:
                        case ipc.Deltas():
                            for delta in message.deltas:
                                self._deliver(delta)
                        case ipc.Stats():
                            self._observer.engine_stats(message)
                            if message.step_seconds > self._silence:
                                return f"one step of the engine took over {self._silence:.0f} s", ready
                        case ipc.Ready():
                            self._become_ready(message)
                            ready = True
                        case ipc.Fatal():
                            return message.message, ready
            except TimeoutError:
                return f"the engine gave no sign of life for {self._silence:.0f} s", ready
            except msgspec.DecodeError as error:
                return f"the engine sent what is no message of this version: {error}", ready
            except MemlaneError as error:  # the model's text side cannot be loaded
                return str(error), ready
            finally:
                self._process = None
                self._observer.engine_ended()
            return process.obituary(), ready

    def _become_ready(self, ready: ipc.Ready) -> None:
        self._on_ready(ready)
        self._observer.engine_started(ready)
        if not self._stopping:
            self.state, self.reason = State.READY, ""

    def _deliver(self, delta: TokenDelta) -> None:
        owner = self._sequences.get(delta.request_id)
        if owner is None:
            return
        if delta.timing is not None:
            self._observer.sequence_timed(delta.timing)
        if delta.finish_reason is not None:
            del self._sequences[delta.request_id]
            if not self._sequences:
                self._idle.set()
        owner.stream.put(Output(owner.index, delta))

    def _fail_all(self, error: MemlaneError) -> None:
        """End every request in flight with this error."""
        for owner in self._sequences.values():
            owner.stream.put(error)
        self._sequences.clear()
        self._idle.set()
