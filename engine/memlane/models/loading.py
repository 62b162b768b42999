"""From a checkpoint to a model that can run: dense weights in memory, tables opened where the user wants them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch

from memlane.checkpoints import open_directory, read_config, resolve, verify
from memlane.checkpoints.cache import cache_root
from memlane.checkpoints.directory import DENSE, table_file_name
from memlane.checkpoints.source import Checkpoint
from memlane.errors import CheckpointError, ConfigError
from memlane.models.config import DTYPES, ModelConfig
from memlane.models.transformer import Transformer
from memlane.tables import ServedTable, Table, TableLayout, ValueTable
from memlane.tables.device import device_speed
from memlane.tables.errors import TableError
from memlane.tables.gpu_open import GpuTableOptions, open_gpu_table
from memlane.tables.layout import RowFormat
from memlane.tables.source import DEADLINE, MERGE_GAP, FileIO
from memlane.tables.table import Placement, Reading

__all__ = ["GpuOptions", "LoadedModel", "TableOptions", "load_model", "served_dtype", "table_bytes"]

# Weights that stay fp32 in a bf16 model: those that choose rows (near-ties flip rows), and norm gains, which multiply
# before the cast.
_ALWAYS_FP32 = (
    "memory.keys",
    "memory.query.weight",
    "memory.query.bias",
    "memory.log_score_scale",
    "norm.weight",
)

# Table files without checksums of their pages are verified whole at start, up to this size; larger ones would delay it.
_VERIFY_BYTES = 256 << 20


@dataclass(frozen=True)
class TableOptions:
    """How tables are opened. The fields of ValueTable.open; cache_bytes is divided among the tables of a model."""

    placement: Placement = "host"
    cache_bytes: int = 0
    policy: str = "lru"
    io: FileIO = "auto"
    deadline: float = DEADLINE
    shared: bool = False
    gpu: GpuOptions | None = None


@dataclass(frozen=True)
class GpuOptions:
    """What is different where a GPU reads tables. row_cache_bytes: of its memory, divided among the tables of a model.

    device: "cpu" runs the same code over the kernels' twins. sequences: that are decoded at once.
    """

    device: torch.device
    row_cache_bytes: int = 0
    sequences: int = 1


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run. Owns its tables: close it, or use it as a context manager.

    directory: the model directory it was loaded from, where tokenizer files lie. hot_rows: files of row ids, most read
    first, for the tables that have one.
    """

    config: ModelConfig
    transformer: Transformer
    tables: dict[str, ServedTable]
    directory: Path
    hot_rows: Mapping[str, Path] = field(default_factory=dict)

    def close(self) -> None:
        """Close all tables."""
        for table in self.tables.values():
            table.close()

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load_model(
    path: str | Path,
    *,
    tables: TableOptions = TableOptions(),
    dtype: str = "auto",
    tokenizer: str | Path | None = None,
) -> LoadedModel:
    """Load a checkpoint of any form that `convert` reads; foreign forms are converted once into the cache directory.

    tables: "host" (in RAM) or "disk" (read row by row through a cache), and on a GPU "device". Dense weights go to the
    GPU where tables are read by one. dtype: of the dense weights, "auto" for the one
    the checkpoint names. Raises CheckpointError naming the file and its defect, ConfigError on options that cannot work.
    """
    directory = resolve(path, tokenizer=tokenizer)
    checkpoint = open_directory(directory)
    config = checkpoint.config
    weights_dtype = _dtype(dtype, config)
    verify(directory, [DENSE])
    with ExitStack() as opened:
        opened_tables = {}
        for name in config.table_names():
            opened_tables[name] = _open_table(directory, config, name, tables)
            opened.callback(opened_tables[name].close)
        device = torch.device("cpu") if tables.gpu is None else tables.gpu.device
        transformer = _build(checkpoint, opened_tables, weights_dtype, device)
        opened.pop_all()  # loaded: the tables now belong to the LoadedModel
    return LoadedModel(config, transformer, opened_tables, directory, checkpoint.hot_rows)


def table_bytes(directory: Path) -> int:
    """Bytes of all tables of a model directory together, as a cache budget is stated in parts of it."""
    config = read_config(directory)
    memory = config.memory
    return 0 if memory is None else memory.rows * memory.row_bytes * len(config.table_names())


def served_dtype(weight: str, dtype: torch.dtype) -> torch.dtype:
    """What a dense weight is held in by a model of that dtype."""
    return torch.float32 if weight.endswith(_ALWAYS_FP32) else dtype


def _dtype(dtype: str, config: ModelConfig) -> torch.dtype:
    name = config.dtype if dtype == "auto" else dtype
    if name not in DTYPES:
        raise ConfigError(f"dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}")
    found = getattr(torch, name)
    assert isinstance(found, torch.dtype)
    return found


def _open_table(directory: Path, config: ModelConfig, name: str, options: TableOptions) -> ServedTable:
    """One table with its part of the cache budget: all tables of a model are of one size, so the parts are equal."""
    memory = config.memory
    assert memory is not None
    path = directory / table_file_name(name)
    share = options.cache_bytes // len(config.table_names())
    try:
        layout = TableLayout.from_safetensors(path, name, RowFormat(memory.row_format), memory.value_dim)
        if layout.checksum_offset is None and layout.nbytes <= _VERIFY_BYTES:
            verify(directory, [path.name])  # its pages cannot be verified as they are read
        speed = device_speed(layout, cache_root() / "devices.json", options.io)
        merge_gap = MERGE_GAP if speed is None else speed.merge_gap
        reading = Reading(options.policy, options.io, merge_gap, options.deadline)
        if options.gpu is not None:
            return open_gpu_table(layout, _on_gpu(config, options, options.gpu), reading, share)
        return ValueTable.open(layout, options.placement, share, shared=options.shared, **reading._asdict())
    except TableError as error:
        raise CheckpointError(path, str(error)) from error


def _on_gpu(config: ModelConfig, options: TableOptions, gpu: GpuOptions) -> GpuTableOptions:
    memory, names = config.memory, config.table_names()
    assert memory is not None
    return GpuTableOptions(
        device=gpu.device,
        placement=options.placement,
        cache_bytes=gpu.row_cache_bytes // len(names),
        decode_ids=gpu.sequences * memory.rows_per_token,
        reads_per_token=memory.rows_per_token * (len(memory.layers) if memory.shared else 1),
        shared=options.shared,
    )


def _build(
    checkpoint: Checkpoint, tables: Mapping[str, Table], dtype: torch.dtype, device: torch.device
) -> Transformer:
    """The model over open tables, its weights read one by one so that no second copy of them is ever whole."""
    with torch.device("meta"):
        model = Transformer(checkpoint.config, tables)
    weights = {}
    for tensor in checkpoint.dense:
        weights[tensor.name] = tensor.load().to(served_dtype(tensor.name, dtype)).to(device)
    model.load_state_dict(weights, assign=True)
    return model.requires_grad_(False).eval()
