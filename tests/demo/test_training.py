"""The training code: its kernels against the served modules, that it learns, and that it resumes exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import train
from data import PHRASINGS
from memlane.models import Transformer
from memlane.tables import ReferenceTable
from ops import HeadLoss
from packing import NOT_ASKED
from twins import TABLE, build, flops_per_token, model_config


def arguments(name: str, runs, *more: str):
    small = ["--facts", "200", "--batch", "32", "--steps", "30", "--vocabulary", "600", "--width", "32",
             "--hidden", "64", "--warmup", "5", "--lr", "1e-2"]  # fmt: skip
    return train.arguments(["--name", name, "--runs", str(runs), *small, *more])


@pytest.fixture(autouse=True, scope="module")
def _facts_once():
    """Every run reads the same facts and trains the same tokenizer; here they do it once."""
    facts = train.all_facts()
    tokenizer = train.train_tokenizer(facts, 600)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "all_facts", lambda: facts)
        patch.setattr(train, "train_tokenizer", lambda *_: tokenizer)
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_dense_twin_costs_the_same_flops_or_slightly_more():
    memory, dense = (flops_per_token(model_config(2048, dense=dense)) for dense in (False, True))
    assert memory <= dense < 1.01 * memory


@pytest.mark.parametrize("dense", [False, True])
def test_training_kernels_match_the_served_modules(tmp_path, dense):
    """Loss and every gradient of the fused training model equal those of plain autograd on memlane's own modules."""
    run = train.Run(arguments("m", tmp_path, "--precision", "float32", *(["--dense"] if dense else [])))
    batch = run.corpus.pack(*run.exposures.batch(0, 32))
    tables = {TABLE: ReferenceTable.from_tensor(run.table.values)} if run.table is not None else {}
    plain = Transformer(run.config, tables)
    plain.load_state_dict(run.model.state_dict())

    hidden = run.model(batch.token_ids, batch.positions, batch.attention)
    loss = HeadLoss.apply(hidden[batch.answer_nodes], run.model.embed.weight, batch.targets, torch.float32)
    loss.backward()
    hidden = plain(batch.token_ids, batch.positions, batch.attention)
    logits = plain.logits(hidden[batch.answer_nodes])
    wanted = F.cross_entropy(logits, batch.targets, ignore_index=NOT_ASKED)
    wanted.backward()

    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    for (name, mine), theirs in zip(run.model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    if run.table is not None:
        grad = tables[TABLE].weight.grad
        torch.testing.assert_close(run.table.grad, grad, rtol=1e-3, atol=1e-6)
        # padding nodes read rows too, with no gradient: those must not count as touched
        assert torch.equal(run.table.touched.bool(), (run.table.grad != 0).any(1))


@pytest.mark.parametrize("dense", [False, True])
def test_loss_goes_down(tmp_path, dense):
    run = train.Run(arguments("m", tmp_path, *(["--dense"] if dense else [])))
    losses = [run.step()[0] for _ in range(30)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


def test_resumed_run_is_bit_identical(tmp_path):
    whole = train.Run(arguments("whole", tmp_path))
    for _ in range(6):
        whole.step()
    first = train.Run(arguments("part", tmp_path))
    for _ in range(3):
        first.step()
    train.save(first, tmp_path)
    second = train.Run(arguments("part", tmp_path, "--seed", "0"))
    second.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    for _ in range(3):
        second.step()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
    for name, value in whole.table.state_dict().items():
        assert torch.equal(value, second.table.state_dict()[name]), name


def test_exact_match_counts_whole_names_only(tmp_path):
    run = train.Run(arguments("m", tmp_path, "--facts", "60"))
    facts, phrasings = np.arange(60), np.arange(60) % len(PHRASINGS)
    assert not train.exact_match(run.model, run.corpus, facts, phrasings).any()
    model, _ = build(run.config, 0)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in run.model.parameters())
