"""Every golden vector, through convert and load_model, with the tables in RAM and on disk behind a cache of a few rows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden import NAMES, Golden, full_logits, greedy
from torch import Tensor

from memlane.checkpoints import convert, detect
from memlane.models import MemoryLayer
from memlane.models.loading import LoadedModel, TableOptions, load_model
from memlane.models.memory import Pending

LOGITS_TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=NAMES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden.load(request.param)


@pytest.fixture(scope="module")
def converted(golden: Golden, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(golden.checkpoint, tmp_path_factory.mktemp("models") / "model", progress=False)


@pytest.fixture(scope="module", params=["host", "disk"])
def model(request: pytest.FixtureRequest, converted: Path) -> Iterator[LoadedModel]:
    rows = 4
    with load_model(converted) as probe:
        budget = rows * sum(table.stats().row_bytes + 8 for table in probe.tables.values())
    with load_model(converted, tables=TableOptions(request.param, budget), dtype="float32") as loaded:
        yield loaded
        for table in loaded.tables.values():
            table.check_integrity()
            if request.param == "disk":
                assert table.stats().cache_slots < table.rows / 8
                assert table.stats().scratch_rows > 0, "the cache was meant to be too small for a batch"


@torch.inference_mode()
def test_logits_rows_and_memory_outputs(
    golden: Golden, model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    blocks = model.transformer.layers

    def watch(layer: int, memory: MemoryLayer) -> None:
        begin = memory.begin

        def watched(x: Tensor, *, live: None) -> Pending:
            seen[layer] = x, begin(x).finish()
            return begin(x)

        monkeypatch.setattr(memory, "begin", watched)

    for layer, block in enumerate(blocks):
        if block.memory is not None:
            watch(layer, block.memory)
    logits = full_logits(model.transformer, golden.expected["input_ids"])
    assert (logits - golden.expected["logits"]).abs().max() < LOGITS_TOLERANCE
    assert set(seen) == set(model.config.memory.layers if model.config.memory else ())
    for layer, (x, output) in seen.items():
        chosen = blocks[layer].memory.select(x)
        assert torch.equal(chosen.ids, golden.indices(layer))  # the same rows, in the same order
        prefix = f"mem.{layer}."
        if prefix + "output" in golden.expected:
            wanted = {
                key: golden.expected[prefix + key].flatten(0, 1) for key in ("input", "output", "scores_raw")
            }
            assert torch.allclose(x, wanted["input"], atol=LOGITS_TOLERANCE)
            assert torch.allclose(chosen.scores, wanted["scores_raw"], atol=LOGITS_TOLERANCE)
            assert torch.allclose(output, wanted["output"], atol=LOGITS_TOLERANCE)


@torch.inference_mode()
def test_greedy_tokens(golden: Golden, model: LoadedModel) -> None:
    tokens = greedy(model.transformer, golden.prompts, golden.continuations.shape[1])
    assert torch.equal(tokens, golden.continuations)


@torch.inference_mode()
def test_placements_agree_to_the_bit(golden: Golden, converted: Path) -> None:
    ids = golden.expected["input_ids"]
    with (
        load_model(converted) as ram,
        load_model(converted, tables=TableOptions("disk", 700)) as disk,
    ):
        assert torch.equal(full_logits(ram.transformer, ids), full_logits(disk.transformer, ids))


def test_forms_are_told_apart(golden: Golden, converted: Path) -> None:
    name = golden.checkpoint
    wanted = "smlm" if name.name == "model" else "lingua-dcp" if name.name == "f_dcp" else "lingua"
    assert detect(golden.checkpoint) == wanted
    assert detect(converted) == "memlane"


@pytest.mark.parametrize("name", ["lingua-a_memplus", "smlm-q4"])
@torch.inference_mode()
def test_bf16_weights_stay_close(name: str, tmp_path: Path) -> None:
    golden = Golden.load(name)
    path = convert(golden.checkpoint, tmp_path / "model", progress=False)
    with load_model(path, dtype="bfloat16") as loaded:
        assert loaded.transformer.embed.weight.dtype == torch.bfloat16
        memory = next(block.memory for block in loaded.transformer.layers if block.memory is not None)
        assert memory.keys.dtype == memory.query.weight.dtype == torch.float32
        logits = full_logits(loaded.transformer, golden.expected["input_ids"])
    assert logits.dtype == torch.float32
    agree = (logits.argmax(-1) == golden.expected["logits"].argmax(-1)).float().mean()
    assert agree > 0.7  # bf16 moves logits by ~1 of a standard deviation of 3 and flips some rows
