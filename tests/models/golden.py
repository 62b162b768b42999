"""The golden vectors: what the reference implementations computed for tiny checkpoints (see tests/data/*/README.md)."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from memlane.models import CausalAttention, Transformer

DATA = Path(__file__).parents[1] / "data"

LINGUA = sorted(path.parent.name for path in DATA.glob("lingua/*/expected.safetensors"))
SMLM = ["q4", "bf16"]
NAMES = [f"lingua-{name}" for name in LINGUA] + [f"smlm-{name}" for name in SMLM]


class Golden(NamedTuple):
    """One checkpoint and its expected tensors. prompts: greedy_tokens[i] continues prompts[i]."""

    checkpoint: Path
    expected: dict[str, Tensor]
    prompts: Tensor
    continuations: Tensor

    @classmethod
    def load(cls, name: str) -> Golden:
        family, _, variant = name.partition("-")
        folder = DATA / family / variant
        expected = load_file(folder / "expected.safetensors")
        if family == "smlm":
            return cls(folder / "model", expected, expected["input_ids"], expected["greedy_tokens"])
        return cls(folder, expected, expected["greedy_prompt"][None], expected["greedy_tokens"][None])

    def indices(self, layer: int) -> Tensor:
        """Rows chosen by memory layer `layer`, [tokens, heads, knn], best first."""
        for key in (f"mem.{layer}.indices", f"layers.{layer}.indices"):
            if key in self.expected:
                return self.expected[key].flatten(0, 1)
        raise KeyError(layer)


def full_logits(model: Transformer, ids: Tensor) -> Tensor:
    """ids [B, T] -> logits [B, T, vocab], without a cache."""
    batch, length = ids.shape
    positions = torch.arange(length).repeat(batch)
    hidden = model(ids.flatten(), positions, CausalAttention(batch, length))
    return model.logits(hidden).view(batch, length, -1)


def greedy(model: Transformer, prompts: Tensor, tokens: int) -> Tensor:
    """prompts [B, T] -> their argmax continuations [B, tokens], everything recomputed for each token."""
    ids = prompts
    for _ in range(tokens):
        ids = torch.cat([ids, full_logits(model, ids)[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids[:, prompts.shape[1] :]
