"""`memlane check`: sound models pass, every kind of damage is named, and rows are measured against another checkpoint."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import DATA
from plain_crc32c import block_sums
from safetensors.torch import load_file, save_file

from memlane.checkpoints import check, convert, open_checkpoint, read_config
from memlane.checkpoints.checker import ModelReport, RowSpan
from memlane.errors import CheckpointError, ConfigError
from memlane.models.config import ROW_FORMATS
from memlane.models.loading import TableOptions, load_model
from memlane.tables import RowFormat, TableLayout, decode_rows
from memlane.tables.checksums import read_checksums
from memlane_server import cli

SMLM, LINGUA = DATA / "smlm" / "q4" / "model", DATA / "lingua" / "a_memplus"
TABLE = "table-values.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return convert(SMLM, tmp_path / "model", rows="int8", progress=False)


def layout_of(model: Path) -> TableLayout:
    memory = read_config(model).memory
    assert memory is not None
    return TableLayout.from_safetensors(model / TABLE, "values", memory.row_format, memory.value_dim)


def overwrite(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def without_checksums(model: Path) -> None:
    save_file({"values": load_file(model / TABLE)["values"]}, model / TABLE)


def unlist(model: Path, name: str) -> None:
    sums = json.loads((model / "memlane-checksums.json").read_text())
    del sums[name]
    (model / "memlane-checksums.json").write_text(json.dumps(sums))


def defects(report: ModelReport) -> dict[str, str]:
    """By file name."""
    found = {file.name: file.defect for file in report.files} | {t.file: t.defect for t in report.tables}
    return {name: defect for name, defect in found.items() if defect is not None}


@pytest.mark.parametrize("source", [SMLM, LINGUA], ids=["from_int4", "from_float32"])
@pytest.mark.parametrize("rows", ROW_FORMATS)
def test_converted_models_carry_checksums_and_pass(tmp_path: Path, source: Path, rows: str) -> None:
    out = convert(source, tmp_path / "out", rows=rows, progress=False)
    layout = layout_of(out)
    raw = layout.path.read_bytes()
    stored = read_checksums(layout)
    assert stored is not None
    assert stored.tolist() == block_sums(raw[layout.offset : layout.offset + layout.nbytes])
    assert load_file(out / TABLE)["values.crc32c"].tolist() == stored.tolist()
    report = check(out, progress=False)
    assert report.clean
    (table,) = report.tables
    assert (table.rows, table.row_format, table.verified_by) == (layout.rows, rows, "blocks")
    assert {f.name for f in report.files} == {p.name for p in out.iterdir()} - {
        TABLE,
        "memlane-checksums.json",
    }


def test_the_shipped_model_passes() -> None:
    assert check(cli.demo_directory(), progress=False).clean


def test_one_flipped_byte_is_found_and_named(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = layout_of(model)
    at = 5 * 4096 + 17
    overwrite(layout.path, layout.offset + at, bytes([layout.path.read_bytes()[layout.offset + at] ^ 1]))
    first, last = 5 * 4096 // layout.stride, (6 * 4096 - 1) // layout.stride
    assert cli.main(["check", str(model)]) == 1
    out = capsys.readouterr().out
    assert f"table values ({TABLE}): rows {first}-{last}: block 5 differs from its checksum\n" in out
    assert "DAMAGED" in out.splitlines()[-1]


def test_damaged_rows_are_not_converted_to_sound_ones(model: Path, tmp_path: Path) -> None:
    layout = layout_of(model)
    overwrite(layout.path, layout.offset + 4096 * 3, bytes(4096))
    first, last = 3 * 4096 // layout.stride, (4 * 4096 - 1) // layout.stride
    with pytest.raises(
        CheckpointError, match=rf"corrupt: rows {first}-{last} differ from their checksum \(1 bad"
    ):
        convert(model, tmp_path / "again", progress=False)
    assert not (tmp_path / "again").exists()


def test_a_sound_model_in_words(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", str(model)]) == 0
    out = capsys.readouterr().out
    assert "model.safetensors: ok (SHA-256)\n" in out
    assert f"table values ({TABLE}): ok, 1,024 int8 rows, every block verified\n" in out
    assert "no damage found" in out.splitlines()[-1]
    assert "GB/s" in out.splitlines()[-1]


def test_as_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = layout_of(model)
    overwrite(layout.path, layout.offset + 3 * layout.stride - 1, b"\x7c")  # row 2's scale: not finite
    assert cli.main(["check", str(model), "--json", "--against", str(SMLM)]) == 1
    found = json.loads(capsys.readouterr().out)
    (table,) = found["tables"]
    assert found["clean"] is False
    assert table["scan"]["bad_scales"] == [{"first": 2, "last": 2}]
    assert [b["first"] for b in table["scan"]["bad_blocks"]] == [0]
    assert table["comparison"] is None  # the rows are known to be damaged
    assert found["bytes_per_second"] > 0
    assert found["directory"] == str(model)


def test_other_files(model: Path) -> None:
    overwrite(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 3, b"\1\2")
    (model / "hot_rows.npy").unlink()
    report = check(model, progress=False)
    assert not report.clean
    assert report.tables[0].clean
    assert defects(report) == {
        "model.safetensors": "corrupt: its sha256 is not the one in memlane-checksums.json",
        "hot_rows.npy": "is missing, memlane-checksums.json lists it",
    }


@pytest.mark.parametrize("name", ["model.safetensors", TABLE])
@pytest.mark.parametrize("keep", [0, 5, 5000, -1])
def test_truncated_files(model: Path, name: str, keep: int) -> None:
    (model / name).write_bytes((model / name).read_bytes()[:keep])
    report = check(model, progress=False)
    assert list(defects(report)) == [name]
    assert not report.clean
    assert all(table.clean for table in report.tables) == (name != TABLE)


def test_a_missing_table(model: Path) -> None:
    (model / TABLE).unlink()
    assert defects(check(model, progress=False)) == {TABLE: "cannot be read: No such file or directory"}


def test_a_table_without_block_checksums(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    without_checksums(model)
    assert defects(check(model, progress=False)) == {
        TABLE: "corrupt: its sha256 is not the one in memlane-checksums.json"
    }
    unlist(model, TABLE)
    report = check(model, progress=False)
    assert report.clean
    assert report.tables[0].verified_by == "size"
    assert cli.main(["check", str(model)]) == 0
    assert "Table values has no checksums: only its size was checked." in capsys.readouterr().out


def test_checksums_of_another_shape(model: Path) -> None:
    tensors = load_file(model / TABLE)
    tensors["values.crc32c"] = tensors["values.crc32c"][:-1].clone()
    save_file(tensors, model / TABLE)
    (defect,) = defects(check(model, progress=False)).values()
    assert "'values.crc32c' is U32 [16]; the checksums of 'values' are U32 [17]" in defect
    unlist(model, TABLE)
    with pytest.raises(CheckpointError, match=r"values\.crc32c"):
        load_model(model, tables=TableOptions("disk", 10_000))


def test_without_a_checksum_file(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "memlane-checksums.json").unlink()
    assert cli.main(["check", str(model)]) == 0
    assert "There is no memlane-checksums.json" in capsys.readouterr().out
    (model / "memlane-checksums.json").write_text("[")
    assert defects(check(model, progress=False))["memlane-checksums.json"].startswith("is not JSON")


def test_what_cannot_be_checked(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="is a smlm checkpoint without checksums: convert it"):
        check(SMLM, progress=False)
    assert cli.main(["check", str(SMLM)]) == 2
    assert cli.main(["check", str(tmp_path / "nothing")]) == 1
    assert capsys.readouterr().err.count("\n") == 2
    with pytest.raises(CheckpointError, match="its table values is 256 x 64, the model's is 1024 x"):
        check(model, against=LINGUA, progress=False)
    with pytest.raises(CheckpointError, match="no such file"):
        check(model, against=tmp_path / "nothing", progress=False)


@pytest.mark.parametrize("rows", ROW_FORMATS)
def test_comparison_with_the_source(tmp_path: Path, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memlane.checkpoints.comparison._CHUNK_BYTES", 4 * 64 * 30)  # several chunks
    out = convert(LINGUA, tmp_path / "out", rows=rows, progress=False)
    (table,) = check(out, against=LINGUA, progress=False).tables
    found = table.comparison
    assert found is not None
    (source,) = open_checkpoint(LINGUA).tables
    exact = next(source.chunks(1000)).double()
    layout = layout_of(out)
    raw = np.fromfile(layout.path, np.uint8, layout.nbytes, offset=layout.offset).reshape(layout.rows, -1)
    decoded = decode_rows(torch.from_numpy(raw), RowFormat(rows), layout.width).double()
    error = (decoded - exact).norm(dim=1) / exact.norm(dim=1)
    assert found.rms_error == pytest.approx(((decoded - exact).norm() / exact.norm()).item(), rel=1e-4)
    assert found.worst_error == pytest.approx(error.max().item(), rel=1e-4)
    assert found.worst_row == error.argmax()
    cosine = torch.nn.functional.cosine_similarity(decoded, exact).mean().item()
    assert found.mean_cosine == pytest.approx(cosine, abs=1e-9)
    bound = {"float32": 0, "bfloat16": 2**-8, "float16": 2**-11, "int8": 0.02, "int4": 0.2, "fp8": 2**-4}[
        rows
    ]
    assert found.rms_error <= found.worst_error <= bound


def test_comparison_with_rows_of_zeros_and_rows_that_are_not_finite(tmp_path: Path) -> None:
    first = convert(LINGUA, tmp_path / "first", progress=False)
    tensors = load_file(first / TABLE)
    values = tensors["values"]
    ours, theirs = values.clone(), values.clone()
    ours[3] = theirs[3] = 0  # equal
    ours[5] = 0  # all of it is wrong
    for model, rows in (("ours", ours), ("theirs", theirs)):
        shutil.copytree(first, tmp_path / model)
        save_file({"values": rows}, tmp_path / model / TABLE)
    (table,) = check(tmp_path / "ours", against=tmp_path / "theirs", progress=False).tables
    found = table.comparison
    assert found is not None
    assert (found.worst_error, found.worst_row) == (1.0, 5)
    assert found.mean_cosine == pytest.approx(1 - 1 / len(values))
    (table,) = check(tmp_path / "theirs", against=tmp_path / "ours", progress=False).tables
    assert table.comparison is not None
    assert (table.comparison.worst_error, table.comparison.worst_row) == (math.inf, 5)
    ours[1, 2] = math.nan
    save_file({"values": ours}, tmp_path / "ours" / TABLE)
    (table,) = check(tmp_path / "ours", against=tmp_path / "theirs", progress=False).tables
    assert table.comparison is not None
    assert (table.comparison.worst_error, table.comparison.worst_row) == (math.inf, 1)


def test_scales_that_were_written_so(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The block checksums agree with such rows: whoever wrote them knew no better."""
    layout = layout_of(model)
    raw = np.fromfile(layout.path, np.uint8, layout.nbytes, offset=layout.offset).reshape(layout.rows, -1)
    raw[[9, 10], -1] = 0x7E
    sums = np.array(block_sums(raw.tobytes()), "<u4")
    overwrite(layout.path, layout.offset, raw.tobytes())
    assert layout.checksum_offset is not None
    overwrite(layout.path, layout.checksum_offset, sums.tobytes())
    (table,) = check(model, progress=False).tables
    assert table.scan is not None
    assert (table.scan.bad_blocks, table.scan.bad_scales) == ((), (RowSpan(9, 10),))
    assert cli.main(["check", str(model)]) == 1
    assert "rows 9-10: scale is not a finite number" in capsys.readouterr().out
