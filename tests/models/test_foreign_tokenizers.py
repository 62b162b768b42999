"""Converted tokenizers against the libraries they come from."""

from __future__ import annotations

import base64
import io
import itertools
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from golden import DATA
from tokenizers import Tokenizer

from memlane.checkpoints import convert, read_config
from memlane.checkpoints.tiktoken_file import _PATTERN, read_tiktoken
from memlane.checkpoints.tokenizers import byte_tokenizer, given_tokenizer
from memlane.errors import CheckpointError

CORPUS = [
    "The quick brown fox jumps over the lazy dog, doesn't it? We'll see: it's 1234567 times.",
    "  Indented\n\n\ttext   with    runs of spaces\r\nand lines   \n",
    "naïve café, Zürich, Ελληνικά, русский текст, 日本語のテキスト, 한국어, العربية, emoji 👩‍👩‍👧 🎉",
    "aaaaaaaaaaaaa bbbbbbbbbb aaaaabbbbbaaaa !!!!!!!! ???? ------ ====",
    "def f(x): return x**2 + 3*x - 7  # comment",
]


def random_texts(count: int) -> list[str]:
    generator = random.Random(0)
    alphabet = [*"abcdeABC  \n\t.,'s1239-_é日🎉", "the", " the", "ing", "aa", "  ", "'ll"]
    return ["".join(generator.choices(alphabet, k=generator.randrange(1, 60))) for _ in range(count)]


TEXTS = [*CORPUS, *random_texts(300), ""]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


# ---- bytes


def test_bytes() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.get_vocab_size() == 258
    for text in TEXTS:
        ids = encode(tokenizer, text)
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([72, 256, 105, 257]) == "Hi"  # ids past the bytes are dropped


def test_converted_bytes_model_adds_bos(tmp_path: Path) -> None:
    out = convert(DATA / "lingua" / "e_dense", tmp_path / "out", progress=False)
    config = read_config(out)
    assert (config.bos_token_id, config.eos_token_ids) == (256, (257,))
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("Hi").ids == [256, 72, 105]
    assert json.loads((out / "tokenizer_config.json").read_text())["bos_token"] == tokenizer.id_to_token(256)
    assert json.loads((out / "generation_config.json").read_text()) == {
        "bos_token_id": 256,
        "eos_token_id": [257],
    }


# ---- tiktoken


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rank file made by merging the most frequent pairs of the corpus, as such files are made."""
    words = [
        [bytes([b]) for b in piece.encode()] for text in CORPUS * 2 + TEXTS[5:60] for piece in text.split(" ")
    ]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < 600:
        counts: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in itertools.pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        left, right = max(counts, key=lambda pair: (counts[pair], pair))
        if left + right not in tokens:
            tokens.append(left + right)
        for word in words:
            at = 0
            while at < len(word) - 1:
                if (word[at], word[at + 1]) == (left, right):
                    word[at : at + 2] = [left + right]
                at += 1
    path = tmp_path_factory.mktemp("ranks") / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(t) + f" {i}\n".encode() for i, t in enumerate(tokens)))
    return path


def test_tiktoken_agrees_with_tiktoken(ranks: Path) -> None:
    table = {
        base64.b64decode(t): int(r) for t, r in (line.split() for line in ranks.read_bytes().splitlines())
    }
    theirs = tiktoken.Encoding("x", pat_str=_PATTERN, mergeable_ranks=table, special_tokens={})
    ours = read_tiktoken(ranks)
    assert any(len(theirs.encode_ordinary(text)) < 0.8 * len(text.encode()) for text in CORPUS)
    for text in TEXTS:
        ids = theirs.encode_ordinary(text)
        assert encode(ours, text) == ids
        assert ours.decode(ids) == text


def test_special_tokens_follow_the_ranks(ranks: Path) -> None:
    files = given_tokenizer(ranks)
    count = len(ranks.read_bytes().splitlines())
    assert (files.bos_token_id, files.eos_token_ids) == (count, (count + 1,))
    assert files.vocab_size == count + 256
    tokenizer = read_tiktoken(ranks)
    assert tokenizer.token_to_id("<|fim_suffix|>") == count + 255
    assert tokenizer.token_to_id("<|fim_middle|>") == count + 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: lines[:-5] + lines[-4:], "lines are missing or repeated"),
        (lambda lines: [*lines, b"!!! 7"], "is not a tiktoken rank file"),
        (lambda lines: lines[:100], "has no rank for byte 100"),
    ],
)
def test_damaged_rank_files(ranks: Path, tmp_path: Path, damage: object, message: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n".join(damage(ranks.read_bytes().splitlines())) + b"\n")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        given_tokenizer(path)


# ---- SentencePiece


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
        },  # Llama 2's
        {"add_dummy_prefix": False, "byte_fallback": True},
        {"bos_id": -1, "split_digits": True},
    ],
    ids=["default", "llama", "no_prefix", "no_bos"],
)
def test_sentencepiece_agrees_with_sentencepiece(
    kind: str, options: dict[str, object], tmp_path: Path
) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in CORPUS * 3 + TEXTS[5:100] for line in text.splitlines()]),
        model_writer=model, model_type=kind, vocab_size=480, hard_vocab_limit=False, character_coverage=0.99,
        minloglevel=2, **options,
    )  # fmt: skip
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue())
    theirs = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    files = given_tokenizer(path)
    assert files.write is not None
    files.write(tmp_path)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert files.vocab_size == theirs.vocab_size()
    assert files.bos_token_id == (None if theirs.bos_id() < 0 else theirs.bos_id())
    assert files.eos_token_ids == (theirs.eos_id(),)
    different = [text for text in TEXTS if encode(ours, text) != theirs.encode(text)]
    assert not different, (
        different[0],
        ours.encode(different[0]).tokens,
        theirs.encode(different[0], out_type=str),
    )
    for text in TEXTS:
        ids = theirs.encode(text)
        if theirs.unk_id() not in ids:  # decoded as " ⁇ " there, left out here
            assert ours.decode(ids) == theirs.decode(ids)


def test_damaged_sentencepiece_model(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=200,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.getvalue()[:1000])
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: is not a SentencePiece model"):
        given_tokenizer(path)


# ---- what the user names


def test_gpt2_files(tmp_path: Path) -> None:
    source = byte_tokenizer()
    vocab = {k: v for k, v in source.get_vocab().items() if v < 256} | {"he": 256, "<|endoftext|>": 257}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\n")
    out = convert(DATA / "smlm" / "q4" / "model", tmp_path / "out", tokenizer=tmp_path, progress=False)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    assert tokenizer.encode("he h").ids == [256, 32, 104]
    assert read_config(out).eos_token_ids == (257,)


def test_no_tokenizer_means_no_tokenizer_files(tmp_path: Path) -> None:
    out = convert(DATA / "smlm" / "q4" / "model", tmp_path / "out", progress=False)
    assert not list(out.glob("tokenizer*"))


def test_a_tokenizer_larger_than_the_model_is_refused(ranks: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="856 tokens, the model has 320"):
        convert(DATA / "smlm" / "q4" / "model", tmp_path / "out", tokenizer=ranks, progress=False)


@pytest.mark.parametrize("content", [b"", b"\x00\x01\x02", b"hello\n"])
def test_files_that_are_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{name}: is not a"):
            given_tokenizer(tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be read"):
        given_tokenizer(tmp_path / "missing.model")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds neither"):
        given_tokenizer(tmp_path / "empty")
