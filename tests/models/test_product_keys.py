"""Product-key selection: the native path, its torch twin and brute force agree, ties and NaNs included."""

from __future__ import annotations

import pytest
import torch
from golden import DATA
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from memlane.models import search, search_reference, select, select_reference
from memlane.native import kernel_variant


def brute_force(scores: Tensor, k: int) -> list[list[int]]:
    """The k best of all num_keys ** 2 rows by sorting them all: larger sum first, then smaller row id."""
    n = scores.shape[-1]
    sums = (scores[:, 0, :, None] + scores[:, 1, None, :]).flatten(1).tolist()
    return [sorted(range(n * n), key=lambda row, s=s: (-s[row], row))[:k] for s in sums]


@given(
    n=st.integers(1, 24),
    k=st.integers(1, 24),
    levels=st.sampled_from([2, 5, 1000]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_selection_is_exact_and_ties_go_to_the_smaller_row(n: int, k: int, levels: int, seed: int) -> None:
    k = min(k, n)
    generator = torch.Generator().manual_seed(seed)
    # integers add without rounding, so that brute force and the pruned search see the same ties
    scores = torch.randint(-levels, levels, (4, 2, n), generator=generator).float()
    twin, fast = select_reference(scores, k), select(scores, k)
    assert torch.equal(twin.ids, fast.ids)
    assert torch.equal(twin.scores, fast.scores)
    assert twin.ids.tolist() == brute_force(scores, k)


@given(seed=st.integers(0, 2**31), scale=st.sampled_from([1e-3, 1.0, 1e4]))
@settings(max_examples=30, deadline=None)
def test_native_and_twin_agree_where_sums_round(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = (torch.randn(16, 2, 64, generator=generator) * scale).bfloat16().float()
    scores[0, 0, 3] = torch.inf
    scores[1, 1, 5:9] = -torch.inf
    scores[2] = 0.0
    scores[2, 0, ::2] = -0.0
    twin, fast = select_reference(scores, 16), select(scores, 16)
    assert torch.equal(twin.ids, fast.ids)
    assert torch.equal(twin.scores, fast.scores)


@given(
    tokens=st.integers(0, 40),
    heads=st.integers(1, 3),
    n=st.integers(1, 40),
    width=st.integers(1, 40),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_search_agrees_with_torch(tokens: int, heads: int, n: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # products of small integers are exact however they are added, so that both see the same scores and the same ties
    query = torch.randint(-4, 5, (tokens, heads, 2, width), generator=generator).float()
    keys = torch.randint(-4, 5, (heads, 2, n, width), generator=generator).float()
    k = 1 + seed % n
    fast, twin = search(query, keys, k), search_reference(query, keys, k)
    assert fast.ids.shape == (tokens, heads, k)
    assert torch.equal(fast.ids, twin.ids)
    assert torch.equal(fast.scores, twin.scores)


@torch.no_grad()
def test_what_is_chosen_for_a_token_does_not_depend_on_the_batch() -> None:
    if kernel_variant() == "scalar":
        pytest.skip("AVX-512 and AVX2 are missing: torch makes the scores")
    query, keys = torch.randn(70, 3, 2, 50), torch.randn(3, 2, 60, 50)
    whole = search(query, keys, 20)
    for cut in (1, 2, 3, 31, 33, 69):
        parts = [search(part.contiguous(), keys, 20) for part in query.split(cut)]
        assert torch.equal(torch.cat([part.ids for part in parts]), whole.ids)
        assert torch.equal(torch.cat([part.scores for part in parts]), whole.scores)


def test_gradients_of_a_search_reach_queries_and_keys() -> None:
    query, keys = torch.randn(5, 2, 2, 8, requires_grad=True), torch.randn(2, 2, 12, 8, requires_grad=True)
    chosen = search(query, keys, 4)
    chosen.scores.square().sum().backward()
    seen_query, seen_keys = query.grad, keys.grad
    query.grad = keys.grad = None
    scores = torch.einsum("thcw,hcnw->thcn", query, keys)
    sums = scores[:, :, 0].gather(2, chosen.ids // 12) + scores[:, :, 1].gather(2, chosen.ids % 12)
    sums.square().sum().backward()
    torch.testing.assert_close(seen_query, query.grad)
    torch.testing.assert_close(seen_keys, keys.grad)


def test_nan_scores_still_give_rows_of_the_table() -> None:
    scores = torch.full((3, 2, 16), torch.nan)
    for chosen in (select_reference(scores, 4), select(scores, 4)):
        assert chosen.ids.min() >= 0
        assert chosen.ids.max() < 256


def test_no_queries() -> None:
    assert select(torch.empty(0, 2, 8), 3).ids.shape == (0, 3)
    assert select_reference(torch.empty(0, 2, 8), 3).ids.shape == (0, 3)


def test_gradients_reach_exactly_the_chosen_scores() -> None:
    scores = torch.randn(5, 2, 12, requires_grad=True)
    chosen = select(scores, 4)
    assert torch.equal(chosen.ids, select_reference(scores.detach(), 4).ids)
    chosen.scores.sum().backward()
    wanted = torch.zeros(5, 2, 12)
    for half, keys in enumerate((chosen.ids // 12, chosen.ids % 12)):
        wanted[:, half].scatter_add_(1, keys, torch.ones(5, 4))
    assert scores.grad is not None
    assert torch.equal(scores.grad, wanted)


def test_tie_rule_of_the_bf16_kernels() -> None:
    """sparse-memory-lm's kernels on bf16 scores full of ties: pair sums rounded to bf16, then the same rule."""
    vectors = load_file(DATA / "smlm" / "bf16_kernels" / "expected.safetensors")
    scores = torch.stack([vectors["s1"], vectors["s2"]], dim=2).float().flatten(0, 1)
    chosen = select_reference(scores, vectors["indices"].shape[-1], sum_dtype=torch.bfloat16)
    assert torch.equal(chosen.ids, vectors["indices"].flatten(0, 1))
    assert torch.equal(chosen.scores, vectors["scores"].float().flatten(0, 1))
    weights = torch.softmax(chosen.scores, dim=-1)
    assert torch.allclose(weights, vectors["weights"].flatten(0, 1), atol=1e-6)


@pytest.mark.parametrize("table", ["table_bf16", "packed_q4"])
def test_bags_of_the_bf16_kernels(table: str) -> None:
    from memlane.tables import RowFormat, decode_rows

    vectors = load_file(DATA / "smlm" / "bf16_kernels" / "expected.safetensors")
    if table == "packed_q4":
        stored = torch.cat([vectors[table], vectors["scales_q4"][:, None].view(torch.uint8)], dim=1)
        rows, wanted = decode_rows(stored, RowFormat.INT4, 32), vectors["bag_q4"]
    else:
        rows, wanted = vectors[table].float(), vectors["bag_bf16"]
    ids, weights = vectors["indices"].flatten(1), vectors["weights"].flatten(1)
    bag = (rows[ids] * weights[..., None]).sum(1)
    gate = torch.nn.functional.silu(vectors["pre"].float()).bfloat16().float()
    assert torch.allclose((bag * gate).bfloat16().float(), wanted.float(), rtol=2**-8, atol=2**-12)
