"""What a model looks like, as config.json states it. Unknown keys are errors: a misspelt one would change the model silently."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from memlane.errors import ConfigError
from memlane.tables.layout import RowFormat

__all__ = ["MemoryConfig", "ModelConfig"]

KINDS = ("product_key", "peer")
ROW_FORMATS = tuple(row_format.value for row_format in RowFormat)
DTYPES = ("float32", "bfloat16", "float16")

MODEL_TYPE = "memlane"
ARCHITECTURE = "MemlaneForCausalLM"

# Our names -> the names Hugging Face configs use. Names not listed are the same in both.
_HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "eos_token_ids": "eos_token_id",
    "dtype": "torch_dtype",
}
_IGNORED = {"model_type", "architectures", "transformers_version"}


@dataclass(frozen=True)
class MemoryConfig:
    """The memory layers of a model. Each replaces the feed-forward part of its block.

    layers: 0-based block numbers, ascending. num_keys: sub-keys per half (a table has num_keys ** 2 rows).
    num_heads, knn: rows chosen per token are num_heads * knn. key_dim: width of a query, both halves together.
    value_dim: width of a row. kind: "product_key" (a weighted sum of rows) or "peer" (rows are single-neuron experts).
    swilu: multiply the sum by silu of a projection of the input (Memory+). value_proj: project the sum to hidden_size.
    gated: multiply the output by a sigmoid gate. shared: one table (PEER: one pair) for all layers.
    score_scale: each head has a learned temperature. row_format: how rows are stored on disk.
    """

    layers: tuple[int, ...]
    num_keys: int
    num_heads: int
    knn: int
    key_dim: int
    value_dim: int
    kind: str = "product_key"
    swilu: bool = True
    value_proj: bool = True
    gated: bool = False
    shared: bool = True
    score_scale: bool = False
    row_format: str = "float32"

    @property
    def rows(self) -> int:
        """Rows of a table."""
        return self.num_keys * self.num_keys

    @property
    def rows_per_token(self) -> int:
        """Rows a token reads in one memory layer (PEER: from each of its two tables)."""
        return self.num_heads * self.knn

    @property
    def row_bytes(self) -> int:
        """Bytes of a row as it is stored."""
        return RowFormat(self.row_format).stride(self.value_dim)

    def table_names(self, layer: int) -> tuple[str, ...]:
        """Names of the tables that memory layer `layer` reads: ("values",) or, for PEER, ("values_u", "values_v")."""
        prefix = "" if self.shared else f"layers.{layer}."
        parts = ("values_u", "values_v") if self.kind == "peer" else ("values",)
        return tuple(prefix + part for part in parts)

    def all_table_names(self) -> tuple[str, ...]:
        """Names of all tables of the model, each once, in layer order."""
        return tuple(dict.fromkeys(name for layer in self.layers for name in self.table_names(layer)))


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer. Field names follow Hugging Face configs where shorter ones would not be clearer.

    rope_interleaved: rotary pairs are elements (2i, 2i+1); otherwise (i, i + head_dim/2).
    dtype: what the dense weights are stored in, and what "auto" serves them in.
    Raises ConfigError on values that cannot work.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_position_embeddings: int
    num_kv_heads: int = 0  # 0: num_heads
    head_dim: int = 0  # 0: hidden_size // num_heads
    rope_theta: float = 10000.0
    rope_interleaved: bool = False
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str = "float32"
    memory: MemoryConfig | None = None

    def __post_init__(self) -> None:
        if not self.num_kv_heads:
            object.__setattr__(self, "num_kv_heads", self.num_heads)
        if not self.head_dim and self.num_heads > 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        _validate(self)

    def is_memory_layer(self, layer: int) -> bool:
        return self.memory is not None and layer in self.memory.layers

    def table_names(self) -> tuple[str, ...]:
        """Names of all tables, each once; empty for a dense model."""
        return self.memory.all_table_names() if self.memory else ()

    def to_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        fields = {_HF_NAMES.get(k, k): v for k, v in dataclasses.asdict(self).items()}
        fields["eos_token_id"] = list(self.eos_token_ids)
        if self.memory is not None:
            fields["memory"]["layers"] = list(self.memory.layers)
        return {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], **fields}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """The config in a parsed config.json. Raises ConfigError on unknown, missing or impossible values."""
        if data.get("model_type") != MODEL_TYPE:
            raise ConfigError(f"model_type is {data.get('model_type')!r}, expected {MODEL_TYPE!r}")
        ours = {theirs: name for name, theirs in _HF_NAMES.items()}
        values = {ours.get(k, k): v for k, v in data.items() if k not in _IGNORED}
        eos = values.get("eos_token_ids", ())
        values["eos_token_ids"] = (eos,) if isinstance(eos, int) else tuple(eos or ())
        if values.get("memory") is not None:
            memory = values["memory"]
            if not isinstance(memory, Mapping):
                raise ConfigError("memory must be an object or null")
            values["memory"] = _build(
                MemoryConfig, {**memory, "layers": tuple(memory.get("layers") or ())}, "memory"
            )
        return _build(cls, values, "config")


_Config = TypeVar("_Config", "ModelConfig", "MemoryConfig")


def _build(cls: type[_Config], values: Mapping[str, Any], where: str) -> _Config:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ConfigError(f"{where}: unknown key(s) {', '.join(unknown)}")
    required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
    if missing := sorted(required - set(values)):
        raise ConfigError(f"{where}: missing key(s) {', '.join(missing)}")
    for name, value in values.items():
        _check_type(f"{where}.{name}", str(fields[name].type), value)
    return cls(**values)


def _check_type(where: str, annotation: str, value: Any) -> None:
    """JSON has no int/float/bool discipline of its own; a string or a bool where a number belongs is refused here."""
    kinds: dict[str, tuple[type, ...]] = {
        "int": (int,),
        "float": (int, float),
        "bool": (bool,),
        "str": (str,),
    }
    base = annotation.removesuffix(" | None")
    if value is None and base != annotation:
        return
    if base == "tuple[int, ...]":
        if any(type(item) is not int for item in value):
            raise ConfigError(f"{where} must be a list of integers, got {list(value)!r}")
    elif base in kinds and type(value) not in kinds[base]:
        raise ConfigError(f"{where} must be {base}, got {value!r}")


def _validate(c: ModelConfig) -> None:
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
                 "intermediate_size", "max_position_embeddings"):  # fmt: skip
        _require(getattr(c, name) > 0, f"{name} must be positive, got {getattr(c, name)}")
    _require(c.num_heads % c.num_kv_heads == 0,
             f"num_kv_heads ({c.num_kv_heads}) must divide num_heads ({c.num_heads})")  # fmt: skip
    _require(c.num_layers <= 1024, f"num_layers must be at most 1024, got {c.num_layers}")
    _require(c.head_dim % 2 == 0, f"head_dim must be even for rotary embeddings, got {c.head_dim}")
    _require(c.rope_theta > 0, f"rope_theta must be positive, got {c.rope_theta}")
    _require(c.norm_eps >= 0, f"norm_eps must not be negative, got {c.norm_eps}")
    _require(c.dtype in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, got {c.dtype!r}")
    for token in (*c.eos_token_ids, *([] if c.bos_token_id is None else [c.bos_token_id])):
        _require(0 <= token < c.vocab_size, f"token id {token} is outside the vocabulary of {c.vocab_size}")
    if c.memory is not None:
        _validate_memory(c.memory, c)


def _validate_memory(m: MemoryConfig, c: ModelConfig) -> None:
    for name in ("num_keys", "num_heads", "knn", "key_dim", "value_dim"):
        _require(getattr(m, name) > 0, f"memory.{name} must be positive, got {getattr(m, name)}")
    _require(bool(m.layers), "memory.layers is empty; a dense model has no memory section")
    _require(
        m.layers == tuple(sorted(set(m.layers))), f"memory.layers must be ascending, got {list(m.layers)}"
    )
    _require(m.layers[0] >= 0 and m.layers[-1] < c.num_layers,
             f"memory.layers {list(m.layers)} are outside the model's {c.num_layers} layers")  # fmt: skip
    _require(m.kind in KINDS, f"memory.kind must be one of {', '.join(KINDS)}, got {m.kind!r}")
    _require(m.row_format in ROW_FORMATS,
             f"memory.row_format must be one of {', '.join(ROW_FORMATS)}, got {m.row_format!r}")  # fmt: skip
    _require(
        m.row_format != "int4" or m.value_dim % 2 == 0, f"int4 rows need an even value_dim, got {m.value_dim}"
    )
    _require(m.key_dim % 2 == 0, f"memory.key_dim must be even, got {m.key_dim}")
    _require(m.num_keys <= 65536, f"memory.num_keys must be at most 65536, got {m.num_keys}")
    _require(m.knn <= m.num_keys, f"memory.knn ({m.knn}) must not exceed memory.num_keys ({m.num_keys})")
    if m.kind == "peer":
        _require(not (m.swilu or m.value_proj), "PEER layers have neither swilu nor value_proj")
    if not m.value_proj:
        _require(not m.swilu, "memory.swilu needs memory.value_proj")
        _require(m.value_dim == c.hidden_size,
                 f"without value_proj, memory.value_dim ({m.value_dim}) must be hidden_size ({c.hidden_size})")  # fmt: skip


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
