"""A batch of decodes in tensors that stay where they are, so that a captured graph finds them when it is replayed.

    row 0   token  position  slot          length  | blocks of its sequence ....... | its last block again ........ |
    row 1   token  position  slot          length  | ...
    row 2   as row 1, but    the sink                as row 1                           a row that only fills up

Host arrays hold the truth. Each step writes into them what changed, and sends that to the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlane.scheduler import StepPlan

__all__ = ["DecodeBatch", "DecodeBatches"]


@dataclass(frozen=True, eq=False)
class DecodeBatch:
    """The first n rows, on the device; compared by identity. The same tensors in every step, with other numbers in them.

    token_ids int64 [n]: where below 0, see `batch.resolve`. positions, slots int64 [n]: as in Batch. lengths int32 [n]:
    positions that a row sees, its own included. tables int32 [n, m]: the blocks that hold its first `longest` positions,
    each row padded with its own last block. longest: no row of a step that runs with this batch is longer. live int64
    [1]: of the ids that its rows look up in a table, how many are not of padding; see `Table.begin`.
    host_lengths, host_tables: lengths and tables on the host, for libraries that plan there.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    lengths: Tensor
    tables: Tensor
    live: Tensor
    longest: int
    block_size: int
    host_lengths: NDArray[np.int32]
    host_tables: NDArray[np.int32]

    @property
    def n(self) -> int:
        return len(self.slots)

    def part(self, begin: int, end: int, live: Tensor) -> DecodeBatch:
        """Some rows of it, over the same tensors; `live` is theirs."""
        return replace(
            self,
            token_ids=self.token_ids[begin:end],
            positions=self.positions[begin:end],
            slots=self.slots[begin:end],
            lengths=self.lengths[begin:end],
            tables=self.tables[begin:end],
            live=live,
            host_lengths=self.host_lengths[begin:end],
            host_tables=self.host_tables[begin:end],
        )


class _Held(NamedTuple):
    """What a row's table holds: so many blocks of this list. A sequence only appends to its list; where it gives its
    blocks up it begins another."""

    blocks: list[int]
    number: int


class DecodeBatches:
    """Up to `rows` rows, of which decode batches of any size are views. One thread owns it, and uses one stream.

    Graphs that read the tensors may still run when the next step is filled in: its copies queue behind them.
    """

    def __init__(
        self,
        rows: int,
        max_length: int,
        block_size: int,
        sink: int,
        device: torch.device | str = "cpu",
        ids_per_row: int = 1,
    ) -> None:
        """max_length: of any sequence, in tokens. sink: the slot that rows without a sequence write to. ids_per_row: that a
        token looks up in a table at once."""
        self.rows, self.max_length = rows, max_length
        self.block_size, self.sink = block_size, sink
        device = torch.device(device)
        pin = device.type == "cuda"
        blocks = -(-max_length // block_size)
        # Tokens, positions, slots; and `live` of the whole batch and of each half.
        self._numbers = torch.zeros(4, max(3, rows), dtype=torch.int64, pin_memory=pin)
        self._ids_per_row = ids_per_row
        self._numbers[2] = sink  # until the first step, as when graphs are captured
        self._lengths = torch.ones(rows, dtype=torch.int32, pin_memory=pin)
        self._tables = torch.zeros(rows, blocks, dtype=torch.int32, pin_memory=pin)
        self._device_numbers = self._numbers.to(device, copy=True)
        self._device_lengths = self._lengths.to(device, copy=True)
        self._device_tables = self._tables.to(device, copy=True)
        self.tokens, self.positions, self.slots, self._live = self._numbers.numpy()
        self.lengths: NDArray[np.int32] = self._lengths.numpy()
        self.tables: NDArray[np.int32] = self._tables.numpy()
        self._held = [_Held([], 0)] * rows
        self._sent = torch.cuda.Event() if pin else None  # type: ignore[no-untyped-call]
        self._batches: dict[tuple[int, int], DecodeBatch] = {}

    def batch(self, n: int, longest: int | None = None) -> DecodeBatch:
        """The first n rows, for steps of at most `longest` positions (max_length); asked again, the same object."""
        longest = self.max_length if longest is None else longest
        assert 0 < n <= self.rows, f"{n} rows of {self.rows}"
        assert 0 < longest <= self.max_length, f"{longest} positions of {self.max_length}"
        if (n, longest) not in self._batches:
            token_ids, positions, slots, _ = self._device_numbers[:, :n]
            blocks = -(-longest // self.block_size)
            self._batches[n, longest] = DecodeBatch(
                token_ids=token_ids,
                positions=positions,
                slots=slots,
                lengths=self._device_lengths[:n],
                tables=self._device_tables[:n, :blocks],
                live=self._device_numbers[3, :1],
                longest=longest,
                block_size=self.block_size,
                host_lengths=self.lengths[:n],
                host_tables=self.tables[:n, :blocks],
            )
        return self._batches[n, longest]

    def halves(self, n: int, longest: int | None = None) -> tuple[DecodeBatch, DecodeBatch]:
        """The first n rows, 2 or more, in two batches: rows up to n // 2, and the others."""
        whole, middle, live = self.batch(n, longest), n // 2, self._device_numbers[3]
        return whole.part(0, middle, live[1:2]), whole.part(middle, n, live[2:3])

    def fill(self, plan: StepPlan, n: int) -> int:
        """Take in a plan of single tokens, filled up to n rows. Returns the longest length, which `batch` must cover.

        The plan must not be empty, and must not have more than n chunks.
        """
        chunks, live = plan.chunks, len(plan.chunks)
        assert plan.all_single, f"{live} chunks, of which {plan.singles} have one token"
        assert 0 < live <= n <= self.rows, f"{live} chunks into {n} of {self.rows} rows"
        if self._sent is not None:
            self._sent.synchronize()  # what the step before sent may not have left these arrays yet
        self.tokens[:live] = [chunk.sequence.token_ids[chunk.start] for chunk in chunks]
        positions = self.positions[:live]
        positions[:] = [chunk.start for chunk in chunks]
        self.lengths[:live] = positions + 1
        block, offset = np.divmod(positions, self.block_size)
        changed = [
            row
            for row, chunk in enumerate(chunks)
            if self._write_table(row, chunk.sequence.blocks, int(block[row]) + 1)
        ]
        self.slots[:live] = self.tables[np.arange(live), block].astype(np.int64) * self.block_size + offset
        last = live - 1
        for numbers in (self.tokens, self.positions, self.lengths):
            numbers[live:n] = numbers[last]
        self.slots[live:n] = self.sink
        first = min(live, n // 2)
        self._live[:3] = np.array([live, first, live - first]) * self._ids_per_row
        changed += [row for row in range(live, n) if self._copy_table(row, last)]
        self._send(changed)
        return int(self.lengths[:live].max())

    def _write_table(self, row: int, blocks: list[int], count: int) -> bool:
        """Let a row hold the first `count` of these blocks; whether anything had to be written for that."""
        held = self._held[row]
        known = held.number if held.blocks is blocks and held.number <= count else 0
        if known == count:
            return False
        table = self.tables[row]
        table[known:count] = blocks[known:count]
        # Padding is masked, but a NaN shows through a mask, and another sequence's block may hold one.
        table[count:] = table[count - 1]
        self._held[row] = _Held(blocks, count)
        return True

    def _copy_table(self, row: int, source: int) -> bool:
        """As `_write_table`: let a row hold what another one does."""
        held, wanted = self._held[row], self._held[source]
        if held.blocks is wanted.blocks and held.number == wanted.number:
            return False
        self.tables[row] = self.tables[source]
        self._held[row] = wanted
        return True

    def _send(self, changed: list[int]) -> None:
        """Copy to the device; of the tables only the rows from the first to the last that changed."""
        self._device_numbers.copy_(self._numbers, non_blocking=True)
        self._device_lengths.copy_(self._lengths, non_blocking=True)
        if changed:
            rows = slice(min(changed), max(changed) + 1)
            self._device_tables[rows].copy_(self._tables[rows], non_blocking=True)
        if self._sent is not None:
            self._sent.record()
