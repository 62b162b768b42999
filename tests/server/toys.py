"""Small tokenisers made in memory: every byte is a token, and some longer ones beside them."""

from __future__ import annotations

import json
from pathlib import Path

from memlane.text.pieces import byte_alphabet

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
EOS = 256  # without merges


def byte_level(merges: tuple[str, ...] = ()) -> dict[str, object]:
    """tokenizer.json of a byte-level BPE: id = byte value, merged pairs from 256, then specials."""
    spelled = {b: c for c, b in byte_alphabet().items()}
    vocab = {spelled[b]: b for b in range(256)}
    pairs = []
    for pair in merges:
        left, right = pair.split(" ")
        pairs.append([left, right])
        vocab[left + right] = 255 + len(pairs)
    options = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": len(vocab) + i,
                "content": content,
                "special": True,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
            }
            for i, content in enumerate(SPECIAL)
        ],
        "pre_tokenizer": {"type": "ByteLevel", **options},
        "decoder": {"type": "ByteLevel", **options},
        "model": {"type": "BPE", "vocab": vocab, "merges": pairs},
    }


def sentencepiece_like() -> dict[str, object]:
    """tokenizer.json as converted from sentencepiece: ▁ for spaces, <0xNN> for bytes without a piece."""
    pieces = ["<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "ab", "é"]
    return {
        "version": "1.0",
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": {p: i for i, p in enumerate(pieces)},
            "merges": [["▁", "a"], ["a", "b"]],
            "byte_fallback": True,
            "unk_token": None,
        },
    }


def write(
    directory: Path, tokenizer: dict[str, object], *, chat_template: str | None = CHAT_TEMPLATE
) -> Path:
    """Lay a tokeniser down as a model directory holds it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    config: dict[str, object] = {"eos_token": "<|end|>"}
    if chat_template is not None:
        config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
