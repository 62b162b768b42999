"""Every instruction set, thread count and cut of a batch gives the bits that plain scalar arithmetic gives."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from memlane.native import Arena, RowView, force_kernel_variant, kernel_variants, set_threads
from memlane.tables import RowFormat, decode_rows, encode_rows

ROWS = 97


def rows_in_memory(row_format: RowFormat, width: int, offset: int = 0) -> tuple[RowView, Tensor]:
    values = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(width))
    stored = encode_rows(values, row_format)
    arena = Arena(offset + stored.numel())
    arena.array()[offset:] = stored.numpy().reshape(-1)
    return RowView(arena, offset, ROWS, row_format.code, width), decode_rows(stored, row_format, width)


def on_all_variants(run: Callable[[], np.ndarray]) -> np.ndarray:
    """Runs with every variant and with one and three threads; all results must have the same bits."""
    results = []
    for variant in kernel_variants():
        force_kernel_variant(variant)
        for threads in (1, 3):
            set_threads(threads)
            results.append(run())
    for result in results[1:]:
        np.testing.assert_array_equal(result.view(np.uint32), results[0].view(np.uint32))
    return results[0]


@pytest.mark.parametrize("row_format", list(RowFormat))
@pytest.mark.parametrize("width", [2, 6, 16, 34, 64, 130, 256])
def test_weighted_sum(row_format: RowFormat, width: int) -> None:
    view, rows = rows_in_memory(row_format, width, offset=3)
    rng = np.random.default_rng(0)
    for tokens, k in [(1, 1), (1, 5), (3, 4), (2, 33), (40, 8)]:
        ids = rng.integers(0, ROWS, tokens * k)
        weights = rng.standard_normal((tokens, k)).astype(np.float32)

        def run(ids: np.ndarray = ids, weights: np.ndarray = weights) -> np.ndarray:
            out = np.full((len(weights), width), np.nan, np.float32)
            view.weighted_sum(ids, weights, out)
            return out

        out = on_all_variants(run)
        exact = np.einsum(
            "tk,tkw->tw", weights.astype(float), rows.numpy()[ids].reshape(tokens, k, width).astype(float)
        )
        np.testing.assert_allclose(out, exact, rtol=1e-5, atol=1e-5)


def test_weighted_sum_is_a_chain_of_fused_multiply_adds() -> None:
    view, rows = rows_in_memory(RowFormat.FLOAT32, 6)
    ids = np.arange(7, dtype=np.int32)
    weights = np.linspace(-2, 3, 7, dtype=np.float32)[None]
    expected = np.zeros((1, 6), np.float32)
    for k in range(7):
        for c in range(6):
            # fp64 holds the product exactly; the sum of two such numbers is rounded once more, which for these few
            # numbers never changes the fp32 result
            expected[0, c] = np.float32(float(weights[0, k]) * float(rows[k, c]) + float(expected[0, c]))

    def run() -> np.ndarray:
        out = np.empty((1, 6), np.float32)
        view.weighted_sum(ids, weights, out)
        return out

    np.testing.assert_array_equal(on_all_variants(run), expected)


@pytest.mark.parametrize("row_format", list(RowFormat))
@pytest.mark.parametrize("width", [2, 16, 34, 48, 100])
def test_dot(row_format: RowFormat, width: int) -> None:
    view, rows = rows_in_memory(row_format, width)
    rng = np.random.default_rng(1)
    ids = rng.integers(0, ROWS, 5 * 9).astype(np.int32)
    x = rng.standard_normal((5, width)).astype(np.float32)

    def run() -> np.ndarray:
        out = np.full((5, 9), np.nan, np.float32)
        view.dot(ids, x, out)
        return out

    exact = np.einsum("tkw,tw->tk", rows.numpy()[ids].reshape(5, 9, width).astype(float), x.astype(float))
    np.testing.assert_allclose(on_all_variants(run), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row_format", list(RowFormat))
def test_gather(row_format: RowFormat) -> None:
    view, rows = rows_in_memory(row_format, 34)
    ids = np.random.default_rng(2).integers(0, ROWS, 50)

    def run() -> np.ndarray:
        out = np.empty((50, 34), np.float32)
        view.gather(ids, out)
        return out

    np.testing.assert_array_equal(on_all_variants(run), rows.numpy()[ids])


@pytest.mark.parametrize("row_format", [RowFormat.FLOAT16, RowFormat.BFLOAT16])
def test_every_16_bit_number_is_widened_exactly(row_format: RowFormat) -> None:
    patterns = torch.arange(65536, dtype=torch.int32).to(torch.uint16)
    dtype = torch.float16 if row_format is RowFormat.FLOAT16 else torch.bfloat16
    arena = Arena(2 * 65536)
    arena.array()[:] = patterns.numpy().view(np.uint8)
    view = RowView(arena, 0, 2048, row_format.code, 32)
    expected = patterns.view(dtype).float().numpy()
    finite = ~np.isnan(expected)
    for variant in kernel_variants():
        force_kernel_variant(variant)
        out = np.empty((2048, 32), np.float32)
        view.gather(np.arange(2048), out)
        np.testing.assert_array_equal(out.reshape(-1)[finite], expected[finite])
        assert np.isnan(out.reshape(-1)[~finite]).all()


def test_every_fp8_code_is_read_as_its_number() -> None:
    stored = torch.zeros(512, 34, dtype=torch.uint8)
    stored[:, :32] = torch.arange(256 * 64).reshape(512, 32) % 256
    stored[:, 32:] = torch.linspace(-3, 3, 512).half()[:, None].view(torch.uint8)
    arena = Arena(stored.numel())
    arena.array()[:] = stored.numpy().reshape(-1)
    view = RowView(arena, 0, 512, RowFormat.FP8.code, 32)

    def run() -> np.ndarray:
        out = np.empty((512, 32), np.float32)
        view.gather(np.arange(512), out)
        return out

    expected = decode_rows(stored, RowFormat.FP8, 32).numpy()  # 480 for 0x7F
    np.testing.assert_array_equal(on_all_variants(run), expected)


@pytest.mark.parametrize("row_format", list(RowFormat))
def test_longer_rows_and_sums(row_format: RowFormat) -> None:
    """Widths and row counts that reach every unrolled loop and its remainder."""
    view, rows = rows_in_memory(row_format, 274, offset=5)
    rng = np.random.default_rng(4)
    for k in (7, 8, 12, 13, 100):
        ids, weights = rng.integers(0, ROWS, 3 * k), rng.standard_normal((3, k)).astype(np.float32)

        def run(ids: np.ndarray = ids, weights: np.ndarray = weights) -> np.ndarray:
            out = np.full((3, 274), np.nan, np.float32)
            view.weighted_sum(ids, weights, out)
            return out

        exact = np.einsum(
            "tk,tkw->tw", weights.astype(float), rows.numpy()[ids].reshape(3, k, 274).astype(float)
        )
        np.testing.assert_allclose(on_all_variants(run), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("row_format", list(RowFormat))
def test_a_batch_may_be_cut_anywhere(row_format: RowFormat) -> None:
    view, _ = rows_in_memory(row_format, 34)
    rng = np.random.default_rng(3)
    tokens, k = 6, 11
    ids = rng.integers(0, ROWS, tokens * k)
    weights = rng.standard_normal((tokens, k)).astype(np.float32)
    x = rng.standard_normal((tokens, 34)).astype(np.float32)
    whole, whole_dot = np.empty((tokens, 34), np.float32), np.empty((tokens, k), np.float32)
    view.weighted_sum(ids, weights, whole)
    view.dot(ids, x, whole_dot)
    for _ in range(20):
        cuts = [
            0,
            *sorted(rng.choice(np.arange(1, tokens * k), rng.integers(1, 12), replace=False)),
            tokens * k,
        ]
        out, out_dot = np.full_like(whole, np.nan), np.full_like(whole_dot, np.nan)
        for begin, end in pairwise(cuts):
            part = np.ascontiguousarray(ids[begin:end])
            view.weighted_sum(part, weights, out, int(begin))
            view.dot(part, x, out_dot, int(begin))
        np.testing.assert_array_equal(out, whole)
        np.testing.assert_array_equal(out_dot, whole_dot)


@pytest.mark.parametrize("bad", [-1, ROWS, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_ids_outside_the_table_are_index_errors(bad: int, dtype: type) -> None:
    view, _ = rows_in_memory(RowFormat.FLOAT32, 16)
    ids = np.array([0, 1, bad, 2], dtype)
    with pytest.raises(IndexError, match=str(bad)):
        view.weighted_sum(ids, np.ones((2, 2), np.float32), np.empty((2, 16), np.float32))
    with pytest.raises(IndexError, match=str(bad)):
        view.gather(ids, np.empty((4, 16), np.float32))


def test_arrays_of_the_wrong_shape_are_refused() -> None:
    view, _ = rows_in_memory(RowFormat.FLOAT32, 16)
    ids, weights = np.arange(4), np.ones((2, 2), np.float32)
    for out in (np.empty((2, 15), np.float32), np.empty((1, 16), np.float32)):
        with pytest.raises(ValueError, match="width"):
            view.weighted_sum(ids, weights, out)
    with pytest.raises(ValueError, match="past the last token"):
        view.weighted_sum(ids, weights, np.empty((2, 16), np.float32), 1)
    with pytest.raises(TypeError):
        view.weighted_sum(ids, weights.astype(np.float64), np.empty((2, 16), np.float32))
    for arguments in [(0, 98, 0, 16), (1, 97, 0, 16), (0, 1, 6, 16), (0, 1, 4, 15), (0, 1, 0, 0)]:
        with pytest.raises(ValueError, match=r"arena|width|format"):
            RowView(Arena(97 * 64), *arguments)


def test_unknown_variants_are_refused() -> None:
    with pytest.raises(ValueError, match="variant"):
        force_kernel_variant("mmx")
