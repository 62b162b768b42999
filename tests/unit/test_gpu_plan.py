"""How a GPU's memory is divided: nothing is given away twice, overrides hold, refusals add up."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memlane.config import EngineConfig
from memlane.errors import ConfigError
from memlane.gpu_plan import Card, GpuNeeds, activation_bytes, plan_gpu
from memlane.models.config import MemoryConfig, ModelConfig

GIB = 1 << 30
MIB = 1 << 20
CARD = Card("a card", 80 * GIB, 79 * GIB)


def config(**options: Any) -> EngineConfig:
    return EngineConfig(model="m", **options)


def needs(**changes: int) -> GpuNeeds:
    base = GpuNeeds(
        weights=GIB,
        activations=GIB,
        tables=20 * GIB,
        kv_wanted=8 * GIB,
        least_kv=GIB,
        least_row_cache=64 * MIB,
    )
    return base._replace(**changes)


@given(
    st.integers(0, 200), st.integers(0, 40), st.integers(1, 100), st.integers(1, 80), st.floats(0.05, 1.0),
    st.sampled_from(["auto", "device", "host", "disk"]), st.sampled_from([None, 16 * GIB, 512 * GIB]),
)  # fmt: skip
def test_parts_never_exceed_what_may_be_used(
    tables: int, weights: int, kv: int, free: int, share: float, placement: Any, ram: int | None
) -> None:
    c = config(placement=placement, gpu_memory_utilization=share)
    n = needs(tables=tables * GIB, weights=weights * GIB, kv_wanted=kv * GIB)
    card = Card("a card", 80 * GIB, free * GIB)
    budget = min(int(card.total * share), card.free)
    try:
        plan = plan_gpu(c, card, n, ram)
    except ConfigError:
        return
    on_device = n.tables if plan.placement == "device" else 0
    assert n.weights + n.activations + on_device + plan.kv_cache + plan.row_cache <= budget
    assert n.least_kv <= plan.kv_cache <= max(n.kv_wanted, n.least_kv)
    assert (
        (plan.row_cache >= n.least_row_cache)
        if n.tables and plan.placement != "device"
        else plan.row_cache == 0
    )
    assert placement in ("auto", plan.placement)


@given(
    st.integers(0, 30), st.integers(1, 12), st.integers(1, 4), st.integers(0, 8), st.integers(1, 30),
    st.sampled_from(["auto", "device", "host", "disk"]),
)  # fmt: skip
def test_what_fits_is_not_refused(
    tables: int, kv: int, least_kv: int, least_rows: int, free: int, placement: Any
) -> None:
    n = needs(
        tables=tables * GIB, kv_wanted=kv * GIB, least_kv=least_kv * GIB, least_row_cache=least_rows * GIB
    )
    card = Card("a card", 80 * GIB, free * GIB)
    beside = n.weights + n.activations + n.least_kv
    fits = {
        "device": beside + n.tables <= card.free,
        "host": beside + (n.least_row_cache if n.tables else 0) <= card.free,
    }
    fits["disk"], fits["auto"] = fits["host"], fits["host"]  # auto: of a card with RAM beside it
    try:
        plan = plan_gpu(config(placement=placement), card, n, 512 * GIB)
    except ConfigError:
        assert not fits[placement]
    else:
        assert fits[plan.placement]


def test_tables_make_room_for_the_kv_cache_that_is_asked_for() -> None:
    asked = plan_gpu(config(kv_cache="60GiB"), CARD, needs(), 500 * GIB)
    assert (asked.placement, asked.kv_cache, asked.row_cache) == ("host", 60 * GIB, 10 * GIB)
    little = plan_gpu(config(kv_cache="1GiB"), CARD, needs(tables=68 * GIB), 500 * GIB)
    assert (little.placement, little.kv_cache) == ("device", GIB)


def test_one_short_sequence_gets_the_least_there_is() -> None:
    assert plan_gpu(config(), CARD, needs(kv_wanted=GIB // 2), None).kv_cache == GIB


def test_tables_go_where_they_fit() -> None:
    def where(tables: int, ram: int | None) -> str:
        return plan_gpu(config(), CARD, needs(tables=tables), ram).placement

    assert where(20 * GIB, 100 * GIB) == "device"
    assert where(200 * GIB, 500 * GIB) == "host"
    assert where(200 * GIB, 300 * GIB) == "disk"
    assert where(200 * GIB, None) == "disk"
    assert where(0, None) == "device"


def test_the_rule_is_the_one_that_is_stated() -> None:
    """72 GiB are to be had; weights and activations leave 70: at most 35 for KV, what remains for rows."""
    plan = plan_gpu(config(placement="host"), CARD, needs(kv_wanted=50 * GIB, tables=500 * GIB), None)
    assert (plan.kv_cache, plan.row_cache) == (35 * GIB, 35 * GIB)
    small = plan_gpu(config(placement="host"), CARD, needs(kv_wanted=GIB, tables=500 * GIB), None)
    assert (small.kv_cache, small.row_cache) == (GIB, 69 * GIB)
    few = plan_gpu(config(placement="host"), CARD, needs(kv_wanted=GIB), None)
    assert (few.kv_cache, few.row_cache) == (GIB, 20 * GIB + 64 * MIB), (
        "never more than all rows, and scratch"
    )


def test_overrides_are_taken_as_given_and_the_other_part_adapts() -> None:
    rows = plan_gpu(config(placement="host", gpu_row_cache="60GiB"), CARD, needs(kv_wanted=50 * GIB), None)
    assert (rows.kv_cache, rows.row_cache) == (10 * GIB, 60 * GIB)
    share = plan_gpu(config(placement="disk", gpu_row_cache="10%"), CARD, needs(), None)
    assert share.row_cache == 2 * GIB
    kv = plan_gpu(config(placement="host", kv_cache="3GiB"), CARD, needs(tables=500 * GIB), None)
    assert (kv.kv_cache, kv.row_cache) == (3 * GIB, 67 * GIB)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"placement": "device"}, {"tables": 100 * GIB}),
        ({}, {"weights": 90 * GIB}),
        ({"kv_cache": "71GiB", "placement": "host"}, {}),
        ({"gpu_row_cache": "70GiB", "placement": "host"}, {}),
        ({"gpu_memory_utilization": 0.01}, {}),
    ],
)
def test_what_cannot_fit_is_refused_with_its_sum(options: dict[str, Any], changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError) as refusal:
        plan_gpu(config(**options), CARD, needs(**changes), 500 * GIB)
    text = str(refusal.value)
    sizes = [float(n) * {"GiB": 1024, "MiB": 1}[unit] for n, unit in re.findall(r"(\d+\.\d) (GiB|MiB)", text)]
    parts = sizes[: text.split(" = ")[0].count("iB")]
    total, budget = sizes[len(parts)], sizes[len(parts) + 1]
    assert sum(parts) == pytest.approx(total, abs=60 * len(parts))  # each is rounded to a tenth
    assert total > budget


def test_a_row_cache_that_cannot_hold_a_step_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"gpu_row_cache.*64\.0 MiB"):
        plan_gpu(config(placement="host", gpu_row_cache="1MiB"), CARD, needs(), None)


def test_activations_grow_with_the_step_and_the_vocabulary() -> None:
    model = ModelConfig(
        vocab_size=32_000, hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096,
        max_position_embeddings=4096,
        memory=MemoryConfig((4,), num_keys=1024, num_heads=4, knn=32, key_dim=512, value_dim=1024),
    )  # fmt: skip
    base = activation_bytes(config(), model, 2)
    assert GIB // 2 < base < 2 * GIB
    assert activation_bytes(config(max_num_batched_tokens=8192), model, 2) > base
    assert activation_bytes(config(max_num_seqs=256), model, 2) - base == 192 * 32_000 * 46
