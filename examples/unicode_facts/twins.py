"""The two models compared: a memory-layer model and its dense twin with slightly more FLOPs a token."""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from memlane.models.attention import Attention
from memlane.models.config import MemoryConfig, ModelConfig
from memlane.models.layers import FeedForward, Rope
from memlane.models.memory import MemoryLayer
from memlane.models.transformer import SelfAttention, Transformer
from ops import Bfloat16Linear, ProductKeyRead, Rotate, SwiGLU, TrainingTable
from tokenizer import BOS_ID, EOS_ID

TABLE = "values"


class AtHand(NamedTuple):
    """A layer's output for which there is nothing to wait."""

    out: Tensor

    def finish(self) -> Tensor:
        return self.out

    def close(self) -> None:
        pass


class TrainingMemoryLayer(MemoryLayer):
    """The served layer with its look-up and weighted sum as one autograd function over a `TrainingTable`."""

    def begin(self, x: Tensor, asked: object = None, live: Tensor | None = None) -> AtHand:
        query = self.query(x).view(x.shape[0], self.config.num_heads, 2, -1)
        bag = ProductKeyRead.apply(query, self.keys, self._tables[0], self.config.knn)
        return AtHand(self.project(bag, self.prepare(x), x.dtype))


class TrainingLinear(nn.Linear):
    """A linear layer with bf16 products: about twice as fast on CPUs with AVX512_BF16 or AMX."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=like.bias is not None)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = Bfloat16Linear.apply(x, self.weight)
        return out if self.bias is None else out + self.bias


class TrainingFeedForward(FeedForward):
    """The served SwiGLU with its elementwise part in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w_down(SwiGLU.apply(self.w_gate_up(x)))
        return out


class TrainingSelfAttention(SelfAttention):
    """The served attention with its rotation in one pass."""

    def forward(self, x: Tensor, layer: int, rope: Rope, attention: Attention) -> Tensor:
        q, k, v = self.wqkv(x).view(x.shape[0], 3, self.heads, self.head_dim).unbind(1)
        q, k = (Rotate.apply(part, *rope) for part in (q, k))
        out: Tensor = self.wo(attention(layer, q, k, v).flatten(1))
        return out


def model_config(
    vocabulary: int, *, dense: bool, width: int = 128, layers: int = 3, attention_heads: int = 4,
    hidden: int = 512, memory_layers: tuple[int, ...] = (1, 2), num_keys: int = 256,
    heads: int = 2, knn: int = 16, key_dim: int = 64,
) -> ModelConfig:  # fmt: skip
    """Memory+: one shared table of num_keys ** 2 rows, swilu and a value projection, in place of two of three FFNs.

    The dense twin has three FFNs of the smallest width (a multiple of 8) that costs at least the same FLOPs a token.
    """
    memory = MemoryConfig(
        layers=memory_layers, num_keys=num_keys, num_heads=heads, knn=knn, key_dim=key_dim, value_dim=width
    )
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_layers=layers,
        num_heads=attention_heads,
        intermediate_size=hidden,
        max_position_embeddings=128,
        rope_theta=1000.0,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_ids=(EOS_ID,),
        memory=memory,
    )
    if not dense:
        return config
    candidates = (
        dataclasses.replace(config, memory=None, intermediate_size=8 * i) for i in itertools.count(1)
    )
    return next(twin for twin in candidates if flops_per_token(twin) >= flops_per_token(config))


def build(
    config: ModelConfig, seed: int, *, bfloat16: bool = False
) -> tuple[Transformer, TrainingTable | None]:
    """A freshly initialised model and, unless dense, its table."""
    torch.manual_seed(seed)
    table = None
    if config.memory is not None:
        table = TrainingTable(TABLE, config.memory.rows, config.memory.value_dim, torch.default_generator)
    model = Transformer(config, {TABLE: table} if table is not None else {})
    for block in model.layers:
        block.attn = TrainingSelfAttention(config)
        if block.ffn is not None:
            block.ffn = TrainingFeedForward(config.hidden_size, config.intermediate_size)
        if block.memory is not None:
            block.memory = TrainingMemoryLayer(config.hidden_size, config.memory, [table])
    for name, module in (
        [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)] if bfloat16 else []
    ):
        if not name.endswith("memory.query"):  # addresses stay exact
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, TrainingLinear(module))
    model.init_weights()
    return model, table


def flops_per_token(config: ModelConfig, context: int = 16) -> int:
    """Forward FLOPs of one token with logits, 2 per multiply-add; attention over `context` tokens."""
    d, m = config.hidden_size, config.memory
    attention = 4 * d * d + 2 * context * d
    macs = config.num_layers * attention + config.vocab_size * d
    for layer in range(config.num_layers):
        if m is not None and config.is_memory_layer(layer):
            scores = m.num_heads * m.key_dim * m.num_keys
            macs += (
                d * m.num_heads * m.key_dim + scores + m.rows_per_token * m.value_dim + 2 * d * m.value_dim
            )
        else:
            macs += 3 * d * config.intermediate_size
    return 2 * macs
