"""`memlane plan`: sizes against counting by hand, placements, foreign forms, a table far larger than memory."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from memlane.checkpoints import save
from memlane.checkpoints.directory import DENSE, table_file_name
from memlane.config import EngineConfig, parse_bytes
from memlane.models import MemoryConfig, ModelConfig, Transformer
from memlane.planner import make_plan
from memlane.tables import ReferenceTable
from memlane.tables.trace import RowRecorder, TracedTable
from memlane_server import cli

DATA = Path(__file__).parents[1] / "data"
GIB = 1 << 30


def config(num_keys: int, layers: tuple[int, ...] = (1,), shared: bool = True) -> ModelConfig:
    memory = MemoryConfig(
        layers=layers,
        num_keys=num_keys,
        num_heads=2,
        knn=4,
        key_dim=8,
        value_dim=256,
        value_proj=True,
        shared=shared,
    )
    return ModelConfig(
        vocab_size=61,
        hidden_size=16,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=24,
        max_position_embeddings=128,
        memory=memory,
    )


def write(directory: Path, num_keys: int, **more: Any) -> Path:
    """A model directory whose tables are sparse files: as large as num_keys makes them, holding nothing."""
    small, wanted = config(8, **more), config(num_keys, **more)
    tables = {name: ReferenceTable(64, 256) for name in small.table_names()}
    save(
        directory,
        small,
        Transformer(small, tables).state_dict(),
        {n: t.weight.detach() for n, t in tables.items()},
    )
    (directory / "memlane-checksums.json").unlink()
    with torch.device("meta"):
        shapes = Transformer(wanted, dict.fromkeys(wanted.table_names(), _table(num_keys))).state_dict()
    sparse(directory / DENSE, {name: list(weight.shape) for name, weight in shapes.items()})
    for name in wanted.table_names():
        sparse(directory / table_file_name(name), {name: [num_keys**2, 256]})
    (directory / "config.json").write_text(json.dumps(wanted.to_dict()))
    return directory


def _table(num_keys: int) -> Any:
    """All that a Transformer wants to know of a table before it runs."""
    return SimpleNamespace(name="values", rows=num_keys**2, width=256)


def sparse(path: Path, shapes: dict[str, list[int]]) -> None:
    header: dict[str, Any] = {}
    at = 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + at)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["plan", *map(str, arguments)])
    output = capsys.readouterr()
    return status, output.out, output.err


def served(command: str) -> EngineConfig:
    """What the engine would be told by a recommended command."""
    given = cli.parser().parse_args(shlex.split(command)[1:])
    return cli._config(EngineConfig, given)


def test_a_small_table_goes_into_ram(tmp_path: Path) -> None:
    plan = make_plan(str(write(tmp_path / "m", 32)), 8 * GIB)
    c = config(32)
    with torch.device("meta"):
        state = Transformer(c, {"values": _table(32)}).state_dict()
    assert plan.weights == {"float32": sum(4 * w.numel() for w in state.values())}
    assert plan.stored == plan.weights
    assert plan.table_bytes == 32 * 32 * 256 * 4
    assert plan.kv.per_1000_tokens == 1000 * 3 * 2 * 2 * 4 * 4  # layers, keys and values, heads, width, bytes
    assert plan.kv.tokens == 64 * 128
    assert plan.kv.nbytes == plan.kv.tokens * plan.kv.per_1000_tokens // 1000
    assert plan.left == plan.memory - plan.reserve - plan.kv.nbytes - sum(plan.weights.values())
    assert (plan.placement, plan.host_fits) == ("host", True)
    assert plan.command is not None
    assert served(plan.command).placement == "host"


def test_a_table_far_larger_than_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path / "m", 8192)  # 64 GiB
    assert sum(file.stat().st_blocks * 512 for file in model.iterdir()) < 10 << 20, "the file is not sparse"
    plan = make_plan(str(model), 4 * GIB)
    assert plan.table_bytes == 64 * GIB
    assert (plan.placement, plan.host_fits) == ("disk", False)
    assert plan.disk is not None
    assert plan.left * 0.99 < plan.disk.nbytes <= plan.left
    assert plan.disk.checksums == 64 << 20
    assert plan.command is not None
    engine = served(plan.command)
    assert engine.placement == "disk"
    assert 0 <= parse_bytes(engine.row_cache) - plan.disk.row_cache < 1 << 20
    status, out, _ = run(capsys, model, "--memory", "4GiB")
    assert status == 0
    assert "64.0 GiB   values: 67,108,864 rows of 1,024 bytes (float32)" in out
    assert "placement disk: the tables do not fit" in out
    assert out.splitlines()[-1] == plan.command


def test_too_little_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path / "m", 8192)
    status, out, _ = run(capsys, model, "--memory", "600MiB")
    assert status == 1
    assert "cannot be served in this memory" in out
    plan = make_plan(str(model), 600 << 20)
    assert (plan.placement, plan.command, plan.disk) == (None, None, None)
    more = make_plan(str(model), (600 << 20) + int(1.1 * plan.short_of))
    assert more.placement == "disk"


def test_tables_share_what_is_left(tmp_path: Path) -> None:
    plan = make_plan(str(write(tmp_path / "m", 2048, layers=(1, 2), shared=False)), 2 * GIB)
    assert [table.name for table in plan.tables] == ["layers.1.values", "layers.2.values"]
    assert plan.disk is not None
    assert plan.disk.cached_rows % 2 == 0
    assert plan.disk.nbytes <= plan.left


def test_a_trace_makes_the_cache_smaller(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, rows = write(tmp_path / "m", 2048), 2048**2  # 4 GiB
    recorder = RowRecorder(tmp_path / "rows", [TracedTable("values", rows, 1024)])
    rng = np.random.default_rng(0)
    for _ in range(300):
        recorder.record(0, rng.integers(0, 5000, 128) * 800)
    recorder.close()
    without = make_plan(str(model), 2 * GIB)
    plan = make_plan(str(model), 2 * GIB, str(tmp_path / "rows"))
    assert plan.disk is not None
    assert without.disk is not None
    assert plan.disk.cached_rows <= 5000 < without.disk.cached_rows
    (expected,) = plan.expected
    assert expected.at_most - 0.005 <= expected.recommended <= expected.at_most
    assert expected.at_most > 0.9
    assert not expected.short
    _, out, _ = run(capsys, model, "--memory", "2GiB", "--trace", tmp_path / "rows")
    assert "by the trace, values hits" in out
    assert "the smallest within half a point" in out


@pytest.mark.parametrize(
    ("table", "status", "says"),
    [(TracedTable("values", 7, 9), 2, "recorded from another model"), (None, 1, "not a record")],
)
def test_a_trace_that_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], table: TracedTable | None, status: int, says: str
) -> None:
    if table is None:
        (tmp_path / "rows").write_text("no")
    else:
        RowRecorder(tmp_path / "rows", [table]).close()
    model = write(tmp_path / "m", 32)
    found, _, err = run(capsys, model, "--trace", tmp_path / "rows")
    assert (found, err.count("\n")) == (status, 1)
    assert says in err


@pytest.mark.parametrize(
    "source",
    [
        "lingua/a_memplus",
        "lingua/d_peer",
        "lingua/e_dense",
        "lingua/f_dcp",
        "smlm/q4/model",
        "smlm/bf16/model",
    ],
)
def test_foreign_checkpoints_are_not_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.setenv("MEMLANE_CACHE", str(tmp_path / "cache"))
    status, out, _ = run(capsys, DATA / source, "--memory", "4GiB")
    assert status == 0
    assert not (tmp_path / "cache").exists()
    if source == "lingua/e_dense":
        assert "There are no tables to place." in out
    else:
        assert "converted into there once" in out
        assert str(tmp_path / "cache") in out


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path / "m", 32)
    status, out, _ = run(capsys, model, "--json")
    assert status == 0
    plan = json.loads(out)
    assert plan["tables"] == [
        {"name": "values", "rows": 1024, "row_bytes": 1024, "row_format": "float32", "nbytes": 1 << 20}
    ]
    assert plan["placement"] == "host"
    assert plan["memory"] > 0


def test_what_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, tmp_path / "missing")[0] == 1
    status, _, err = run(capsys, tmp_path, "--memory", "much")
    assert status == 2
    assert "--memory" in err
