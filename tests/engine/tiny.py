"""A tiny random model, engines around it, and the slow twin: everything recomputed for each token."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from memlane.config import EngineConfig
from memlane.engine import Engine
from memlane.ipc import Add
from memlane.models import CausalAttention, MemoryConfig, ModelConfig, Transformer
from memlane.models.loading import LoadedModel
from memlane.request import SamplingParams, TokenDelta
from memlane.tables import ReferenceTable, Table

VOCAB = 61
MEMORY = MemoryConfig(layers=(1,), num_keys=32, num_heads=2, knn=4, key_dim=8, value_dim=16)
CONFIG = ModelConfig(
    vocab_size=VOCAB,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=24,
    max_position_embeddings=128,
    eos_token_ids=(60,),
    memory=MEMORY,
)


@functools.cache
def weights() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Weights of the dense part, and the value table. Sharper than at initialisation, so that answers vary."""
    torch.manual_seed(3)
    table = ReferenceTable(MEMORY.rows, MEMORY.value_dim)
    state = Transformer(CONFIG, {"values": table}).state_dict()
    state["embed.weight"] *= 30
    return state, table.weight.detach()


def table() -> ReferenceTable:
    return ReferenceTable.from_tensor(weights()[1]).requires_grad_(False)


def transformer(tables: Mapping[str, Table] | None = None) -> Transformer:
    model = Transformer(CONFIG, tables or {"values": table()})
    model.load_state_dict(weights()[0])
    return model.requires_grad_(False).eval()


def engine(
    tables: Mapping[str, Table] | None = None, model: Transformer | None = None, **options: Any
) -> Engine:
    """An engine over the tiny model. kv_blocks: so many KV blocks, in place of kv_cache. split: every step in halves.

    lookahead: steps are planned before the tokens of those before them are known, as on a GPU.
    """
    split, lookahead = options.pop("split", False), options.pop("lookahead", False)
    options.setdefault("block_size", 4)
    blocks = options.pop("kv_blocks", None)
    if blocks is not None:
        head_dim = CONFIG.hidden_size // CONFIG.num_heads
        options["kv_cache"] = str(
            blocks * options["block_size"] * CONFIG.num_layers * 2 * CONFIG.num_kv_heads * head_dim * 4
        )
    loaded = LoadedModel(CONFIG, model or transformer(tables), cast(Any, {}), Path("tiny"))
    e = Engine(EngineConfig(model="tiny", **options), loaded)
    e.lookahead = lookahead
    if split:
        e.runner.splits = lambda plan: plan.tokens > 1  # type: ignore[method-assign]
    return e


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": 12} | options)


def request(name: str, prompt: Sequence[int], params: SamplingParams | None = None) -> Add:
    return Add(request_id=name, prompt_token_ids=list(prompt), params=params or greedy())


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return torch.randint(0, VOCAB - 1, (length,), generator=generator).tolist()


def run(engine: Engine, *, check: bool = True) -> dict[str, list[TokenDelta]]:
    """Step until nothing is left; the deltas of each sequence."""
    deltas: dict[str, list[TokenDelta]] = {}
    while engine.unfinished:
        for delta in engine.step():
            deltas.setdefault(delta.request_id, []).append(delta)
        if check:
            engine.check_integrity()
    return deltas


def tokens(deltas: Sequence[TokenDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


def answer(engine: Engine, prompt: Sequence[int], params: SamplingParams | None = None) -> list[int]:
    engine.add(request("only", prompt, params))
    return tokens(run(engine)["only"])


@torch.no_grad()
def logits_naive(model: Transformer, token_ids: Sequence[int]) -> torch.Tensor:
    ids = torch.tensor(token_ids)
    return model.logits(model(ids, torch.arange(len(ids)), CausalAttention(1, len(ids))))


@functools.cache
def _naive_model() -> Transformer:
    return transformer()


def greedy_naive(prompt: Sequence[int], count: int) -> list[int]:
    """The argmax continuation, everything recomputed for each token."""
    return _greedy_naive(tuple(prompt), count)


@functools.cache
def _greedy_naive(prompt: tuple[int, ...], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(logits_naive(_naive_model(), ids)[-1].argmax()))
    return ids[len(prompt) :]
