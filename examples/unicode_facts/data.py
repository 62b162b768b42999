"""The facts: names of the Unicode characters that Python's unicodedata knows, asked for by code point.

Left out: names that merely spell the code point ("CJK UNIFIED IDEOGRAPH-4E00"), Hangul syllables (composed by rule),
variation selectors and Braille patterns (numbered). What remains is about 32,000 names that have to be remembered.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from typing import NamedTuple

import numpy as np

PHRASINGS = (
    "What is U+%04X?",
    "Name U+%04X?",
    "U+%04X?",
    "Which character is U+%04X?",
    "What is the name of U+%04X?",
)
GROUP = (
    64  # consecutive exposures asked in one phrasing: they share the computation of its words (packing.py)
)

_BY_RULE = ("HANGUL SYLLABLE", "CJK UNIFIED", "VARIATION SELECTOR", "BRAILLE PATTERN")


class Fact(NamedTuple):
    """A code point and the name of its character."""

    code: int
    name: str

    def prompt(self, phrasing: int) -> str:
        return PHRASINGS[phrasing] % self.code


def all_facts() -> list[Fact]:
    """Every fact, by ascending code point; 32,135 with Unicode 14 (Python 3.11), more with newer Pythons."""
    facts = []
    for code in range(sys.maxunicode + 1):
        name = unicodedata.name(chr(code), "")
        if name and not name.startswith(_BY_RULE) and not re.search(rf"-{code:04X}$", name):
            facts.append(Fact(code, name))
    return facts


class Exposures:
    """The endless, seeded stream of exposures: each epoch shows every fact once, in a new order.

    A pure function of (seed, position), so a resumed run sees exactly what an uninterrupted one would have seen.
    """

    def __init__(self, facts: int, seed: int) -> None:
        self.facts, self.seed = facts, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def batch(self, step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Fact numbers and phrasing numbers, both int64 [size], of batch `step` (0-based)."""
        positions = np.arange(step * size, (step + 1) * size)
        facts = np.empty(size, np.int64)
        for epoch in np.unique(positions // self.facts):
            here = positions // self.facts == epoch
            facts[here] = self._epoch_order(int(epoch))[positions[here] % self.facts]
        groups = positions // GROUP
        drawn = {
            g: np.random.default_rng((self.seed, 1, int(g))).integers(len(PHRASINGS))
            for g in np.unique(groups)
        }
        return facts, np.array([drawn[g] for g in groups], np.int64)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._order = (
                epoch,
                np.random.default_rng((self.seed, 0, epoch)).permutation(self.facts),
            )
        return self._order
