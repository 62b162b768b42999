"""Tables for tests: small files on disk, and what the machine can do with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from memlane.native import force_kernel_variant, get_threads, set_threads
from memlane.tables import RowFormat, TableLayout, write_table

MakeTable = Callable[..., tuple[TableLayout, Tensor]]


@pytest.fixture
def make_table(tmp_path: Path) -> MakeTable:
    """make_table(rows, width, dtype, seed) -> (layout of a file of normal rows, the fp32 rows that went in)."""

    def make(
        rows: int = 1000, width: int = 48, dtype: RowFormat | str = RowFormat.FLOAT32, seed: int = 0
    ) -> tuple[TableLayout, Tensor]:
        values = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
        path = tmp_path / f"{dtype}-{rows}-{width}-{seed}.safetensors"
        return write_table(path, "values", rows, width, dtype, values.split(333)), values

    return make


@pytest.fixture(autouse=True)
def _native_settings() -> Iterator[None]:
    """Whatever a test forces is undone."""
    threads = get_threads()
    yield
    force_kernel_variant("")
    set_threads(threads)
