"""What computes attention over the KV cache, as the runner sees it."""

from __future__ import annotations

from typing import Protocol

from memlane.models.attention import Attention
from memlane.runner.batch import Batch
from memlane.runner.decode_batch import DecodeBatch
from memlane.runner.kv import KVCache

__all__ = ["AttentionBackend"]


class AttentionBackend(Protocol):
    """A library behind one face. One thread owns it, and uses one stream.

    Attention that it hands out writes the step's keys and values before it reads any, as PagedAttention does.
    """

    @property
    def name(self) -> str:
        """As the option attention_backend spells it."""

    @property
    def block_size(self) -> int | None:
        """KV blocks must be a multiple of so many tokens; None if any size will do."""

    def attention(self, cache: KVCache, batch: Batch) -> Attention:
        """For one step of any plan, run eagerly. Two steps may be under way at once, in turns."""

    def decode(self, cache: KVCache, static: DecodeBatch) -> Attention:
        """For any number of steps whose numbers are in the tensors of `static`; may be captured in a graph.

        Called before the capture. What depends on those numbers is worked out at layer 0 of each step, on the device;
        `prepare` must have been called for the step that is captured too.
        """

    def prepare(self, static: DecodeBatch) -> None:
        """Called on the host before each step with `static`, once it is filled. Does not wait for running steps."""

    def bound(self, longest: int, most: int) -> int:
        """The `longest` of a DecodeBatch for steps of that length: no smaller, at most `most`, of few different values.

        A graph is captured for each value, so a backend that reads only what a sequence has says `most`.
        """
