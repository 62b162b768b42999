"""Runs the model over a planned step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from memlane.models import Transformer
from memlane.runner.batch import make_batch
from memlane.runner.kv import KVCache
from memlane.runner.paged import PagedAttention
from memlane.scheduler import StepPlan

__all__ = ["Runner"]


class Runner:
    """A model and its KV cache. Holds nothing of any request between steps but what lies in KV blocks."""

    def __init__(self, transformer: Transformer, kv: KVCache) -> None:
        self.transformer, self.kv = transformer, kv
        self.device = kv.layers[0].device

    @torch.inference_mode()
    def run(self, plan: StepPlan, *, all_logits: bool = False) -> Tensor:
        """Compute the plan's tokens and write their KV. The plan must not be empty.

        Returns logits fp32 [chunks, vocab] after the last token of each chunk; with `all_logits` [T, vocab] after every
        token. Those of chunks that do not sample show whether what they computed is finite: each token attends to all
        before it, so one that is not makes the later ones so.
        Raises RowReadError if table rows could not be read; the same or a smaller plan may then be run again.
        """
        batch = make_batch(plan, self.kv.block_size, self.device)
        hidden = self.transformer(batch.token_ids, batch.positions, PagedAttention(self.kv, batch))
        if batch.ends is not None and not all_logits:
            hidden = hidden.index_select(0, batch.ends)
        return self.transformer.logits(hidden)

    @torch.inference_mode()
    def clear(self, blocks: Sequence[int]) -> None:
        """Zero KV blocks that a failed sequence left behind."""
        self.kv.clear(blocks)
