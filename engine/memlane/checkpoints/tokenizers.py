"""The tokenizer of a foreign checkpoint as tokenizer.json, where its data is at hand; otherwise the model speaks token ids."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from memlane.checkpoints.sentencepiece_file import is_sentencepiece, read_sentencepiece
from memlane.checkpoints.tiktoken_file import byte_alphabet, is_tiktoken, read_tiktoken
from memlane.errors import CheckpointError
from memlane.models.config import ModelConfig

__all__ = ["NO_TOKENIZER", "TokenizerFiles", "fit", "given_tokenizer", "lingua_tokenizer"]

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"

# Files of a tokenizer folder that are taken over as they are.
_COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer that can be written into a model directory. write is None if there is none.

    vocab_size: one more than its largest id; 0 if there is none.
    """

    write: Callable[[Path], None] | None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    vocab_size: int = 0


NO_TOKENIZER = TokenizerFiles(None)


def fit(path: Path, config: ModelConfig, files: TokenizerFiles) -> ModelConfig:
    """The config with the tokenizer's BOS and EOS ids, where it has them. CheckpointError if it knows more tokens."""
    if files.vocab_size > config.vocab_size:
        raise CheckpointError(
            path, f"its tokenizer has {files.vocab_size} tokens, the model has {config.vocab_size}"
        )
    bos = config.bos_token_id if files.bos_token_id is None else files.bos_token_id
    return dataclasses.replace(
        config, bos_token_id=bos, eos_token_ids=files.eos_token_ids or config.eos_token_ids
    )


def lingua_tokenizer(params: Path, spec: Mapping[str, Any]) -> TokenizerFiles:
    """The tokenizer that params.json names ("data.tokenizer"), from beside the checkpoint if it is one with a file.

    Its path is one on the training machine; only its file name is looked for, beside params.json.
    """
    name = spec.get("name")
    if name == "bytes":
        return _built(byte_tokenizer(), BEGIN, END)
    beside = params.parent / Path(str(spec.get("path") or "-")).name
    if name in ("sp", "tiktoken") and beside.is_file():
        return given_tokenizer(beside)
    return NO_TOKENIZER


def given_tokenizer(path: Path) -> TokenizerFiles:
    """The tokenizer in a file or folder.

    A tokenizer.json, a folder with one or with vocab.json and merges.txt (GPT-2's form), a tiktoken rank file, or a
    SentencePiece model. Raises CheckpointError if it is none of these.
    """
    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            return _copied(path / "tokenizer.json")
        if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
            return _gpt2(path)
        raise CheckpointError(path, "holds neither tokenizer.json nor vocab.json with merges.txt")
    try:
        head = path.open("rb").read(512)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    if path.suffix == ".json":
        return _copied(path)
    if is_tiktoken(head):
        return _built(read_tiktoken(path), BEGIN, END)
    if is_sentencepiece(head):
        model = read_sentencepiece(path)
        return _built(model.tokenizer, model.bos, model.eos)
    raise CheckpointError(path, "is not a tokenizer.json, a tiktoken rank file or a SentencePiece model")


def byte_tokenizer() -> Tokenizer:
    """Ids 0 to 255 are bytes, then BOS and EOS."""
    vocab = {symbol: byte for byte, symbol in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(BEGIN, special=True), AddedToken(END, special=True)])
    return tokenizer


def _built(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> TokenizerFiles:
    """A tokenizer made here. Prompts get BOS and no EOS, as the training code does it."""
    bos_id = None if bos is None else tokenizer.token_to_id(bos)
    eos_id = None if eos is None else tokenizer.token_to_id(eos)
    if bos is not None and bos_id is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
        )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": bos,
        "eos_token": eos,
    }

    def write(into: Path) -> None:
        tokenizer.save(str(into / "tokenizer.json"))
        (into / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")

    eos_ids = () if eos_id is None else (eos_id,)
    return TokenizerFiles(write, bos_id, eos_ids, tokenizer.get_vocab_size(with_added_tokens=True))


def _copied(path: Path) -> TokenizerFiles:
    """An existing tokenizer.json with what lies beside it."""
    tokenizer = _load(path)
    settings: dict[str, Any] = {}
    config = path.with_name("tokenizer_config.json")
    if config.is_file():
        try:
            settings = json.loads(config.read_bytes())
        except ValueError as error:
            raise CheckpointError(config, f"is not JSON: {error}") from error

    def token_id(key: str) -> int | None:
        token = settings.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        return tokenizer.token_to_id(text) if isinstance(text, str) else None

    def write(into: Path) -> None:
        shutil.copyfile(path, into / "tokenizer.json")
        for name in _COPIED[1:]:
            if path.with_name(name).is_file():
                shutil.copyfile(path.with_name(name), into / name)

    eos = token_id("eos_token")
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    return TokenizerFiles(write, token_id("bos_token"), () if eos is None else (eos,), largest + 1)


def _load(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    except Exception as error:
        raise CheckpointError(path, f"is not a tokenizer.json: {error}") from error


def _gpt2(directory: Path) -> TokenizerFiles:
    """GPT-2's vocab.json and merges.txt; nothing is added to a prompt."""
    try:
        vocab, merges = models.BPE.read_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    except Exception as error:
        raise CheckpointError(directory, f"vocab.json and merges.txt are no tokenizer: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    if tokenizer.token_to_id(end) is None:
        return _built(tokenizer, None, None)
    tokenizer.add_special_tokens([AddedToken(end, special=True)])
    return _built(tokenizer, None, end)
