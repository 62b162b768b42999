"""Model directories with random weights and a table of any size, written without ever holding the table in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from memlane.checkpoints.directory import CONFIG, DENSE, table_file_name
from memlane.models import ModelConfig, Transformer
from memlane.tables import RowFormat, TableLayout, encode_rows, write_table

BLOCK_BYTES = 16 << 20  # of rows that come over and over


class NoRows:
    """Stands for a table while weights are drawn: it has a shape and no rows."""

    def __init__(self, name: str, rows: int, width: int) -> None:
        self.name, self.rows, self.width = name, rows, width


def write_random_model(directory: Path, config: ModelConfig, seed: int = 0) -> TableLayout:
    """Writes config, dense weights and the one table that all memory layers share; returns where its rows lie.

    The table is a block of random rows of 16 MiB, over and over, so that writing costs the disk's time alone; the block
    is the same whatever the model. Pages have checksums, as in any table of ours.
    """
    memory = config.memory
    assert memory is not None
    assert memory.shared
    directory.mkdir(parents=True)
    torch.manual_seed(seed)
    (name,) = config.table_names()
    with torch.no_grad():
        model = Transformer(config, {name: NoRows(name, memory.rows, memory.value_dim)})
    save_file(model.state_dict(), directory / DENSE)
    row_format = RowFormat(memory.row_format)
    numbers = torch.randn(
        BLOCK_BYTES // memory.row_bytes, memory.value_dim, generator=torch.Generator().manual_seed(seed)
    )
    block = encode_rows(numbers * memory.value_dim**-0.5, row_format)
    layout = write_table(
        directory / table_file_name(name),
        name,
        memory.rows,
        memory.value_dim,
        row_format,
        _over_and_over(block, memory.rows),
    )
    (directory / CONFIG).write_text(json.dumps(config.to_dict()))
    return layout


def random_prompt(rng: np.random.Generator, length: int, vocab: int) -> list[int]:
    return [int(token) for token in rng.integers(0, vocab, length)]


def _over_and_over(block: Tensor, rows: int) -> Iterator[Tensor]:
    for begin in range(0, rows, len(block)):
        yield block[: rows - begin]
