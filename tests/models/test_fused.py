"""Compiled dense layers against the modules.

Tracing, sharing and equality by a backend of torch.compile that runs plain torch; once, what inductor makes of it for a CPU.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.async_compile import AsyncCompile

from memlane.models import CausalAttention, MemoryConfig, ModelConfig, Transformer
from memlane.models.fused import Fused
from memlane.models.layers import rope_at
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


def weights_after_attention(block: Any) -> tuple[Tensor, ...]:
    modules = (block.attn.wo, block.ffn_norm, block.ffn.w_gate_up, block.ffn.w_down)
    return tuple(module.weight for module in modules)


def test_inductor_makes_few_kernels_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside products, which are calls of a library. Plain torch takes more than thirty on a GPU."""
    model = build(dataclasses.replace(CONFIG, memory=None), torch.bfloat16)
    block, fused = model.layers[0], Fused(model.config)
    x, attended = torch.randn(6, 32).bfloat16(), torch.randn(6, 4, 8).bfloat16()
    rope = rope_at(torch.arange(6), 8, 10000.0)
    kernels: dict[str, int] = {}

    def count(name: str, run: Callable[[], object]) -> None:
        before = len(called)
        run()
        kernels[name] = len(called) - before

    # Written, but not compiled: that takes seconds, and none of them needs to be run.
    called: list[None] = []
    monkeypatch.setattr(AsyncCompile, "cpp_pybinding", lambda *_: lambda *_: called.append(None))
    with torch.inference_mode(), torch._inductor.config.patch(force_disable_caches=True):
        count("rope", lambda: fused.rope(torch.arange(6)))
        count("project", lambda: fused.project(x, rope, block.attn_norm.weight, block.attn.wqkv.weight))
        count("feed_forward", lambda: fused.feed_forward(x, attended, *weights_after_attention(block)))
        count("norm", lambda: fused.norm(x, model.norm.weight))
    assert kernels == {"rope": 1, "project": 2, "feed_forward": 2, "norm": 1}


def test_what_inductor_makes_computes_the_same() -> None:
    model = build(dataclasses.replace(CONFIG, memory=None), torch.bfloat16)
    block, fused = model.layers[0], Fused(model.config)
    x, attended = torch.randn(6, 32).bfloat16(), torch.randn(6, 4, 8).bfloat16()
    rope = rope_at(torch.arange(6), 8, 10000.0)
    uncached = {"cpp_cache_precompile_headers": False, "force_disable_caches": True}
    with torch.inference_mode(), torch._inductor.config.patch(uncached):
        out = fused.feed_forward(x, attended, *weights_after_attention(block))
        wanted, _ = block.plain(x, rope, lambda layer, q, k, v: attended)
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
