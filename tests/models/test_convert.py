"""Conversion: atomic, bounded in memory, checksummed; the cache of conversions; saving a trained model."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import DATA, Golden, full_logits
from safetensors import safe_open
from torch import Tensor

from memlane.checkpoints import convert, open_directory, read_config, resolve, save, verify
from memlane.checkpoints.source import FloatRows
from memlane.checkpoints.tensors import MemoryTensor
from memlane.config import EngineConfig
from memlane.errors import CheckpointError, ConfigError
from memlane.models import MemoryConfig, ModelConfig, Transformer
from memlane.models.loading import TableOptions, load_model, table_bytes
from memlane.tables import ReferenceTable, RowFormat, TableLayout, decode_rows
from memlane.warming import WarmStart

SMLM, LINGUA = DATA / "smlm" / "q4" / "model", DATA / "lingua" / "a_memplus"


def table_values(directory: Path, name: str = "values") -> Tensor:
    """A table of a model directory, decoded."""
    (table,) = [t for t in open_directory(directory).tables if t.name == name]
    stored = torch.cat(list(table.chunks(1000)))
    row_format = RowFormat(table.row_format)
    return decode_rows(stored, row_format, table.width) if row_format.is_quantised else stored.float()


def test_files_are_ordinary_and_aligned(tmp_path: Path) -> None:
    out = convert(LINGUA, tmp_path / "out", progress=False)
    assert json.loads((out / "config.json").read_text())["model_type"] == "memlane"
    with safe_open(out / "model.safetensors", "pt") as file:  # the library accepts our files
        assert file.get_tensor("layers.1.memory.keys").shape == (2, 2, 16, 16)
    with safe_open(out / "table-values.safetensors", "pt") as file:
        assert file.get_tensor("values").shape == (256, 64)
    layout = TableLayout.from_safetensors(out / "table-values.safetensors", "values")
    assert layout.offset % 4096 == 0
    assert set(json.loads((out / "memlane-checksums.json").read_text())) == {
        p.name for p in out.iterdir() if p.name != "memlane-checksums.json"
    }
    verify(out)


@pytest.mark.parametrize("source", [SMLM, LINGUA], ids=["from_int4", "from_float32"])
@pytest.mark.parametrize("rows", ["float32", "bfloat16", "float16", "int8", "int4", "fp8"])
def test_row_formats(tmp_path: Path, source: Path, rows: str) -> None:
    exact = table_values(convert(source, tmp_path / "exact", progress=False))
    out = convert(source, tmp_path / "out", rows=rows, progress=False)
    memory = read_config(out).memory
    assert memory is not None
    assert memory.row_format == rows
    error = (table_values(out) - exact).abs().amax(1) / exact.abs().amax(1).clamp(min=1e-6)
    assert (
        error.max()
        <= {"float32": 0, "bfloat16": 2**-8, "float16": 2**-9, "int8": 1 / 126, "int4": 1 / 7, "fp8": 1 / 27}[
            rows
        ]
    )
    assert table_bytes(out) == memory.rows * memory.row_bytes
    with load_model(out, tables=TableOptions("disk", 4096)) as model:
        assert torch.isfinite(full_logits(model.transformer, torch.arange(12)[None])).all()


def test_converting_our_own_form_again(tmp_path: Path) -> None:
    first = convert(SMLM, tmp_path / "first", progress=False)
    again = convert(first, tmp_path / "again", progress=False)
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {
        p.name: p.read_bytes() for p in again.iterdir()
    }
    assert (again / "hot_rows.npy").read_bytes() == (SMLM / "hot_rows.npy").read_bytes()


def test_an_existing_destination(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    convert(SMLM, out, progress=False)  # empty: fine
    with pytest.raises(CheckpointError, match="out: exists already"):
        convert(LINGUA, out, progress=False)
    convert(LINGUA, out, overwrite=True, progress=False)
    assert read_config(out).rope_interleaved
    verify(out)
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="will not be overwritten, it is not a model directory"):
        convert(SMLM, precious, overwrite=True, progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "precious"]


class Interrupted(FloatRows):
    def chunks(self, rows: int) -> Iterator[Tensor]:
        yield self.tensor.load()[:1]
        raise KeyboardInterrupt


def test_a_stopped_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = convert(LINGUA, tmp_path / "out", progress=False)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    stopped = Interrupted("values", MemoryTensor(torch.zeros(1024, 64)), "float32")
    source = dataclasses.replace(
        open_directory(convert(SMLM, tmp_path / "src", progress=False)), tables=(stopped,)
    )
    monkeypatch.setattr("memlane.checkpoints.converter.open_checkpoint", lambda *_: source)
    with pytest.raises(KeyboardInterrupt):
        convert(SMLM, out, overwrite=True, progress=False)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "src"]


def test_memory_does_not_grow_with_the_table(tmp_path: Path) -> None:
    source = tmp_path / "big"
    source.mkdir()
    keys, width = 512, 256
    content = torch.load(DATA / "smlm" / "bf16" / "model" / "rest.pt", weights_only=True)
    content["model_config"].update(mem_n_keys=keys, mem_v_dim=width)
    content["table_shape"] = [keys**2, width]
    for layer in (0, 2):
        ffn = f"layers.{layer}.ffn."
        content["state_dict"][ffn + "keys"] = torch.zeros(2, 2, keys, 8)
        content["state_dict"][ffn + "swilu_proj.weight"] = torch.zeros(width, 48)
        content["state_dict"][ffn + "swilu_proj.bias"] = torch.zeros(width)
        content["state_dict"][ffn + "value_proj.weight"] = torch.zeros(48, width)
    torch.save(content, source / "rest.pt")
    table = 2 * keys**2 * width
    with (source / "values_bf16.bin").open("wb") as file:
        file.truncate(table)  # 128 MiB of zeros that take no disk
    program = f"""
import resource
from memlane.checkpoints import convert
convert({str(SMLM)!r}, {str(tmp_path / "warm")!r}, rows="int8", progress=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert({str(source)!r}, {str(tmp_path / "out")!r}, rows="int8", progress=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < table // 2


def test_wrong_hot_rows_are_refused(tmp_path: Path) -> None:
    out = convert(SMLM, tmp_path / "out", progress=False)
    np.save(out / "hot_rows.npy", np.array([0, 1024]))
    with pytest.raises(CheckpointError, match=r"hot_rows\.npy: holds row ids outside the table's 1024 rows"):
        convert(out, tmp_path / "again", progress=False)
    with (
        load_model(out, tables=TableOptions("disk", 10000)) as model,
        pytest.raises(CheckpointError, match=r"hot_rows\.npy: does not hold int64 row ids"),
    ):
        WarmStart(EngineConfig(model=str(out)), model)
    np.save(out / "hot_rows.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"hot_rows\.npy: is not a \.npy file of row ids"):
        convert(out, tmp_path / "again", progress=False)


def test_no_more_rows_are_pinned_than_are_known_to_be_hot(tmp_path: Path) -> None:
    out = convert(SMLM, tmp_path / "out", progress=False)
    np.save(out / "hot_rows.npy", np.array([5, 9, 2]))
    with load_model(out, tables=TableOptions("disk", 10000)) as model:
        WarmStart(
            EngineConfig(model=str(out), pin_rows="50%", warm_start="off", warm_wait=True), model
        )  # fmt: skip
        assert model.tables["values"].stats().pinned_slots == 3
        assert set(model.tables["values"].ranking().tolist()) == {2, 5, 9}


def test_unknown_row_format(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rows must be one of float32"):
        convert(SMLM, tmp_path / "out", rows="int3")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", r"model\.safetensors: corrupt: its sha256"),
        ("table-values.safetensors", r"table-values\.safetensors: .* do not match their checksum"),
    ],
)
def test_flipped_bits_are_found_at_start(tmp_path: Path, file: str, message: str) -> None:
    out = convert(SMLM, tmp_path / "out", progress=False)
    data = bytearray((out / file).read_bytes())
    data[-5] ^= 16
    (out / file).write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        load_model(out)


@pytest.mark.parametrize("file", ["model.safetensors", "table-values.safetensors"])
@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_files_are_found_at_start(tmp_path: Path, file: str, keep: int) -> None:
    out = convert(SMLM, tmp_path / "out", progress=False)
    (out / file).write_bytes((out / file).read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=file):
        load_model(out)
    (out / file).unlink()
    with pytest.raises(CheckpointError, match=file):
        load_model(out)


def test_paths_that_are_no_checkpoints(tmp_path: Path) -> None:
    for path, message in [
        (tmp_path / "missing", "no such file or directory"),
        (tmp_path, "holds no checkpoint"),
        (Path(__file__), "is not a checkpoint folder"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            resolve(path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"config\.json: is of model_type 'llama'"):
        load_model(tmp_path)


def test_foreign_checkpoints_are_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMLANE_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "foreign"
    shutil.copytree(SMLM, source)
    first = resolve(source, progress=False)
    made = (first / "config.json").stat().st_mtime_ns
    assert resolve(source / "rest.pt") == first
    assert (first / "config.json").stat().st_mtime_ns == made
    assert resolve(first) == first
    (source / "hot_rows.npy").touch()  # a changed source is another model
    assert resolve(source, progress=False) != first


def test_two_callers_convert_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock is on a file, so that threads stand for processes here."""
    monkeypatch.setenv("MEMLANE_CACHE", str(tmp_path / "cache"))
    converted, found = [], []

    def counted(source: Path, target: Path, **options: Any) -> Path:
        converted.append(target)
        return convert(source, target, **options)

    monkeypatch.setattr("memlane.checkpoints.cache.convert", counted)
    callers = [
        threading.Thread(target=lambda: found.append(resolve(LINGUA, progress=False))) for _ in range(3)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(found) == 3
    assert len(set(found)) == len(converted) == 1
    verify(found[0])


def test_leftovers_of_a_killed_conversion_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEMLANE_CACHE", str(tmp_path))
    model = resolve(LINGUA, progress=False)
    left = model.with_name(f".{model.name}.partial-x")
    shutil.copytree(model, left)
    shutil.rmtree(model)
    assert resolve(LINGUA, progress=False) == model
    assert not left.exists()


def test_saving_a_trained_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    memory = MemoryConfig(
        layers=(0,), num_keys=8, num_heads=2, knn=4, key_dim=8, value_dim=16, row_format="float32"
    )
    config = ModelConfig(vocab_size=40, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=24,
                         max_position_embeddings=32, tie_word_embeddings=True, memory=memory)  # fmt: skip
    table = ReferenceTable(64, 16)
    model = Transformer(config, {"values": table})
    ids = torch.randint(0, 40, (2, 7))
    hot = {"values": np.arange(64)[::-1]}

    def write_tokenizer(into: Path) -> None:
        (into / "tokenizer.json").write_text("{}")

    out = save(
        tmp_path / "out",
        config,
        model.state_dict(),
        {"values": table.weight},
        hot_rows=hot,
        write_tokenizer=write_tokenizer,
    )
    verify(out)
    assert (out / "tokenizer.json").exists()
    with load_model(out) as loaded, torch.no_grad():
        assert torch.allclose(full_logits(loaded.transformer, ids), full_logits(model, ids), atol=1e-5)
    small = save(tmp_path / "small", config, model.state_dict(), {"values": table.weight}, rows="int8")
    assert table_bytes(small) == 64 * 18
    weights = {k: v for k, v in model.state_dict().items() if k != "norm.weight"}
    with pytest.raises(CheckpointError, match=r"weight norm\.weight is missing"):
        save(tmp_path / "bad", config, weights, {"values": table.weight})


def test_golden_model_keeps_its_answers_in_int8(tmp_path: Path) -> None:
    golden = Golden.load("lingua-a_memplus")
    out = convert(golden.checkpoint, tmp_path / "out", rows="int8", progress=False)
    with load_model(out) as model, torch.no_grad():
        logits = full_logits(model.transformer, golden.expected["input_ids"])
    agree = (logits.argmax(-1) == golden.expected["logits"].argmax(-1)).float().mean()
    assert agree > 0.9
