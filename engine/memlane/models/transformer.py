"""A pre-norm decoder-only Transformer whose feed-forward parts may be memory layers. Knows nothing of requests or caches."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import closing

import torch
from torch import Tensor, nn

from memlane.models import fusible
from memlane.models.attention import Attention
from memlane.models.config import ModelConfig
from memlane.models.fused import Fused
from memlane.models.layers import FeedForward, Linear, RMSNorm, Rope, linear, resolve, rope_at, rotate
from memlane.models.memory import Asked, MemoryLayer, Prepared
from memlane.models.pieces import Pieces, finish
from memlane.tables import Table

__all__ = ["Block", "SelfAttention", "Transformer"]

logger = logging.getLogger(__name__)


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

    def run(
        self,
        x: Tensor,
        rope: Rope | Tensor,
        attention: Attention,
        fused: Fused | None = None,
        live: Tensor | None = None,
    ) -> Pieces:
        """x [T, D] -> [T, D]. Stops once if it has a memory layer: its rows are asked for, and not yet needed.

        fused: computes the dense parts, in place of the modules, which are its twin; then `rope` is what it began with.
        live: as `Table.begin` has it.
        """
        if fused is not None:
            assert isinstance(rope, Tensor)
            return (yield from self._run_fused(fused, x, rope, attention, live))
        assert isinstance(rope, Rope)
        x = x + self.attn(self.attn_norm(x), self.layer, rope, attention)
        normed = self.ffn_norm(x)
        if self.ffn is not None:
            out: Tensor = x + self.ffn(normed)
            return out
        assert self.memory is not None
        with closing(self.memory.begin(normed, live=live)) as pending:
            yield pending
            return x + pending.finish()

    def _run_fused(
        self, by: Fused, x: Tensor, rope: Tensor, attention: Attention, live: Tensor | None
    ) -> Pieces:
        lines = attention.lines(self.layer)
        heads = by.project(x, rope, self.attn_norm.weight, self.attn.wqkv.weight, lines)
        # Of one layout, whatever computes it: for another one everything would be compiled again, within a step.
        attended = attention(self.layer, *heads, written=lines is not None).contiguous()
        wo, gain = self.attn.wo.weight, self.ffn_norm.weight
        if self.ffn is not None:
            return by.feed_forward(x, attended, wo, gain, self.ffn.w_gate_up.weight, self.ffn.w_down.weight)
        assert self.memory is not None
        weights = self.memory.weights()
        asked = by.ask(x, attended, wo, gain, weights)
        prepared = Prepared(asked.silu, asked.gate)
        with closing(self.memory.begin(asked.normed, Asked(asked.query, prepared), live)) as pending:
            yield pending
            return by.answer(asked, pending.sum(), weights.value_proj)


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
        self.fused: Fused | None = None  # see `fuse`
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        if not self.embed.weight.is_meta:
            self.init_weights()

    def forward(self, token_ids: Tensor, positions: Tensor, attention: Attention) -> Tensor:
        """token_ids, positions int64 [T] -> hidden states after the final norm [T, D], in the model's dtype."""
        return finish(self.run(token_ids, positions, attention))

    def run(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: Attention,
        previous: Tensor | None = None,
        live: Tensor | None = None,
    ) -> Pieces:
        """`forward` in pieces: stops at every memory layer, right after its rows were asked for.

        previous: what token ids below 0 stand for; see `layers.resolve`. live: as `Table.begin` has it.

        Whoever drives it may do something else there while rows are read. Closed at a stop, it gives those rows up.
        Raises RowReadError, with tokens counted within these T, where it goes on and rows could not be read.
        """
        fused = self.fused
        rope: Rope | Tensor
        if fused is None:
            rope = rope_at(positions, self.config.head_dim, self.config.rope_theta)
            x = self.embed(token_ids if previous is None else resolve(token_ids, previous))
        else:
            x, rope = fused.begin(token_ids, positions, previous, self.embed.weight)
        for block in self.layers:
            assert isinstance(block, Block)
            x = yield from block.run(x, rope, attention, fused, live)
        out: Tensor = self.norm(x) if fused is None else fused.norm(x, self.norm.weight)
        return out

    @torch.inference_mode()
    def fuse(self, backend: str = "inductor") -> None:
        """Have dense parts run fused from now on, where that works; else a warning says why not, and they stay plain.

        Takes a minute or so the first time on a machine; what was compiled is remembered on its disk.
        """
        started = time.perf_counter()
        fused = Fused(self.config, backend)
        try:
            for tokens in (1, 2):
                self._try(fused, tokens)
        except (RuntimeError, OSError) as error:
            logger.warning("dense layers run unfused, they could not be compiled: %s", error)
            return
        self.fused = fused
        logger.info("dense layers compiled in %.1f s", time.perf_counter() - started)

    def _try(self, fused: Fused, tokens: int) -> None:
        """Everything that is to be compiled, once."""
        c, weight = self.config, self.embed.weight
        positions = torch.arange(tokens, device=weight.device)
        x, rope = fused.begin(positions, positions.clone(), None, weight)
        for block in {type(block.ffn): block for block in self.layers}.values():
            assert isinstance(block, Block)
            heads = fused.project(x, rope, block.attn_norm.weight, block.attn.wqkv.weight)
            wo, gain = block.attn.wo.weight, block.ffn_norm.weight
            attended = torch.empty_like(heads.q, memory_format=torch.contiguous_format).zero_()
            if block.ffn is not None:
                fused.feed_forward(x, attended, wo, gain, block.ffn.w_gate_up.weight, block.ffn.w_down.weight)
            if block.memory is not None:
                assert c.memory is not None
                w = block.memory.weights()
                asked = fused.ask(x, attended, wo, gain, w)
                fused.answer(asked, torch.zeros(tokens, c.memory.value_dim, device=x.device), w.value_proj)
        hidden = fused.norm(x, self.norm.weight)
        logits = torch.empty(tokens, c.vocab_size, device=x.device)
        fused.logits(hidden, logits, self.head)
        fused.greedy(logits, torch.empty_like(positions), torch.empty_like(positions))

    @property
    def head(self) -> Tensor:
        """The weight that makes logits of hidden states: [vocab, D]."""
        return self.embed.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """hidden [n, D] as `forward` returns it -> fp32 [n, vocab]; in `out`, if that is given."""
        if self.fused is not None and out is not None:
            self.fused.logits(hidden, out, self.head)
            return out
        found = linear(hidden, self.head)
        return found.float() if out is None else out.copy_(found)

    def greedy(self, logits: Tensor, tokens: Tensor, choices: Tensor) -> None:
        """Choose the tokens with the best logits: see `fusible.greedy`."""
        (fusible if self.fused is None else self.fused).greedy(logits, tokens, choices)

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
