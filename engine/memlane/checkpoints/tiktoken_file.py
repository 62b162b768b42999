"""tiktoken rank files ("base64-bytes rank" a line) as a byte-level BPE of the tokenizers library.

tiktoken merges whichever neighbouring pair makes the lowest-ranked token; the library merges listed pairs in order. So
every split of every token into two tokens is listed, ordered by the rank of what it makes: then both choose alike.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from memlane.errors import CheckpointError

__all__ = ["byte_alphabet", "is_tiktoken", "read_tiktoken"]

# Llama 3's split pattern, which Meta's training code uses for every rank file.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SPECIAL = 256  # special tokens, placed after the ranks
_NAMED = {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 2: "<|fim_prefix|>", 3: "<|fim_middle|>",
          253: "<|fim_end_fill|>", 254: "<|fim_pad|>", 255: "<|fim_suffix|>"}  # fmt: skip


def is_tiktoken(head: bytes) -> bool:
    """Whether a file that starts with `head` may be a rank file."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", head) is not None


def read_tiktoken(path: Path) -> Tokenizer:
    """The tokenizer of a rank file with Meta's split pattern and special tokens. CheckpointError if it is malformed."""
    ranks = _read_ranks(path)
    symbols = byte_alphabet()
    text = {token: "".join(symbols[byte] for byte in token) for token in ranks}
    pairs = [
        (rank, ranks[token[:cut]], ranks[token[cut:]], token[:cut], token[cut:])
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    merges = [(text[left], text[right]) for *_, left, right in sorted(pairs)]
    vocab = {text[token]: rank for token, rank in ranks.items()}
    # ignore_merges: a piece that is itself a token is taken whole, as tiktoken does
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(_PATTERN), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    names = [_NAMED.get(i, f"<|reserved_special_token_{i}|>") for i in range(_SPECIAL)]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return tokenizer


def _read_ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, binascii.Error) as error:
        raise CheckpointError(path, f"is not a tiktoken rank file: {error}") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(path, "its ranks are not 0, 1, 2, ...: lines are missing or repeated")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise CheckpointError(path, f"has no rank for byte {missing[0]}")
    return ranks


def byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE writes for each byte (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
