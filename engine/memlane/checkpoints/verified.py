"""A table of our own form, compared with the checksums in its file while it is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from memlane.checkpoints.source import TableSource
from memlane.errors import CheckpointError
from memlane.tables import TableError, TableLayout
from memlane.tables.checksums import BlockChecksums, read_checksums, rows_of_blocks

__all__ = ["VerifiedRows"]


@dataclass(frozen=True)
class VerifiedRows:
    """`source`, whose bytes lie as `layout` says. Without this a conversion would give damaged rows sound checksums."""

    source: TableSource
    layout: TableLayout

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def rows(self) -> int:
        return self.source.rows

    @property
    def width(self) -> int:
        return self.source.width

    @property
    def row_format(self) -> str:
        return self.source.row_format

    def chunks(self, rows: int) -> Iterator[Tensor]:
        """As the source's. After the last chunk: CheckpointError naming the first block that differs."""
        checksums = BlockChecksums()
        for chunk in self.source.chunks(rows):
            checksums.update(chunk.contiguous().view(torch.uint8).reshape(-1).numpy())
            yield chunk
        try:
            stored = read_checksums(self.layout)
        except (TableError, OSError) as error:
            raise CheckpointError(self.layout.path, f"corrupt: {error}") from error
        if stored is None:
            return
        bad = np.flatnonzero(checksums.finish() != stored)
        if len(bad):
            span = rows_of_blocks(self.layout, int(bad[0]), int(bad[0]))
            raise CheckpointError(
                self.layout.path,
                f"corrupt: rows {span[0]}-{span[-1]} differ from their checksum ({len(bad)} bad blocks in all)",
            )
