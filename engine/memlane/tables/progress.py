"""How far a long piece of work on bytes has come: a log line every few seconds, with rate and estimate."""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

__all__ = ["Progress", "in_words"]

logger = logging.getLogger(__name__)


class _Unit(NamedTuple):
    name: str
    nbytes: int


_UNITS = (_Unit("GiB", 1 << 30), _Unit("MiB", 1 << 20), _Unit("KiB", 1 << 10))


def in_words(nbytes: int) -> str:
    """1.5 GiB, 8.0 MiB, 0.1 KiB."""
    unit = next((unit for unit in _UNITS if nbytes >= unit.nbytes), _UNITS[-1])
    return f"{nbytes / unit.nbytes:.1f} {unit.name}"


class Progress:
    """Counts bytes and says now and then how many are done; `finish` says what it all took.

    what: "table values"; done: "loaded into RAM". interval: seconds between two lines.
    """

    def __init__(self, what: str, done: str, total: int, interval: float = 5.0) -> None:
        self._what, self._done, self._total, self._interval = what, done, total, interval
        self._count = 0
        self._started = self._said = time.monotonic()

    def advance(self, nbytes: int) -> None:
        """So many more are done."""
        self._count += nbytes
        now = time.monotonic()
        if self._count < self._total and now - self._said >= self._interval:
            self._said = now
            rate = self._count / (now - self._started)
            logger.info(
                "%s: %s of %s (%.0f %%) %s, %.2f GB/s, %.0f s left",
                self._what,
                in_words(self._count),
                in_words(self._total),
                100 * self._count / self._total,
                self._done,
                rate / 1e9,
                (self._total - self._count) / rate,
            )

    def finish(self) -> None:
        """All is done."""
        seconds = time.monotonic() - self._started
        rate = self._count / max(seconds, 1e-9) / 1e9
        logger.info(
            "%s: %s %s in %.2f s (%.2f GB/s)", self._what, in_words(self._count), self._done, seconds, rate
        )
