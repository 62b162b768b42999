"""The reference table's sums, products and gradients against indexing."""

from __future__ import annotations

import pytest
import torch

from memlane.tables import ReferenceTable, Table


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_equal_those_of_indexing(sparse: bool) -> None:
    table = ReferenceTable(20, 6, sparse_grad=sparse)
    assert isinstance(table, Table)
    ids = torch.tensor([[1, 2, 1], [19, 0, 2]])
    weights = torch.randn(2, 3, requires_grad=True)
    x = torch.randn(2, 6, requires_grad=True)
    loss = (
        table.weighted_sum(ids, weights).pow(2).sum()
        + table.dot(ids, x).pow(2).sum()
        + table.gather(ids[0]).sum()
    )
    got = torch.autograd.grad(loss, [table.weight, weights, x])

    rows = table.weight[ids]
    plain = (rows * weights[..., None]).sum(1).pow(2).sum() + (rows * x[:, None]).sum(-1).pow(2).sum()
    expected = torch.autograd.grad(plain + table.weight[ids[0]].sum(), [table.weight, weights, x])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.to_dense(), b, rtol=1e-5, atol=1e-5)


def test_holds_what_it_is_given() -> None:
    values = torch.randn(5, 4).bfloat16()
    table = ReferenceTable.from_tensor(values, name="t")
    assert torch.equal(table.gather(torch.arange(5)), values.float())
    assert (table.name, table.rows, table.width) == ("t", 5, 4)
    assert table.weighted_sum(torch.empty(0, 3, dtype=torch.int64), torch.empty(0, 3)).shape == (0, 4)
    assert torch.equal(
        table.weighted_sum(torch.empty(2, 0, dtype=torch.int64), torch.empty(2, 0)), torch.zeros(2, 4)
    )
    assert ReferenceTable(1000, 16, init_std=0.5).weight.std().item() == pytest.approx(0.5, rel=0.1)


def test_a_lookup_ends_once() -> None:
    table = ReferenceTable(10, 4, name="t")
    ids, weights, x = torch.randint(0, 10, (3, 5)), torch.randn(3, 5), torch.randn(3, 4)
    assert torch.equal(table.begin(ids).weighted_sum(weights), table.weighted_sum(ids, weights))
    lookup = table.begin(ids)
    assert torch.equal(lookup.dot(x), table.dot(ids, x))
    lookup.close()
    with pytest.raises(RuntimeError, match="'t' has ended"):
        lookup.weighted_sum(weights)
    assert table.begin(torch.empty(0, 3, dtype=torch.int64)).weighted_sum(torch.empty(0, 3)).shape == (0, 4)
    for bad in (-1, 10):
        with pytest.raises(IndexError, match="10 rows"):
            table.begin(torch.tensor([[0, bad]]))
