"""The demo's data, tokenizer and batches."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from data import PHRASINGS, Exposures, all_facts
from memlane.models import CausalAttention, ModelConfig, Transformer
from packing import NOT_ASKED, STEP, Corpus
from tokenizer import BOS_ID, EOS_ID, train_tokenizer


@pytest.fixture(scope="module")
def facts():
    return all_facts()


@pytest.fixture(scope="module")
def tokenizer(facts) -> Tokenizer:
    return train_tokenizer(facts, 1024)


def test_facts_are_names_that_have_to_be_remembered(facts):
    names = {fact.code: fact.name for fact in facts}
    assert 30_000 < len(facts) < 45_000  # grows with the Unicode version of the Python that runs
    if unicodedata.unidata_version == "14.0.0":
        assert len(facts) == 32_135
    assert names[0x2603] == "SNOWMAN"
    assert 0x4E00 not in names, "CJK names spell their code point"
    assert 0xAC00 not in names, "Hangul syllables are composed by rule"


def test_tokenizer_round_trip(facts, tokenizer):
    for fact in facts[::97]:
        assert tokenizer.decode(tokenizer.encode(fact.name).ids) == fact.name
    for phrasing in PHRASINGS:
        for code in ("0041", "1F600", "FFFD"):
            tokens = tokenizer.encode(phrasing.replace("%04X", code)).tokens
            assert "".join(tokens).endswith(f"{code}?")
            assert all(digit in tokens for digit in code), "hex digits stay single"


def test_each_epoch_shows_every_fact_once_in_a_new_order():
    stream = Exposures(60, seed=3)
    drawn = np.concatenate([stream.batch(step, 20)[0] for step in range(6)])
    assert sorted(drawn[:60]) == list(range(60)) == sorted(drawn[60:])
    assert list(drawn[:60]) != list(drawn[60:])


def test_the_stream_depends_on_seed_and_step_alone():
    whole = [Exposures(50, seed=3).batch(step, 16) for step in range(9)]
    for step in (8, 2, 5):  # any order, fresh or used
        again = Exposures(50, seed=3).batch(step, 16)
        assert all(np.array_equal(a, b) for a, b in zip(again, whole[step], strict=True))
    assert not np.array_equal(Exposures(50, seed=4).batch(0, 16)[0], whole[0][0])


def test_packed_batch_is_the_padded_one_without_repeated_prefixes(facts, tokenizer):
    """Logits through shared prefixes equal those of plain padded sequences."""
    corpus = Corpus(facts[:40], tokenizer)
    numbers = np.array([3, 17, 4, 3, 30])
    phrasings = np.array([0, 0, 2, 1, 0])
    batch = corpus.pack(numbers, phrasings)
    config = ModelConfig(tokenizer.get_vocab_size(), 32, 2, 2, 64, 128, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = Transformer(config)

    sequences = []
    for number, phrasing in zip(numbers, phrasings, strict=True):
        question = [BOS_ID, *tokenizer.encode(facts[number].prompt(phrasing)).ids]
        sequences.append((question, [*tokenizer.encode(facts[number].name).ids, EOS_ID]))
    length = max(len(q) + len(a) for q, a in sequences)
    padded = torch.zeros(len(sequences), length, dtype=torch.int64)
    for row, (question, answer) in zip(padded, sequences, strict=True):
        row[: len(question) + len(answer)] = torch.tensor(question + answer)
    positions = torch.arange(length).repeat(len(sequences))
    hidden = model(padded.flatten(), positions, CausalAttention(len(sequences), length))
    hidden = hidden.view(len(sequences), length, -1)
    wanted = torch.cat([hidden[i, len(q) - 1 : len(q) + len(a) - 1] for i, (q, a) in enumerate(sequences)])

    packed = model(batch.token_ids, batch.positions, batch.attention)[batch.answer_nodes]
    asked = batch.targets != NOT_ASKED
    torch.testing.assert_close(packed[asked], wanted, rtol=1e-4, atol=1e-5)
    assert batch.targets[asked].tolist() == [token for _, answer in sequences for token in answer]
    assert len(batch.token_ids) % STEP == 0
    assert len(batch.token_ids) < (padded != 0).sum() - 15 + STEP
