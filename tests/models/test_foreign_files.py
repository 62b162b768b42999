"""Foreign files that are truncated, corrupt, incomplete or hostile: each gives an error that names the file, and runs nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import DATA
from torch import Tensor

from memlane.checkpoints import convert, open_checkpoint
from memlane.checkpoints.dcp import DcpFolder, _tile
from memlane.checkpoints.tensors import StoredTensor
from memlane.checkpoints.torch_file import read_torch_file
from memlane.errors import CheckpointError


def copy(tmp_path: Path, name: str) -> Path:
    target = tmp_path / name.replace("/", "-")
    shutil.copytree(DATA / name, target)
    return target


def save(value: object, path: Path) -> Path:
    torch.save(value, path)
    return path


class Evil:
    """Pickles as a call that leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


# ---- files of torch.save


def test_tensors_of_every_shape_and_type(tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    value = {
        "plain": base.clone(),
        "transposed": base.clone().t(),
        "window": base[1:3, 2:5],
        "bf16": torch.randn(7, 3).bfloat16(),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 5),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "nested": OrderedDict(a=[torch.tensor([True, False]), (1, 2.5, None, "text")]),
    }
    read = read_torch_file(save(value, tmp_path / "x.pt"))
    for name in ("plain", "transposed", "window", "bf16", "scalar", "empty", "parameter"):
        assert isinstance(read[name], StoredTensor)
        assert torch.equal(read[name].load(), value[name])
    assert read["nested"]["a"][0].load().tolist() == [True, False]
    assert read["nested"]["a"][1] == (1, 2.5, None, "text")
    for name in ("plain", "transposed", "window", "bf16"):
        assert torch.equal(torch.cat(list(read[name].chunks(2))), value[name])


def test_a_file_inside_a_file(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(torch.arange(5), buffer)
    path = tmp_path / "shard"
    path.write_bytes(b"x" * 13 + buffer.getvalue() + b"y" * 7)
    assert read_torch_file(path, 13, len(buffer.getvalue())).load().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.99])
def test_truncated_at(tmp_path: Path, keep: float) -> None:
    path = save({"a": torch.randn(1000), "b": torch.randn(10)}, tmp_path / "x.pt")
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"x\.pt: (truncated|corrupt)"):
        read_torch_file(path)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    path = save({"a": torch.zeros(3)}, tmp_path / "x.pt")
    data = path.read_bytes()
    directory = data.rindex(
        b"PK\x01\x02"
    )  # an entry of the zip directory; bit 11 of its flags promises UTF-8
    flags = int.from_bytes(data[directory + 8 : directory + 10], "little") | 0x800
    damaged = bytearray(data)
    damaged[directory + 8 : directory + 10] = flags.to_bytes(2, "little")
    damaged[directory + 50] = 0xD0
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"x\.pt: truncated or not a file of torch\.save"):
        read_torch_file(path)


def test_flipped_bit_in_a_tensor(tmp_path: Path) -> None:
    path = save({"a": torch.zeros(1000)}, tmp_path / "x.pt")
    offset = read_torch_file(path)["a"].offset
    data = bytearray(path.read_bytes())
    data[offset + 100] ^= 1
    path.write_bytes(data)
    for read in (lambda t: t.load(), lambda t: list(t.chunks(64))):
        with pytest.raises(
            CheckpointError, match=r"x\.pt: corrupt: the \(1000,\) tensor .* fails its checksum"
        ):
            read(read_torch_file(path)["a"])


def test_file_without_checksums(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = save(torch.arange(9), tmp_path / "x.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert read_torch_file(path).load().tolist() == list(range(9))


def rewritten_pickle(path: Path, structure: bytes) -> None:
    """Replace data.pkl of a torch file."""
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(name, structure if name.endswith("/data.pkl") else data)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (b"", "corrupt pickle"),
        (b"\x80\x02.", "corrupt pickle"),
        (b"\x80\x02]q\x00h\x07.", "corrupt pickle"),
        (b"\x80\x02]r\xff\xff\xff\x7f.", "corrupt pickle: ValueError: memo index"),  # would take 32 GiB
        (b"\x80\x04\x8e\x00\x00\x00\x00\x10\x00\x00\x00.", "corrupt pickle"),  # bytes that are not there
        (b"cos\nsystem\n(S'true'\ntR.", r"refused: .*(os|posix)\.system"),
        (b"cbuiltins\neval\n(S'1'\ntR.", r"refused: .*builtins\.eval"),
        (b"ctorch\nload\n(S'1'\ntR.", r"refused: .*torch\.load"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(I1\nI2\nI3\nI4\ntR.", "corrupt pickle"),
    ],
)
def test_malformed_and_hostile_structures(tmp_path: Path, structure: bytes, message: str) -> None:
    path = save({"a": torch.zeros(3)}, tmp_path / "x.pt")
    rewritten_pickle(path, structure)
    with pytest.raises(CheckpointError, match=r"x\.pt: " + message):
        read_torch_file(path)


@pytest.mark.parametrize("change", [{"offset": 4}, {"size": (9,)}, {"stride": (-1,)}, {"size": (-3,)}])
def test_a_view_beyond_its_storage(tmp_path: Path, change: dict[str, Any]) -> None:
    path = save(torch.zeros(8), tmp_path / "x.pt")
    view = {"offset": 0, "size": (8,), "stride": (1,), **change}

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", torch.FloatStorage, "0", "cpu", 8) if value is Storage else None

    class View:
        def __reduce__(self) -> tuple[Any, ...]:
            return torch._utils._rebuild_tensor_v2, (Storage, *view.values(), False, OrderedDict())

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(View())
    rewritten_pickle(path, buffer.getvalue())
    with pytest.raises(CheckpointError, match="reaches beyond its storage"):
        read_torch_file(path)


# ---- hostile pickles in each place a checkpoint has one


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("smlm/q4/model", "rest.pt"),
        ("lingua/a_memplus", "consolidated/consolidated.pth"),
        ("lingua/f_dcp", ".metadata"),
        ("lingua/f_dcp", "__0_0.distcp"),
    ],
)
def test_no_pickle_is_executed(tmp_path: Path, name: str, file: str) -> None:
    folder, mark = copy(tmp_path, name), tmp_path / "executed"
    evil = {
        "model": Evil(mark),
        "state_dict": Evil(mark),
        "model_config": {},
        "table_keys": [],
        "table_shape": [1, 1],
    }
    path = folder / file
    if file == ".metadata":
        path.write_bytes(pickle.dumps(evil))
    elif file.endswith(".distcp"):
        blob = io.BytesIO()
        torch.save(evil, blob)
        places = DcpFolder(folder)._places
        _overwrite_blocks(path, blob.getvalue(), places)
    else:
        torch.save(evil, path)
    with pytest.raises(
        CheckpointError, match=r"system.*nothing was executed|truncated or not a file of torch\.save"
    ):
        convert(folder, tmp_path / "out", progress=False)
    assert not mark.exists()
    assert not (tmp_path / "out").exists()
    pickle.loads(pickle.dumps(Evil(mark)))  # the weapon works, elsewhere
    assert mark.exists()


def _overwrite_blocks(path: Path, blob: bytes, places: dict[Any, dict[str, Any]]) -> None:
    """Put `blob` at the end of every large enough block: a zip archive is found from its end."""
    data = bytearray(path.read_bytes())
    for place in places.values():
        if place["length"] >= len(blob):
            end = place["offset"] + place["length"]
            data[end - len(blob) : end] = blob
    path.write_bytes(data)


# ---- missing and contradicting parts

Damage = Callable[[Path], None]


def truncate(file: str, keep: float) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / file
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])

    return damage


def remove(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


def edit_json(file: str, *keys: str, value: object) -> Damage:
    def damage(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        inner = content
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        (folder / file).write_text(json.dumps(content))

    return damage


def edit_saved(file: str, change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        content = torch.load(folder / file, weights_only=True)
        change(content)
        torch.save(content, folder / file)

    return damage


def append(file: str) -> Damage:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes() + b"\0")


CONSOLIDATED = "consolidated/consolidated.pth"
PARAMS = "consolidated/params.json"
KEY = "layers.1.feed_forward.keys"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("lingua/a_memplus", truncate(CONSOLIDATED, 0.9), r"consolidated\.pth: truncated"),
        ("lingua/a_memplus", remove(PARAMS), r"params\.json: cannot be read"),
        ("lingua/a_memplus", truncate(PARAMS, 0.5), r"params\.json: is not JSON"),
        ("lingua/a_memplus", edit_json(PARAMS, "model", value=[1]), r"params\.json: model is not an object"),
        ("lingua/a_memplus", edit_json(PARAMS, "model", "n_heads", value=None), "n_heads is missing"),
        ("lingua/a_memplus", edit_json(PARAMS, "model", "dim", value=32), r"weight .* is \["),
        ("lingua/a_memplus", edit_json(PARAMS, "model", "vocab_size", value="many"), "describes no model"),
        ("lingua/a_memplus", edit_json(PARAMS, "model", "weight_tying", value=True), "weight_tying"),
        (
            "lingua/a_memplus",
            edit_json(PARAMS, "model", "productkey_args", "mem_v_dim", value=0),
            "mem_v_dim 0",
        ),
        (
            "lingua/a_memplus",
            edit_json(PARAMS, "model", "productkey_args", "mem_knn", value=17),
            "knn .17. must not",
        ),
        (
            "lingua/a_memplus",
            edit_json(PARAMS, "model", "productkey_args", "mem_n_keys", value=32),
            "table|weight",
        ),
        (
            "lingua/a_memplus",
            edit_saved(CONSOLIDATED, lambda c: c["model"].pop(KEY)),
            f"tensor {KEY} is missing",
        ),
        (
            "lingua/a_memplus",
            edit_saved(CONSOLIDATED, lambda c: c["model"].update(x=torch.ones(1))),
            "unexpected tensor x",
        ),
        (
            "lingua/a_memplus",
            edit_saved(CONSOLIDATED, lambda c: c["model"].update(x=1)),
            "'x' is not a named tensor",
        ),
        ("lingua/a_memplus", edit_saved(CONSOLIDATED, lambda c: c.pop("model")), 'holds no "model"'),
        ("lingua/f_dcp", truncate(".metadata", 0.7), r"\.metadata: corrupt pickle"),
        ("lingua/f_dcp", truncate("__0_0.distcp", 0.3), r"__0_0\.distcp: truncated"),
        ("lingua/f_dcp", remove("__0_0.distcp"), r"__0_0\.distcp: cannot be read"),
        ("smlm/q4/model", truncate("values_q4.bin", 0.9), r"values_q4\.bin: (truncated|corrupt)"),
        ("smlm/q4/model", append("scales_q4.bin"), r"scales_q4\.bin: corrupt: its sha256"),
        ("smlm/q4/model", remove("scales_q4.bin"), r"scales_q4\.bin: cannot be read"),
        ("smlm/q4/model", remove("values_q4.bin"), "neither values_q4.bin nor values_bf16.bin"),
        ("smlm/q4/model", truncate("meta.json", 0.5), r"meta\.json: is not the meta\.json"),
        ("smlm/bf16/model", truncate("hot_rows.npy", 0.5), r"hot_rows\.npy: corrupt"),
    ],
)
def test_damaged_checkpoints(tmp_path: Path, name: str, damage: Damage, message: str) -> None:
    folder = copy(tmp_path, name)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "out", progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == [folder.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model_config"].update(eng_layers=[1]), "n-gram memory in layers"),
        (lambda c: c["model_config"].update(mem_layers=[]), "mem_layers is empty"),
        (lambda c: c["model_config"].update(mem_layers=[2]), "tensor|unexpected|table_keys"),
        (lambda c: c["model_config"].update(mem_query_norm="layernorm"), "mem_query_norm"),
        (lambda c: c.update(table_shape=[1024, 62]), "truncated|too long"),
        (lambda c: c.update(table_keys=["x"]), "table_keys"),
        (lambda c: c.pop("state_dict"), "is not the rest.pt"),
        (lambda c: c["state_dict"].update(extra=torch.ones(1)), "unexpected tensor extra"),
        (lambda c: c["state_dict"].pop("layers.1.ffn.query_norm.running_var"), "running_var is missing"),
    ],
)
def test_contradicting_rest(tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    folder = copy(tmp_path, "smlm/q4/model")
    edit_saved("rest.pt", change)(folder)
    (folder / "meta.json").unlink()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


# ---- what must be tolerated


def test_only_the_owner_of_a_shared_table_need_be_there(tmp_path: Path) -> None:
    folder = copy(tmp_path, "lingua/a_memplus")
    edit_saved(CONSOLIDATED, lambda c: c["model"].pop("layers.3.feed_forward.values.weight"))(folder)
    edit_json(PARAMS, "model", "productkey_args", "layers", value=" 3, 1,9")(
        folder
    )  # any order, spaces, past the end
    edit_json(PARAMS, "model", "some_future_option", value=1)(folder)
    checkpoint = open_checkpoint(folder)
    assert [table.name for table in checkpoint.tables] == ["values"]
    assert checkpoint.config.memory is not None
    assert checkpoint.config.memory.layers == (1, 3)


def test_unknown_options_and_missing_defaults_of_rest(tmp_path: Path) -> None:
    folder = copy(tmp_path, "smlm/q4/model")

    def change(content: dict[str, Any]) -> None:
        content["model_config"].update(future=1, eng_layers=[])
        content["model_config"].pop("rope_theta")

    edit_saved("rest.pt", change)(folder)
    (folder / "meta.json").unlink()
    assert open_checkpoint(folder).config.rope_theta == 10000.0


# ---- distributed checkpoints with several shards


def test_sharded_tensors_are_put_together(tmp_path: Path) -> None:
    """One tensor cut in a 2 x 2 grid over two files, as memory parallelism and FSDP together do it."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )  # fmt: skip

    whole = torch.randn(10, 6)
    files = [io.BytesIO(), io.BytesIO()]
    chunks, storage = [], {}
    for row, column in [(0, 0), (0, 4), (7, 0), (7, 4)]:
        part = whole[row : 7 if row == 0 else 10, column : 4 if column == 0 else 6].clone()
        chunks.append(ChunkStorageMetadata(torch.Size([row, column]), part.shape))
        number = 0 if row == 0 else 1
        start = files[number].tell()
        blob = io.BytesIO()
        torch.save(part, blob)
        files[number].write(blob.getvalue())
        index = MetadataIndex("model.t", torch.Size([row, column]), len(chunks) - 1)
        storage[index] = _StorageInfo(f"__{number}_0.distcp", start, len(blob.getvalue()))
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([10, 6]), chunks)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({"model.t": entry}, storage_data=storage)))
    for number, file in enumerate(files):
        (tmp_path / f"__{number}_0.distcp").write_bytes(file.getvalue())
    tensor = DcpFolder(tmp_path).tensor("model.t")
    assert torch.equal(tensor.load(), whole)
    parts: list[Tensor] = list(tensor.chunks(3))
    assert [len(part) for part in parts] == [3, 3, 3, 1]
    assert torch.equal(torch.cat(parts), whole)


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = copy(tmp_path, "lingua/f_dcp")
    data = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(data.replace(b"__0_0.distcp", b"../../a/b/cd"))
    with pytest.raises(CheckpointError, match="which is not a file of this folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "blocks", [[((0, 0), (2, 3)), ((0, 0), (2, 3))], [((0, 0), (4, 2)), ((0, 2), (2, 2))], []]
)
def test_blocks_that_do_not_tile_their_tensor(blocks: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> None:
    assert not _tile((4, 3), blocks)
    assert _tile((4, 3), [((0, 0), (4, 2)), ((0, 2), (3, 1)), ((3, 2), (1, 1)), ((4, 0), (0, 3))])
