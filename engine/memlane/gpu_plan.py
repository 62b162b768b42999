"""How the memory of a GPU is divided, before anything is loaded into it. Pure arithmetic: it asks no driver.

    | weights | activations | tables, if placed on the device | KV cache | row cache, if tables lie elsewhere |
    |<-------------------- gpu_memory_utilization of the card, at most what is free ----------------------->|

Rule: what weights, activations and tables on the device leave over is the rest. The KV cache takes what max_num_seqs
sequences of full length can fill, but at most half of the rest where there is a row cache. The row cache takes what
then remains, at most the whole of the tables. `kv_cache` and `gpu_row_cache` override either; the other adapts.
"""

from __future__ import annotations

from typing import NamedTuple

from memlane.config import EngineConfig, parse_bytes
from memlane.errors import ConfigError
from memlane.models.config import ModelConfig
from memlane.sizes import format_size
from memlane.tables.table import Placement

__all__ = ["Card", "GpuNeeds", "GpuPlan", "activation_bytes", "plan_gpu"]

_CONTEXT = 640 << 20  # the driver's context, workspaces of the libraries, captured graphs
_SCORE_BYTES = 2 * (32 << 20)  # of product keys: scored in pieces of 32 MiB, and what is chosen from them
_TABLE_SHARE = 0.5  # of available RAM that tables may take unasked, as on a CPU


class Card(NamedTuple):
    """A GPU's name, and its memory in bytes: all of it, and what nobody holds now."""

    name: str
    total: int
    free: int


class GpuNeeds(NamedTuple):
    """What a model needs, in bytes: dense weights, activations of the largest step, tables as rows are laid out for a
    GPU, KV of as many sequences as may run and of the least that can be worked with, and the least of a row cache."""

    weights: int
    activations: int
    tables: int
    kv_wanted: int
    least_kv: int
    least_row_cache: int


class GpuPlan(NamedTuple):
    """Where tables go, the bytes of both caches (row_cache: 0 where there is none), and the lines that say why."""

    placement: Placement
    kv_cache: int
    row_cache: int
    lines: list[str]


def activation_bytes(config: EngineConfig, model: ModelConfig, itemsize: int) -> int:
    """An upper estimate of what the largest step holds beside weights and caches. itemsize: of the model's dtype."""
    heads = model.num_heads + 2 * model.num_kv_heads
    per_token = itemsize * (
        8 * model.hidden_size + 3 * model.intermediate_size + 3 * heads * model.head_dim
    ) + 4 * (4 * model.hidden_size)
    if model.memory is not None:
        m = model.memory
        per_token += m.rows_per_token * 48 + 4 * (3 * m.value_dim + 2 * m.num_heads * m.key_dim)
    # fp32 twice and the model's dtype; and of top_p, sorted scores, their ids, and three vectors of fp64
    logits = config.max_num_seqs * model.vocab_size * (8 + itemsize + 4 + 8 + 24)
    scores = _SCORE_BYTES if model.memory is not None else 0
    return config.max_num_batched_tokens * per_token + logits + scores + _CONTEXT


def plan_gpu(config: EngineConfig, card: Card, needs: GpuNeeds, ram: int | None) -> GpuPlan:
    """Divide a card's memory. ram: bytes available on the host, None where unknown.

    Raises ConfigError, with the sum that does not fit.
    """
    budget = min(int(card.total * config.gpu_memory_utilization), card.free)
    kv_given = None if config.kv_cache == "auto" else parse_bytes(config.kv_cache, option="kv_cache")
    placement, why = _placement(config, needs, kv_given, budget, ram)
    on_device = needs.tables if placement == "device" else 0
    rest = budget - needs.weights - needs.activations - on_device
    cached = placement != "device" and needs.tables > 0
    least = needs.least_row_cache if cached else 0
    rows_given = (
        None
        if config.gpu_row_cache == "auto" or not cached
        else parse_bytes(config.gpu_row_cache, whole=needs.tables, option="gpu_row_cache")
    )
    if rows_given is not None and rows_given < least:
        raise ConfigError(
            f"gpu_row_cache: {format_size(rows_given)} are too few; rows of a single step need {format_size(least)}"
        )
    if kv_given is not None:
        kv = kv_given
    else:
        for_rows = rows_given if rows_given is not None else max(least, rest // 2) if cached else 0
        kv = max(needs.least_kv, min(needs.kv_wanted, rest - for_rows))
    rows = rows_given if rows_given is not None else min(needs.tables + least, rest - kv) if cached else 0
    if rows < least or kv + rows > rest:
        raise ConfigError(_refusal(config, card, needs, budget, on_device, kv, max(rows, least)))
    lines = [
        f"placement: {placement} ({why})",
        f"GPU memory: {format_size(budget)} of the {format_size(card.total)} of {card.name} "
        f"(gpu_memory_utilization {config.gpu_memory_utilization:g}, {format_size(card.free)} free): "
        f"weights {format_size(needs.weights)}, activations up to {format_size(needs.activations)}, "
        f"tables {format_size(on_device)}, KV cache {format_size(kv)}, row cache {format_size(rows)}",
    ]
    return GpuPlan(placement, kv, rows, lines)


class _Placed(NamedTuple):
    placement: Placement
    why: str


def _placement(
    config: EngineConfig, needs: GpuNeeds, kv_given: int | None, budget: int, ram: int | None
) -> _Placed:
    if config.placement != "auto":
        return _Placed(config.placement, "as asked")
    if needs.tables == 0:
        return _Placed("device", "there are no tables")
    kv = max(needs.least_kv, min(needs.kv_wanted, budget // 4)) if kv_given is None else kv_given
    beside = needs.weights + needs.activations + kv
    size = format_size(needs.tables)
    if needs.tables + beside <= budget:
        return _Placed("device", f"tables of {size} fit the GPU beside all else")
    if ram is not None and needs.tables <= ram * _TABLE_SHARE:
        return _Placed(
            "host",
            f"tables of {size} do not fit the GPU; they take at most half of the {format_size(ram)} of RAM",
        )
    return _Placed("disk", f"tables of {size} fit neither the GPU nor half of the available RAM")


def _refusal(
    config: EngineConfig, card: Card, needs: GpuNeeds, budget: int, tables: int, kv: int, rows: int
) -> str:
    parts = [
        ("weights", needs.weights),
        ("activations", needs.activations),
        ("tables", tables),
        ("KV cache", kv),
        ("row cache", rows),
    ]
    total = sum(size for _, size in parts)
    listed = " + ".join(f"{name} {format_size(size)}" for name, size in parts if size)
    return (
        f"{card.name} cannot hold this: {listed} = {format_size(total)}, and {format_size(budget)} are to be had "
        f"({config.gpu_memory_utilization:g} of {format_size(card.total)}, {format_size(card.free)} free). Lower "
        "max_num_batched_tokens, max_num_seqs, kv_cache or gpu_row_cache, or place tables on the host or on disk"
    )
