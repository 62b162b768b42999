"""What the HTTP side knows about the model that the engine has loaded."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from memlane import ipc
from memlane.config import EngineConfig, ServerConfig
from memlane.errors import CheckpointError, ConfigError, ErrorKind, RequestError
from memlane.text import ChatTemplate, Tokenizer

# generation_config.json: its name → ours, with the type it must have
_GENERATION_DEFAULTS: Final[dict[str, tuple[str, type]]] = {
    "temperature": ("temperature", float),
    "top_p": ("top_p", float),
    "top_k": ("top_k", int),
    "min_p": ("min_p", float),
    "repetition_penalty": ("repetition_penalty", float),
    "max_new_tokens": ("max_tokens", int),
}


@dataclass(frozen=True)
class ServedModel:
    """Name, text side and limits of one loaded model. Immutable."""

    name: str
    created: int  # Unix seconds
    vocab_size: int
    max_model_len: int
    tokenizer: Tokenizer | None  # None: the model takes and gives token ids only
    template: ChatTemplate | None
    defaults: dict[str, Any]  # of SamplingParams

    def check_name(self, asked: str | None) -> None:
        """Raises RequestError unless `asked` is this model; leaving the name out asks for the only one."""
        if asked is not None and asked != self.name:
            raise RequestError(
                f"the model {asked[:200]!r} does not exist; this server has {self.name!r}",
                param="model",
                kind=ErrorKind.MODEL_NOT_FOUND,
            )

    def need_tokenizer(self, param: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(
                f"this model came without a tokeniser, so {param} must be token ids; "
                "the operator can start the server with --tokenizer",
                param=param,
            )
        return self.tokenizer

    def need_template(self) -> ChatTemplate:
        if self.template is None:
            raise RequestError(
                "this model has no chat template; use /v1/completions, "
                "or the operator can start the server with --chat-template",
                param="messages",
            )
        return self.template


def load(engine: EngineConfig, server: ServerConfig, ready: ipc.Ready) -> ServedModel:
    """Read the text side of the model that the engine reports. Raises CheckpointError or ConfigError."""
    directory = Path(ready.model_directory)
    tokenizer = None
    if engine.tokenizer is not None:
        tokenizer = Tokenizer.load(engine.tokenizer)
    elif (directory / "tokenizer.json").is_file():
        tokenizer = Tokenizer.load(directory)
    return ServedModel(
        name=server.served_model_name or model_name(engine.model),
        created=int(time.time()),
        vocab_size=ready.vocab_size,
        max_model_len=ready.max_model_len,
        tokenizer=tokenizer,
        template=_template(server, tokenizer),
        defaults=_defaults(directory / "generation_config.json"),
    )


def model_name(model: str) -> str:
    """The name clients use unless the operator gives another: the last part of the path."""
    return Path(model).resolve().name


def _template(server: ServerConfig, tokenizer: Tokenizer | None) -> ChatTemplate | None:
    if tokenizer is None:
        return None
    source = tokenizer.chat_template
    if server.chat_template is not None:
        try:
            source = Path(server.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--chat-template: {error}") from error
    if source is None:
        return None
    special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    return ChatTemplate(source, special_tokens=special)


def _defaults(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(file, f"not valid JSON: {error}") from error
    if not isinstance(given, dict):
        raise CheckpointError(file, "not a JSON object")
    found: dict[str, Any] = {}
    for name, (ours, kind) in _GENERATION_DEFAULTS.items():
        value = given.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            raise CheckpointError(file, f"{name} is {value!r}, not a number")
        found[ours] = kind(value)
    if given.get("do_sample") is False:
        found["temperature"] = 0.0
    return found
