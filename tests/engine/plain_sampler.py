"""The sampler's twin, in which the host takes part: it looks at results on the way, and changes logits row by row.

Its results and those of memlane.runner.sampler are the same on the CPU, bit by bit.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch
from torch import Tensor

from memlane.request import TokenLogprobs
from memlane.runner import Sampled
from memlane.runner.random_numbers import uniform
from memlane.scheduler import Sequence

_LEAST = torch.finfo(torch.float32).tiny


@torch.inference_mode()
def sample(logits: Tensor, sequences: SequenceOf[Sequence]) -> list[Sampled]:
    """logits fp32 [n, vocab], one row for each sequence -> one result for each. May overwrite logits."""
    if not sequences:
        return []
    # One pass finds any inf or NaN: both survive summing, and finite fp32 logits cannot overflow.
    finite = torch.isfinite(logits.sum(-1)).tolist()
    reports = _report(logits, sequences, finite)
    if any(is_adjusted(sequence) for sequence in sequences):
        adjust(logits, sequences)
    random = [row for row, sequence in enumerate(sequences) if not sequence.params.greedy and finite[row]]
    if len(random) == len(sequences):
        tokens = _draw(logits, sequences)
    else:
        tokens = logits.argmax(-1).tolist()
        if random:
            drawn = _draw(logits[random], [sequences[row] for row in random])
            for row, token in zip(random, drawn, strict=True):
                tokens[row] = token
    if reports is None:
        return [Sampled(token if ok else None, None) for token, ok in zip(tokens, finite, strict=True)]
    return [
        Sampled(token if ok else None, report.of(token) if report is not None else None)
        for token, ok, report in zip(tokens, finite, reports, strict=True)
    ]


def _draw(logits: Tensor, sequences: SequenceOf[Sequence]) -> list[int]:
    """One random token for each row of logits [n, vocab], all finite or -inf."""
    device = logits.device
    # The best at 0, and no temperature below the least normal fp32: then the least ones give 0 and -inf, never NaN.
    temperatures = torch.tensor([[max(s.params.temperature, _LEAST)] for s in sequences], device=device)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperatures
    logits = _truncate(logits, sequences)
    # fp64: the running sum over a large vocabulary must not swallow small probabilities.
    cumulative = torch.softmax(logits, dim=-1, dtype=torch.float64).cumsum_(-1)
    at = torch.tensor(
        [[uniform(s.seed, s.output_length)] for s in sequences], dtype=torch.float64, device=device
    )
    # The first token whose sum reaches the draw. The draw is above 0 and at most the total, so that token exists and
    # has a probability above 0, however the sums were rounded.
    tokens: list[int] = torch.searchsorted(cumulative, at * cumulative[:, -1:])[:, 0].tolist()
    return tokens


def _truncate(logits: Tensor, sequences: SequenceOf[Sequence]) -> Tensor:
    """Set to -inf what min_p, top_k and top_p exclude. The most likely token always stays."""
    device, vocab = logits.device, logits.shape[-1]
    if any(s.params.min_p > 0 for s in sequences):
        min_p = torch.tensor([[s.params.min_p] for s in sequences], device=device)
        probs = torch.softmax(logits, dim=-1)
        logits = logits.masked_fill(probs < min_p * probs.amax(-1, keepdim=True), float("-inf"))
    top_k = [k if 0 < (k := s.params.top_k) < vocab else vocab for s in sequences]
    top_p = [s.params.top_p for s in sequences]
    if min(top_k) == vocab and min(top_p) == 1.0:
        return logits
    best, ids = (
        logits.topk(max(top_k), dim=-1) if max(top_k) < vocab else logits.sort(dim=-1, descending=True)
    )
    rank = torch.arange(best.shape[-1], device=device)
    best = best.masked_fill(rank >= torch.tensor(top_k, device=device)[:, None], float("-inf"))
    if min(top_p) < 1.0:
        probs = torch.softmax(best, dim=-1, dtype=torch.float64)
        before = (
            probs.cumsum(-1) - probs
        )  # mass of the better ones: a token stays while that is short of top_p
        limit = torch.tensor(top_p, dtype=torch.float64, device=device)[:, None]
        best = best.masked_fill((before >= limit) & (rank > 0) & (limit < 1.0), float("-inf"))
    return torch.full_like(logits, float("-inf")).scatter_(-1, ids, best)


class _Report(NamedTuple):
    """What is needed to report any chosen token of one row: its log-probabilities and the best ids."""

    logprobs: Tensor
    top: list[tuple[int, float]]

    def of(self, token: int) -> TokenLogprobs:
        logprob = float(self.logprobs[token])
        rank = 1 + int((self.logprobs > logprob).sum())
        return TokenLogprobs(token, logprob, rank, self.top)


def _report(
    logits: Tensor, sequences: SequenceOf[Sequence], finite: list[bool]
) -> list[_Report | None] | None:
    """Reports for the rows that ask for log-probabilities; None if none does. Taken before logits are modified."""
    wanted = [s.params.logprobs if ok else None for s, ok in zip(sequences, finite, strict=True)]
    rows = [row for row, count in enumerate(wanted) if count is not None]
    if not rows:
        return None
    logprobs = torch.log_softmax(logits[rows], dim=-1)
    most = min(max(wanted[row] or 0 for row in rows), logits.shape[-1])
    values, ids = (x.tolist() for x in logprobs.topk(most, dim=-1))
    reports: list[_Report | None] = [None] * len(sequences)
    for i, row in enumerate(rows):
        count = min(wanted[row] or 0, most)
        reports[row] = _Report(logprobs[i], list(zip(ids[i][:count], values[i][:count], strict=True)))
    return reports


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
