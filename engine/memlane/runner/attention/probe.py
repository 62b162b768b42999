"""A trial at start: does a library compute, on this machine, what the reference does?

A library may be installed and yet not work: made for another CUDA, or in need of a compiler that is not there. That has
to be found before the first request, while there is still another one to take.
"""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Iterable

import torch

from memlane.models import ModelConfig
from memlane.request import SamplingParams
from memlane.runner.attention.library import LibraryBackend
from memlane.runner.attention.protocol import AttentionBackend
from memlane.runner.attention.sdpa import SdpaBackend
from memlane.runner.batch import make_batch
from memlane.runner.decode_batch import DecodeBatches
from memlane.runner.kv import KVCache
from memlane.scheduler import Chunk, Sequence, StepPlan

__all__ = ["largest_difference", "probe"]

# What libraries and their just-in-time compilers raise.
_FAILURES = (
    ImportError, OSError, RuntimeError, ValueError, TypeError, AttributeError, AssertionError, subprocess.SubprocessError,
)  # fmt: skip

_LENGTH = 64  # tokens of a sequence, at least; two blocks, at least
_TOLERANCE = 0.05  # of values around 1: several times what rounding to bfloat16 makes


def probe(
    library: type[LibraryBackend],
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int,
) -> LibraryBackend | str:
    """The backend, made and tried; or why it does not work."""
    try:
        backend = library(config, dtype, device)
        with torch.inference_mode():
            worst = largest_difference(backend, config, dtype, device, block_size)
    except _FAILURES as error:
        lines = str(error).strip().splitlines()
        return f"it fails: {lines[0] if lines else type(error).__name__}"
    # NaN is no small difference either.
    return backend if worst <= _TOLERANCE else f"it differs from scaled_dot_product_attention by {worst:.3g}"


def largest_difference(
    backend: AttentionBackend,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    block_size: int,
) -> float:
    """Between what it and SDPA compute for random numbers: a prompt beside a decode, two decodes, and those in a batch of
    fixed size. NaN if either computes one."""
    one_layer = dataclasses.replace(config, num_layers=1, memory=None)
    blocks = -(-_LENGTH // block_size) if block_size < _LENGTH // 2 else 2  # of each of two sequences
    length = blocks * block_size
    generator = torch.Generator()
    caches = [KVCache(one_layer, 2 * blocks, block_size, dtype, device) for _ in range(2)]
    for cache in caches:
        shape = cache.layers[0].shape
        cache.layers[0].copy_(torch.randn(shape, generator=generator.manual_seed(0)))
    long, short = (_sequence(range(first, 2 * blocks, 2), length) for first in (1, 0))
    half = length // 2
    mixed = StepPlan([Chunk(long, length - 2, 1, True), Chunk(short, 3, half - 3, True)], 1)
    decodes = StepPlan([Chunk(long, length - 1, 1, True), Chunk(short, half, 1, True)], 2)
    batches = DecodeBatches(3, length, block_size, caches[0].sink, device)
    static = batches.batch(3)
    batches.fill(decodes, 3)
    captured = backend.decode(caches[0], static), SdpaBackend().decode(caches[1], static)
    backend.prepare(static)
    worst = torch.zeros((), device=device)
    for plan in (mixed, decodes, None):
        if plan is None:
            tokens, pair = static.n, captured
        else:
            batch = make_batch(plan, block_size, device)
            tokens = plan.tokens
            pair = backend.attention(caches[0], batch), SdpaBackend().attention(caches[1], batch)
        parts = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
        qkv = torch.randn(tokens, sum(parts), config.head_dim, generator=generator).to(device, dtype)
        q, k, v = torch.split(qkv, parts, dim=1)  # views, as compiled layers hand them out
        # Twice: looking everywhere, which shows a wrong block, and at itself, which shows a length that is one short.
        itself = 4 * k.repeat_interleave(config.num_heads // config.num_kv_heads, dim=1)
        for queries in (q, itself):
            got, wanted = (attention(0, queries, k, v) for attention in pair)
            worst = torch.maximum(worst, (got.float() - wanted.float()).abs().amax())
    return float(worst)


def _sequence(blocks: Iterable[int], length: int) -> Sequence:
    sequence = Sequence("probe", [0] * length, SamplingParams(), max_length=length)
    sequence.blocks = list(blocks)
    return sequence
