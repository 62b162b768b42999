"""Work of a GPU beside its main stream. On the CPU everything happens at once, in the order it is written."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["Mark", "SideStream", "host_buffer", "link_speed", "new_stream"]

_LINK_BYTES = 64 << 20

Mark = torch.cuda.Event | None  # a point on a stream; None on the CPU, where all points have been passed


class SideStream:
    """One stream of a device. "Main" is whatever stream is current when a method is called."""

    def __init__(self, device: torch.device) -> None:
        self._stream = new_stream(device)

    @property
    def capturing(self) -> bool:
        """Whether what is launched now is recorded in a graph and not computed."""
        return self._stream is not None and torch.cuda.is_current_stream_capturing()

    @contextmanager
    def branch(self, after: Mark = None) -> Iterator[None]:
        """What is launched within runs beside the main stream, after a mark on that: what was launched on it so far."""
        if self._stream is None:
            yield
            return
        self._stream.wait_event(after or _mark_main(self._stream))
        with torch.cuda.stream(self._stream):
            yield

    def main_mark(self) -> Mark:
        """The point after all that was launched on the main stream so far."""
        return None if self._stream is None else _mark_main(self._stream)

    def mark(self) -> Mark:
        """The point after all that was launched on it so far."""
        return None if self._stream is None else self._stream.record_event()

    def join(self, mark: Mark) -> None:
        """What is launched on the main stream from now on waits for the mark."""
        if mark is not None:
            assert self._stream is not None
            torch.cuda.current_stream(self._stream.device).wait_event(mark)


def _mark_main(side: torch.cuda.Stream) -> torch.cuda.Event:
    mark: torch.cuda.Event = torch.cuda.current_stream(side.device).record_event()
    return mark


def new_stream(device: torch.device, *, urgent: bool = False) -> torch.cuda.Stream | None:
    """Another stream of a GPU; None for the CPU.

    urgent: of high priority. torch has 32 streams of each priority and then hands the same ones out again, so only one of
    another priority is sure not to be a stream of somebody else, which may be in the middle of a capture.
    """
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device, priority=-1 if urgent else 0)  # type: ignore[no-untyped-call]


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of the host, uninitialised; pinned where `device` is a GPU."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


@functools.cache
def link_speed(device: torch.device) -> float:
    """Bytes a second that a copy from pinned host memory moves; infinity for the CPU, where there is no link."""
    if device.type != "cuda":
        return math.inf
    host = host_buffer((_LINK_BYTES,), torch.uint8, device)
    there = torch.empty_like(host, device=device)
    stream = torch.cuda.current_stream(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    for _ in range(2):  # the first one warms up
        begin.record(stream)
        there.copy_(host, non_blocking=True)
        end.record(stream)
    end.synchronize()
    return 1e3 * _LINK_BYTES / float(begin.elapsed_time(end))
