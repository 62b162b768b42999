"""Checkpoints of Meta's memory-layer code (facebookresearch/memory): consolidated.pth, or the raw distributed step folder.

What differs from our names, layouts and conventions, and nothing else. A table shared by several layers is stored once
per layer; the copy of the lowest block is read, the others are left alone and need not be there.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from memlane.checkpoints.dcp import DcpFolder
from memlane.checkpoints.source import Checkpoint, DenseTensor, FloatRows, check_shapes, row_format_of
from memlane.checkpoints.tensors import LazyTensor, StoredTensor
from memlane.checkpoints.tokenizers import fit, lingua_tokenizer
from memlane.checkpoints.torch_file import read_torch_file
from memlane.errors import CheckpointError, ConfigError
from memlane.models.config import MemoryConfig, ModelConfig

__all__ = ["CONSOLIDATED", "open_consolidated", "open_dcp"]

CONSOLIDATED = "consolidated.pth"
PARAMS = "params.json"

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

# Tensors that a checkpoint may carry and that no output depends on: later copies of a shared table, and the projections
# that PEER layers create without using.
_UNUSED = re.compile(
    r"layers\.\d+\.feed_forward\.(values(_[uv])?\.weight|(value_proj|swilu_projection)\.(weight|bias))"
)


class _Tensors(Protocol):
    """Tensors by name, opened on demand."""

    def names(self) -> Collection[str]: ...

    def tensor(self, name: str) -> LazyTensor: ...


@dataclasses.dataclass(frozen=True)
class _Consolidated:
    """The "model" part of consolidated.pth; its optimiser part, twice as large, is never read."""

    model: Mapping[str, StoredTensor]

    def names(self) -> Collection[str]:
        return self.model.keys()

    def tensor(self, name: str) -> StoredTensor:
        return self.model[name]


@dataclasses.dataclass(frozen=True)
class _StepFolder:
    """The "model" part of a distributed checkpoint."""

    folder: DcpFolder

    def names(self) -> Collection[str]:
        return [name.removeprefix("model.") for name in self.folder.names() if name.startswith("model.")]

    def tensor(self, name: str) -> LazyTensor:
        return self.folder.tensor("model." + name)


def open_consolidated(directory: Path) -> Checkpoint:
    """The checkpoint in a folder of consolidated.pth and params.json."""
    path = directory / CONSOLIDATED
    content = read_torch_file(path)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise CheckpointError(path, 'holds no "model" dictionary')
    for name, value in model.items():
        if not isinstance(name, str) or not isinstance(value, StoredTensor):
            raise CheckpointError(path, f"{name!r} is not a named tensor")
    return _checkpoint(directory, "lingua", path, _Consolidated(model))


def open_dcp(directory: Path) -> Checkpoint:
    """The checkpoint in a raw step folder of .metadata, *.distcp files and params.json."""
    folder = DcpFolder(directory)
    return _checkpoint(directory, "lingua-dcp", folder.path, _StepFolder(folder))


def _checkpoint(directory: Path, form: str, path: Path, tensors: _Tensors) -> Checkpoint:
    params_path = directory / PARAMS
    params = _read_params(params_path)
    files = lingua_tokenizer(params_path, _section(params_path, params, "data", "tokenizer"))
    config = fit(params_path, _config(params_path, params), files)
    names, taken = set(tensors.names()), set[str]()

    def take(name: str) -> LazyTensor:
        if name not in names:
            raise CheckpointError(path, f"tensor {name} is missing")
        taken.add(name)
        return tensors.tensor(name)

    dense = [
        DenseTensor(ours, shape or _stacked([p.shape for p in parts]), parts)
        for ours, theirs, shape in _dense_names(config)
        for parts in [tuple(take(name) for name in theirs)]
    ]
    tables = []
    for ours, name in _table_names(config):
        tensor = take(name)
        if len(tensor.shape) != 2:
            raise CheckpointError(path, f"table {name} is of shape {list(tensor.shape)}")
        tables.append(FloatRows(ours, tensor, row_format_of(path, name, tensor.dtype)))
    if unknown := sorted(name for name in names - taken if not _UNUSED.fullmatch(name)):
        raise CheckpointError(path, f"unexpected tensor {unknown[0]} ({len(unknown)} in all)")
    if config.memory is not None:
        memory = dataclasses.replace(config.memory, row_format=tables[0].row_format)
        config = dataclasses.replace(config, memory=memory)
    check_shapes(path, config, dense, tables)
    return Checkpoint(directory, form, config, tuple(dense), tuple(tables), {}, files.write)


def _stacked(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()


def _dense_names(c: ModelConfig) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...] | None]]:
    """Our name, their names (stacked along the first dimension), and our shape where it differs from the stacked one."""
    yield "embed.weight", ("tok_embeddings.weight",), None
    yield "norm.weight", ("norm.weight",), None
    yield "lm_head.weight", ("output.weight",), None
    for i in range(c.num_layers):
        ours, attn, mlp = f"layers.{i}.", f"layers.{i}.attention.", f"layers.{i}.feed_forward."
        yield ours + "attn_norm.weight", (f"layers.{i}.attention_norm.weight",), None
        yield ours + "ffn_norm.weight", (f"layers.{i}.ffn_norm.weight",), None
        yield ours + "attn.wqkv.weight", (attn + "wq.weight", attn + "wk.weight", attn + "wv.weight"), None
        yield ours + "attn.wo.weight", (attn + "wo.weight",), None
        if c.memory is None or not c.is_memory_layer(i):
            yield ours + "ffn.w_gate_up.weight", (mlp + "w1.weight", mlp + "w3.weight"), None
            yield ours + "ffn.w_down.weight", (mlp + "w2.weight",), None
            continue
        m = c.memory
        yield ours + "memory.keys", (mlp + "keys",), (m.num_heads, 2, m.num_keys, m.key_dim // 2)
        pairs = [("query", "query_proj.query_mlps.0", True), ("value_proj", "value_proj", m.value_proj),
                 ("swilu", "swilu_projection", m.swilu), ("gate", "gating", m.gated)]  # fmt: skip
        for name, theirs, present in pairs:
            for part in ("weight", "bias") if present else ():
                yield f"{ours}memory.{name}.{part}", (f"{mlp}{theirs}.{part}",), None


def _table_names(c: ModelConfig) -> Iterator[tuple[str, str]]:
    """Our table name, their tensor name; for a shared table that of the lowest memory block, which owns it."""
    seen = set()
    for layer in c.memory.layers if c.memory else ():
        for ours in c.memory.table_names(layer) if c.memory else ():
            if ours not in seen:
                seen.add(ours)
                yield ours, f"layers.{layer}.feed_forward.{ours.rpartition('.')[2]}.weight"


def _read_params(path: Path) -> dict[str, Any]:
    try:
        params = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"is not JSON: {error}") from error
    if not isinstance(params, dict):
        raise CheckpointError(path, "is not a JSON object")
    return params


def _section(path: Path, params: Mapping[str, Any], *keys: str) -> Mapping[str, Any]:
    """A nested object of params.json; empty where it is left out. Other keys are training options and are ignored."""
    value: Any = params
    for key in keys:
        value = value.get(key) or {}
        if not isinstance(value, dict):
            raise CheckpointError(path, f"{'.'.join(keys)} is not an object")
    return value  # type: ignore[no-any-return]


def _config(path: Path, params: Mapping[str, Any]) -> ModelConfig:
    """The model in params.json, with the defaults of the code that wrote it."""
    model = _section(path, params, "model")
    model_dtype = _section(path, params, "distributed").get("model_dtype", "bf16")
    try:
        if model.get("weight_tying"):
            raise CheckpointError(path, "weight_tying is set, which the writing code cannot train")
        dim, heads = int(model.get("dim", 512)), model.get("n_heads")
        if heads is None:
            raise CheckpointError(path, "model.n_heads is missing")
        return ModelConfig(
            vocab_size=int(model.get("vocab_size", -1)),
            hidden_size=dim,
            num_layers=int(model.get("n_layers", 8)),
            num_heads=int(heads),
            num_kv_heads=int(model.get("n_kv_heads") or heads),
            head_dim=int(model.get("head_dim") or dim // int(heads)),
            intermediate_size=_ffn_hidden(
                dim, model.get("ffn_dim_multiplier"), int(model.get("multiple_of", 256))
            ),
            max_position_embeddings=int(model.get("max_seqlen", 1024)),
            rope_theta=float(model.get("rope_theta", 10000.0)),
            rope_interleaved=True,
            norm_eps=float(model.get("norm_eps", 1e-5)),
            dtype=_DTYPES.get(model_dtype, "float32"),
            memory=_memory(path, model, dim),
        )
    except (ConfigError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(path, f"describes no model: {error}") from error


def _memory(path: Path, model: Mapping[str, Any], dim: int) -> MemoryConfig | None:
    args = _section(path, {"model": model}, "model", "productkey_args")
    blocks = {int(block) for block in str(args.get("layers", "")).split(",") if block.strip()}
    layers = tuple(
        sorted(b for b in blocks if b < int(model.get("n_layers", 8)))
    )  # later ones do not exist: no effect
    if not args.get("is_enabled", False) or not layers:
        return None
    peer, swilu = bool(args.get("peer_variant", False)), bool(args.get("swilu_projection", True))
    value_dim = int(args.get("mem_v_dim", -1))
    if value_dim == 0 or (peer and value_dim > 0):
        raise CheckpointError(
            path, f"mem_v_dim {value_dim} is not possible {'with peer_variant' if peer else ''}"
        )
    return MemoryConfig(
        layers=layers,
        num_keys=int(args.get("mem_n_keys", 1024)),
        num_heads=int(args.get("mem_heads", 4)),
        knn=int(args.get("mem_knn", 32)),
        key_dim=int(args.get("mem_k_dim", 512)),
        value_dim=value_dim if value_dim > 0 else dim,
        kind="peer" if peer else "product_key",
        swilu=swilu and not peer,
        value_proj=(swilu or value_dim > 0) and not peer,
        gated=bool(args.get("mem_gated", False)),
        shared=bool(args.get("mem_share_values", True)),
    )


def _ffn_hidden(dim: int, multiplier: float | None, multiple_of: int) -> int:
    hidden = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return -(-hidden // multiple_of) * multiple_of
