"""A whole engine over tables on a GPU: the same tokens wherever rows lie, with graphs and without, a step ahead or not.

On a CPU the kernels' twins compute, and functions that are run again stand for graphs.
"""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

import tiny

from memlane.checkpoints.directory import CONFIG, DENSE, table_file_name
from memlane.config import EngineConfig
from memlane.engine import Engine
from memlane.models import MemoryConfig, ModelConfig, Transformer
from memlane.models.loading import GpuOptions, TableOptions, load_model
from memlane.request import FinishReason, SamplingParams, TokenDelta
from memlane.runner import decode_graphs, halves
from memlane.runner.graphs import CudaCapture, TwinCapture
from memlane.tables import ReferenceTable, RowFormat, write_table
from memlane.tables.table import Placement

PLACEMENTS: tuple[Placement, ...] = ("device", "host", "disk")
MODEL = dataclasses.replace(
    tiny.CONFIG,
    hidden_size=64,
    num_layers=5,
    intermediate_size=96,
    memory=dataclasses.replace(tiny.MEMORY, layers=(1, 3), value_dim=64, row_format="bfloat16"),
)
PEER = dataclasses.replace(
    MODEL,
    memory=MemoryConfig(
        (1, 3), num_keys=32, num_heads=2, knn=4, key_dim=8, value_dim=64, kind="peer", swilu=False,
        value_proj=False, row_format="int4",
    ),
)  # fmt: skip

Make = Callable[..., Engine]


def write_model(directory: Path, config: ModelConfig) -> Path:
    """A random model whose answers vary: a directory as `memlane convert` writes it."""
    torch.manual_seed(4)
    memory = config.memory
    assert memory is not None
    tables = {name: ReferenceTable(memory.rows, memory.value_dim) for name in config.table_names()}
    state = Transformer(config, tables).state_dict()
    state["embed.weight"] *= 30
    directory.mkdir()
    save_file(state, directory / DENSE)
    for name, table in tables.items():
        row_format, values = RowFormat(memory.row_format), table.weight.detach()
        path = directory / table_file_name(name)
        write_table(path, name, memory.rows, memory.value_dim, row_format, values.split(300))
    (directory / CONFIG).write_text(json.dumps(config.to_dict()))
    return directory


@pytest.fixture(params=[MODEL, PEER], ids=["memory", "peer"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", request.param)


@pytest.fixture
def make(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """make(directory, placement, graphs=..., ahead=..., halves=...) -> an engine with small caches, closed at the end."""
    engines: list[Engine] = []
    monkeypatch.setattr(decode_graphs, "MIN_HALVES", 4)
    monkeypatch.setattr(halves, "MIN_TOKENS", 8)
    monkeypatch.setattr("memlane.tables.gpu_open._SCRATCH_ROWS", 96)

    def engine(
        directory: Path,
        placement: Placement,
        *,
        graphs: bool = True,
        ahead: bool = True,
        split: bool = True,
        **options: Any,
    ) -> Engine:
        gpu = GpuOptions(torch.device(device), row_cache_bytes=120_000, sequences=8)
        tables = TableOptions(placement=placement, cache_bytes=20_000, gpu=gpu)
        model = load_model(directory, tables=tables, dtype="bfloat16" if device == "cuda" else "float32")
        config = EngineConfig(
            model=str(directory), max_num_seqs=8, max_num_batched_tokens=48, kv_cache="2MiB",
            cuda_graphs=False, block_size=None if device == "cuda" else 4, warm_start="off", **options,
        )  # fmt: skip
        made = Engine(config, model)
        capture = CudaCapture(torch.device(device)) if device == "cuda" else TwinCapture()
        made.runner.pad_decodes(
            8, made.max_model_len, capture if graphs else None, cut=placement == "disk", halves=split
        )
        made.lookahead = ahead
        engines.append(made)
        return made

    yield engine
    for each in engines:
        each.close()


def answers(engine: Engine, seed: int, count: int = 20) -> dict[str, list[TokenDelta]]:
    """Prompts of all lengths that come while others are decoded; half of the answers are drawn."""
    rng = random.Random(seed)
    waiting = [
        tiny.request(
            f"r{i}",
            tiny.prompt(rng.choice([1, 3, 9, 40, 90]), i),
            SamplingParams(
                temperature=rng.choice([0.0, 0.8]),
                seed=i,
                max_tokens=rng.randint(1, 14),
                ignore_eos=i % 3 > 0,
            ),
        )
        for i in range(count)
    ]
    deltas: dict[str, list[TokenDelta]] = {}
    while waiting or engine.unfinished:
        for _ in range(rng.randint(0, 3)):
            if waiting:
                engine.add(waiting.pop())
        for delta in engine.step():
            deltas.setdefault(delta.request_id, []).append(delta)
    engine.check_integrity()
    for table in engine.model.tables.values():
        table.check_integrity()
    return deltas


def tokens(deltas: dict[str, list[TokenDelta]]) -> dict[str, list[int]]:
    return {name: tiny.tokens(found) for name, found in sorted(deltas.items())}


def ways(rng: random.Random) -> list[tuple[Placement, bool, bool]]:
    """Placements, with graphs or without, a step ahead or not. On a CPU, where each takes a second, not all: the plainest,
    and for each placement what is served and another."""
    if torch.cuda.is_available():
        return list(itertools.product(PLACEMENTS, (True, False), (True, False)))
    others = [(True, False), (False, True), (False, False)]
    some = [(placement, *way) for placement in PLACEMENTS for way in ((True, True), rng.choice(others))]
    return [("device", False, False), *some]


@pytest.mark.parametrize("split", [False, True], ids=["whole", "halves"])
def test_tokens_do_not_depend_on_placement_graphs_or_lookahead(
    directory: Path, make: Make, split: bool
) -> None:
    seed = random.randrange(2**32)
    count = 20 if torch.cuda.is_available() else 14
    expected: dict[str, list[int]] | None = None
    requested: dict[str, int] = {}
    for placement, graphs, ahead in ways(random.Random(seed)):
        engine = make(directory, placement, graphs=graphs, ahead=ahead, split=split)
        found = tokens(answers(engine, seed, count))
        if expected is None:
            expected = found
            assert len({tuple(each) for each in found.values()}) > len(found) // 2, "answers are to vary"
        assert found == expected, f"seed {seed}: {placement}, graphs {graphs}, ahead {ahead}"
        for table in engine.model.tables.values():
            stats = table.stats()
            # Padding, and what is computed to capture it, is not counted; without lookahead nothing surplus is computed.
            if not ahead:
                assert stats.requested_rows == requested.setdefault(table.name, stats.requested_rows) > 0
            assert placement == "device" or stats.unique_misses > 0


def test_rows_that_cannot_be_read_end_their_sequences_and_no_others(tmp_path: Path, make: Make) -> None:
    directory = write_model(tmp_path / "model", MODEL)
    expected = tokens(answers(make(directory, "disk"), 11))
    engine = make(directory, "disk")
    table = engine.model.tables["values"]
    assert table.on_disk is not None
    table.on_disk.source.inject_fault(100, 160, errno.EIO, 1_000_000)
    found = answers(engine, 11)
    failed = {name for name, deltas in found.items() if deltas[-1].finish_reason is FinishReason.ERROR}
    assert failed, "the fault was meant to be met"
    assert failed != set(found), "and to leave some alone"
    for name, deltas in found.items():
        got = tiny.tokens(deltas)
        assert got == expected[name][: len(got)]
        assert name in failed or got == expected[name]
    table.on_disk.source.inject_fault(0, -1, 0, 0)
    assert tokens(answers(engine, 11)) == expected
