"""A computation in pieces as graphs: all of it as one, or one a piece, with the host's part in between.

whole    one graph, in which the table's side streams fork where a lookup begins and join where it ends.

    device  │ A to layer 1 ─ A to layer 2 ─ A to the end │           host: replay

cut      a graph a piece; what the host does for the rows that a piece asked for comes before the next one is replayed.

    device  │ A1 .......│           │ A2 .......│           │ A3 ...│
    host    replay A1   │ fetch A1 ─ replay A2  │ fetch A2 ─ replay A3

cut, two halves   each computes while the host fetches for the other:

    device  │ A1 ......│ B1 ......│ A2 ......│ B2 ......│ A3 ...│ B3 ...│
    host    A1, B1     │ fetch A1 │ fetch B1 │ fetch A2 │ fetch B2
                                 A2         B2         A3         B3       (replays)

A piece ends where the generator stops. While pieces are captured, the generator's own variables keep what passes from
one piece to the next alive, so no later piece of the set is given that memory before the last one has read it; pieces are
always replayed in the order of their capture. What was yielded at a stop is kept: its `fetch` is called at each replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple, Protocol

from torch import Tensor

from memlane.models.pieces import Pieces, Waiting, finish
from memlane.runner.graphs import Capture, Graph
from memlane.runner.halves import alternate
from memlane.tables import RowReadError

__all__ = ["Captured", "Cut", "Eager", "Part", "Whole"]

Tail = Callable[[Sequence[Tensor]], Tensor]


class Part(NamedTuple):
    """One of at most two parts of a batch that run in turns: how to compute its tokens, the step's from `begin` on.

    start: called again for each run; reads tensors that stay where they are.
    """

    begin: int
    start: Callable[[], Pieces]


class Captured(Protocol):
    """A computation that can be run again and again, over the tensors that it reads."""

    def run(self) -> Tensor:
        """-> what `tail` made of the results of all parts; valid until anything else is run.

        Raises RowReadError, with the step's tokens; it can be run again then.
        """


class Eager:
    """The twin: no graphs."""

    def __init__(self, parts: Sequence[Part], tail: Tail) -> None:
        self._parts, self._tail = parts, tail

    def run(self) -> Tensor:
        pieces = [_located(part) for part in self._parts]
        if len(pieces) == 1:
            return self._tail([finish(pieces[0])])
        return self._tail(alternate(*pieces))


class Whole:
    """One graph. For tables that never need the host."""

    def __init__(self, capture: Capture, parts: Sequence[Part], tail: Tail) -> None:
        """Captures. RuntimeError where that is not possible."""
        eager = Eager(parts, tail)
        capture.warm_up(eager.run)
        self._graph = capture.capture(eager.run)

    def run(self) -> Tensor:
        return self._graph.replay()


class Cut:
    """A graph for each piece of each part, the parts in turns."""

    def __init__(self, capture: Capture, parts: Sequence[Part], tail: Tail) -> None:
        """Captures. RuntimeError where that is not possible."""
        self._runs = [_Run(part) for part in parts]
        self._tail = tail
        self._pieces: list[_Piece] = []
        capture.warm_up(Eager(parts, tail).run)
        try:
            while self._runs[-1].result is None:
                first = not self._pieces
                for run in self._runs:
                    with _locating(run.part):
                        self._pieces.append(_Piece(run, capture.capture(partial(self._advance, run, first))))
        finally:
            self._close([])

    @property
    def pieces(self) -> int:
        """How many graphs there are."""
        return len(self._pieces)

    def run(self) -> Tensor:
        waiting: dict[_Run, Waiting] = {}
        out: Waiting | Tensor | None = None
        try:
            for run, graph in self._pieces:
                with _locating(run.part):
                    if run in waiting:
                        waiting[run].fetch()
                    out = graph.replay()
                if isinstance(out, Tensor):
                    waiting.pop(run, None)
                else:
                    out.launched()
                    waiting[run] = out
        finally:
            self._close(waiting.values())
        assert isinstance(out, Tensor)
        return out

    def _advance(self, run: _Run, first: bool) -> Waiting | Tensor:
        """What a piece computes: up to the next stop, and beyond the end of the last part the tail."""
        stop = run.advance(restart=first)
        if stop is not None:
            return stop
        results = [each.result for each in self._runs if each.result is not None]
        return self._tail(results) if run is self._runs[-1] else results[-1]

    def _close(self, waiting: Iterable[Waiting]) -> None:
        """Give up what is still waited for: nothing, unless something failed."""
        with ExitStack() as closing_all:
            for run in self._runs:
                closing_all.callback(run.close)
            for each in waiting:
                closing_all.callback(each.close)


class _Run:
    """A part under way. Once its pieces are captured as CUDA graphs, its generator has ended and rests."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.result: Tensor | None = None
        self._pieces: Pieces | None = None

    def advance(self, *, restart: bool) -> Waiting | None:
        """Compute up to the next stop, and say what is waited for there; None at the end, where there is a result."""
        if restart:
            self.close()
            self._pieces, self.result = self.part.start(), None
        assert self._pieces is not None
        try:
            return next(self._pieces)
        except StopIteration as end:
            self.result = end.value
            return None

    def close(self) -> None:
        if self._pieces is not None:
            self._pieces.close()


class _Piece(NamedTuple):
    run: _Run
    graph: Graph[Waiting | Tensor]


def _located(part: Part) -> Pieces:
    with _locating(part):
        return (yield from part.start())


@contextmanager
def _locating(part: Part) -> Iterator[None]:
    """Errors name tokens of the step, not of the part."""
    try:
        yield
    except RowReadError as error:
        tokens = [part.begin + token for token in error.tokens]
        raise RowReadError(error.table, error.rows, error.reason, tokens) from None
