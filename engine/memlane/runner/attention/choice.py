"""Which backend computes attention: the first that can, or the one that is named."""

from __future__ import annotations

from collections.abc import Callable

import torch

from memlane.errors import ConfigError
from memlane.models import ModelConfig
from memlane.runner.attention.flash_attn import FlashAttnBackend
from memlane.runner.attention.flashinfer import FlashInferBackend
from memlane.runner.attention.library import LibraryBackend
from memlane.runner.attention.probe import probe
from memlane.runner.attention.protocol import AttentionBackend
from memlane.runner.attention.sdpa import SdpaBackend
from memlane.runner.attention.varlen import VarlenBackend

__all__ = ["DEFAULT_BLOCK_SIZE", "choose_backend"]

DEFAULT_BLOCK_SIZE = 16

# In the order in which they are tried.
_LIBRARIES: tuple[type[LibraryBackend], ...] = (FlashInferBackend, FlashAttnBackend, VarlenBackend)


def choose_backend(
    wanted: str,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    note: Callable[[str], None],
    block_size: int | None = None,
) -> AttentionBackend:
    """The backend that serves this model, which is noted in one line with what speaks against those before it.

    wanted: a name, or "auto". block_size: of KV blocks, if it is given; else it follows from the backend (DEFAULT_BLOCK_SIZE
    if that does not care). Raises ConfigError if a backend that is named cannot be used.
    """
    refused: list[str] = []
    for library in _LIBRARIES:
        if wanted not in ("auto", library.name):
            continue
        found = _try(library, config, dtype, device, block_size)
        if not isinstance(found, str):
            note(f"attention: {found.name} ({'; '.join([found.words, *refused])})")
            return found
        if wanted != "auto":
            raise ConfigError(f"attention_backend: {wanted} cannot be used: {found}")
        refused.append(f"{library.name}: {found}")
    if wanted == "auto":
        reasons = refused if device.type == "cuda" else ["the only one on the CPU"]
        note(f"attention: sdpa ({'; '.join(reasons)})")
    return SdpaBackend()


def _try(
    library: type[LibraryBackend],
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int | None,
) -> LibraryBackend | str:
    """The backend, or what speaks against it."""
    reason = library.supports(config, dtype, device)
    if reason is not None:
        return reason
    unit = library.block_size
    if unit is not None and block_size is not None and block_size % unit:
        return f"its KV blocks are multiples of {unit} tokens, not {block_size}"
    return probe(library, config, dtype, device, block_size or unit or DEFAULT_BLOCK_SIZE)
