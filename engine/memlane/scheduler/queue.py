"""Sequences waiting to run, first come first served."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from memlane.scheduler.sequence import Sequence

__all__ = ["WaitingQueue"]


class WaitingQueue:
    """A FIFO that forgets any member in constant time (clients hang up) and takes preempted ones back in front."""

    def __init__(self) -> None:
        self._members: OrderedDict[str, Sequence] = OrderedDict()

    def push(self, sequence: Sequence) -> None:
        self._members[sequence.request_id] = sequence

    def push_front(self, sequence: Sequence) -> None:
        """For a preempted sequence: it is older than all that wait, because victims are chosen youngest first."""
        self._members[sequence.request_id] = sequence
        self._members.move_to_end(sequence.request_id, last=False)

    def first(self) -> Sequence:
        """The next to be admitted. The queue must not be empty."""
        return next(iter(self._members.values()))

    def remove(self, sequence: Sequence) -> None:
        del self._members[sequence.request_id]

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._members.values())

    def __contains__(self, sequence: object) -> bool:
        return isinstance(sequence, Sequence) and self._members.get(sequence.request_id) is sequence
