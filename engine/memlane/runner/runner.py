"""Runs the model over a planned step."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from memlane.models import Transformer
from memlane.models.pieces import Pieces, finish
from memlane.request import SamplingParams
from memlane.runner import halves
from memlane.runner.attention import AttentionBackend, SdpaBackend
from memlane.runner.batch import make_batch
from memlane.runner.decode_batch import DecodeBatches
from memlane.runner.decode_graphs import DecodeGraphs
from memlane.runner.graphs import Capture
from memlane.runner.kv import KVCache
from memlane.runner.sampler import Greedy
from memlane.runner.transfer import upload
from memlane.scheduler import Chunk, StepPlan
from memlane.scheduler import Sequence as Tokens
from memlane.scheduler.plan import make_plan
from memlane.tables import RowReadError

__all__ = ["Runner"]

logger = logging.getLogger(__name__)

# Of prompts: kernels are compiled for ranges of tokens, and these, whole or in halves, are one for each.
_WARM_LENGTHS = (3, 100, 400)


def _never(sequences: int) -> bool:
    return False


class Runner:
    """A model and its KV cache. Holds nothing of any request between steps but what lies in KV blocks."""

    def __init__(
        self,
        transformer: Transformer,
        kv: KVCache,
        split_decode: Callable[[int], bool] = _never,
        attention: AttentionBackend | None = None,
        most_half: int | None = None,
    ) -> None:
        """split_decode: whether a step of so many single tokens, and nothing else, is to run as two halves.
        attention: what computes it (SdpaBackend). most_half: tokens of a half at most, where tables have such a limit."""
        self.transformer, self.kv = transformer, kv
        self.device = kv.layers[0].device
        self.split_decode = split_decode
        self.attention = attention or SdpaBackend()
        self._most_half = most_half
        self.decode: DecodeGraphs | None = None  # see `pad_decodes`

    @torch.inference_mode()
    def run(self, plan: StepPlan, *, all_logits: bool = False, previous: Tensor | None = None) -> Tensor:
        """Compute the plan's tokens and write their KV. The plan must not be empty.

        previous: as `make_batch` takes it.

        Returns logits fp32 [chunks, vocab] after the last token of each chunk; with `all_logits` [T, vocab] after every
        token. Those of chunks that do not sample show whether what they computed is finite: each token attends to all
        before it, so one that is not makes the later ones so.
        Raises RowReadError if table rows could not be read; the same or a smaller plan may then be run again.
        """
        if self.decode is not None and not all_logits and self.decode.takes(plan):
            return self.decode.run(plan, previous)
        if self.splits(plan):
            middle = plan.tokens // 2
            first, second = halves.cut(plan, middle)
            parts = (self._pieces(first, 0, previous), self._pieces(second, middle, previous))
            hidden = torch.cat(halves.alternate(*parts))
        else:
            hidden = finish(self._pieces(plan, 0, previous))
        if not (plan.all_single or all_logits):
            ends = [end - 1 for end in accumulate(chunk.length for chunk in plan.chunks)]
            hidden = hidden.index_select(0, upload(ends, torch.int64, self.device))
        return self.transformer.logits(hidden)

    def greedy(self, logits: Tensor) -> Greedy | None:
        """What was chosen greedily along with the logits that the last `run` returned, if it was; see DecodeGraphs."""
        return None if self.decode is None else self.decode.greedy(logits)

    def pad_decodes(
        self,
        sequences: int,
        max_length: int,
        capture: Capture | None,
        *,
        cut: bool,
        halves: bool,
        split: Callable[[int], bool] | None = None,
    ) -> None:
        """From now on run steps of up to so many single tokens, none beyond max_length, as DecodeGraphs does."""
        memory = self.transformer.config.memory
        batches = DecodeBatches(
            sequences,
            max_length,
            self.kv.block_size,
            self.kv.sink,
            self.device,
            ids_per_row=0 if memory is None else memory.rows_per_token,
        )
        self.decode = DecodeGraphs(
            self.transformer, self.kv, self.attention, batches, capture, cut=cut, halves=halves, split=split
        )
        self.decode.capture_all()

    def warm_up(self, most: int, longest: int) -> None:
        """Compute prompts nobody asked for, up to a step of `most` tokens, none beyond `longest`.

        Kernels are compiled when they are first launched, which would take the first requests seconds; and a step that
        does not fit the GPU's memory is better known of now.
        """
        for tokens in (*(n for n in _WARM_LENGTHS if n < most), most):
            chunks = []
            for begin in range(0, tokens, longest):
                length = min(longest, tokens - begin)
                sequence = Tokens("warm-up", [0] * length, SamplingParams(), max_length=length + 1)
                sequence.blocks = [self.kv.sink // self.kv.block_size] * -(-length // self.kv.block_size)
                chunks.append(Chunk(sequence, 0, length, True))
            try:
                self.run(make_plan(chunks))
            except torch.OutOfMemoryError as error:
                logger.warning(
                    "a step of %d tokens does not fit the GPU, lower max_num_batched_tokens: %s",
                    tokens,
                    error,
                )
            except RowReadError as error:
                logger.warning("a step of %d tokens was not tried: %s", tokens, error)

    def splits(self, plan: StepPlan) -> bool:
        """Whether the plan is run as two halves.

        Where there is a prompt in it, that depends on the plan alone, except for tables with such a limit: the same answers,
        bit by bit, wherever rows lie.
        """
        if self.transformer.config.memory is None:
            return False
        if plan.all_single:
            return plan.singles > 1 and self.split_decode(plan.singles)
        fits = self._most_half is None or plan.tokens - plan.tokens // 2 <= self._most_half
        return plan.tokens >= 2 * halves.MIN_TOKENS and fits

    @torch.inference_mode()
    def clear(self, blocks: Sequence[int]) -> None:
        """Zero KV blocks that a failed sequence left behind."""
        self.kv.clear(blocks)

    def _pieces(self, plan: StepPlan, begin: int, previous: Tensor | None) -> Pieces:
        """The hidden states [T, D] of a plan whose tokens are those of a step from `begin` on; errors name the step's."""
        batch = make_batch(plan, self.kv.block_size, self.device, previous)
        try:
            return (
                yield from self.transformer.run(
                    batch.token_ids, batch.positions, self.attention.attention(self.kv, batch)
                )
            )
        except RowReadError as error:
            tokens = [begin + token for token in error.tokens]
            raise RowReadError(error.table, error.rows, error.reason, tokens) from None
