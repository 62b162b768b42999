"""A computation that stops where it would have to wait: a generator of what it waits for, that returns a tensor."""

from __future__ import annotations

from collections.abc import Generator
from typing import Protocol

from torch import Tensor

__all__ = ["Pieces", "Waiting", "advance", "finish"]


class Waiting(Protocol):
    """What a computation waits for at a stop."""

    def launched(self) -> None:
        """As `Lookup.launched`."""

    def fetch(self) -> None:
        """As `Lookup.fetch`. Going on calls it where that is needed, except from within a replayed graph."""

    def close(self) -> None:
        """As `Lookup.close`."""


Pieces = Generator[Waiting, None, Tensor]


def advance(pieces: Pieces) -> Tensor | None:
    """Compute up to the next stop; the result where there is none, else None."""
    try:
        next(pieces)
    except StopIteration as end:
        out: Tensor = end.value
        return out
    return None


def finish(pieces: Pieces) -> Tensor:
    """Compute all that is left, waiting at every stop."""
    try:
        while (out := advance(pieces)) is None:
            pass
    finally:
        pieces.close()  # where an interrupt comes between two pieces
    return out
