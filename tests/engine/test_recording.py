"""`record_rows`: what the layers asked for is what the file holds, and nothing is overwritten."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from memlane import LLM
from memlane import engine as engine_module
from memlane.checkpoints import save
from memlane.config import EngineConfig, build
from memlane.errors import ConfigError
from memlane.models import MemoryLayer
from memlane.tables.trace import TracedTable, read_trace

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The tiny model as a directory, with hot rows that a cache is warmed with."""
    state, table = tiny.weights()
    hot = torch.arange(200).numpy()
    return save(tmp_path / "tiny", tiny.CONFIG, state, {"values": table}, hot_rows={"values": hot})


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The row ids that memory layers choose, lookup by lookup."""
    found: list[list[int]] = []
    lookup = MemoryLayer.choose

    def listening(layer: MemoryLayer, x: Tensor) -> tuple[Tensor, Tensor]:
        ids, weights = lookup(layer, x)
        found.append(ids.flatten().tolist())
        return ids, weights

    monkeypatch.setattr(MemoryLayer, "choose", listening)
    return found


@pytest.mark.parametrize("placement", ["host", "disk"])
def test_the_record_is_what_the_layers_asked_for(
    model: Path, asked: list[list[int]], tmp_path: Path, placement: str
) -> None:
    options: dict[str, Any] = {"placement": placement, "row_cache": "25%", "max_num_batched_tokens": 16}
    with LLM(model, record_rows=str(tmp_path / "rows"), **options) as llm:
        llm.generate([tiny.prompt(30), tiny.prompt(7)], tiny.greedy(max_tokens=5), use_tqdm=False)
    trace = read_trace(tmp_path / "rows")
    rows, row_bytes = tiny.MEMORY.rows, 4 * tiny.MEMORY.value_dim
    cache = rows * row_bytes // 4 if placement == "disk" else None
    assert trace.tables == (TracedTable("values", rows, row_bytes, cache),)
    assert trace.model == model.name
    assert len(asked) > 5
    assert [record.ids.tolist() for record in trace] == asked


def test_two_tables(asked: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEER asks both of its tables for the same rows, one after the other."""
    monkeypatch.setenv("MEMLANE_CACHE", str(tmp_path / "cache"))
    with LLM(DATA / "lingua" / "d_peer", placement="disk", record_rows=str(tmp_path / "rows")) as llm:
        llm.generate([[1, 2, 3]], tiny.greedy(max_tokens=3), use_tqdm=False)
    trace = read_trace(tmp_path / "rows")
    names = [table.name for table in trace.tables]
    assert len(names) > 1
    records = [(names[record.table], record.ids.tolist()) for record in trace]
    assert [ids for name, ids in records if name.endswith("values_u")] == asked
    assert [ids for name, ids in records if name.endswith("values_v")] == asked


@pytest.mark.parametrize(("file", "says"), [("there", "exists already"), ("no/folder", "No such file")])
def test_a_file_that_cannot_be_made_is_refused_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, says: str
) -> None:
    (tmp_path / "there").write_text("precious")
    monkeypatch.setattr(engine_module, "start", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError, match=rf"record_rows: .*{says}"):
        engine_module.Engine(EngineConfig(model="m", record_rows=str(tmp_path / file)))
    assert (tmp_path / "there").read_text() == "precious"


def test_a_limit_that_is_no_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="record_rows_limit"):
        build(EngineConfig, {"model": "m", "record_rows_limit": "much"}, {})


def test_answers_go_on_when_the_limit_is_reached(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = [tiny.prompt(30)]
    with LLM(model, placement="disk") as llm:
        expected = llm.generate(prompts, tiny.greedy(), use_tqdm=False)[0].outputs[0].token_ids
    options = {"record_rows": str(tmp_path / "rows"), "record_rows_limit": "200"}
    with caplog.at_level(logging.WARNING), LLM(model, placement="disk", **options) as llm:
        assert llm.generate(prompts, tiny.greedy(), use_tqdm=False)[0].outputs[0].token_ids == expected
    assert [r.message for r in caplog.records if "recording rows ends" in r.message]
    assert list(read_trace(tmp_path / "rows")) == []


def test_the_record_is_whole_after_a_fault_of_the_gpu(
    model: Path, asked: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    llm = LLM(model, record_rows=str(tmp_path / "rows"))
    llm.generate([tiny.prompt(9)], tiny.greedy(max_tokens=3), use_tqdm=False)
    llm.engine.device = torch.device("cuda")
    with pytest.raises(RuntimeError, match="illegal"):
        llm.engine.close()
    assert [record.ids.tolist() for record in read_trace(tmp_path / "rows")] == asked
    llm.engine.model.close()
