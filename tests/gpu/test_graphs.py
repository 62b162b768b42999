"""Decode steps as CUDA graphs, and dense layers compiled for a GPU, against the same without. A CPU takes the twins."""

from __future__ import annotations

import dataclasses
import logging
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

import tiny
from staged import StagedTable
from torch._dynamo.utils import counters

from memlane.models import Transformer
from memlane.request import SamplingParams
from memlane.runner import KVCache, Runner, decode_graphs
from memlane.runner.captured import Cut, Whole
from memlane.runner.graphs import Capture, CudaCapture, TwinCapture
from memlane.scheduler import Chunk, Sequence, StepPlan
from memlane.scheduler.plan import make_plan

CONFIG = dataclasses.replace(
    tiny.CONFIG,
    hidden_size=64,
    num_layers=5,
    intermediate_size=96,
    memory=dataclasses.replace(tiny.MEMORY, layers=(1, 3), gated=True),
)
BLOCK, LONGEST = 16, 90
EACH = -(-LONGEST // BLOCK)
DTYPES = [torch.float32, torch.bfloat16]
MODES = {
    "whole": (False, False),
    "whole halves": (False, True),
    "cut": (True, False),
    "cut halves": (True, True),
}


def capture_on(device: str) -> Capture:
    return CudaCapture(torch.device(device)) if device == "cuda" else TwinCapture()


def runner(device: str, dtype: torch.dtype, *, by_host: bool, sequences: int) -> Runner:
    """The same weights, table and cache contents each time."""
    torch.manual_seed(1)
    values = torch.randn(CONFIG.memory.rows, CONFIG.memory.value_dim).to(device)  # type: ignore[union-attr]
    model = Transformer(CONFIG, {"values": StagedTable(values, by_host=by_host)})
    model.embed.weight.data *= 30
    for name, weight in model.named_parameters():
        exact = ".memory.query" in name or ".memory.keys" in name or name.endswith("norm.weight")
        weight.data = weight.data.to(device, torch.float32 if exact else dtype)
    made = Runner(model.requires_grad_(False).eval(), KVCache(CONFIG, EACH * sequences, BLOCK, dtype, device))
    for layer in made.kv.layers:
        layer.copy_(torch.randn(layer.shape))
    return made


def plan(rng: random.Random, count: int, sequences: int) -> StepPlan:
    chunks = []
    for i, first in enumerate(rng.sample(range(sequences), count)):
        length = rng.randint(1, LONGEST)
        sequence = Sequence(
            f"s{i}", tiny.prompt(length, rng.randrange(999)), SamplingParams(), max_length=LONGEST
        )
        sequence.blocks = rng.sample(range(EACH * first, EACH * (first + 1)), EACH)
        chunks.append(Chunk(sequence, length - 1, 1, True))
    return make_plan(chunks)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize(("cut", "halves"), MODES.values(), ids=MODES.keys())
def test_graphs_and_eager_batches_agree_bit_by_bit(
    device: str, dtype: torch.dtype, cut: bool, halves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_graphs, "MIN_HALVES", 2)
    sequences, steps = (64, 60) if device == "cuda" else (6, 4)
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    eager, graphs = (runner(device, dtype, by_host=cut, sequences=sequences) for _ in range(2))
    eager.pad_decodes(sequences, LONGEST, None, cut=cut, halves=halves)
    graphs.pad_decodes(sequences, LONGEST, capture_on(device), cut=cut, halves=halves)
    assert graphs.decode is not None
    graphs.decode._logits.fill_(float("nan"))
    for step in range(steps):
        each = plan(rng, rng.randint(1, sequences), sequences)
        assert torch.equal(graphs.run(each), eager.run(each)), f"seed {seed}, step {step}"
    made = {type(each.captured) for each in graphs.decode._sets.values()}
    assert made == {Cut if cut else Whole}


# What is traced depends on no dtype, and tracing is all that a CPU does of it.
@pytest.mark.parametrize("dtype", DTYPES if torch.cuda.is_available() else DTYPES[:1])
def test_compiled_layers_agree_with_modules(
    device: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """And with themselves in graphs. On a GPU by what inductor compiles, else by its tracing alone."""
    torch._dynamo.reset()
    sequences = 16 if device == "cuda" else 3
    plain, fused = (runner(device, dtype, by_host=False, sequences=sequences) for _ in range(2))
    with caplog.at_level(logging.WARNING):
        fused.transformer.fuse("inductor" if device == "cuda" else "aot_eager")
    assert fused.transformer.fused is not None, caplog.text
    graphs = runner(device, dtype, by_host=False, sequences=sequences)
    graphs.transformer.fused = fused.transformer.fused
    fused.pad_decodes(sequences, LONGEST, None, cut=False, halves=False)
    graphs.pad_decodes(sequences, LONGEST, capture_on(device), cut=False, halves=False)
    before = counters["stats"]["unique_graphs"]
    rng, near = random.Random(0), 0
    for count in (1, sequences, 2, 3, 1):
        each = plan(rng, count, sequences)
        wanted, found = plain.run(each), fused.run(each).clone()
        assert torch.equal(graphs.run(each), found)
        # Another rounding may choose another row where two are nearly as good: of few tokens, then.
        tolerance = 1e-3 if dtype == torch.float32 else 0.05
        near += int(((found - wanted).norm(dim=-1) < tolerance * wanted.norm(dim=-1)).sum())
    assert counters["stats"]["unique_graphs"] == before, "something was compiled again"
    assert near >= 0.8 * (sequences + 7), f"{near} of {sequences + 7} tokens agree"
    torch._dynamo.reset()
