"""A pre-norm decoder-only Transformer whose feed-forward parts may be memory layers. Knows nothing of requests or caches."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

import torch
from torch import Tensor, nn

from memlane.models.attention import Attention
from memlane.models.config import ModelConfig
from memlane.models.layers import FeedForward, Linear, RMSNorm, Rope, linear, rope_at, rotate
from memlane.models.memory import MemoryLayer
from memlane.models.pieces import Pieces, finish
from memlane.tables import Table

__all__ = ["Block", "SelfAttention", "Transformer"]


class SelfAttention(nn.Module):
    """Projections and rotary embedding around whatever attention the step brings. `wqkv` rows: q | k | v, head by head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        self.interleaved = config.rope_interleaved
        self.wqkv = Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.wo = Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, layer: int, rope: Rope, attention: Attention) -> Tensor:
        qkv = self.wqkv(x).view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = qkv.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        q, k = (rotate(part, rope, interleaved=self.interleaved) for part in (q, k))
        out: Tensor = self.wo(attention(layer, q, k, v).flatten(1))
        return out


class Block(nn.Module):
    """h = x + attn(attn_norm(x)); out = h + mlp(ffn_norm(h)), where mlp is `ffn` or `memory`, one of the two."""

    def __init__(self, config: ModelConfig, layer: int, tables: Mapping[str, Table]) -> None:
        super().__init__()
        self.layer = layer
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = SelfAttention(config)
        self.ffn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.ffn: FeedForward | None = None
        self.memory: MemoryLayer | None = None
        if config.memory is not None and config.is_memory_layer(layer):
            own = [tables[name] for name in config.memory.table_names(layer)]
            self.memory = MemoryLayer(config.hidden_size, config.memory, own)
        else:
            self.ffn = FeedForward(config.hidden_size, config.intermediate_size)

    def run(self, x: Tensor, rope: Rope, attention: Attention) -> Pieces:
        """x [T, D] -> [T, D]. Stops once if it has a memory layer: its rows are asked for, and not yet needed."""
        x = x + self.attn(self.attn_norm(x), self.layer, rope, attention)
        normed = self.ffn_norm(x)
        if self.memory is None:
            assert self.ffn is not None
            out: Tensor = x + self.ffn(normed)
            return out
        with closing(self.memory.begin(normed)) as pending:
            yield pending
            return x + pending.finish()


class Transformer(nn.Module):
    """The dense part of a model over tables given by name (`ModelConfig.table_names()`), which it does not own.

    Tokens of all sequences of a step are packed into one dimension T; positions say where in its sequence each lies,
    and the step's `attention` says which of them see each other. Every other layer treats tokens independently.
    """

    def __init__(self, config: ModelConfig, tables: Mapping[str, Table] | None = None) -> None:
        """Weights are random as for training; on the meta device they are left unset. KeyError if a table is missing."""
        super().__init__()
        self.config = config
        # Given a weight: drawing one on the meta device would import torch._dynamo, 1.5 s of every start.
        vectors = torch.empty(config.vocab_size, config.hidden_size)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size, _weight=vectors)
        self.layers = nn.ModuleList(Block(config, i, tables or {}) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        if not self.embed.weight.is_meta:
            self.init_weights()

    def forward(self, token_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """token_ids, positions int64 [T] -> hidden states after the final norm [T, D], in the model's dtype."""
        return finish(self.run(token_ids, positions, attention))

    def run(self, token_ids: Tensor, positions: Tensor, attention: Attention) -> Pieces:
        """`forward` in pieces: stops at every memory layer, right after its rows were asked for.

        Whoever drives it may do something else there while rows are read. Closed at a stop, it gives those rows up.
        Raises RowReadError, with tokens counted within these T, where it goes on and rows could not be read.
        """
        rope = rope_at(positions, self.config.head_dim, self.config.rope_theta)
        x = self.embed(token_ids)
        for block in self.layers:
            assert isinstance(block, Block)
            x = yield from block.run(x, rope, attention)
        out: Tensor = self.norm(x)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [n, D] as `forward` returns it -> fp32 [n, vocab]."""
        head = self.embed if self.lm_head is None else self.lm_head
        return linear(hidden, head.weight).float()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Random weights from torch's global generator: normal(0, fan_in ** -0.5), residual outputs scaled down by depth."""
        depth = (2 * self.config.num_layers) ** -0.5
        for name, param in self.named_parameters():
            if name.endswith("memory.keys"):
                bound = param.shape[-1] ** -0.5
                nn.init.uniform_(param, -bound, bound)
            elif name == "embed.weight":
                nn.init.normal_(param, std=0.02)
            elif param.dim() == 2:
                residual = name.endswith(("attn.wo.weight", "ffn.w_down.weight"))
                nn.init.normal_(param, std=param.shape[1] ** -0.5 * (depth if residual else 1.0))
            elif not name.endswith("norm.weight"):
                nn.init.zeros_(param)
