"""Products of dense layers against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from memlane.models.layers import Linear, linear


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 3), (7, 16), (64, 48), (1024, 130), (50_304, 32)])
@pytest.mark.parametrize("biased", [False, True])
def test_the_product_of_a_single_token_is_torchs(rows: int, columns: int, biased: bool) -> None:
    generator = torch.Generator().manual_seed(rows + columns)
    weight = torch.randn(rows, columns, generator=generator)
    bias = torch.randn(rows, generator=generator) if biased else None
    x = torch.randn(1, columns, generator=generator)
    with torch.inference_mode():
        found, wanted = linear(x, weight, bias), F.linear(x, weight, bias)
    assert found.shape == (1, rows)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * columns**0.5)


@pytest.mark.parametrize("tokens", [0, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_batches_are_torchs_bit_by_bit(tokens: int, dtype: torch.dtype) -> None:
    weight, x = torch.randn(24, 16, dtype=dtype), torch.randn(tokens, 16, dtype=dtype)
    with torch.inference_mode():
        assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_a_bfloat16_token_is_torchs_bit_by_bit() -> None:
    weight, x = torch.randn(24, 16, dtype=torch.bfloat16), torch.randn(1, 16, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert torch.equal(linear(x, weight), F.linear(x, weight))


def test_gradients_flow_through_a_single_token() -> None:
    layer, x = Linear(6, 4), torch.randn(1, 6, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0, keepdim=True))
    assert layer.weight.grad is not None
