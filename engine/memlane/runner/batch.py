"""A step plan as tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memlane.models.layers import resolve
from memlane.runner.transfer import upload
from memlane.scheduler import StepPlan

__all__ = ["Batch", "Prefill", "make_batch", "resolve"]


class Prefill(NamedTuple):
    """A chunk of several tokens: flat tokens begin … end - 1, of a sequence that has `start` computed before them."""

    begin: int
    end: int
    start: int


class Batch(NamedTuple):
    """A step of T tokens in plan order; the first `singles` of its chunks are of one token each, then come `prefills`.

    token_ids, positions, slots: int64 [T], on the device. lengths, blocks: for each chunk, on the host, the positions
    that its last token sees, its own included, and the blocks that hold them.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    singles: int
    prefills: list[Prefill]
    lengths: list[int]
    blocks: list[list[int]]


def make_batch(
    plan: StepPlan, block_size: int, device: torch.device | str = "cpu", previous: Tensor | None = None
) -> Batch:
    """Read tokens and block tables of the planned sequences; changes nothing.

    previous: tokens int64 [n] that the step before sampled, on the device. Tokens that are still expected are its rows.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    lengths: list[int] = []
    blocks: list[list[int]] = []
    prefills: list[Prefill] = []
    for chunk in plan.chunks[: plan.singles]:
        sequence, position = chunk.sequence, chunk.start
        block = position // block_size
        token_ids.append(sequence.token_ids[position])
        positions.append(position)
        slots.append(sequence.blocks[block] * block_size + position % block_size)
        lengths.append(position + 1)
        blocks.append(sequence.blocks[: block + 1])
    for chunk in plan.chunks[plan.singles :]:
        sequence, begin, stop = chunk.sequence, len(token_ids), chunk.start + chunk.length
        token_ids += sequence.token_ids[chunk.start : stop]
        positions += range(chunk.start, stop)
        slots += [
            sequence.blocks[p // block_size] * block_size + p % block_size for p in range(chunk.start, stop)
        ]
        lengths.append(stop)
        blocks.append(sequence.blocks[: -(-stop // block_size)])
        prefills.append(Prefill(begin, len(token_ids), chunk.start))
    flat = upload([token_ids, positions, slots], torch.int64, torch.device(device))
    if min(token_ids, default=0) < 0:
        assert previous is not None, "a placeholder is no token"
        flat[0] = resolve(flat[0], previous)
    return Batch(
        token_ids=flat[0],
        positions=flat[1],
        slots=flat[2],
        singles=plan.singles,
        prefills=prefills,
        lengths=lengths,
        blocks=blocks,
    )
