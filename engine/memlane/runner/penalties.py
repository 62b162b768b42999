"""The changes to logits that depend on a sequence's own tokens: bias, min_tokens, penalties."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from memlane.runner.transfer import upload
from memlane.scheduler import Sequence

__all__ = ["adjust", "reads_history"]


def reads_history(sequence: Sequence) -> bool:
    """Whether the choice of a token depends on which ones came before it, beside what the model makes of them."""
    p = sequence.params
    return p.repetition_penalty != 1.0 or bool(p.presence_penalty or p.frequency_penalty)


def adjust(logits: Tensor, sequences: SequenceOf[Sequence | None]) -> None:
    """Apply logit_bias, min_tokens and penalties, in this order, to logits fp32 [n, vocab] in place.

    One sequence for each row; rows without one stay as they are. Nothing here waits for the device.
    """
    _add_biases(logits, sequences)
    _forbid_ends(logits, sequences)
    _penalise(logits, sequences)


def _add_biases(logits: Tensor, sequences: SequenceOf[Sequence | None]) -> None:
    vocab = logits.shape[-1]
    places: list[int] = []  # in the flattened logits
    biases: list[float] = []
    for row, sequence in enumerate(sequences):
        if sequence is not None and sequence.params.logit_bias:
            places += [row * vocab + token for token in sequence.params.logit_bias]
            biases += sequence.params.logit_bias.values()
    if places:
        device = logits.device
        added = upload(biases, logits.dtype, device)
        logits.view(-1).index_add_(0, upload(places, torch.int64, device), added)


def _forbid_ends(logits: Tensor, sequences: SequenceOf[Sequence | None]) -> None:
    vocab = logits.shape[-1]
    places: list[int] = []
    for row, sequence in enumerate(sequences):
        if sequence is not None and sequence.params.min_tokens > sequence.output_length:
            places += [row * vocab + t for t in sequence.eos_ids | sequence.stop_ids if t < vocab]
    if places:
        logits.view(-1).index_fill_(0, upload(places, torch.int64, logits.device), float("-inf"))


def _penalise(logits: Tensor, sequences: SequenceOf[Sequence | None]) -> None:
    """Repetition (Keskar et al. 2019, CTRL, section 4.1) counts prompt and answer; presence and frequency the answer."""
    rows = [row for row, s in enumerate(sequences) if s is not None and reads_history(s)]
    if not rows:
        return
    penalised = [s for s in sequences if s is not None and reads_history(s)]
    assert not any(s.expects for s in penalised), "a penalty would overlook the token that is on its way"
    device, vocab = logits.device, logits.shape[-1]
    index = upload(rows, torch.int64, device)
    p = [s.params for s in penalised]
    repetition, presence, frequency = upload(
        [
            [x.repetition_penalty for x in p],
            [x.presence_penalty for x in p],
            [x.frequency_penalty for x in p],
        ],
        logits.dtype,
        device,
    )[:, :, None]
    values = logits.index_select(0, index)
    if any(x.repetition_penalty != 1.0 for x in p):
        seen = _counts([s.token_ids for s in penalised], vocab, device) > 0
        scaled = torch.where(values > 0, values / repetition, values * repetition)
        values = torch.where(seen, scaled, values)
    if any(x.presence_penalty or x.frequency_penalty for x in p):
        counts = _counts([s.token_ids[s.prompt_length :] for s in penalised], vocab, device)
        values -= frequency * counts + presence * (counts > 0)
    logits.index_copy_(0, index, values)


def _counts(histories: SequenceOf[list[int]], vocab: int, device: torch.device) -> Tensor:
    """How often each token occurs in each history: int64 [histories, vocab]."""
    flat = [row * vocab + token for row, tokens in enumerate(histories) for token in tokens]
    counts = torch.zeros(len(histories), vocab, dtype=torch.int64, device=device)
    places = upload(flat, torch.int64, device)
    counts.view(-1).scatter_add_(0, places, torch.ones_like(places))  # bincount would ask for the largest
    return counts
