"""Streams and events of a simulated GPU: who has waited for whom, so that two uses of memory without an order are found.

Work is done at once, in the order of the program; what is simulated is what that order does not guarantee. Each stream
counts its work, and knows how much of every other's is done before its next (a vector clock):

    main   1 lookup ─┬─ 2 sums of before ──────────────┬─ 3 sums     main 3 knows side 1; main 2 does not
    side             └─ 1 rows into slots ─ event ─────┘
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["Line", "Memory", "Race"]

_names = itertools.count()


class Race(AssertionError):
    """Two uses of the same memory that may happen in either order, or at once."""


class Use(NamedTuple):
    """A point of a line at which memory was used, and what did it."""

    line: int
    time: int
    what: str


class Line:
    """What runs in order: a stream, the processor, or one of a graph's streams during one replay."""

    def __init__(self, name: str, known: dict[int, int] | None = None) -> None:
        self.number, self.name = next(_names), name
        self.known = dict(known or {})

    def step(self, what: str) -> Use:
        time = self.known.get(self.number, 0) + 1
        self.known[self.number] = time
        return Use(self.number, time, f"{what} on {self.name}")

    def learn(self, known: dict[int, int]) -> None:
        for line, time in known.items():
            self.known[line] = max(time, self.known.get(line, 0))

    def knows(self, use: Use) -> bool:
        return self.known.get(use.line, 0) >= use.time


class Memory:
    """Who used a piece of memory last. `part`: rows of it, where uses of different rows are to be told apart."""

    def __init__(self, owner: Line | None = None, freed: list[str] | None = None) -> None:
        """owner: whose memory the allocator hands out again, for work on that line, once nobody holds this any more.

        freed: gets a line for each use that the owner has not waited for by then."""
        self.owner, self._freed = owner, freed
        self._written: dict[int | None, Use] = {}
        self._read: dict[int | None, dict[int, Use]] = {}
        self.racy = False

    def use(self, line: Line, what: str, *, write: bool, parts: Iterable[int | None] = (None,)) -> None:
        use = line.step(what)
        if self.racy:
            return
        for part in parts:
            before = [self._written[part]] if part in self._written else []
            if write:
                before += self._read.get(part, {}).values()
            for other in before:
                if not line.knows(other):
                    raise Race(f"{use.what} does not wait for {other.what}")
            if write:
                self._written[part], self._read[part] = use, {}
            else:
                self._read.setdefault(part, {})[use.line] = use

    def belongs_to_a_graph(self) -> None:
        """It is not given back as long as that lives; nothing has been done with it yet."""
        self.owner = None
        self._written, self._read = {}, {}

    def __del__(self) -> None:
        if self.owner is None or self._freed is None or self.racy:
            return
        uses = [*self._written.values(), *(use for each in self._read.values() for use in each.values())]
        late = {use.what for use in uses if not self.owner.knows(use)}
        self._freed += [f"given back before {what} has been waited for by {self.owner.name}" for what in late]
