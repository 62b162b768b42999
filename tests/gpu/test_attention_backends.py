"""Attention on a GPU: whatever is installed agrees with SDPA, eagerly and from captured graphs."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from memlane.models import ModelConfig
from memlane.request import SamplingParams
from memlane.runner import AttentionBackend, DecodeBatches, KVCache, choose_backend, resolve
from memlane.runner.attention import SdpaBackend, choice, probe
from memlane.runner.batch import make_batch
from memlane.runner.decode_batch import DecodeBatch
from memlane.runner.paged import PagedAttention
from memlane.scheduler import Chunk, Sequence, StepPlan

LAYERS, ROWS, BLOCKS_EACH = 2, 4, 3


def model(heads: int, kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=32,
        hidden_size=heads * head_dim,
        num_layers=LAYERS,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=8,
        max_position_embeddings=4096,
    )


MODELS = [model(16, 16, 64), model(8, 2, 128), model(5, 1, 64)]


@pytest.fixture(params=MODELS, ids=lambda c: f"{c.num_heads}-{c.num_kv_heads}-{c.head_dim}")
def config(request: pytest.FixtureRequest) -> ModelConfig:
    found: ModelConfig = request.param
    return found


def backends(config: ModelConfig, device: torch.device) -> Iterator[AttentionBackend]:
    """SDPA, and every library that says it can. A library that says so must work."""
    yield SdpaBackend()
    for library in choice._LIBRARIES:
        if library.supports(config, torch.bfloat16, device) is None:
            found = probe.probe(library, config, torch.bfloat16, device, library.block_size or 16)
            assert not isinstance(found, str), f"{library.name}: {found}"
            yield found


def sequences(block_size: int, rng: random.Random) -> list[Sequence]:
    length = BLOCKS_EACH * block_size
    blocks = rng.sample(range(ROWS * BLOCKS_EACH), ROWS * BLOCKS_EACH)
    made = []
    for i in range(ROWS):
        sequence = Sequence(f"s{i}", [i + 1] * length, SamplingParams(), max_length=length)
        sequence.blocks = blocks[i::ROWS]
        made.append(sequence)
    return made


def decodes(some: list[Sequence], rng: random.Random) -> StepPlan:
    return StepPlan([Chunk(s, rng.randrange(len(s.token_ids)), 1, True) for s in some], len(some))


def qkv(config: ModelConfig, tokens: int, device: torch.device) -> list[Tensor]:
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    return [torch.randn(tokens, n, config.head_dim, device=device).to(torch.bfloat16) for n in heads]


def test_steps_of_any_plan(device: str, config: ModelConfig) -> None:
    seed = random.randrange(1 << 30)
    rng, where = random.Random(seed), torch.device(device)
    for backend in backends(config, where):
        block_size = backend.block_size or 16
        cache, copy = (
            KVCache(config, ROWS * BLOCKS_EACH, block_size, torch.bfloat16, where) for _ in range(2)
        )
        a, b, c, d = sequences(block_size, rng)
        length = BLOCKS_EACH * block_size
        fill = StepPlan([Chunk(s, 0, length - 1, False) for s in (a, b, c, d)], 0)
        mixed = [
            Chunk(a, length - 1, 1, True),
            Chunk(b, 5, 1, True),
            Chunk(c, 0, 9, True),
            Chunk(d, 3, length - 4, True),
        ]
        for plan in (fill, StepPlan(mixed, 2), decodes([a, b, c], rng)):
            batch = make_batch(plan, block_size, where)
            attention, twin = backend.attention(cache, batch), PagedAttention(copy, batch)
            for layer in range(LAYERS):
                numbers = qkv(config, plan.tokens, where)
                torch.testing.assert_close(
                    attention(layer, *numbers), twin(layer, *numbers), rtol=0.02, atol=0.02,
                    msg=lambda text, name=backend.name: f"{name}, seed {seed}: {text}",
                )  # fmt: skip


def test_captured_steps(device: str, config: ModelConfig) -> None:
    """One graph, replayed for steps of other lengths and of fewer sequences than rows."""
    if device == "cpu":
        pytest.skip("no CUDA device")
    seed = random.randrange(1 << 30)
    rng, where = random.Random(seed), torch.device(device)
    for backend in backends(config, where):
        block_size = backend.block_size or 16
        cache, copy = (
            KVCache(config, ROWS * BLOCKS_EACH, block_size, torch.bfloat16, where) for _ in range(2)
        )
        for x, y in zip(cache.layers, copy.layers, strict=True):
            y.copy_(x.normal_())
        some = sequences(block_size, rng)
        batches = DecodeBatches(ROWS, BLOCKS_EACH * block_size, block_size, cache.sink, where)
        static = batches.batch(ROWS)
        numbers = [qkv(config, ROWS, where) for _ in range(LAYERS)]
        outs = _capture(backend, cache, static, batches, decodes(some, rng), numbers)
        for live in (4, 1, 3, 2, 4):
            plan = decodes(some[:live], rng)
            for x in (x for layer in numbers for x in layer):
                x.normal_()
            for out in outs[1]:
                out.fill_(float("nan"))
            batches.fill(plan, ROWS)
            backend.prepare(static)
            outs[0].replay()
            twin = PagedAttention(copy, make_batch(plan, block_size, where))
            for layer, out in enumerate(outs[1]):
                torch.testing.assert_close(
                    out[:live], twin(layer, *(x[:live] for x in numbers[layer])), rtol=0.02, atol=0.02,
                    msg=lambda text, name=backend.name: f"{name}, seed {seed}: {text}",
                )  # fmt: skip
                assert torch.equal(cache.layers[layer][:-1], copy.layers[layer][:-1]), backend.name


def _capture(
    backend: AttentionBackend,
    cache: KVCache,
    static: DecodeBatch,
    batches: DecodeBatches,
    plan: StepPlan,
    numbers: list[list[Tensor]],
) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of all layers, captured after one run beside it, and where it leaves what they compute."""
    attention = backend.decode(cache, static)
    batches.fill(plan, static.n)
    backend.prepare(static)
    before = [layer.clone() for layer in cache.layers]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for layer in range(LAYERS):
            attention(layer, *numbers[layer])
    torch.cuda.current_stream().wait_stream(stream)
    for layer, kept in zip(cache.layers, before, strict=True):
        layer.copy_(kept)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = [attention(layer, *numbers[layer]).clone() for layer in range(LAYERS)]
    return graph, outs


def test_something_is_chosen(device: str, config: ModelConfig) -> None:
    lines: list[str] = []
    backend = choose_backend("auto", config, torch.bfloat16, torch.device(device), lines.append)
    assert lines[0].startswith(f"attention: {backend.name} (")


def test_batches_are_filled_while_earlier_steps_run(device: str) -> None:
    """Many steps in a row without waiting for any: each leaves its own numbers."""
    rng, where = random.Random(2), torch.device(device)
    some = sequences(16, rng)
    batches = DecodeBatches(ROWS, BLOCKS_EACH * 16, 16, 999, where)
    static = batches.batch(ROWS)
    busy = torch.randn(2048 if device == "cuda" else 8, 2048 if device == "cuda" else 8, device=where)
    previous = torch.arange(100, 100 + ROWS, device=where)
    seen, wanted = [], []
    for _ in range(30):
        busy = busy @ busy
        plan = decodes(some[: rng.randint(1, ROWS)], rng)
        batches.fill(plan, ROWS)
        fields = (resolve(static.token_ids, previous), static.positions, static.slots, static.lengths)
        seen.append(torch.stack([x[: len(plan.chunks)].long() for x in fields]))
        batch = make_batch(plan, 16)
        wanted.append(
            torch.stack([batch.token_ids, batch.positions, batch.slots, torch.tensor(batch.lengths)])
        )
    for step, (got, right) in enumerate(zip(seen, wanted, strict=True)):
        assert torch.equal(got.cpu(), right), step
