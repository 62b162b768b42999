"""The dense parts of a model as few kernels: torch.compile over `fusible`, compiled once and shared by all layers.

Launches of a step beside attention, as torch 2.13 generates code for compute capability 9.0 (benchmarks/launches.py counts
them; products of several tokens are those of a library):

                  a single token                                     several tokens
  begin           embedding, angles                             2    the same                                       2
  project         norm + product, rotation + KV                 2    norm, product, rotation + KV                   3
  feed_forward    product, add + norm + product + silu,              product, norm, product, silu, product
                  product + add                                 3                                                   5
  ask             product + add, norm + query,                       product, norm, query, swilu, silu
                  norm + swilu + silu                           3                                                   5
  answer          silu + product + add                          1    silu, product, add                             3
  norm, logits    norm, product                                 2    norm, product, cast                            3
  greedy          best of each part, best of all                2    the same                                       2

For a single token products are sums: inductor writes and tunes them itself, and joins what comes before and after them
(as gpt-fast does: its config.coordinate_descent_tuning has them tuned).

Knows nothing of modules: `Block` calls these instead of its own, which stay the twin.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memlane.models import fusible
from memlane.models.attention import Lines
from memlane.models.config import ModelConfig
from memlane.models.fusible import RotaryHeads
from memlane.models.memory import LayerWeights
from memlane.models.product_keys import ieee_products

__all__ = ["Begun", "Fused", "FusedHeads", "Question"]

logger = logging.getLogger(__name__)


class FusedHeads(NamedTuple):
    """What attention gets: q [T, H, hd], k and v [T, KV, hd], q and k rotated; views of one tensor."""

    q: Tensor
    k: Tensor
    v: Tensor


class Begun(NamedTuple):
    """The first layer's input x [T, D], and cosines and sines of the step's angles [T, 2, hd / 2]."""

    x: Tensor
    rope: Tensor


class Question(NamedTuple):
    """Of a block with a memory layer: x [T, D] after attention, its norm, and what the layer makes of that before it has rows.

    query fp32 [T, H * Q], silu [T, width] and gate [T, 1] where the layer has them. normed is what it says for PEER only.
    """

    x: Tensor
    normed: Tensor
    query: Tensor
    silu: Tensor | None
    gate: Tensor | None


class _Compiled:
    """A function whose tensors of tokens come first, compiled for a single token and for any greater number of them."""

    def __init__(
        self,
        one: Callable[..., Any],
        many: Callable[..., Any],
        tokenwise: int,
        backend: str,
        *,
        sized: int = 0,
        foreign: slice | None = None,
    ) -> None:
        """sized: as many arguments after those have a first dimension of any size, too. foreign: arguments that were not
        computed by this step; see `_plain`."""
        self._tokenwise, self._sized, self._foreign = tokenwise, sized, foreign
        tuned: dict[str, Any] | None = {"coordinate_descent_tuning": True} if backend == "inductor" else None
        self._one = torch.compile(one, fullgraph=True, dynamic=False, backend=backend, options=tuned)
        self._many = torch.compile(many, fullgraph=True, backend=backend)

    def __call__(self, *args: Any) -> Any:
        if self._foreign is not None:
            given = list(args)
            given[self._foreign] = map(_plain, given[self._foreign])
            return self.chosen(*given)(*given)
        return self.chosen(*args)(*args)

    def chosen(self, *args: Any) -> Callable[..., Any]:
        """What is compiled for these arguments."""
        single = args[0].shape[0] == 1
        for x in args[self._tokenwise if single else 0 : self._tokenwise + self._sized]:
            if isinstance(x, Tensor) and x.shape[0] > 1:
                torch._dynamo.mark_dynamic(x, 0)
        chosen: Callable[..., Any] = self._one if single else self._many
        return chosen


def _plain(x: Tensor) -> Tensor:
    """The same memory as a tensor that begins where its storage does, and was made outside of inference mode.

    torch.compile compiles again for a tensor that differs in either, and places in a batch do.
    """
    with torch.inference_mode(False):
        out: Tensor = torch.from_dlpack(x)  # type: ignore[attr-defined]
        return out


class Fused:
    """The compiled functions of one model. Results are those of the plain ones within rounding."""

    def __init__(self, config: ModelConfig, backend: str = "inductor") -> None:
        """backend: of torch.compile. Compiles nothing yet: each function when it is first called. See Transformer.fuse."""
        self._config = config
        self._heads = RotaryHeads(config.num_heads, config.num_kv_heads, config.rope_interleaved)
        self._begin = _Compiled(fusible.begin, fusible.begin, 2, backend, sized=1, foreign=slice(0, 3))
        self._project = _Compiled(
            fusible.project_one, fusible.project, 3, backend, sized=1, foreign=slice(2, 4)
        )
        self._feed_forward = _Compiled(fusible.feed_forward_one, fusible.feed_forward, 2, backend)
        self._ask = _Compiled(fusible.ask_one, fusible.ask, 2, backend)
        self._answer = _Compiled(fusible.answer_one, fusible.answer, 4, backend)
        self._norm = _Compiled(fusible.norm, fusible.norm, 1, backend)
        self._logits = _Compiled(fusible.logits_one, fusible.logits, 2, backend, foreign=slice(1, 2))
        self._greedy = _Compiled(fusible.greedy, fusible.greedy, 3, backend, foreign=slice(0, 3))

    def begin(
        self, token_ids: Tensor, positions: Tensor, previous: Tensor | None, embedding: Tensor
    ) -> Begun:
        """As `Transformer.run` begins: see there."""
        c = self._config
        if previous is None:
            previous = torch.zeros(2, dtype=torch.int64, device=token_ids.device)
        return Begun(*self._begin(token_ids, positions, previous, embedding, c.head_dim, c.rope_theta))

    def project(
        self, x: Tensor, rope: Tensor, gain: Tensor, wqkv: Tensor, lines: Lines | None = None
    ) -> FusedHeads:
        """x [T, D] before the norm -> q, k, v; k and v are written, too, where there are lines for them."""
        c = self._config
        to = lines or self._nowhere(x)
        qkv = self._project(x, rope, to.slots, to.lines, gain, wqkv, self._heads, c.norm_eps)
        return FusedHeads(*torch.split(qkv, [c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1))

    def _nowhere(self, x: Tensor) -> Lines:
        c = self._config
        lines = x.new_empty(2, 2 * c.num_kv_heads, c.head_dim)
        return Lines(lines, torch.zeros(len(x), dtype=torch.int64, device=x.device))

    def feed_forward(
        self, x: Tensor, attended: Tensor, wo: Tensor, gain: Tensor, w_gate_up: Tensor, w_down: Tensor
    ) -> Tensor:
        """x [T, D], attended [T, H, hd] -> the block's output [T, D]."""
        out: Tensor = self._feed_forward(
            x, attended.flatten(1), wo, gain, w_gate_up, w_down, self._config.norm_eps
        )[0]
        return out

    def ask(self, x: Tensor, attended: Tensor, wo: Tensor, gain: Tensor, weights: LayerWeights) -> Question:
        """x [T, D], attended [T, H, hd] -> all that a block with a memory layer computes before it knows rows."""
        memory = self._config.memory
        assert memory is not None
        with ieee_products(x.device):
            return Question(
                *self._ask(
                    x, attended.flatten(1), wo, gain, weights, memory.kind == "peer", self._config.norm_eps
                )
            )

    def answer(self, question: Question, bag: Tensor, value_proj: tuple[Tensor, Tensor] | None) -> Tensor:
        """bag fp32 [T, width]: what comes of the rows -> the block's output [T, D]."""
        out: Tensor = self._answer(question.x, bag, question.silu, question.gate, value_proj)
        return out

    def norm(self, x: Tensor, gain: Tensor) -> Tensor:
        """As RMSNorm."""
        out: Tensor = self._norm(x, gain, self._config.norm_eps)
        return out

    def logits(self, hidden: Tensor, out: Tensor, weight: Tensor) -> None:
        """hidden [T, D] -> fp32 [T, vocab], in `out`."""
        self._logits(hidden, out, weight)

    def greedy(self, logits: Tensor, tokens: Tensor, choices: Tensor) -> None:
        """See `fusible.greedy`."""
        self._greedy(logits, tokens, choices)
