"""Checkpoints of sparse-memory-lm: rest.pt (dense weights), a flat table file in 4 bits or bf16, hot_rows.npy, meta.json.

values_q4.bin    rows x dim/2 bytes   low nibble: column k, high nibble: column k + dim/2, minus 8, times the scale
scales_q4.bin    rows x fp16          signed
values_bf16.bin  rows x dim bf16      instead of, or beside, the two above
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memlane.checkpoints.directory import sha256
from memlane.checkpoints.source import Checkpoint, DenseTensor, FloatRows, TableSource, check_shapes
from memlane.checkpoints.tensors import StoredTensor
from memlane.checkpoints.torch_file import read_torch_file
from memlane.errors import CheckpointError, ConfigError
from memlane.models.config import MemoryConfig, ModelConfig

__all__ = ["REST", "open_smlm"]

REST = "rest.pt"
META = "meta.json"
HOT_ROWS = "hot_rows.npy"
VALUES_Q4, SCALES_Q4, VALUES_BF16 = "values_q4.bin", "scales_q4.bin", "values_bf16.bin"

GPT2_END_OF_TEXT = 50256
_BATCH_NORM_EPS = 1e-5  # PyTorch's default, whatever the model's norm_eps

logger = logging.getLogger(__name__)


def open_smlm(directory: Path, *, verify: bool = True) -> Checkpoint:
    """The checkpoint in a released folder. The 4-bit table is taken if both forms are there.

    verify: check files that meta.json lists a sha256 for, if they exist (it also lists files that are not released).
    It reads all of them: without, headers only are read.
    """
    path = directory / REST
    content = read_torch_file(path)
    try:
        model, state = dict(content["model_config"]), dict(content["state_dict"])
        table_keys, (rows, width) = set(content["table_keys"]), content["table_shape"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(path, f"is not the rest.pt of a sparse-memory-lm release: {error!r}") from error
    if verify:
        _verify_sums(directory)
    table, row_format = _open_table(directory, int(rows), int(width))
    config = _config(path, model, row_format)
    dense = list(
        _dense(path, state, config, batch_norm=model.get("mem_query_norm", "batchnorm") == "batchnorm")
    )
    memory = config.memory
    assert memory is not None
    if table_keys != {f"layers.{i}.ffn.values.weight" for i in memory.layers}:
        raise CheckpointError(
            path, f"table_keys {sorted(table_keys)} do not match mem_layers {list(memory.layers)}"
        )
    check_shapes(path, config, dense, [table])
    hot = {"values": directory / HOT_ROWS} if (directory / HOT_ROWS).exists() else {}
    return Checkpoint(directory, "smlm", config, tuple(dense), (table,), hot)


@dataclass(frozen=True)
class Int4Rows:
    """The 4-bit table, each row joined with its scale as our int4 rows have it: codes, then the fp16 scale."""

    name: str
    codes: StoredTensor
    scales: StoredTensor
    row_format: str = "int4"

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def width(self) -> int:
        return 2 * self.codes.shape[1]

    def chunks(self, rows: int) -> Iterator[Tensor]:
        for codes, scales in zip(self.codes.chunks(rows), self.scales.chunks(rows), strict=True):
            yield torch.cat([codes, scales.view(torch.uint8)], dim=1)


def _open_table(directory: Path, rows: int, width: int) -> tuple[TableSource, str]:
    if (directory / VALUES_Q4).exists():
        if width % 2:
            raise CheckpointError(directory / VALUES_Q4, f"4-bit rows need an even width, got {width}")
        codes = _flat(directory / VALUES_Q4, torch.uint8, rows, width // 2)
        return Int4Rows("values", codes, _flat(directory / SCALES_Q4, torch.float16, rows, 1)), "int4"
    if (directory / VALUES_BF16).exists():
        return FloatRows(
            "values", _flat(directory / VALUES_BF16, torch.bfloat16, rows, width), "bfloat16"
        ), "bfloat16"
    raise CheckpointError(directory, f"holds neither {VALUES_Q4} nor {VALUES_BF16}")


def _flat(path: Path, dtype: torch.dtype, rows: int, width: int) -> StoredTensor:
    wanted = rows * width * dtype.itemsize
    try:
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    if size != wanted:
        defect = "truncated" if size < wanted else "too long"
        raise CheckpointError(path, f"{defect}: {size} bytes, {rows} rows of {width} {dtype} take {wanted}")
    return StoredTensor.contiguous(path, 0, dtype, (rows, width))


def _verify_sums(directory: Path) -> None:
    path = directory / META
    if not path.exists():
        logger.warning("%s is missing: the files beside it are read unverified", path)
        return
    try:
        sums = json.loads(path.read_bytes()).get("sha256") or {}
        wanted = {str(name): str(digest) for name, digest in sums.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(path, f"is not the meta.json of a release: {error}") from error
    for name, digest in wanted.items():
        file = directory / Path(name).name
        if file.exists() and sha256(file) != digest:
            raise CheckpointError(file, f"corrupt: its sha256 is not the one in {META}")


def _config(path: Path, model: Mapping[str, Any], row_format: str) -> ModelConfig:
    if model.get("eng_layers"):
        raise CheckpointError(
            path, f"has n-gram memory in layers {model['eng_layers']}, which is not supported"
        )
    try:
        hidden, vocab = int(model.get("d_model", 384)), int(model.get("vocab_size", 50304))
        layers = tuple(sorted(int(i) for i in model.get("mem_layers", ())))
        if not layers:
            raise CheckpointError(path, "mem_layers is empty: no memory model")
        if not model.get("mem_share_values", False) and len(layers) > 1:
            raise CheckpointError(path, "mem_share_values is off: a released folder holds one table only")
        if model.get("mem_query_norm", "batchnorm") not in ("batchnorm", "none"):
            raise CheckpointError(path, f"mem_query_norm {model['mem_query_norm']!r} is not supported")
        value_dim, swilu = int(model.get("mem_v_dim", -1)), bool(model.get("mem_swilu", True))
        memory = MemoryConfig(
            layers=layers,
            num_keys=int(model.get("mem_n_keys", 512)),
            num_heads=int(model.get("mem_heads", 4)),
            knn=int(model.get("mem_knn", 32)),
            key_dim=int(model.get("mem_k_dim", 256)),
            value_dim=value_dim if value_dim > 0 else hidden,
            swilu=swilu,
            value_proj=swilu,
            score_scale=model.get("mem_score_scale", "none") == "learned",
            row_format=row_format,
        )
        return ModelConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            num_layers=int(model.get("n_layers", 12)),
            num_heads=int(model.get("n_heads", 6)),
            intermediate_size=int(model.get("ffn_hidden", 1024)),
            max_position_embeddings=int(model.get("max_seq_len", 1024)),
            rope_theta=float(model.get("rope_theta", 10000.0)),
            norm_eps=float(model.get("norm_eps", 1e-5)),
            tie_word_embeddings=True,
            eos_token_ids=(GPT2_END_OF_TEXT,) if vocab > GPT2_END_OF_TEXT else (),
            memory=memory,
        )
    except (ConfigError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(path, f"describes no model: {error}") from error


def _dense(
    path: Path, state: Mapping[str, Any], c: ModelConfig, *, batch_norm: bool
) -> Iterator[DenseTensor]:
    left = set(state)

    def take(*names: str) -> tuple[StoredTensor, ...]:
        for name in names:
            if not isinstance(state.get(name), StoredTensor):
                raise CheckpointError(path, f"tensor {name} is missing")
        left.difference_update(names)
        return tuple(state[name] for name in names)

    def same(ours: str, theirs: str) -> DenseTensor:
        (tensor,) = take(theirs)
        return DenseTensor(ours, tensor.shape, (tensor,))

    take("lm_head.weight")  # a second copy of the embedding
    yield same("embed.weight", "tok_emb.weight")
    yield same("norm.weight", "norm.weight")
    for i in range(c.num_layers):
        layer = f"layers.{i}."
        for name in ("attn_norm.weight", "ffn_norm.weight", "attn.wqkv.weight", "attn.wo.weight"):
            yield same(layer + name, layer + name)
        if not c.is_memory_layer(i):
            yield same(layer + "ffn.w_gate_up.weight", layer + "ffn.w13.weight")
            yield same(layer + "ffn.w_down.weight", layer + "ffn.w2.weight")
            continue
        assert c.memory is not None
        yield same(layer + "memory.keys", layer + "ffn.keys")
        if c.memory.score_scale:
            yield same(layer + "memory.log_score_scale", layer + "ffn.log_score_scale")
        for ours, theirs in (("swilu", "swilu_proj"), ("value_proj", "value_proj")) if c.memory.swilu else ():
            for part in ("weight", "bias"):
                yield same(f"{layer}memory.{ours}.{part}", f"{layer}ffn.{theirs}.{part}")
        for part in ("weight", "bias"):
            names = [f"{layer}ffn.query_proj.{part}"]
            make: Callable[[Sequence[Tensor]], Tensor] | None = None
            if batch_norm:
                stats = ("weight", "bias", "running_mean", "running_var")
                names += [f"{layer}ffn.query_norm.{stat}" for stat in stats]
                make = _fold_weight if part == "weight" else _fold_bias
                left.discard(f"{layer}ffn.query_norm.num_batches_tracked")
            parts = take(*names)
            yield DenseTensor(f"{layer}memory.query.{part}", parts[0].shape, parts, make)
    if left:
        raise CheckpointError(path, f"unexpected tensor {sorted(left)[0]} ({len(left)} in all)")


def _fold_weight(parts: Sequence[Tensor]) -> Tensor:
    """The query projection times the BatchNorm's gain / sqrt(variance + eps), in fp64, rounded once."""
    weight, gain, _, _, variance = (part.double() for part in parts)
    return (weight * (gain / (variance + _BATCH_NORM_EPS).sqrt())[:, None]).float()


def _fold_bias(parts: Sequence[Tensor]) -> Tensor:
    bias, gain, shift, mean, variance = (part.double() for part in parts)
    return ((bias - mean) * gain / (variance + _BATCH_NORM_EPS).sqrt() + shift).float()
