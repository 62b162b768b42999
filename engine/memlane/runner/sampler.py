"""From logits to tokens. A pure function: the same logits and the same sequence give the same token in any batch.

    logits ─ logprobs (of the unmodified distribution)
       └─ logit_bias ─ min_tokens ─ penalties ─┬─ temperature 0: argmax
                                               └─ / temperature ─ min_p ─ top_k ─ top_p ─ draw

Names, order and meaning of the steps are vLLM's. A draw inverts the cumulative distribution at a number that depends on
(seed, output position) alone, so it needs no generator state, survives preemption, and is the same on every device.

Two stages: `launch` gives all its work to the device and waits for none of it, so that the next step can be given to
the device behind it; what came out reaches the host in one copy, which `Pending.result` waits for.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import torch
from torch import Tensor

from memlane.request import TokenLogprobs
from memlane.runner.penalties import adjust, reads_history
from memlane.runner.random_numbers import uniform
from memlane.runner.transfer import Download, upload
from memlane.scheduler import Sequence

__all__ = ["Greedy", "Pending", "PendingGreedy", "Sampled", "launch"]

_LEAST = torch.finfo(torch.float32).tiny


class Sampled(NamedTuple):
    """A token chosen for one sequence, or None where its logits were not finite."""

    token_id: int | None
    logprobs: TokenLogprobs | None


class Pending:
    """Tokens that the device chooses, or is about to.

    tokens: int64 [n] on the device, for the next step to read: 0 where logits were not finite.

    What travels to the host, as one vector (fp64 holds every token id and every fp32 exactly):

        | tokens [n] | finite [n] | logprob, rank, best ids, their logprobs  [reports, 2 + 2 * best] |
    """

    def __init__(
        self, tokens: Tensor, finite: Tensor, reports: Tensor | None, reported: list[_Reported]
    ) -> None:
        """reports: fp64 [reports, 2 + 2 * best] for the rows named in `reported`."""
        self.tokens = tokens
        self._reported = reported
        parts = [tokens, finite] if reports is None else [tokens, finite, reports.flatten()]
        self._download = Download(torch.cat(parts))

    @classmethod
    def nothing(cls) -> Pending:
        """What comes of no rows."""
        return cls(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool), None, [])

    def result(self) -> list[Sampled]:
        """One result for each row. Waits until they are there."""
        values, n = self._download.wait().tolist(), len(self.tokens)
        found = [
            Sampled(int(token) if finite else None, None)
            for token, finite in zip(values[:n], values[n : 2 * n], strict=True)
        ]
        width = (len(values) - 2 * n) // len(self._reported) if self._reported else 0
        for i, (row, best) in enumerate(self._reported):
            token = found[row].token_id
            if token is not None:
                report = values[2 * n + i * width : 2 * n + (i + 1) * width]
                found[row] = Sampled(token, _logprobs(token, report, best))
        return found


class PendingGreedy:
    """As Pending, of choices that the device makes along with the logits."""

    def __init__(self, greedy: Greedy) -> None:
        self.tokens = greedy.tokens
        self._download = Download(greedy.choices)

    def result(self) -> list[Sampled]:
        """As Pending."""
        return [Sampled(None if token < 0 else token, None) for token in self._download.wait().tolist()]


class Greedy(NamedTuple):
    """What would be chosen if nobody asked for anything but the best logits, as the device works it out with the logits.

    tokens, choices int64 [n]: the same, but where logits are not finite, a token 0 and a choice -1.
    """

    tokens: Tensor
    choices: Tensor


def _plain(sequence: Sequence | None) -> bool:
    """Whether it takes what is best, and nothing else of the logits matters."""
    if sequence is None:
        return True
    p = sequence.params
    untouched = not (p.logit_bias or reads_history(sequence) or p.min_tokens > sequence.output_length)
    return p.greedy and p.logprobs is None and untouched


class _Reported(NamedTuple):
    """A row whose log-probabilities were asked for, with so many of the best ones."""

    row: int
    best: int


@torch.inference_mode()
def launch(
    logits: Tensor, sequences: SequenceOf[Sequence | None], greedy: Greedy | None = None
) -> Pending | PendingGreedy:
    """Choose a token for each row of logits fp32 [n, vocab], which may be overwritten; waits for nothing. n > 0.

    Of a row without a sequence only whether it is finite means anything. greedy: of these logits, if it is known.
    """
    if greedy is not None and all(map(_plain, sequences)):
        return PendingGreedy(greedy)
    # One pass finds any inf or NaN: both survive summing, and finite fp32 logits cannot overflow.
    finite = torch.isfinite(logits.sum(-1))
    reported = [
        _Reported(row, min(s.params.logprobs, logits.shape[-1]))
        for row, s in enumerate(sequences)
        if s is not None and s.params.logprobs is not None
    ]
    rows = upload([row for row, _ in reported], torch.int64, logits.device) if reported else None
    logprobs = None if rows is None else torch.log_softmax(logits.index_select(0, rows), dim=-1)
    adjust(logits, sequences)
    # Where logits are not finite anything may have been chosen, a number past the vocabulary even.
    tokens = _choose(logits, sequences).mul_(finite)
    if rows is None or logprobs is None:
        return Pending(tokens, finite, None, [])
    reports = _report(logprobs, tokens.index_select(0, rows), max(best for _, best in reported))
    return Pending(tokens, finite, reports, reported)


def _choose(logits: Tensor, sequences: SequenceOf[Sequence | None]) -> Tensor:
    """Tokens int64 [n]: those of the greatest logits, or drawn ones where a sequence wants that."""
    drawing = [row for row, s in enumerate(sequences) if s is not None and not s.params.greedy]
    if not drawing:
        return logits.argmax(-1)
    wanting = [s for s in sequences if s is not None and not s.params.greedy]
    parameters = _Parameters(drawing, wanting, logits.device)
    if len(drawing) == len(sequences):
        return _draw(logits, wanting, parameters)
    rows = parameters.rows
    drawn = _draw(logits.index_select(0, rows), wanting, parameters)
    return logits.argmax(-1).index_copy_(0, rows, drawn)


class _Parameters:
    """What draws depend on, on the device: brought there in one copy, as fp64, which holds all of it exactly.

    Each [n, 1] in the dtype that it is used in, except `rows`, int64 [n]: those of the logits.
    """

    def __init__(self, rows: list[int], sequences: SequenceOf[Sequence], device: torch.device) -> None:
        p = [s.params for s in sequences]
        columns: SequenceOf[SequenceOf[float]] = [
            rows,
            # No temperature below the least normal fp32: with the best logit at 0, the least ones then give 0 and -inf,
            # never NaN.
            [max(x.temperature, _LEAST) for x in p],
            [x.min_p for x in p],
            [x.top_k if x.top_k > 0 else 2**31 for x in p],
            [x.top_p for x in p],
            [uniform(s.seed, s.output_length) for s in sequences],
        ]
        self._packed = upload(columns, torch.float64, device).unsqueeze(-1)

    @property
    def rows(self) -> Tensor:
        return self._packed[0, :, 0].long()

    @property
    def temperature(self) -> Tensor:
        return self._packed[1].float()

    @property
    def min_p(self) -> Tensor:
        return self._packed[2].float()

    @property
    def top_k(self) -> Tensor:
        return self._packed[3].long()

    @property
    def top_p(self) -> Tensor:
        return self._packed[4]

    @property
    def at(self) -> Tensor:
        """The numbers that draws take, in (0, 1)."""
        return self._packed[5]


def _draw(logits: Tensor, sequences: SequenceOf[Sequence], parameters: _Parameters) -> Tensor:
    """One random token for each row of logits [n, vocab], all finite or -inf. int64 [n]."""
    logits = (logits - logits.amax(-1, keepdim=True)) / parameters.temperature
    logits = _truncate(logits, sequences, parameters)
    # fp64: the running sum over a large vocabulary must not swallow small probabilities.
    cumulative = torch.softmax(logits, dim=-1, dtype=torch.float64).cumsum_(-1)
    # The first token whose sum reaches the draw. The draw is above 0 and at most the total, so that token exists and
    # has a probability above 0, however the sums were rounded.
    return torch.searchsorted(cumulative, parameters.at * cumulative[:, -1:])[:, 0]


def _truncate(logits: Tensor, sequences: SequenceOf[Sequence], parameters: _Parameters) -> Tensor:
    """Set to -inf what min_p, top_k and top_p exclude. The most likely token always stays."""
    vocab = logits.shape[-1]
    if any(s.params.min_p > 0 for s in sequences):
        probs = torch.softmax(logits, dim=-1)
        logits = logits.masked_fill(probs < parameters.min_p * probs.amax(-1, keepdim=True), float("-inf"))
    most = max(k if 0 < (k := s.params.top_k) < vocab else vocab for s in sequences)
    cut_k = any(0 < s.params.top_k < vocab for s in sequences)
    cut_p = any(s.params.top_p < 1.0 for s in sequences)
    if not (cut_k or cut_p):
        return logits
    best, ids = logits.topk(most, dim=-1) if most < vocab else logits.sort(dim=-1, descending=True)
    rank = torch.arange(best.shape[-1], device=logits.device)
    best = best.masked_fill(rank >= parameters.top_k, float("-inf"))
    if cut_p:
        probs = torch.softmax(best, dim=-1, dtype=torch.float64)
        before = (
            probs.cumsum(-1) - probs
        )  # mass of the better ones: a token stays while that is short of top_p
        limit = parameters.top_p
        best = best.masked_fill((before >= limit) & (rank > 0) & (limit < 1.0), float("-inf"))
    return torch.full_like(logits, float("-inf")).scatter_(-1, ids, best)


def _report(logprobs: Tensor, tokens: Tensor, best: int) -> Tensor:
    """logprobs fp32 [n, vocab] and the tokens int64 [n] chosen -> fp64 [n, 2 + 2 * best], laid out as `Pending` says."""
    chosen = logprobs.gather(1, tokens[:, None])
    rank = 1 + (logprobs > chosen).sum(1, keepdim=True)
    values, ids = logprobs.topk(best, dim=-1)
    return torch.cat([part.double() for part in (chosen, rank, ids, values)], dim=1)


def _logprobs(token: int, report: list[float], count: int) -> TokenLogprobs:
    """A line of `_report`, of which `count` of the best were asked for."""
    best = (len(report) - 2) // 2
    ids, values = report[2 : 2 + count], report[2 + best : 2 + best + count]
    return TokenLogprobs(
        token, report[0], int(report[1]), [(int(i), v) for i, v in zip(ids, values, strict=True)]
    )
