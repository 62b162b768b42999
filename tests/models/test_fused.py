"""Compiled dense layers against the modules.

Tracing, sharing and equality by a backend of torch.compile that runs plain torch; once, what inductor makes of it for a CPU.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from memlane.models import CausalAttention, MemoryConfig, ModelConfig, Transformer, fusible
from memlane.models.attention import Lines
from memlane.models.fused import Fused
from memlane.models.layers import rope_at, rotate
from memlane.tables import ReferenceTable

MEMORY = MemoryConfig(layers=(1,), num_keys=8, num_heads=2, knn=4, key_dim=8, value_dim=16)
CONFIG = ModelConfig(
    vocab_size=50, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=48,
    max_position_embeddings=64, eos_token_ids=(2,), tie_word_embeddings=True, memory=MEMORY,
)  # fmt: skip


def build(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(7)
    tables = {} if config.memory is None else {"values": ReferenceTable(MEMORY.rows, MEMORY.value_dim)}
    model = Transformer(config, tables)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            parameter.data = parameter.data.to(dtype)
    return model.requires_grad_(False).eval()


@pytest.fixture(autouse=True)
def nothing_compiled_yet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # To see which vector instructions a compiler knows it is run several times, and takes seconds.
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", lambda: [])
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def hidden(model: Transformer, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(0, 50, (tokens,), generator=generator)
    with torch.inference_mode():
        return model(ids, torch.arange(tokens), CausalAttention(1, tokens))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_layers_and_batch_sizes_share_what_was_compiled(interleaved: bool) -> None:
    config = dataclasses.replace(CONFIG, rope_interleaved=interleaved)
    plain, fused = build(config), build(config)
    fused.fuse(backend="aot_eager")
    assert fused.fused is not None
    hidden(fused, 1), hidden(fused, 2)
    before = counters["stats"]["unique_graphs"]
    for tokens in (1, 2, 3, 9, 33, 1):
        torch.testing.assert_close(hidden(fused, tokens), hidden(plain, tokens), rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_keys_and_values_are_written_where_they_belong(interleaved: bool, tokens: int) -> None:
    config = dataclasses.replace(CONFIG, memory=None, rope_interleaved=interleaved)
    block, fused = build(config).layers[0], Fused(config, "aot_eager")
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 32, generator=generator)
    lines = torch.randn(20, 4, 8, generator=generator)
    before, slots = lines.clone(), torch.randperm(19, generator=generator)[:tokens]
    weights = block.attn_norm.weight, block.attn.wqkv.weight
    rope = rope_at(3 * torch.arange(tokens) + 7, 8, config.rope_theta)
    with torch.inference_mode():
        q, k, v = fused.project(x, torch.cat(rope, dim=1), *weights, Lines(lines, slots))
        qkv = block.attn.wqkv(block.attn_norm(x)).view(tokens, 8, 8)
    wanted = [rotate(part, rope, interleaved=interleaved) for part in (qkv[:, :4], qkv[:, 4:6])]
    for got, part in zip((q, k, v), [*wanted, qkv[:, 6:]], strict=True):
        torch.testing.assert_close(got, part, rtol=1e-5, atol=1e-5)
    before[slots] = torch.cat((k, v), dim=1)
    assert torch.equal(lines[:-1], before[:-1])  # the last line is anyone's


@pytest.mark.parametrize(("tokens", "vocab"), [(1, 300), (4, 256), (3, 127), (2, 211)])
def test_greedy_choices(tokens: int, vocab: int) -> None:
    logits = torch.randint(0, 40, (tokens, vocab), generator=torch.Generator().manual_seed(vocab)).float()
    if tokens > 1:
        logits[1, vocab // 2] = float("nan") if vocab % 2 else float("-inf")
    found, choices = torch.full((2, tokens), -7, dtype=torch.int64).unbind(0)
    fusible.greedy(logits, found, choices)
    for row, token, choice in zip(logits, found.tolist(), choices.tolist(), strict=True):
        finite = bool(row.isfinite().all())
        first = int((row == row.max()).nonzero()[0, 0]) if finite else 0
        assert (token, choice) == (first, first if finite else -1)


def weights_after_attention(block: Any) -> tuple[Tensor, ...]:
    modules = (block.attn.wo, block.ffn_norm, block.ffn.w_gate_up, block.ffn.w_down)
    return tuple(module.weight for module in modules)


def test_what_inductor_makes_computes_the_same() -> None:
    model = build(dataclasses.replace(CONFIG, memory=None), torch.bfloat16)
    block, fused = model.layers[0], Fused(model.config)
    x, attended = torch.randn(6, 32).bfloat16(), torch.randn(6, 4, 8).bfloat16()
    uncached = {"cpp_cache_precompile_headers": False, "force_disable_caches": True}
    with torch.inference_mode(), torch._inductor.config.patch(uncached):
        out = fused.feed_forward(x, attended, *weights_after_attention(block))
        h = x + block.attn.wo(attended.flatten(1))
        wanted = h + block.ffn(block.ffn_norm(h))
    torch.testing.assert_close(out, wanted, rtol=0.02, atol=0.02)


def test_what_cannot_be_compiled_runs_plain(caplog: pytest.LogCaptureFixture) -> None:
    model = build(CONFIG)
    wanted = hidden(model, 5)
    without = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    with torch._inductor.config.patch(without), caplog.at_level(logging.WARNING):
        model.fuse()
    assert model.fused is None
    assert "dense layers run unfused" in caplog.text
    assert torch.equal(hidden(model, 5), wanted)
