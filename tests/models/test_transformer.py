"""The Transformer as training uses it, and its config."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from memlane.errors import ConfigError
from memlane.models import CausalAttention, MemoryConfig, MemoryLayer, ModelConfig, Transformer
from memlane.models.layers import RMSNorm, rope_at, rotate
from memlane.models.pieces import advance
from memlane.tables import Lookup, ReferenceTable

MEMORY = MemoryConfig(layers=(1, 2), num_keys=8, num_heads=2, knn=4, key_dim=8, value_dim=16)
CONFIG = ModelConfig(
    vocab_size=50, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, intermediate_size=24,
    max_position_embeddings=64, eos_token_ids=(2,), bos_token_id=1, tie_word_embeddings=True, memory=MEMORY,
)  # fmt: skip


def build(config: ModelConfig = CONFIG) -> tuple[Transformer, dict[str, ReferenceTable]]:
    torch.manual_seed(0)
    memory = config.memory
    tables = {}
    if memory is not None:
        tables = {n: ReferenceTable(memory.rows, memory.value_dim, name=n) for n in config.table_names()}
    return Transformer(config, tables), tables


def run(model: Transformer, ids: Tensor) -> Tensor:
    batch, length = ids.shape
    hidden = model(ids.flatten(), torch.arange(length).repeat(batch), CausalAttention(batch, length))
    return model.logits(hidden).view(batch, length, -1)


VARIANTS = {
    "memory+": MEMORY,
    "vanilla": dataclasses.replace(MEMORY, swilu=False, value_dim=6),
    "bare": dataclasses.replace(MEMORY, swilu=False, value_proj=False),
    "gated": dataclasses.replace(MEMORY, gated=True, score_scale=True),
    "separate": dataclasses.replace(MEMORY, shared=False),
    "peer": dataclasses.replace(MEMORY, kind="peer", swilu=False, value_proj=False, gated=True),
    "dense": None,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_weight_and_table_learns(variant: str) -> None:
    model, tables = build(dataclasses.replace(CONFIG, memory=VARIANTS[variant]))
    ids = torch.randint(0, 50, (4, 9))
    parameters = [*model.parameters(), *(table.weight for table in tables.values())]
    optimizer = torch.optim.Adam(parameters, lr=3e-2)
    losses = []
    for step in range(12):
        loss = torch.nn.functional.cross_entropy(run(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        if step == 1:  # at step 0 some gradients are zero by initialisation
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_tables_are_not_parameters_of_the_model() -> None:
    model, _ = build()
    assert not any("table" in name or "values" in name for name in model.state_dict())
    assert len(list(model.parameters())) == len(model.state_dict())


@torch.no_grad()
def test_padding_left_out_changes_nothing() -> None:
    model, _ = build()
    lengths, width = [7, 3, 5], 7
    ids = torch.randint(3, 50, (3, width))
    grid = torch.arange(width).repeat(3)
    keep = torch.cat([torch.arange(n) + row * width for row, n in enumerate(lengths)])
    packed = model(ids.flatten()[keep], grid[keep], CausalAttention(3, width, keep))
    for row, (part, n) in enumerate(zip(packed.split(lengths), lengths, strict=True)):
        alone = model(ids[row, :n], torch.arange(n), CausalAttention(1, n))
        assert torch.allclose(part, alone, atol=1e-5)


@torch.no_grad()
def test_a_token_does_not_see_later_ones() -> None:
    model, _ = build()
    ids = torch.randint(0, 50, (1, 8))
    changed = ids.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 50
    assert torch.allclose(run(model, ids)[:, :-1], run(model, changed)[:, :-1], atol=1e-6)
    assert not torch.allclose(run(model, ids)[:, -1], run(model, changed)[:, -1], atol=1e-3)


@torch.no_grad()
def test_selection_in_pieces_equals_selection_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = MemoryLayer(16, MEMORY, [ReferenceTable(64, 16)])
    torch.nn.init.normal_(layer.keys)
    x = torch.randn(33, 16)
    monkeypatch.setattr("memlane.models.product_keys.kernel_variant", lambda: "scalar")
    whole = layer.select(x)
    monkeypatch.setattr("memlane.models.product_keys._SCORE_BYTES", 2 * 2 * 8 * 4 * 5)
    pieces = layer.select(x)
    assert torch.equal(whole.ids, pieces.ids)
    assert torch.allclose(whole.scores, pieces.scores, atol=1e-6)
    assert layer(torch.empty(0, 16)).shape == (0, 16)


def test_a_table_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"65 x 16.*\(64, 16\)"):
        MemoryLayer(16, MEMORY, [ReferenceTable(65, 16)])


def test_rmsnorm_rounds_once() -> None:
    norm = RMSNorm(64, 1e-5)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(5, 64).bfloat16()
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight.double()
    assert torch.equal(norm(x), exact.float().bfloat16())


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_by_pairs_of_complex_numbers(interleaved: bool) -> None:
    x, positions = torch.randn(6, 3, 8), torch.tensor([0, 1, 5, 17, 100, 4000])
    first = x[..., 0::2] if interleaved else x[..., :4]
    second = x[..., 1::2] if interleaved else x[..., 4:]
    angles = positions[:, None].double() * 500.0 ** (-torch.arange(0, 8, 2).double() / 8)
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)[:, None]
    out = rotate(x, rope_at(positions, 8, 500.0), interleaved=interleaved)
    got = (
        torch.complex(out[..., 0::2], out[..., 1::2])
        if interleaved
        else torch.complex(out[..., :4], out[..., 4:])
    )
    assert torch.allclose(got, turned.to(torch.complex64), atol=2e-3)  # fp32 angles: 4000 radians carry 2e-4


def test_config_survives_json() -> None:
    import json

    for memory in VARIANTS.values():
        config = dataclasses.replace(CONFIG, memory=memory)
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hiden_size": 3}, "unknown key.*hiden_size"),
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"vocab_size": "50"}, "vocab_size must be int"),
        ({"vocab_size": True}, "vocab_size must be int"),
        ({"num_key_value_heads": 3}, r"num_kv_heads \(3\) must divide"),
        ({"eos_token_id": [99]}, "token id 99 is outside"),
        ({"torch_dtype": "int8"}, "dtype must be one of"),
        ({"memory": {"layers": [1]}}, "memory: missing key"),
        ({"memory": 3}, "memory must be an object"),
        ({"memory": {**CONFIG.to_dict()["memory"], "knn": 9}}, "knn .9. must not exceed"),
        ({"memory": {**CONFIG.to_dict()["memory"], "layers": [2, 1]}}, "must be ascending"),
        ({"memory": {**CONFIG.to_dict()["memory"], "layers": [1, 7]}}, "outside the model's 3 layers"),
        ({"memory": {**CONFIG.to_dict()["memory"], "kind": "moe"}}, "kind must be one of"),
        ({"memory": {**CONFIG.to_dict()["memory"], "row_format": "int3"}}, "row_format must be one of"),
        ({"memory": {**CONFIG.to_dict()["memory"], "value_proj": False}}, "swilu needs"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_dict({**CONFIG.to_dict(), **change})


# --- in pieces ---


class Asked:
    """A table that writes down what its lookups go through."""

    def __init__(self, name: str, events: list[str], *, broken: bool = False) -> None:
        self.table = ReferenceTable(64, 16, name=name)
        self.name, self.rows, self.width = name, 64, 16
        self.events, self.broken = events, broken

    def begin(self, ids: Tensor, live: Tensor | None = None) -> Lookup:
        if self.broken:
            raise IndexError("no such row")
        self.events.append(f"begin {self.name}")
        return AskedLookup(self, ids)

    def weighted_sum(self, ids: Tensor, weights: Tensor) -> Tensor:
        raise NotImplementedError

    def dot(self, ids: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def gather(self, ids: Tensor) -> Tensor:
        raise NotImplementedError


class AskedLookup:
    def __init__(self, owner: Asked, ids: Tensor) -> None:
        self.owner, self.ids = owner, ids
        self.closed = False

    def weighted_sum(self, weights: Tensor) -> Tensor:
        self.owner.events.append(f"sum {self.owner.name}")
        return self.owner.table.weighted_sum(self.ids, weights)

    def dot(self, x: Tensor) -> Tensor:
        self.owner.events.append(f"dot {self.owner.name}")
        return self.owner.table.dot(self.ids, x)

    def activations(self, x: Tensor, weights: Tensor) -> Tensor:
        return torch.nn.functional.gelu(self.dot(x)) * weights

    def close(self) -> None:
        if not self.closed:
            self.owner.events.append(f"close {self.owner.name}")
        self.closed = True


def peer_layer(events: list[str], *, broken: bool = False) -> MemoryLayer:
    torch.manual_seed(0)
    layer = MemoryLayer(16, VARIANTS["peer"], [Asked("u", events), Asked("v", events, broken=broken)])
    torch.nn.init.normal_(layer.keys)
    return layer


def test_both_tables_of_a_peer_layer_are_asked_at_once() -> None:
    events: list[str] = []
    layer, x = peer_layer(events), torch.randn(5, 16)
    pending = layer.begin(x)
    assert events == ["begin u", "begin v"]
    out = pending.finish()
    assert events[2:4] == ["dot u", "sum v"]
    assert sorted(events[4:]) == ["close u", "close v"]
    assert torch.equal(out, layer(x))
    pending.close()
    assert len(events) == 2 * 6


def test_lookups_are_closed_when_a_layer_cannot_begin_or_is_given_up() -> None:
    events: list[str] = []
    with pytest.raises(IndexError, match="no such row"):
        peer_layer(events, broken=True).begin(torch.randn(5, 16))
    assert events == ["begin u", "close u"]
    events.clear()
    peer_layer(events).begin(torch.randn(5, 16)).close()
    assert sorted(events[2:]) == ["close u", "close v"]


@torch.no_grad()
def test_the_model_stops_once_a_memory_layer_and_can_be_left_there() -> None:
    events: list[str] = []
    model = Transformer(CONFIG, {"values": Asked("t", events)})
    step = (torch.randint(0, 50, (7,)), torch.arange(7), CausalAttention(1, 7))
    pieces = model.run(*step)
    stops = []
    while (out := advance(pieces)) is None:
        stops.append(list(events))
    assert stops == [["begin t"], ["begin t", "sum t", "close t", "begin t"]]
    assert torch.equal(out, model(*step))
    events.clear()
    pieces = model.run(*step)
    assert advance(pieces) is None
    pieces.close()
    assert events == ["begin t", "close t"]


def test_building_on_the_meta_device_does_not_bring_torchs_compiler() -> None:
    code = """
import sys, torch
from memlane.models import ModelConfig, Transformer
config = ModelConfig(vocab_size=8, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8, max_position_embeddings=8)
with torch.device("meta"):
    Transformer(config)
sys.exit("torch._dynamo" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
