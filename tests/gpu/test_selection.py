"""Product-key selection in Triton against its torch twin: the same rows, the same bits."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from memlane.kernels import selection
from memlane.models import product_keys
from memlane.models.product_keys import choose_reference, ieee_products, select_reference

QUERIES = 300 if torch.cuda.is_available() else 1
SHAPES = [(16, 16), (100, 7), (130, 1), (1, 1), (3, 2), (129, 128), (1024, 32), (2100, 33)]
LEVELS = ("normal", "three", "one", "rounded", "infinite")


def random_scores(shape: tuple[int, ...], levels: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if levels == "one":
        return torch.full(shape, -1.5)
    if levels == "three":  # -0.0 ties with 0.0
        values = torch.tensor([-1.0, 0.0, -0.0, 1.0])
        return values[torch.randint(0, 4, shape, generator=generator)]
    scores = torch.randn(shape, generator=generator)
    if levels == "rounded":
        return scores.bfloat16().float()
    if levels == "infinite":  # of one sign: a sum of both is NaN, whose sign depends on the machine
        scores[torch.rand(shape, generator=generator) < 0.3] = torch.inf * (1 - 2 * (seed % 2))
    return scores


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes what is not written show."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        out = empty(*args, **kwargs)  # type: ignore[call-overload]
        return out.fill_(-1 if out.dtype == torch.int64 else torch.nan)

    monkeypatch.setattr("memlane.kernels.selection.torch.empty", poisoned)


def assert_selects_as_the_twin(scores: Tensor, k: int) -> None:
    found, wanted = selection.select(scores, k), select_reference(scores, k)
    assert torch.equal(found.ids, wanted.ids)
    assert torch.equal(found.values.view(torch.int32), wanted.scores.view(torch.int32))


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_shapes(device: str, n: int, k: int) -> None:
    assert_selects_as_the_twin(random_scores((QUERIES, 2, n), "normal", n + k).to(device), k)


@pytest.mark.parametrize("levels", LEVELS)
def test_ties(device: str, levels: str) -> None:
    for n, k in SHAPES if torch.cuda.is_available() else SHAPES[:2]:
        assert_selects_as_the_twin(random_scores((QUERIES, 2, n), levels, n + k).to(device), k)


# The interpreter takes any; a GPU needs a kernel for each, so a few that differ from run to run.
_random = random.Random()
SIZES = (
    st.tuples(st.integers(1, 200), st.integers(1, 128))
    if QUERIES == 1
    else st.sampled_from([(_random.randint(1, 200), _random.randint(1, 128)) for _ in range(8)])
)


@given(
    sizes=SIZES,
    levels=st.sampled_from(LEVELS),
    exponent=st.sampled_from([0, -140, 100]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=8 if QUERIES == 1 else 200, deadline=None)
def test_random_selections(sizes: tuple[int, int], levels: str, exponent: int, seed: int) -> None:
    device, (n, k) = "cuda" if torch.cuda.is_available() else "cpu", sizes
    scores = random_scores((1, 2, n), levels, seed) * 2.0**exponent
    assert_selects_as_the_twin(scores.to(device), min(k, n))


@pytest.mark.filterwarnings("ignore:All-NaN")  # of the interpreter
@pytest.mark.parametrize("filling", ["all", "some"])
def test_nan_scores_still_give_rows_of_the_table(device: str, filling: str) -> None:
    scores = torch.randn(QUERIES, 2, 70, device=device)
    scores[..., :: 1 if filling == "all" else 3] = torch.nan
    scores[0, 0, 5] = -torch.nan
    ids, _ = selection.select(scores, 20)
    assert ids.min() >= 0
    assert ids.max() < 70 * 70


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("strided", [True, False])
def test_weights_are_a_softmax_head_by_head(device: str, scaled: bool, strided: bool) -> None:
    tokens, heads, n, k = QUERIES, 3, 40, 12
    scores = random_scores((tokens, heads, 2, n), "normal", 5).to(device)
    if strided:  # as a product of planes leaves them
        scores = scores.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    log_scale = torch.randn(heads, device=device) if scaled else None
    ids, weights = selection.choose(scores, k, log_scale)
    wanted = select_reference(scores.reshape(-1, 2, n), k)
    logits = wanted.scores.view(tokens, heads, k) * (1.0 if log_scale is None else log_scale.exp()[:, None])
    assert torch.equal(ids, wanted.ids.view(tokens, heads * k))
    torch.testing.assert_close(weights, logits.softmax(-1).flatten(1), rtol=1e-5, atol=1e-7)


def test_no_queries(device: str) -> None:
    assert selection.select(torch.empty(0, 2, 8, device=device), 3).ids.shape == (0, 3)
    assert selection.choose(torch.empty(0, 4, 2, 8, device=device), 3).values.shape == (0, 12)


def test_what_does_not_fit_is_refused(device: str) -> None:
    for shape, k in (((1, 2, 8), 9), ((1, 2, 8), 0), ((1, 3, 8), 2), ((1, 2, 300), 129)):
        with pytest.raises(ValueError, match="cannot choose"):
            selection.select(torch.zeros(shape, device=device), k)
    with pytest.raises(TypeError, match="fp32"):
        selection.select(torch.zeros(1, 2, 8, device=device, dtype=torch.float64), 1)


@torch.no_grad()
def test_a_layer_chooses_with_one_kernel(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys = torch.randint(-4, 5, (4, 2, 2, 8)).float(), torch.randint(-4, 5, (2, 2, 24, 8)).float()
    log_scale = torch.randn(2)
    wanted = choose_reference(query, keys, 5, log_scale)  # on the CPU
    monkeypatch.setattr(product_keys, "_has_kernel", lambda *_: True)
    monkeypatch.setattr(product_keys, "_SCORE_BYTES", 3 * 2 * 2 * 24 * 4)  # three tokens at a time
    found = product_keys.choose(query.to(device), keys.to(device), 5, log_scale.to(device))
    assert torch.equal(found.ids.cpu(), wanted.ids)
    torch.testing.assert_close(found.weights.cpu(), wanted.weights, rtol=1e-5, atol=1e-7)


def test_products_are_of_fp32_whatever_the_process_allows() -> None:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        for setting in ("tf32", "ieee"):
            settings.fp32_precision = setting
            with ieee_products(torch.device("cuda")):
                assert settings.fp32_precision == "ieee"
            assert settings.fp32_precision == setting
    finally:
        settings.fp32_precision = before


def test_a_cpu_does_not_bring_triton() -> None:
    code = (
        "import sys, torch; from memlane.models.product_keys import choose, select;"
        "choose(torch.randn(2, 2, 2, 8), torch.randn(2, 2, 9, 8), 3); select(torch.randn(2, 2, 9), 3);"
        "sys.exit('triton' in sys.modules and 'memlane.kernels.selection' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
