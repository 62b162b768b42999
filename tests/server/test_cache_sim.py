"""`memlane cache-sim`: its report on records made so that the answer is known."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from memlane.tables.trace import RowRecorder, TracedTable
from memlane_server import cli

ROWS, ROW_BYTES = 2000, 512


def record(path: Path, *, tables: int = 1, cache: int | None = None, lookups: int = 300) -> Path:
    """Nine of ten reads go to a tenth of the rows, the rest anywhere."""
    recorder = RowRecorder(
        path, [TracedTable(f"t{i}", ROWS, ROW_BYTES, cache) for i in range(tables)], model="m"
    )
    rng = np.random.default_rng(0)
    for _ in range(lookups):
        for table in range(tables):
            hot = rng.integers(0, ROWS // 10, 90)
            recorder.record(table, np.concatenate([hot, rng.integers(0, ROWS, 10)]))
    recorder.close()
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main(["cache-sim", *map(str, arguments)])
    output = capsys.readouterr()
    return status, output.out, output.err


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = record(tmp_path / "rows", cache=ROWS * ROW_BYTES // 2)
    status, out, _ = run(capsys, file, "--sizes", "5%,25%,250KiB", "--policies", "lru")
    assert status == 0
    assert "rows that m was asked for" in out
    assert "table t0: 2,000 rows of 512 bytes, 1000.0 KiB, served with a cache of 500.0 KiB" in out
    assert "300 lookups of 30,000 ids" in out
    table = [line.split() for line in out.splitlines() if "KiB " in line and "%" in line and "," not in line]
    assert [(row[0], row[2]) for row in table] == [
        ("50.0", "5.0%"),
        ("250.0", "25.0%"),  # 25 % and 250 KiB are the same size
        ("500.0", "50.0%"),  # the budget: what it was served with
        ("1000.0", "100.0%"),
    ]
    assert "<- budget" in next(line for line in out.splitlines() if "500.0 KiB" in line and "50.0%" in line)
    assert "Recommended for 500.0 KiB: lru, which hits" in out


def test_the_numbers_are_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = record(tmp_path / "rows")
    status, _, _ = run(capsys, file, "--budget", "30%", "--json", tmp_path / "out.json", "--warm-up", "50%")
    assert status == 0
    (table,) = json.loads((tmp_path / "out.json").read_text())["tables"]
    assert (table["ids"], table["counted_ids"], table["lookups"]) == (30_000, 15_000, 300)
    assert table["top"]["0.1"] == pytest.approx(0.91, abs=0.01)
    rates = {point["slots"]: point["hit_rate"] for point in table["points"] if point["policy"] == "lru"}
    assert rates[600] == pytest.approx(
        0.9 + 0.1 * 600 / 2000, abs=0.015
    )  # all hot rows, and others by chance
    advice = table["recommendation"]
    assert advice["budget_bytes"] == 600 * ROW_BYTES
    assert (advice["half"]["slots"], advice["double"]["slots"]) == (300, 1200)
    curve = {point["slots"]: point["hit_rate"] for point in table["lru_curve"]}
    assert curve[2000] == pytest.approx(rates[1500], abs=0.05)


def test_a_smaller_size_that_is_as_good_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = RowRecorder(tmp_path / "rows", [TracedTable("t", ROWS, ROW_BYTES)])
    for i in range(200):
        recorder.record(0, (np.arange(10) + i * 10) % 100)  # a hundred rows, round and round
    recorder.close()
    _, out, _ = run(capsys, tmp_path / "rows", "--sizes", "4%,5%,20%", "--policies", "lru")
    assert "Recommended for 250.0 KiB: lru, which hits 100.0% of reads; half the size would hit 100.0%" in out
    assert "50.0 KiB (5.0%) are as good: 100.0%." in out


def test_tables_share_the_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = record(tmp_path / "rows", tables=2, lookups=50)
    _, out, _ = run(capsys, file, "--budget", "400KiB")
    assert "table t0" in out
    assert "table t1" in out
    assert out.count("Recommended for 200.0 KiB") == 2
    _, out, _ = run(capsys, file, "--table", "t1")
    assert "table t0" not in out
    assert out.count("Recommended for 250.0 KiB") == 1


def test_a_torn_record_is_used_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = record(tmp_path / "rows", lookups=1500)
    file.write_bytes(file.read_bytes()[:-9])
    status, out, _ = run(capsys, file)
    assert status == 0
    assert "it ends early: the last" in out
    assert "Recommended" in out


def test_a_short_record_is_called_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, record(tmp_path / "short", lookups=10))
    assert "The record is short" in out
    _, out, _ = run(capsys, record(tmp_path / "long"))
    assert "The record is short" not in out


def test_an_empty_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, record(tmp_path / "rows", lookups=0))
    assert status == 0
    assert "nothing to replay" in out


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--policies", "magic"], 2, "no policy 'magic'; there are lru"),
        (["--table", "x"], 2, "no table 'x'"),
        (["--sizes", "big"], 2, "--sizes: 'big' is not a size"),
        (["--budget", "big"], 2, "--budget"),
        (["--warm-up", "3"], 2, "--warm-up"),
        (["--warm-up", "100%"], 2, "--warm-up"),
        (["--json", "/no/folder"], 1, "/no/folder"),
        (["--plot", "x.nonsense"], 2, "--plot"),
    ],
)
def test_wrong_usage_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, says: str
) -> None:
    found, _, err = run(capsys, record(tmp_path / "rows", lookups=3), *arguments)
    assert found == status
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("content", [None, b"", b"something else"])
def test_no_record_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "rows").write_bytes(content)
    status, _, err = run(capsys, tmp_path / "rows")
    assert status == 1
    assert "rows: " in err
    assert err.count("\n") == 1


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = record(tmp_path / "rows", tables=2, lookups=50)
    status, _, _ = run(capsys, file, "--plot", tmp_path / "out.png")
    assert status == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "memlane_server.cache_plot", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails now
    status, _, err = run(capsys, record(tmp_path / "rows", lookups=3), "--plot", "x.png")
    assert status == 2
    assert "pip install 'memlane[plot]'" in err
