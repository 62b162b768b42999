"""From a config to a model that is ready to run: which device computes, what lies where, and how much memory each has."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch

from memlane.checkpoints import read_config, resolve
from memlane.checkpoints.source import dense_shapes
from memlane.choices import Choices, KVSize, available_memory
from memlane.config import EngineConfig
from memlane.errors import ConfigError
from memlane.gpu_plan import Card, GpuNeeds, activation_bytes, plan_gpu
from memlane.kernels import device_stride
from memlane.models import ModelConfig
from memlane.models.loading import (
    GpuOptions,
    LoadedModel,
    TableOptions,
    load_model,
    served_dtype,
    table_bytes,
)
from memlane.runner import AttentionBackend, KVCache
from memlane.tables import Placement
from memlane.tables.gpu_open import least_cache_bytes

__all__ = ["Started", "start"]

_LEAST_BLOCKS = 2


class Started(NamedTuple):
    """A model, what computes its attention, and how much KV it has."""

    model: LoadedModel
    attention: AttentionBackend
    kv: KVSize


def start(config: EngineConfig, choices: Choices, model: LoadedModel | None = None) -> Started:
    """Decide, and load what config names; a model already loaded stays where it is. CheckpointError, ConfigError."""
    if model is not None:
        weights = model.transformer.embed.weight
        attention = choices.attention(model.config, weights.dtype, weights.device)
        return Started(model, attention, choices.kv_size(model.config, weights.dtype, available_memory()))
    device = choices.device()
    directory = resolve(Path(config.model), tokenizer=config.tokenizer)
    if device.type == "cuda":
        return _start_on_gpu(config, choices, directory, device)
    if config.placement == "device":
        raise ConfigError("placement: device is the memory of a GPU, and the CPU computes here; use host")
    placement = choices.placement(table_bytes(directory), available_memory())
    tables = _tables(config, choices, directory, placement)
    loaded = load_model(directory, tables=tables, dtype=choices.dtype("cpu"), tokenizer=config.tokenizer)
    return start(config, choices, loaded)


def _start_on_gpu(config: EngineConfig, choices: Choices, directory: Path, device: torch.device) -> Started:
    model = read_config(directory)
    name = choices.dtype(str(device))
    dtype: torch.dtype = getattr(torch, name)
    attention = choices.attention(model, dtype, device)
    needs = _needs(config, model, dtype, choices.block_size, config.max_model_len)
    plan = plan_gpu(config, _card(device), needs, available_memory())
    for line in plan.lines:
        choices.note(line)
    kv = choices.kv_size(model, dtype, available_memory(), plan.kv_cache)  # before loading: it may refuse
    gpu = GpuOptions(device, plan.row_cache, config.max_num_seqs)
    tables = _tables(config, choices, directory, plan.placement, gpu)
    loaded = load_model(directory, tables=tables, dtype=name, tokenizer=config.tokenizer)
    return Started(loaded, attention, kv)


def _tables(
    config: EngineConfig,
    choices: Choices,
    directory: Path,
    placement: Placement,
    gpu: GpuOptions | None = None,
) -> TableOptions:
    return TableOptions(
        placement=placement,
        cache_bytes=choices.cache_bytes(table_bytes(directory)),
        policy=config.cache_policy,
        io=config.table_io,
        deadline=config.read_timeout,
        shared=config.shared_tables,
        gpu=gpu,
    )


def _needs(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, block_size: int, max_length: int | None
) -> GpuNeeds:
    weights = sum(
        math.prod(shape) * served_dtype(name, dtype).itemsize for name, shape in dense_shapes(model).items()
    )
    block = KVCache.block_bytes(model, block_size, dtype)
    a_sequence = -(-(max_length or model.max_position_embeddings) // block_size)
    tables = least = 0
    if model.memory is not None:
        m, number = model.memory, len(model.table_names())
        tables = number * m.rows * device_stride(m.row_bytes)
        least = number * least_cache_bytes(m.rows, m.row_bytes, config.max_num_seqs * m.rows_per_token)
    return GpuNeeds(
        weights=weights,
        activations=activation_bytes(config, model, dtype.itemsize),
        tables=tables,
        kv_wanted=config.max_num_seqs * a_sequence * block,
        least_kv=_LEAST_BLOCKS * block,
        least_row_cache=least,
    )


def _card(device: torch.device) -> Card:
    free, total = torch.cuda.mem_get_info(device)
    return Card(torch.cuda.get_device_name(device), total, free)
