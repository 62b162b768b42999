"""What the engine decides when options say "auto". Each decision is one line with its reason, logged and reported."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import torch

from memlane.config import EngineConfig, parse_bytes
from memlane.errors import ConfigError
from memlane.models import ModelConfig
from memlane.runner import AttentionBackend, KVCache, choose_backend
from memlane.runner.attention import DEFAULT_BLOCK_SIZE
from memlane.sizes import format_size, format_size_that_holds
from memlane.tables import Placement

__all__ = ["Choices", "KVSize", "available_memory"]

logger = logging.getLogger(__name__)

_KV_AUTO_LIMIT = 1 << 30
_TABLE_SHARE = (
    0.5  # of available memory that tables may take unasked: the rest is for weights, KV and the page cache
)


class KVSize(NamedTuple):
    """How many KV blocks there are, and the longest sequence that they and the model allow."""

    blocks: int
    max_model_len: int


class Choices:
    """Makes the decisions for one start of the engine and keeps their lines."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.block_size = config.block_size or DEFAULT_BLOCK_SIZE  # tokens; see `attention`
        self.lines: list[str] = []

    def note(self, line: str) -> None:
        """Log and keep one decision."""
        logger.info("%s", line)
        self.lines.append(line)

    def device(self) -> torch.device:
        """What computes. Raises ConfigError if that is to be a GPU and there is none."""
        found = torch.cuda.is_available()
        if self.config.device == "cuda" and not found:
            raise ConfigError("device: cuda was asked for, and torch finds no CUDA device here")
        if self.config.device == "cpu" or not found:
            return torch.device("cpu")
        device = torch.device("cuda", torch.cuda.current_device())
        self.note(f"device: {torch.cuda.get_device_name(device)}")
        return device

    def placement(self, table_bytes: int, available: int | None) -> Placement:
        """Where tables of that many bytes go, with so many bytes of memory to be had (None: unknown)."""
        if self.config.placement != "auto":
            return self.config.placement
        if table_bytes == 0:
            return "host"
        if available is None:
            self.note("placement: disk (how much memory is available is unknown)")
            return "disk"
        fits = table_bytes <= available * _TABLE_SHARE
        placement: Placement = "host" if fits else "disk"
        self.note(
            f"placement: {placement} (tables of {format_size(table_bytes)} take {'at most' if fits else 'more than'} "
            f"{_TABLE_SHARE:.0%} of the {format_size(available)} of memory available)"
        )
        return placement

    def dtype(self, device: str) -> str:
        """Name of the torch dtype of dense weights, activations and KV."""
        if self.config.dtype != "auto":
            return self.config.dtype
        if device == "cpu":
            self.note("dtype: float32 (batched bfloat16 products are slow on most CPUs)")
            return "float32"
        self.note(f"dtype: bfloat16 (on {device})")
        return "bfloat16"

    def attention(self, model: ModelConfig, dtype: torch.dtype, device: torch.device) -> AttentionBackend:
        """What computes attention. Settles block_size too. Raises ConfigError if what is asked for cannot be had."""
        c = self.config
        chosen = choose_backend(c.attention_backend, model, dtype, device, self.note, c.block_size)
        self.block_size = c.block_size or chosen.block_size or DEFAULT_BLOCK_SIZE
        return chosen

    def graphs(self) -> bool:
        """Whether decode steps on a GPU are replayed as graphs."""
        if not self.config.cuda_graphs:
            self.note("CUDA graphs: off, as asked")
        return self.config.cuda_graphs

    def lookahead(self, device: torch.device) -> bool:
        """Whether the next step is planned while the current one runs."""
        if device.type == "cpu":
            return False
        self.note(f"async scheduling: {'on' if self.config.async_scheduling else 'off, as asked'}")
        return self.config.async_scheduling

    def cache_bytes(self, table_bytes: int) -> int:
        """Bytes of the row cache, all tables together."""
        return parse_bytes(self.config.row_cache, whole=table_bytes, option="row_cache")

    def kv_size(
        self, model: ModelConfig, dtype: torch.dtype, available: int | None, planned: int | None = None
    ) -> KVSize:
        """Number of KV blocks and the resulting limit on lengths. Every sequence within the limit fits alone.

        available: bytes of RAM to be had, of which KV takes a part unless planned: bytes for it, settled already.
        Raises ConfigError if a stated limit cannot be kept.
        """
        c = self.config
        if c.max_model_len is not None and c.max_model_len > model.max_position_embeddings:
            raise ConfigError(
                f"max_model_len: {c.max_model_len} is beyond the {model.max_position_embeddings} positions "
                "that the model was made for"
            )
        wanted = c.max_model_len or model.max_position_embeddings
        block_bytes = KVCache.block_bytes(model, self.block_size, dtype)
        a_sequence = -(-wanted // self.block_size)
        if planned is not None:
            blocks = planned // block_bytes
        elif c.kv_cache == "auto":
            limit = min(_KV_AUTO_LIMIT, available // 4 if available is not None else _KV_AUTO_LIMIT)
            blocks = min(c.max_num_seqs * a_sequence, limit // block_bytes)
            self.note(
                f"kv_cache: {format_size(blocks * block_bytes)}, {blocks * self.block_size} tokens "
                f"({c.max_num_seqs} sequences of {wanted} tokens, to {format_size(limit)})"
            )
        else:
            asked = parse_bytes(c.kv_cache, option="kv_cache")
            if available is not None and asked > available:
                raise ConfigError(
                    f"kv_cache: {format_size(asked)} is more than the {format_size(available)} of memory available"
                )
            blocks = asked // block_bytes
        if blocks >= a_sequence:
            return KVSize(blocks, wanted)
        if c.max_model_len is not None or blocks * self.block_size < 2:
            raise ConfigError(
                f"kv_cache: {format_size(blocks * block_bytes)} hold {blocks * self.block_size} tokens, fewer than one "
                f"sequence of {wanted}; give it {format_size_that_holds(a_sequence * block_bytes)} or lower max_model_len"
            )
        self.note(
            f"max_model_len: {blocks * self.block_size} (all that the KV cache holds; the model has {wanted})"
        )
        return KVSize(blocks, blocks * self.block_size)


def available_memory() -> int | None:
    """Bytes of memory that can be taken without swapping, within the control group's limit; None if unknown."""
    found = [n for n in (_system_available(), _group_available()) if n is not None]
    return min(found, default=None)


def _system_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _group_available(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a control group (v2) has left: its limit less what is used and cannot be reclaimed."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    return max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
