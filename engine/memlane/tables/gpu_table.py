"""Value tables that a GPU reads: rows in its own memory, or behind a row cache there. Results do not depend on which.

weighted_sum(ids, weights) = begin(ids).weighted_sum(weights), as for ValueTable; what lies between is a store's:
see gpu_stores.py. On the CPU the same code runs over the kernels' torch twins.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from memlane.kernels import RowMemory
from memlane.kernels.choice import row_kernels
from memlane.tables.at_once import AtOnce
from memlane.tables.cache import Ids
from memlane.tables.errors import RowReadError, TableError
from memlane.tables.gpu_stores import Store, StoredRows
from memlane.tables.layout import TableLayout
from memlane.tables.stats import TableStats
from memlane.tables.table import Placement, ValueTable

__all__ = ["GpuLookup", "GpuTable"]


class GpuTable(AtOnce):
    """A table on a GPU, over a store that says where its rows are. One thread uses it; stats() and tiers() are anyone's.

    Row ids come from the model's own product keys and are not checked: looking at them would stop the GPU.

    recorder: called with the flat ids of each lookup, if set; each lookup then waits for its ids.
    """

    def __init__(self, layout: TableLayout, store: Store, device: torch.device) -> None:
        """Owns the store: closed with the table. See `gpu_stores` for the kinds."""
        self.layout = layout
        self.device = device
        self.recorder: Callable[[Ids], None] | None = None
        self.store = store
        self._closed = False

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def rows(self) -> int:
        return self.layout.rows

    @property
    def width(self) -> int:
        return self.layout.width

    @property
    def placement(self) -> Placement:
        return self.store.placement

    @property
    def on_disk(self) -> ValueTable | None:
        """The table that reads the file through a cache in RAM, where there is one."""
        return self.store.on_disk

    @property
    def most_ids(self) -> int | None:
        """That a lookup can take in one part, None: any number. Lookups in parts must not be open beside others."""
        return self.store.most_ids

    def begin(self, ids: Tensor, live: Tensor | None = None) -> GpuLookup:
        """ids int32 or int64 [tokens, k] on the device: looks them up and starts what brings missing rows.

        live: as the protocol has it. ValueError where such ids would be looked up in parts.
        """
        if self._closed:
            raise TableError(f"table {self.name!r} is closed")
        if ids.dtype not in (torch.int32, torch.int64) or ids.device.type != self.device.type:
            raise TypeError(f"ids must be int32 or int64 on {self.device}, not {ids.dtype} on {ids.device}")
        if ids.dim() != 2:
            raise ValueError(f"ids must have 2 dimensions, not shape {list(ids.shape)}")
        if self.recorder is not None:
            self.recorder(ids.flatten().cpu().numpy())
        return GpuLookup(self, ids.contiguous(), live)

    def start_warming(self, row_ids: Sequence[int] | NDArray[np.int64] | Tensor, pin: int = 0) -> None:
        """As ValueTable's, of the cache in RAM behind the GPU's; the latter fills as it is used."""
        if self.on_disk is not None:
            self.on_disk.start_warming(row_ids, pin)

    def warm_some(self, patience: float = 0.0) -> bool:
        """As ValueTable's, of the cache in RAM."""
        return self.on_disk is not None and self.on_disk.warm_some(patience)

    def ranking(self) -> NDArray[np.int64]:
        """As ValueTable's, of the cache in RAM."""
        return np.empty(0, np.int64) if self.on_disk is None else self.on_disk.ranking()

    @property
    def stall_seconds(self) -> float:
        """Time for which missing rows were waited for, or would have been had nothing else been done meanwhile."""
        return self.store.stall_seconds

    def start_counting(self) -> None:
        """Counters of the GPU's cache begin anew: after steps that only warmed kernels up."""
        self.store.start_counting()

    def note_tokens(self, tokens: int) -> None:
        """So many tokens were computed with this table: what replayed graphs read is not seen otherwise."""
        self.store.note_tokens(tokens)

    def abandon(self) -> None:
        """After a step that broke off: forgets rows whose slots were taken and that may never have come."""
        self.store.abandon()

    def stats(self) -> TableStats:
        """The counters of the first tier: the GPU's own."""
        return self.store.tiers()[0]

    def tiers(self) -> list[TableStats]:
        """The counters of each cache that a row passes, the GPU's first."""
        return self.store.tiers()

    def check_integrity(self) -> None:
        """AssertionError if a cache contradicts itself. Walks everything and stops the GPU: for tests."""
        self.store.check_integrity()

    def close(self) -> None:
        """Gives memory and files back. Idempotent."""
        self._closed = True
        self.store.close()


class GpuLookup:
    """ids [tokens, k] asked for. See `memlane.tables.protocol.Lookup`.

    Where rows go through the host, more ids than the scratch region has slots are looked up in parts of whole tokens,
    one after another: however full the cache's sets are, each row of a part then finds a slot.
    """

    def __init__(self, table: GpuTable, ids: Tensor, live: Tensor | None) -> None:
        """Use GpuTable.begin. RuntimeError in a capture where there would be parts: the host must come in between."""
        self._table, self._ids, self._live = table, ids, live
        self._tokens, self._k = ids.shape
        most = table.store.most_ids
        self._step = max(1, self._tokens if most is None else most // max(1, self._k))
        if self.in_parts and table.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(f"table {table.name!r}: {ids.numel()} ids are looked up in parts")
        if self.in_parts and live is not None:
            raise ValueError(
                f"table {table.name!r}: {ids.numel()} ids of a padded batch are looked up in parts"
            )
        self._kernels = row_kernels(table.device)
        self._ended = False
        self._rows: StoredRows | None = None  # of the part that is open
        self._latest: StoredRows | None = None  # of the part that was opened last
        self._begin = 0  # of the part that is open
        if self._tokens and self._k:
            self._open()

    @property
    def in_parts(self) -> bool:
        """Whether there is more than one part: a graph cannot be captured of that."""
        return self._step < self._tokens

    def launched(self) -> None:
        if self._latest is not None:
            self._latest.launched()

    def fetch(self) -> None:
        """Also after the end: a graph that was captured of this lookup is replayed over the same rows."""
        if self._latest is not None:
            self._bring(self._latest)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """weights fp32 [tokens, k] -> fp32 [tokens, width], added in the order of k as everywhere."""
        self._check(weights, (self._tokens, self._k), "weights")
        return self._end(
            self._table.width,
            lambda near, slots, far, part: self._kernels.weighted_sum(near, slots, weights[part], far),
        )

    def dot(self, x: Tensor) -> Tensor:
        """x fp32 [tokens, width] -> fp32 [tokens, k]: each row with its token's x."""
        self._check(x, (self._tokens, self._table.width), "x")
        return self._end(self._k, lambda near, slots, far, part: self._kernels.dot(near, slots, x[part], far))

    def activations(self, x: Tensor, weights: Tensor) -> Tensor:
        """x fp32 [tokens, width], weights fp32 [tokens, k] -> gelu(row . x) * weights, fp32 [tokens, k], in one kernel."""
        self._check(x, (self._tokens, self._table.width), "x")
        self._check(weights, (self._tokens, self._k), "weights")
        return self._end(
            self._k,
            lambda near, slots, far, part: self._kernels.activations(
                near, slots, x[part], weights[part], far
            ),
        )

    def gather(self) -> Tensor:
        """The rows as fp32 [tokens * k, width]."""
        width = self._table.width
        return self._end(
            self._k * width, lambda near, slots, far, part: self._kernels.gather(near, slots.flatten(), far)
        ).view(-1, width)

    def close(self) -> None:
        self._ended = True
        if self._rows is not None:
            self._rows.close()
            self._rows = None

    def _open(self) -> None:
        part = self._ids[self._begin : self._begin + self._step]
        self._rows = self._latest = self._table.store.begin(part.flatten(), self._live)

    def _bring(self, rows: StoredRows) -> None:
        try:
            rows.fetch()
        except RowReadError as error:
            raise self._located(error) from None

    def _located(self, error: RowReadError) -> RowReadError:
        """With the tokens, of all parts, that needed the rows."""
        wanted = torch.tensor(error.rows, device=self._ids.device)
        tokens = torch.isin(self._ids, wanted).any(-1).nonzero().flatten()
        return RowReadError(error.table, error.rows, error.reason, tokens.tolist())

    def _end(
        self, columns: int, compute: Callable[[RowMemory, Tensor, RowMemory | None, slice], Tensor]
    ) -> Tensor:
        if self._ended:
            raise TableError(f"a lookup of table {self._table.name!r} was ended twice")
        self._ended = True
        results = []
        while self._rows is not None:
            rows = self._rows
            if not rows.fetched:
                self._bring(rows)
            rows.wait()
            part = slice(self._begin, min(self._begin + self._step, self._tokens))
            slots = rows.slots.view(part.stop - part.start, self._k)
            results.append(compute(rows.near, slots, rows.far, part).view(part.stop - part.start, columns))
            rows.close()
            self._rows = None
            self._begin = part.stop
            if self._begin < self._tokens:
                self._open()
        if not results:
            return torch.zeros(self._tokens, columns, device=self._table.device)
        return torch.cat(results) if len(results) > 1 else results[0]

    def _check(self, values: Tensor, shape: tuple[int, int], what: str) -> None:
        if values.dtype != torch.float32 or values.device.type != self._table.device.type:
            raise TypeError(
                f"{what} must be fp32 on {self._table.device}, not {values.dtype} on {values.device}"
            )
        if values.shape != shape:
            raise ValueError(f"{what} is {list(values.shape)}, expected {list(shape)}")
