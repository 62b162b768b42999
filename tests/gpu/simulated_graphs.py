"""Streams, events and graphs of a simulated GPU, under torch.cuda's names. A graph is a tape of what its streams were given.

Whether a replay keeps all in order is seen anew each time: its streams begin where the one that replays it is.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from simulated_streams import Line, Memory
from torch import Tensor

if TYPE_CHECKING:
    from simulated_cuda import CudaTensor, Simulation

__all__ = ["DEVICE", "Capturing", "Event", "Graph", "Op", "Refused", "Stream", "Uses"]

DEVICE = torch.device("cuda", 1)  # not the one that is current at first


class Refused(AssertionError):
    """What a GPU, or the rule that a step waits for nothing, does not allow."""


class Stream:
    """torch.cuda.Stream. capture: the one that it is part of."""

    def __init__(self, simulation: Simulation, name: str) -> None:
        self._simulation = simulation
        self.device = DEVICE
        self.line = Line(name)
        self.capture: Capturing | None = None

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._simulation)
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        if not event.recorded:
            return
        if event.capture is not None and not event.capture.over and self.capture is None:
            self.capture = event.capture
            self.capture.lines[self] = Line(f"captured {self.line.name}")
        if event.capture is not self.capture:
            raise Refused("an event of a capture is waited for outside it, or the other way round")
        self._simulation.now(self).learn(event.known)
        if self.capture is not None:
            self.capture.tape.append(_Wait(self, event))

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        if self.capture is not None:
            raise Refused("a stream is waited for that is being captured")
        self._simulation.host.learn(self.line.known)


class Event:
    """torch.cuda.Event."""

    def __init__(self, simulation: Simulation, enable_timing: bool = False) -> None:
        self._simulation = simulation
        self.recorded = False
        self.known: dict[int, int] = {}
        self.capture: Capturing | None = None

    def record(self, stream: Stream | None = None) -> None:
        if stream is None:
            self._simulation.check_device("an event")
            stream = self._simulation.current
        self.recorded, self.capture = True, stream.capture
        self.known = dict(self._simulation.now(stream).known)
        if self.capture is not None:
            self.capture.tape.append(_Record(stream, self))

    def synchronize(self) -> None:
        if self._simulation.capturing:
            raise Refused("an event is waited for within a capture")
        if self.recorded:
            assert self.capture is None
            self._simulation.host.learn(self.known)

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Uses(NamedTuple):
    """What an operation does with memory. rows: of a memory, where only these are meant; asked when it runs."""

    what: str
    reads: Sequence[CudaTensor]
    writes: Sequence[CudaTensor]
    rows: Callable[[], list[tuple[CudaTensor, Sequence[int], bool]]] | None = None


class Op(NamedTuple):
    """Done again at each replay, on the same memory."""

    stream: Stream
    again: Callable[[], None]
    what: str
    touched: list[tuple[weakref.ref[Memory], bool]]
    rows: Callable[[], list[tuple[weakref.ref[Memory], Sequence[int], bool]]] | None


class _Wait(NamedTuple):
    stream: Stream
    event: Event


class _Record(NamedTuple):
    stream: Stream
    event: Event


class Capturing:
    """A capture under way: what was given to its streams."""

    def __init__(self, origin: Stream) -> None:
        self.origin = origin
        self.lines = {origin: Line(f"captured {origin.line.name}")}
        self.tape: list[Op | _Wait | _Record] = []
        self.fresh: list[Tensor] = []  # made within
        self.inside: set[int] = set()
        self.memories: list[weakref.ref[Memory]] = []
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what it wrote to, and how that was
        self.over = False

    def keep(self, host: Tensor) -> None:
        """A capture computes nothing: what is written to is to be as it was."""
        storage = host.untyped_storage()
        if storage.data_ptr() not in self.before and storage.data_ptr() not in self.inside:
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)  # type: ignore[call-overload]
            self.before[storage.data_ptr()] = whole, whole.clone()

    def end(self) -> None:
        self.over = True
        for whole, saved in self.before.values():
            whole.copy_(saved)
        for host in self.fresh:
            host.fill_(float("nan") if host.is_floating_point() else 77)
        for found in self.memories:
            if (memory := found()) is not None:
                memory.belongs_to_a_graph()
        for stream in self.lines:
            stream.capture = None
        known = self.lines[self.origin].known
        for line in self.lines.values():
            if known.get(line.number, 0) < line.known.get(line.number, 0):
                raise Refused(f"{line.name} was not joined before the capture ended")


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self.capture: Capturing | None = None

    def replay(self) -> None:
        simulation, capture = self._simulation, self.capture
        assert capture is not None
        assert capture.over
        if simulation.capturing:
            raise Refused("a graph is replayed within a capture")
        line = simulation.now(simulation.current)
        lines = {stream: Line(f"replayed {stream.line.name}") for stream in capture.lines}
        lines[capture.origin].learn(line.known)
        events: dict[int, dict[int, int]] = {}
        for entry in capture.tape:
            now = lines[entry.stream]
            if isinstance(entry, _Record):
                events[id(entry.event)] = dict(now.known)
            elif isinstance(entry, _Wait):
                now.learn(events[id(entry.event)])
            else:
                for found, write in entry.touched:
                    if (memory := found()) is not None:
                        memory.use(now, entry.what, write=write)
                for found, parts, write in entry.rows() if entry.rows is not None else []:
                    if (memory := found()) is not None:
                        memory.use(now, entry.what, write=write, parts=parts)
                entry.again()
        line.learn(lines[capture.origin].known)
