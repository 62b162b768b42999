"""The KV blocks: who uses them, which are free, which are kept for their content.

total = free (content worthless) + used (references > 0) + cached (no references, content published)
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

from memlane.scheduler.prefix import PrefixCache

__all__ = ["BlockPool"]


class BlockPool:
    """Counts references to blocks 0 … total - 1. Allocation takes free blocks first, then the stalest cached ones."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.prefix = PrefixCache()
        self._references = [0] * total
        self._free = list(
            range(total - 1, -1, -1)
        )  # a stack: low numbers first, recently freed ones again soon

    @property
    def available(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._free) + self.prefix.idle

    @property
    def used(self) -> int:
        return self.total - self.available

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each; there must be as many available. Their content is arbitrary."""
        assert count <= self.available, f"{count} blocks asked, {self.available} available"
        blocks = [self._free.pop() if self._free else self.prefix.evict() for _ in range(count)]
        for block in blocks:
            self._references[block] = 1
        return blocks

    def share(self, blocks: SequenceOf[int]) -> None:
        """One more reference to each of these published blocks."""
        for block in blocks:
            if self._references[block] == 0:
                self.prefix.reuse(block)
            self._references[block] += 1

    def idle_among(self, blocks: SequenceOf[int]) -> int:
        """How many of these published blocks `share` would take out of what is available."""
        return sum(self._references[block] == 0 for block in blocks)

    def release(self, blocks: SequenceOf[int]) -> list[int]:
        """Give up one reference to each block of a sequence, in its order. Returns those that became free.

        Later blocks are parked first and so evicted first: a chain is found from its start, so a lost beginning
        would make the rest useless.
        """
        freed = []
        for block in reversed(blocks):
            self._references[block] -= 1
            assert self._references[block] >= 0, f"block {block} released twice"
            if self._references[block] == 0:
                if block in self.prefix:
                    self.prefix.park(block)
                else:
                    self._free.append(block)
                    freed.append(block)
        return freed

    def withdraw(self, blocks: SequenceOf[int]) -> None:
        """Take these blocks out of the prefix cache; idle ones become free."""
        for block in blocks:
            idle = self.prefix.is_idle(block)
            self.prefix.forget(block)
            if idle:
                self._free.append(block)

    def drop_cached(self) -> None:
        """Empty the prefix cache."""
        self.withdraw(self.prefix.blocks())

    def check_integrity(self, tables: SequenceOf[SequenceOf[int]]) -> None:
        """Compare the books with the block tables of all sequences. Raises AssertionError on any difference."""
        expected = [0] * self.total
        for table in tables:
            for block in table:
                expected[block] += 1
        assert expected == self._references, "reference counts differ from the block tables"
        used = sum(count > 0 for count in self._references)
        cached = [block for block in range(self.total) if self.prefix.is_idle(block)]
        assert len(self._free) + used + len(cached) == self.total, (
            f"{len(self._free)} free + {used} used + {len(cached)} cached != {self.total}"
        )
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert not any(self._references[block] for block in [*self._free, *cached]), (
            "a block in use is on offer"
        )
        assert not any(block in self.prefix for block in self._free), "a free block is published"
