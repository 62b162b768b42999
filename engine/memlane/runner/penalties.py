"""The changes to logits that depend on a sequence's own tokens: bias, min_tokens, penalties."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from memlane.scheduler import Sequence

__all__ = ["adjust", "is_adjusted"]


def is_adjusted(sequence: Sequence) -> bool:
    """Whether `adjust` has anything to do for this sequence's next token."""
    p = sequence.params
    return bool(
        p.logit_bias
        or p.min_tokens > sequence.output_length
        or p.repetition_penalty != 1.0
        or p.presence_penalty
        or p.frequency_penalty
    )


def adjust(logits: Tensor, sequences: SequenceOf[Sequence]) -> None:
    """Apply logit_bias, min_tokens and penalties to logits fp32 [n, vocab] in place, row by row where asked."""
    for row, sequence in zip(logits, sequences, strict=True):
        if is_adjusted(sequence):
            _add_bias(row, sequence)
            _forbid_ends(row, sequence)
            _penalise(row, sequence)


def _add_bias(row: Tensor, sequence: Sequence) -> None:
    bias = sequence.params.logit_bias
    if bias:
        values = torch.tensor(list(bias.values()), dtype=row.dtype, device=row.device)
        row.index_add_(0, torch.tensor(list(bias), device=row.device), values)


def _forbid_ends(row: Tensor, sequence: Sequence) -> None:
    if sequence.params.min_tokens > sequence.output_length:
        ends = [t for t in sequence.eos_ids | sequence.stop_ids if t < row.shape[0]]
        row.index_fill_(0, torch.tensor(ends, dtype=torch.int64, device=row.device), float("-inf"))


def _penalise(row: Tensor, sequence: Sequence) -> None:
    """Repetition (Keskar et al. 2019, CTRL, section 4.1) counts prompt and answer; presence and frequency the answer."""
    p, vocab = sequence.params, row.shape[0]
    tokens = torch.tensor(sequence.token_ids, device=row.device)
    if p.repetition_penalty != 1.0:
        seen = torch.bincount(tokens, minlength=vocab) > 0
        scaled = torch.where(row > 0, row / p.repetition_penalty, row * p.repetition_penalty)
        torch.where(seen, scaled, row, out=row)
    if p.presence_penalty or p.frequency_penalty:
        counts = torch.bincount(tokens[sequence.prompt_length :], minlength=vocab)
        row -= p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
