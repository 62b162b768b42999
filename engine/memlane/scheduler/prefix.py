"""The prefix cache: which full KV blocks hold which beginnings of sequences.

A block is known by a hash chained over all tokens from the sequence's start to the block's end, so that equal
hashes mean equal KV. Only full blocks take part; a partially filled one belongs to one sequence alone.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf
from hashlib import blake2b

__all__ = ["PrefixCache", "extend_hashes"]

# Collisions would serve one user's KV to another: a cryptographic hash, not Python's.
_DIGEST_BYTES = 16


def extend_hashes(hashes: list[bytes], token_ids: SequenceOf[int], blocks: int, block_size: int) -> None:
    """Grow the chain `hashes` in place until it covers the first `blocks` full blocks of token_ids."""
    for index in range(len(hashes), blocks):
        parent = hashes[index - 1] if index else b""
        tokens = array("q", token_ids[index * block_size : (index + 1) * block_size]).tobytes()
        hashes.append(blake2b(tokens, digest_size=_DIGEST_BYTES, key=parent).digest())


class PrefixCache:
    """Maps hashes to blocks. Blocks that no sequence uses are idle, in order of last use, and may be evicted."""

    def __init__(self) -> None:
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def idle(self) -> int:
        """Blocks that are cached and used by nobody."""
        return len(self._idle)

    def find(self, hashes: SequenceOf[bytes]) -> list[int]:
        """The blocks of the longest cached beginning of this chain."""
        found = []
        for digest in hashes:
            block = self._block_of.get(digest)
            if block is None:
                break
            found.append(block)
        return found

    def insert(self, digest: bytes, block: int) -> None:
        """Publish a full, computed block in use. An equal one published earlier stays; this one is then private."""
        if digest not in self._block_of and block not in self._hash_of:
            self._block_of[digest] = block
            self._hash_of[block] = digest

    def __contains__(self, block: int) -> bool:
        return block in self._hash_of

    def is_idle(self, block: int) -> bool:
        return block in self._idle

    def park(self, block: int) -> None:
        """A published block lost its last user."""
        self._idle[block] = None

    def reuse(self, block: int) -> None:
        """An idle block got a user again."""
        del self._idle[block]

    def evict(self) -> int:
        """Forget the idle block that was used longest ago and return it. There must be one."""
        block, _ = self._idle.popitem(last=False)
        self.forget(block)
        return block

    def forget(self, block: int) -> None:
        """Withdraw a block: nobody new will find it. Its users keep it."""
        digest = self._hash_of.pop(block, None)
        if digest is not None:
            del self._block_of[digest]
        self._idle.pop(block, None)

    def blocks(self) -> list[int]:
        """All published blocks."""
        return list(self._hash_of)
