"""Kernels over rows give the bits of their twins and of the processor, whatever the shape of the launch."""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from memlane.kernels import RowMemory, reference, row_launches, rows
from memlane.kernels.row_memory import device_stride
from memlane.tables import RowFormat, ValueTable, encode_rows, write_table

ROWS = 23
FORMATS = [row_format.value for row_format in RowFormat]
FUNCTIONS = ["weighted_sum", "dot", "activations", "gather"]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """What is not written is NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)


def rows_in_memory(row_format: str, width: int, device: str, padded: bool = True, seed: int = 0) -> RowMemory:
    """Normal rows; what lies between them is 0xFF, which is NaN or -1."""
    values = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(seed))
    stored = encode_rows(values, RowFormat(row_format))
    stride = device_stride(stored.shape[1]) if padded else stored.shape[1]
    data = torch.full((ROWS, stride), 255, dtype=torch.uint8)
    data[:, : stored.shape[1]] = stored
    return RowMemory(data.to(device), row_format, width)


def batch(device: str, tokens: int, k: int, width: int, far: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Slots, weights and x that differ from run to run; the seed is in what pytest prints of a failure."""
    seed = torch.seed() % (1 << 31)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    slots = torch.randint(-ROWS if far else 0, ROWS, (tokens, k))
    return slots.to(device), torch.randn(tokens, k).to(device), torch.randn(tokens, width).to(device)


def assert_same_bits(result: Tensor, expected: Tensor) -> None:
    assert result.dtype == expected.dtype == torch.float32
    assert torch.equal(result.cpu().view(torch.int32), expected.cpu().view(torch.int32))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_twins_take_the_same_arguments(name: str) -> None:
    assert inspect.signature(getattr(rows, name)) == inspect.signature(getattr(reference, name))


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize(("width", "padded"), [(64, True), (34, False), (10, False)])
def test_rows_of_any_kind(row_format: str, width: int, padded: bool, device: str) -> None:
    near = rows_in_memory(row_format, width, device, padded)
    slots, weights, x = batch(device, 3, 5, width)
    assert_same_bits(rows.weighted_sum(near, slots, weights), reference.weighted_sum(near, slots, weights))
    assert_same_bits(rows.dot(near, slots, x), reference.dot(near, slots, x))
    assert_same_bits(rows.gather(near, slots[0]), reference.gather(near, slots[0]))
    expected = reference.activations(near, slots, x, weights)
    torch.testing.assert_close(rows.activations(near, slots, x, weights), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("row_format", ["float32", "bfloat16", "int8", "fp8"])
def test_odd_widths(row_format: str, device: str) -> None:
    """Scales lie on odd addresses then."""
    for width in (1, 37):
        for padded in (True, False):
            near = rows_in_memory(row_format, width, device, padded)
            slots, weights, x = batch(device, 2, 3, width)
            expected = reference.weighted_sum(near, slots, weights)
            assert_same_bits(rows.weighted_sum(near, slots, weights), expected)
            assert_same_bits(rows.dot(near, slots, x), reference.dot(near, slots, x))


@pytest.mark.parametrize("row_format", FORMATS)
def test_bits_are_those_of_the_processor(row_format: str, device: str, tmp_path: Path) -> None:
    width = 50
    values = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(7))
    layout = write_table(tmp_path / "table.safetensors", "values", ROWS, width, row_format, [values])
    table = ValueTable.open(layout, placement="host")
    stored = encode_rows(values, RowFormat(row_format))
    near = RowMemory(stored.to(device), row_format, width)
    slots, weights, x = batch("cpu", 4, 9, width)
    on_device = [one.to(device) for one in (slots, weights, x)]
    for module in (rows, reference):
        out = module.weighted_sum(near, on_device[0], on_device[1])
        assert_same_bits(out, table.weighted_sum(slots, weights))
        assert_same_bits(module.dot(near, on_device[0], on_device[2]), table.dot(slots, x))
        assert_same_bits(module.gather(near, on_device[0][0]), table.gather(slots[0]))


@pytest.mark.parametrize("row_format", ["bfloat16", "int4"])
@pytest.mark.parametrize("shape", row_launches._SUM_SHAPES, ids=lambda shape: f"{shape.rows} at once")
def test_every_shape_of_a_sum(
    row_format: str, shape: row_launches._SumShape, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_launches, "_SUM_SHAPES", (shape._replace(most_tokens=float("inf")),))
    width = 300 if device == "cuda" else 66  # more than one block in the narrow shapes
    near = rows_in_memory(row_format, width, device)
    for k in (1, shape.rows, 2 * shape.rows + 3):
        slots, weights, _ = batch(device, 1, k, width)
        assert_same_bits(
            rows.weighted_sum(near, slots, weights), reference.weighted_sum(near, slots, weights)
        )


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("many", [False, True])
def test_every_shape_of_a_product(
    row_format: str, many: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_launches, "_MANY_ROWS", 1 if many else 1 << 60)
    for width in (288, 84):  # whole steps of 16 columns in halves of 144; halves of 42, and a rest
        near = rows_in_memory(row_format, width, device)
        slots, _, x = batch(device, 2, 35, width)
        assert_same_bits(rows.dot(near, slots, x), reference.dot(near, slots, x))


@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_rows_near_and_far(row_format: str, dtype: torch.dtype, device: str) -> None:
    near = rows_in_memory(row_format, 36, device)
    far = rows_in_memory(row_format, 36, "cpu", padded=False, seed=1)
    if device == "cuda":
        far = far._replace(data=far.data.pin_memory())
    slots, weights, x = batch(device, 3, 6, 36, far=True)
    slots = slots.to(dtype)
    assert (slots < 0).any()
    assert_same_bits(
        rows.weighted_sum(near, slots, weights, far), reference.weighted_sum(near, slots, weights, far)
    )
    assert_same_bits(rows.dot(near, slots, x, far), reference.dot(near, slots, x, far))
    assert_same_bits(rows.gather(near, slots[0], far), reference.gather(near, slots[0], far))
    both = torch.cat([near.data[:, : far.data.shape[1]].cpu(), far.data]).to(
        device
    )  # far row r is row ROWS + r
    plain = torch.where(slots < 0, ROWS - 1 - slots.long(), slots.long())
    together = RowMemory(both, row_format, 36)
    assert_same_bits(
        rows.weighted_sum(near, slots, weights, far), reference.weighted_sum(together, plain, weights)
    )


def test_rows_may_be_all_far(device: str) -> None:
    far = rows_in_memory("float16", 16, "cpu")
    if device == "cuda":
        far = far._replace(data=far.data.pin_memory())
    near = RowMemory(torch.empty(0, 32, dtype=torch.uint8, device=device), "float16", 16)
    slots, weights, _ = batch(device, 2, 3, 16)
    out = rows.weighted_sum(near, -1 - slots, weights, far)
    assert_same_bits(out, reference.weighted_sum(far, slots, weights))


def test_rows_further_apart_than_32_bits_can_say(device: str) -> None:
    apart = 3 << 30
    memory = torch.empty(0, dtype=torch.uint8, device=device)
    torch.use_deterministic_algorithms(
        False
    )  # 9 GiB that are never written, so take no room where pages are lazy
    memory = torch.empty(3 * apart, dtype=torch.uint8, device=device).view(3, apart)
    small = rows_in_memory("bfloat16", 16, device)
    memory[:, :32] = small.data[:3]
    near = RowMemory(memory, "bfloat16", 16)
    slots = torch.tensor([[2, 0, 1]], dtype=torch.int32, device=device)
    weights, x = torch.randn(1, 3, device=device), torch.randn(1, 16, device=device)
    assert_same_bits(rows.weighted_sum(near, slots, weights), reference.weighted_sum(small, slots, weights))
    assert_same_bits(
        rows.weighted_sum(near, -1 - slots, weights, near), reference.weighted_sum(small, slots, weights)
    )
    assert_same_bits(rows.dot(near, slots, x), reference.dot(small, slots, x))
    assert_same_bits(rows.gather(near, slots[0]), reference.gather(small, slots[0]))


def test_rows_that_begin_on_odd_addresses(device: str) -> None:
    at_even = rows_in_memory("int8", 32, device)
    moved = torch.full((at_even.data.numel() + 1,), 255, dtype=torch.uint8, device=device)
    moved[1:] = at_even.data.flatten()
    near = at_even._replace(data=moved[1:].view(at_even.data.shape))
    slots, weights, x = batch(device, 2, 3, 32)
    assert_same_bits(rows.weighted_sum(near, slots, weights), reference.weighted_sum(at_even, slots, weights))
    assert_same_bits(rows.dot(near, slots, x), reference.dot(at_even, slots, x))
    with pytest.raises(ValueError, match="multiples of 2 bytes"):
        rows.weighted_sum(near._replace(row_format="bfloat16", width=16), slots, weights)


@pytest.mark.parametrize("module", [rows, reference], ids=["kernels", "twins"])
def test_nothing_asked_for(module: object, device: str) -> None:
    near = rows_in_memory("int4", 32, device)
    for tokens, k in ((0, 4), (3, 0), (0, 0)):
        slots = torch.empty(tokens, k, dtype=torch.int64, device=device)
        weights, x = torch.empty(tokens, k, device=device), torch.ones(tokens, 32, device=device)
        assert torch.equal(module.weighted_sum(near, slots, weights), torch.zeros(tokens, 32, device=device))  # type: ignore[attr-defined]
        assert module.dot(near, slots, x).shape == (tokens, k)  # type: ignore[attr-defined]
        assert module.activations(near, slots, x, weights).shape == (tokens, k)  # type: ignore[attr-defined]
    assert module.gather(near, torch.empty(0, dtype=torch.int32, device=device)).shape == (0, 32)  # type: ignore[attr-defined]


def test_arguments_that_do_not_fit_are_refused(device: str) -> None:
    near = rows_in_memory("bfloat16", 16, device)
    slots, weights, x = batch(device, 2, 3, 16)
    with pytest.raises(TypeError, match="slots must be int32 or int64"):
        rows.weighted_sum(near, slots.to(torch.int16), weights)
    with pytest.raises(ValueError, match="slots must have 2"):
        rows.dot(near, slots[0], x)
    with pytest.raises(TypeError, match="weights must be fp32"):
        rows.weighted_sum(near, slots, weights.double())
    with pytest.raises(ValueError, match="weights are"):
        rows.activations(near, slots, x, weights[:1])
    with pytest.raises(ValueError, match="x are"):
        rows.dot(near, slots, x[:, :8])
    with pytest.raises(ValueError, match="rows of two kinds"):
        rows.gather(near, slots[0], rows_in_memory("float16", 16, device))


def test_views_are_read_as_what_they_show(device: str) -> None:
    near = rows_in_memory("float16", 16, device)
    slots, weights, x = batch(device, 4, 6, 16)
    part = slice(None, None, 2)
    out = rows.weighted_sum(near, slots[part].T, weights[part].T)
    assert_same_bits(out, reference.weighted_sum(near, slots[part].T, weights[part].T))
    assert_same_bits(rows.dot(near, slots[part], x[part]), reference.dot(near, slots[part], x[part]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("row_format", FORMATS)
@pytest.mark.parametrize("tokens", [1, 64, 300, 1000])
def test_large_batches(row_format: str, tokens: int, device: str) -> None:
    near = rows_in_memory(row_format, 1024, device)
    slots, weights, x = batch(device, tokens, 128, 1024)
    assert_same_bits(rows.weighted_sum(near, slots, weights), reference.weighted_sum(near, slots, weights))
    few = slice(0, 200)
    assert_same_bits(rows.dot(near, slots, x)[few], reference.dot(near, slots[few], x[few]))


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(FLOATS, FLOATS, FLOATS)
def test_the_twins_fma_rounds_once(a: float, b: float, c: float) -> None:
    fmaf = ctypes.CDLL("libm.so.6").fmaf
    fmaf.argtypes, fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
    result = reference.fma(*(torch.tensor([one], dtype=torch.float32) for one in (a, b, c)))
    assert_same_bits(result, torch.tensor([fmaf(a, b, c)], dtype=torch.float32))
