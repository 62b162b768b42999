"""A step plan as tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from memlane.scheduler import StepPlan

__all__ = ["Batch", "Prefill", "make_batch"]


class Prefill(NamedTuple):
    """A chunk of several tokens: flat tokens begin … end - 1, of a sequence that has `start` computed before them.

    table: int64 [1, m], the blocks that hold positions 0 … start + (end - begin) - 1; None if start is 0, when all
    there is to attend to is in the chunk.
    """

    begin: int
    end: int
    start: int
    table: Tensor | None


class Batch(NamedTuple):
    """Tensors of a step; T tokens in plan order, the first `singles` of them alone in their chunks.

    token_ids, positions, slots: int64 [T]. tables: int64 [singles, m], each padded with its own last block: padding is
    masked, but a NaN shows through a mask, and another sequence's block may hold one. lengths: int64 [singles],
    positions each single token sees, its own included.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    singles: int
    tables: Tensor
    lengths: Tensor
    longest: int
    prefills: list[Prefill]


def make_batch(
    plan: StepPlan, block_size: int, device: torch.device | str = "cpu", previous: Tensor | None = None
) -> Batch:
    """Read tokens and block tables of the planned sequences; changes nothing.

    previous: tokens int64 [n] that the step before sampled, on the device. Tokens that are still expected are its rows.
    """
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    tables: list[list[int]] = []
    prefills: list[Prefill] = []
    for chunk in plan.chunks[: plan.singles]:
        sequence, position = chunk.sequence, chunk.start
        block = position // block_size
        token_ids.append(sequence.token_ids[position])
        positions.append(position)
        slots.append(sequence.blocks[block] * block_size + position % block_size)
        tables.append(sequence.blocks[: block + 1])
    longest = max(positions, default=-1) + 1
    lengths = [position + 1 for position in positions]
    for chunk in plan.chunks[plan.singles :]:
        sequence, begin, stop = chunk.sequence, len(token_ids), chunk.start + chunk.length
        token_ids += sequence.token_ids[chunk.start : stop]
        positions += range(chunk.start, stop)
        slots += [
            sequence.blocks[p // block_size] * block_size + p % block_size for p in range(chunk.start, stop)
        ]
        table = sequence.blocks[: -(-stop // block_size)]
        prefills.append(
            Prefill(
                begin,
                len(token_ids),
                chunk.start,
                torch.tensor([table], device=device) if chunk.start else None,
            )
        )
    widest = max(map(len, tables), default=0)
    flat = torch.tensor([token_ids, positions, slots], dtype=torch.int64, device=device)
    if min(token_ids, default=0) < 0:
        assert previous is not None, "a placeholder is no token"
        flat[0] = _resolve(flat[0], previous)
    return Batch(
        token_ids=flat[0],
        positions=flat[1],
        slots=flat[2],
        singles=plan.singles,
        tables=torch.tensor(
            [table + table[-1:] * (widest - len(table)) for table in tables], dtype=torch.int64, device=device
        ),
        lengths=torch.tensor(lengths, dtype=torch.int64, device=device),
        longest=longest,
        prefills=prefills,
    )


def _resolve(token_ids: Tensor, previous: Tensor) -> Tensor:
    """token_ids int64 [T] with previous[row] in place of each -(row + 1), which in two's complement is ~row."""
    return torch.where(token_ids < 0, previous.index_select(0, (~token_ids).clamp_(min=0)), token_ids)
