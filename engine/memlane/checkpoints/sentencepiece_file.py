"""SentencePiece models as tokenizers of the tokenizers library. The protobuf is read here: its few fields need no library."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

from memlane.errors import CheckpointError

__all__ = ["SentencePiece", "is_sentencepiece", "read_sentencepiece"]

SPACE = "\u2581"  # how pieces write a space

# SentencePiece.Type and TrainerSpec.ModelType of sentencepiece_model.proto
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNIGRAM, BPE = 1, 2

Field = int | bytes


@dataclass(frozen=True)
class SentencePiece:
    """A converted model and the text of its BOS and EOS tokens."""

    tokenizer: Tokenizer
    bos: str | None
    eos: str | None


@dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    kind: int


def is_sentencepiece(head: bytes) -> bool:
    """Whether a file that starts with `head` may be a model: its first field is a piece."""
    return head[:1] == b"\x0a" and b"\x15" in head[:64]


def read_sentencepiece(path: Path) -> SentencePiece:
    """The unigram or BPE model in a file. Raises CheckpointError if it is malformed or of another kind."""
    try:
        return _convert(path, path.read_bytes())
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
        raise CheckpointError(path, f"is not a SentencePiece model: {error}") from error


def _convert(path: Path, data: bytes) -> SentencePiece:
    pieces, trainer, normalizer = [], dict[int, Field](), dict[int, Field]()
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(_bytes(value)))
            score = struct.unpack("<f", _bytes(piece.get(2, b"\0\0\0\0")))[0]
            pieces.append(_Piece(_bytes(piece[1]).decode(), score, _int(piece.get(3, NORMAL))))
        elif number == 2:
            trainer = dict(_fields(_bytes(value)))
        elif number == 3:
            normalizer = dict(_fields(_bytes(value)))
    kind = _int(trainer.get(3, UNIGRAM))
    if kind not in (UNIGRAM, BPE) or not pieces:
        raise CheckpointError(path, "is not a SentencePiece model of the unigram or BPE kind")
    tokenizer = Tokenizer(_unigram(pieces) if kind == UNIGRAM else _bpe(pieces))
    prefix = bool(normalizer.get(3, 1))
    tokenizer.normalizer = _normalizer(normalizer, prefix)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    tokenizer.add_special_tokens(
        [AddedToken(p.text, special=True, normalized=False) for p in pieces if p.kind in (CONTROL, UNKNOWN)]
    )
    tokenizer.add_tokens([AddedToken(p.text, normalized=False) for p in pieces if p.kind == USER_DEFINED])
    return SentencePiece(tokenizer, _control(pieces, trainer, 41, 1), _control(pieces, trainer, 42, 2))


def _unigram(pieces: list[_Piece]) -> models.Model:
    unknown = next(i for i, p in enumerate(pieces) if p.kind == UNKNOWN)
    return models.Unigram([(p.text, p.score) for p in pieces], unknown, any(p.kind == BYTE for p in pieces))


def _bpe(pieces: list[_Piece]) -> models.Model:
    """Merges are implied: any two neighbours whose concatenation is a piece, best score first."""
    vocab = {p.text: i for i, p in enumerate(pieces)}
    usable = {p.text for p in pieces if p.kind in (NORMAL, USER_DEFINED, UNUSED)}
    pairs = [
        (-piece.score, vocab[piece.text[:cut]], vocab[piece.text[cut:]], piece.text[:cut], piece.text[cut:])
        for piece in pieces
        if piece.kind == NORMAL
        for cut in range(1, len(piece.text))
        if piece.text[:cut] in usable and piece.text[cut:] in usable
    ]
    merges = [(left, right) for *_, left, right in sorted(pairs)]
    unknown = next(p.text for p in pieces if p.kind == UNKNOWN)
    fallback = any(p.kind == BYTE for p in pieces)
    return models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=fallback)


def _normalizer(spec: dict[int, Field], prefix: bool) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if charsmap := _bytes(spec.get(2, b"")):
        steps.append(normalizers.Precompiled(charsmap))
    if spec.get(4, 1):  # remove_extra_whitespaces
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _control(pieces: list[_Piece], trainer: dict[int, Field], field: int, default: int) -> str | None:
    """The text of a control token by its id, a varint in which -1 (none) fills all 64 bits."""
    index = _int(trainer.get(field, default))
    return pieces[index].text if index < len(pieces) and pieces[index].kind == CONTROL else None


def _fields(data: bytes) -> Iterator[tuple[int, Field]]:
    """(field number, value) of a protobuf message: varints as int, everything else as its bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"truncated at byte {len(data)}")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"varint too long at byte {at}")


def _bytes(value: Field) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError("a number where bytes belong")
    return value


def _int(value: Field) -> int:
    if not isinstance(value, int):
        raise TypeError("bytes where a number belongs")
    return value
