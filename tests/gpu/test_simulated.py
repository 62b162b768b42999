"""A whole engine on a simulated GPU: the tokens of the same engine without one, and nothing that a GPU would refuse, wait
for, or do in another order. See simulated_cuda.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_cuda import Simulation, simulated
from simulated_kernels import replace_kernels
from test_placements import MODEL, PEER, answers, tokens, write_model

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

from memlane.config import EngineConfig
from memlane.engine import Engine
from memlane.models import Transformer
from memlane.models.loading import GpuOptions, TableOptions, load_model
from memlane.runner import DecodeSplit, decode_graphs, halves
from memlane.tables.table import Placement

Make = Callable[..., Engine]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "MIN_HALVES", 4)
    monkeypatch.setattr(halves, "MIN_TOKENS", 8)
    monkeypatch.setattr("memlane.tables.gpu_open._SCRATCH_ROWS", 192)
    monkeypatch.setattr(Transformer, "fuse", lambda self: None)


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulation]:
    with simulated() as made:
        replace_kernels(monkeypatch, made)
        yield made


def engine(directory: Path, device: str, placement: Placement, dtype: str, **options: Any) -> Engine:
    gpu = GpuOptions(torch.device(device), row_cache_bytes=90_000, sequences=8)
    tables = TableOptions(placement=placement, cache_bytes=20_000, gpu=gpu)
    model = load_model(directory, tables=tables, dtype=dtype)
    config = EngineConfig(
        model=str(directory), max_num_seqs=8, max_num_batched_tokens=48, kv_cache="2MiB", block_size=4,
        warm_start="off", attention_backend="sdpa", **options,
    )  # fmt: skip
    made = Engine(config, model)
    if device == "cpu":
        made.runner.pad_decodes(8, made.max_model_len, None, cut=False, halves=True, split=made.decode_split.wanted)
    return made


@pytest.mark.parametrize("placement", ["device", "host", "disk"])
@pytest.mark.parametrize("kind", ["memory", "peer"])
@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("split", [True, False])
def test_engine(tmp_path: Path, small: None, placement: Placement, kind: str, graphs: bool, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DecodeSplit, 'wanted', lambda self, n: split)
    directory = write_model(tmp_path / "model", MODEL if kind == "memory" else PEER)
    plain = engine(directory, "cpu", "device", "bfloat16")
    expected = tokens(answers(plain, 3, 8))
    plain.close()
    with simulated() as simulation:
        replace_kernels(monkeypatch, simulation)
        found_engine = engine(directory, "cuda:0", placement, "bfloat16", cuda_graphs=graphs)
        for t in found_engine.model.tables.values():
            if hasattr(t.store, "cache"):
                t.store.cache.counters.memory.racy = True
        simulation.strict = True
        step = found_engine.step
        def checked():
            simulation.strict = True
            try: return step()
            finally: simulation.strict = False
        found_engine.step = checked
        got = tokens(answers(found_engine, 3, 8))
        simulation.strict = False
        assert got == expected
        found_engine.close()
