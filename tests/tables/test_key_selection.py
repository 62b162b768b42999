"""Product-key selection against sorting, with scores that tie, overflow and are not numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from memlane.native import (
    force_kernel_variant,
    kernel_variants,
    search_product_keys,
    select_product_keys,
    set_threads,
)

Shape = Callable[[Tensor], Tensor]


def twin(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The rule, spelled out: sort each half, then the pairs with (a + 1)(b + 1) <= k."""
    ids, sums = [], []
    keys = scores.shape[2]
    for first, second in scores:
        best = [
            sorted(range(keys), key=lambda j, half=half: (-half[j].item(), j))[:k] for half in (first, second)
        ]
        pairs = [
            (-(first[best[0][a]] + second[best[1][b]]).item(), best[0][a] * keys + best[1][b])
            for a in range(k)
            for b in range(k // (a + 1))
        ]
        pairs = sorted(pairs)[:k]
        ids.append([row for _, row in pairs])
        sums.append([-total for total, _ in pairs])
    return torch.tensor(ids).reshape(-1, k), torch.tensor(sums, dtype=torch.float32).reshape(-1, k)


SHAPES: dict[str, Shape] = {
    "normal": lambda s: s,
    "ties": lambda s: (2 * s).round(),
    "bf16": lambda s: s.bfloat16().float(),
    "equal": lambda s: torch.zeros_like(s),
    "signed zeros": lambda s: s.sign() * 0.0,
    "large": lambda s: s * 1e38,
    "infinite": lambda s: torch.where(s > 1, torch.inf, torch.where(s < -1, -torch.inf, s)),
    "falling": lambda s: s.sort(descending=True).values,
}


@pytest.mark.parametrize("variant", kernel_variants())
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("keys", "k"), [(1, 1), (8, 8), (16, 5), (128, 64), (131, 33), (256, 16), (300, 90)])
def test_equals_sorting(variant: str, shape: str, keys: int, k: int) -> None:
    scores = SHAPES[shape](torch.randn(3, 2, keys, generator=torch.Generator().manual_seed(keys)))
    if shape == "infinite" and torch.isnan(scores[:, 0].amax() + scores[:, 1].amin()):
        scores = scores.clamp(max=3.0)  # inf - inf has no place in an order
    force_kernel_variant(variant)
    ids, sums = select_product_keys(scores, k)
    expected_ids, expected_sums = twin(scores, k)
    assert torch.equal(ids, expected_ids)
    assert torch.equal(sums, expected_sums)


def test_equals_a_search_over_all_pairs() -> None:
    scores = torch.randn(20, 2, 64)
    ids, sums = select_product_keys(scores, 32)
    every = (scores[:, 0, :, None] + scores[:, 1, None, :]).flatten(1)
    best = every.topk(32, dim=1)
    assert torch.equal(sums, best.values)
    assert torch.equal(every.gather(1, ids), sums)


def test_threads_do_not_change_the_result() -> None:
    scores = torch.randn(300, 2, 256)
    results = []
    for threads in (1, 2, 5):
        set_threads(threads)
        results.append(select_product_keys(scores, 16))
    assert all(torch.equal(ids, results[0][0]) and torch.equal(sums, results[0][1]) for ids, sums in results)


@pytest.mark.parametrize("variant", kernel_variants())
def test_nans_give_valid_ids(variant: str) -> None:
    force_kernel_variant(variant)
    for share in (0.01, 0.5, 1.0):
        scores = torch.randn(10, 2, 256)
        scores[torch.rand(10, 2, 256) < share] = torch.nan
        ids, _ = select_product_keys(scores, 16)
        assert ids.min() >= 0
        assert ids.max() < 256 * 256
        assert all(len(set(row)) == 16 for row in ids.tolist())


def test_bad_arguments_are_refused() -> None:
    scores = torch.randn(2, 2, 8)
    for k in (0, 9):
        with pytest.raises(ValueError, match="k must be"):
            select_product_keys(scores, k)
    with pytest.raises(ValueError, match=r"\[m, 2, keys\]"):
        select_product_keys(torch.randn(2, 3, 8), 4)
    with pytest.raises(TypeError):
        select_product_keys(scores.double(), 4)
    assert select_product_keys(torch.randn(0, 2, 8), 4)[0].shape == (0, 4)


def half_scores(query: Tensor, keys: Tensor) -> Tensor:
    """The scores of the rule, [tokens, heads, 2, n]: partial sum l takes the columns c with c % 16 == l, then the tree.

    fp64 holds each product exactly, so that rounding its sum to fp32 is a fused multiply-add but for double rounding,
    which numbers of 12 bits rule out.
    """
    tokens, heads, _, width = query.shape
    padded = torch.nn.functional.pad(query[:, :, :, None] * keys[None].double(), (0, -width % 16))
    partial = torch.zeros(tokens, heads, 2, keys.shape[2], 16)
    for group in padded.split(16, dim=-1):
        partial = (partial.double() + group).float()
    for step in (8, 4, 2, 1):
        partial = partial[..., :step] + partial[..., step : 2 * step]
    return partial[..., 0]


@pytest.mark.parametrize(
    ("tokens", "heads", "n", "width"),
    [(1, 1, 4, 1), (1, 2, 128, 64), (5, 2, 131, 37), (75, 1, 7, 16), (9, 3, 30, 40)],
)
def test_search_equals_selection_by_the_scores_of_the_rule(
    tokens: int, heads: int, n: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(width)
    query = torch.randint(-2048, 2048, (tokens, heads, 2, width), generator=generator) * 2.0**-10
    keys = torch.randint(-2048, 2048, (heads, 2, n, width), generator=generator) * 2.0**-7
    k = min(n, 16)
    ids, sums = select_product_keys(half_scores(query, keys).flatten(0, 1), k)
    for variant in kernel_variants():
        force_kernel_variant(variant)
        for threads in (1, 3):
            set_threads(threads)
            found, found_sums = search_product_keys(query, keys, k)
            assert torch.equal(found, ids.view(tokens, heads, k))
            assert torch.equal(found_sums, sums.view(tokens, heads, k))


def test_a_search_refuses_bad_arguments() -> None:
    query, keys = torch.randn(2, 3, 2, 8), torch.randn(3, 2, 5, 8)
    assert search_product_keys(query[:0], keys, 4)[0].shape == (0, 3, 4)
    for bad_query, bad_keys, k in [
        (query, keys, 0),
        (query, keys, 6),
        (query[:, :2], keys, 4),
        (query[..., :7], keys, 4),
        (query[:, :, :1], keys, 4),
        (query, keys[:, :, :3], 2),
        (query, keys[:, :1], 4),
        (query.flatten(0, 1), keys, 4),
        (query[..., :0], keys[..., :0], 4),
    ]:
        with pytest.raises(ValueError, match=r"k must|agree|\[tokens|keys a half|four|width"):
            search_product_keys(bad_query, bad_keys, k)
    with pytest.raises(TypeError, match="keys must be fp32"):
        search_product_keys(query, keys.double(), 4)
