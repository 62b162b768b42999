"""What is decided before a model is loaded: the device, and the memory of a GPU that these tests only pretend to have."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from memlane import starting
from memlane.checkpoints.directory import CONFIG
from memlane.choices import Choices
from memlane.config import EngineConfig
from memlane.errors import ConfigError
from memlane.gpu_plan import Card
from memlane.kernels import device_stride
from memlane.models.loading import TableOptions, served_dtype

GIB = 1 << 30
MODEL = dataclasses.replace(
    tiny.CONFIG,
    memory=dataclasses.replace(tiny.MEMORY, layers=(0, 1), num_keys=256, value_dim=1000, row_format="int8"),
)


class Loaded(Exception):
    """What would have been loaded."""

    def __init__(self, options: TableOptions, dtype: str) -> None:
        super().__init__()
        self.options, self.dtype = options, dtype


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / CONFIG).write_text(json.dumps(MODEL.to_dict()))
    monkeypatch.setattr(starting, "resolve", lambda *_, **__: tmp_path)
    return tmp_path


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 8 GiB; loading ends in Loaded."""

    def load(directory: Path, *, tables: TableOptions, dtype: str, tokenizer: Any) -> None:
        raise Loaded(tables, dtype)

    monkeypatch.setattr(Choices, "device", lambda self: torch.device("cuda"))
    monkeypatch.setattr(starting, "_card", lambda device: Card("pretended", 8 * GIB, 8 * GIB))
    monkeypatch.setattr(starting, "load_model", load)
    monkeypatch.setattr(starting, "available_memory", lambda: 64 * GIB)


def begin(directory: Path, **options: Any) -> Loaded:
    config = EngineConfig(model=str(directory), attention_backend="sdpa", **options)
    with pytest.raises(Loaded) as loaded:
        starting.start(config, Choices(config))
    return loaded.value


def test_a_gpu_that_is_not_there_is_refused(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for options, message in [
        ({"device": "cuda"}, "torch finds no CUDA device"),
        ({"device": "cpu", "placement": "device"}, "memory of a GPU"),
        ({"placement": "device"}, "memory of a GPU"),
    ]:
        config = EngineConfig(model=str(directory), **options)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=message):
            starting.start(config, Choices(config))


@pytest.mark.usefixtures("pretended")
def test_tables_and_caches_get_what_the_plan_says(directory: Path) -> None:
    found = begin(directory)
    assert (found.options.placement, found.dtype) == ("device", "bfloat16")
    found = begin(directory, placement="disk", gpu_row_cache="512MiB", row_cache="50%", shared_tables=True)
    assert found.options.placement == "disk"
    assert found.options.gpu is not None
    assert found.options.gpu.row_cache_bytes == 512 << 20
    assert found.options.gpu.sequences == 64
    assert found.options.shared
    memory = MODEL.memory
    assert memory is not None
    assert found.options.cache_bytes == memory.rows * memory.row_bytes // 2
    found = begin(directory, placement="host", dtype="float32")
    assert found.dtype == "float32"
    assert found.options.gpu is not None
    stride = device_stride(memory.row_bytes)
    assert stride == 1008, "rows of 1,002 bytes are laid out in whole vectors"
    assert memory.rows * stride < found.options.gpu.row_cache_bytes < 8 * GIB


@pytest.mark.usefixtures("pretended")
def test_what_cannot_fit_is_refused_before_anything_is_loaded(directory: Path) -> None:
    for options in (
        {"kv_cache": "20GiB"},
        {"gpu_memory_utilization": 0.01},
        {"gpu_row_cache": "1MiB", "placement": "host"},
    ):
        config = EngineConfig(model=str(directory), attention_backend="sdpa", **options)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match=r"MiB|GiB"):
            starting.start(config, Choices(config))


def test_needs_are_those_of_the_weights_as_they_are_held() -> None:
    config = EngineConfig(model="m", max_num_seqs=4)
    needs = starting._needs(config, MODEL, torch.bfloat16, 16, None)
    state = tiny.Transformer(MODEL, {"values": tiny.ReferenceTable(256 * 256, 1000)}).state_dict()
    assert needs.weights == sum(
        weight.numel() * served_dtype(name, torch.bfloat16).itemsize for name, weight in state.items()
    )
    block = MODEL.num_layers * 16 * 2 * MODEL.num_kv_heads * MODEL.head_dim * 2
    assert needs.kv_wanted == 4 * (128 // 16) * block
    assert needs.tables == 256 * 256 * 1008
    dense = dataclasses.replace(MODEL, memory=None)
    assert starting._needs(config, dense, torch.bfloat16, 16, 32)[2:] == (0, 4 * 2 * block, 2 * block, 0)
