"""A computation that stops where it would have to wait: a generator that says nothing and returns a tensor."""

from __future__ import annotations

from collections.abc import Generator

from torch import Tensor

__all__ = ["Pieces", "advance", "finish"]

Pieces = Generator[None, None, Tensor]


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
