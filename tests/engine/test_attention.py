"""Attention backends on the CPU: SDPA as it is, libraries through stand-ins that assert what the real ones demand."""

from __future__ import annotations

import dataclasses
import inspect
import random
import sys
from collections.abc import Callable
from typing import Any

import fake_attention
import pytest
import tiny
import torch
from torch import Tensor

from memlane.choices import Choices
from memlane.config import EngineConfig
from memlane.errors import ConfigError
from memlane.models import ModelConfig
from memlane.request import SamplingParams
from memlane.runner import DecodeBatches, KVCache
from memlane.runner.attention import AttentionBackend, SdpaBackend, choice, choose_backend, library, probe
from memlane.runner.attention.flash_attn import FlashAttnBackend
from memlane.runner.attention.flashinfer import FlashInferBackend
from memlane.runner.attention.varlen import VarlenBackend
from memlane.runner.batch import make_batch
from memlane.runner.paged import PagedAttention
from memlane.scheduler import Chunk, Sequence, StepPlan
from memlane.scheduler.plan import make_plan

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
DTYPE = torch.bfloat16
LAYERS = 2
LIBRARIES = [FlashInferBackend, FlashAttnBackend, VarlenBackend]


def model(heads: int = 4, kv_heads: int = 2, head_dim: int = 64) -> ModelConfig:
    return dataclasses.replace(
        tiny.CONFIG, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, num_layers=LAYERS, memory=None
    )


def blocks_of(backend: AttentionBackend) -> int:
    return backend.block_size or 16


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", fake_attention.flash_attn_module())
    monkeypatch.setitem(sys.modules, "flashinfer", fake_attention.flashinfer_module())
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", fake_attention.varlen_module())


@pytest.fixture(params=[SdpaBackend, *LIBRARIES], ids=lambda kind: kind.name)
def make(request: pytest.FixtureRequest) -> Callable[[ModelConfig], AttentionBackend]:
    kind = request.param
    return lambda config: kind() if kind is SdpaBackend else kind(config, DTYPE, CPU)


class World:
    """Sequences over a cache that is full of what earlier steps left, and a copy of it for the twin."""

    def __init__(self, config: ModelConfig, block_size: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.config, self.block_size = config, block_size
        self.longest = 3 * block_size
        self.sequences = [self._sequence(i) for i in range(5)]
        self.cache, self.copy = (KVCache(config, 15, block_size, DTYPE) for _ in range(2))
        for a, b in zip(self.cache.layers, self.copy.layers, strict=True):
            b.copy_(a.normal_(generator=self.generator))

    def _sequence(self, i: int) -> Sequence:
        made = Sequence(f"s{i}", tiny.prompt(self.longest, i), SamplingParams(), max_length=self.longest)
        made.blocks = self.rng.sample(range(3 * i, 3 * i + 3), 3)
        return made

    def plan(self, singles: int, prefills: int) -> StepPlan:
        chunks = []
        for i, sequence in enumerate(self.sequences[: singles + prefills]):
            if i < singles:
                chunks.append(Chunk(sequence, self.rng.randrange(self.longest), 1, True))
            else:
                start = self.rng.choice([0, self.rng.randrange(self.longest - 2)])
                chunks.append(Chunk(sequence, start, self.rng.randint(2, self.longest - start), True))
        return make_plan(chunks)

    def tokens(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as the model makes them: v is a view."""
        c = self.config
        qkv = torch.randn(count, c.num_heads + 2 * c.num_kv_heads, c.head_dim, generator=self.generator)
        q, k, v = qkv.to(DTYPE).split([c.num_heads, c.num_kv_heads, c.num_kv_heads], dim=1)
        return q.contiguous(), k.contiguous(), v

    def close(self, got: Tensor, wanted: Tensor) -> None:
        torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)
        for a, b in zip(self.cache.layers, self.copy.layers, strict=True):
            assert torch.equal(a[:-1], b[:-1])


# --- steps ---


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize(("singles", "prefills"), [(1, 0), (4, 0), (0, 1), (2, 2)])
def test_a_step_of_any_plan(
    make: Callable[[ModelConfig], AttentionBackend], heads: tuple[int, int], singles: int, prefills: int
) -> None:
    config = model(*heads)
    backend = make(config)
    world = World(config, blocks_of(backend), seed=singles + 10 * prefills)
    plan = world.plan(singles, prefills)
    batch = make_batch(plan, world.block_size)
    attention, twin = backend.attention(world.cache, batch), PagedAttention(world.copy, batch)
    for layer in range(LAYERS):
        tokens = world.tokens(plan.tokens)
        world.close(attention(layer, *tokens), twin(layer, *tokens))


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=str)
def test_steps_of_a_static_batch(
    make: Callable[[ModelConfig], AttentionBackend], heads: tuple[int, int]
) -> None:
    """One attention for all steps, in which sequences are at other lengths, and fewer of them than rows."""
    config = model(*heads)
    backend = make(config)
    world = World(config, blocks_of(backend), seed=3)
    batches = DecodeBatches(5, world.longest, world.block_size, world.cache.sink)
    static = batches.batch(4, backend.bound(1, world.longest))
    attention = backend.decode(world.cache, static)
    for live in (4, 2, 3, 1, 4):
        plan = world.plan(live, 0)
        if batches.fill(plan, 4) > static.longest:
            static = batches.batch(4, backend.bound(world.longest, world.longest))
            attention = backend.decode(world.cache, static)
        backend.prepare(static)
        twin = PagedAttention(world.copy, make_batch(plan, world.block_size))
        for layer in range(LAYERS):
            tokens = world.tokens(4)
            got = attention(layer, *tokens)
            assert got.isfinite().all()
            world.close(got[:live], twin(layer, *(x[:live] for x in tokens)))


def test_a_static_batch_reads_nothing_else(make: Callable[[ModelConfig], AttentionBackend]) -> None:
    """NaN in the blocks of others, and in the sink, reaches nobody."""
    config = model()
    backend = make(config)
    world = World(config, blocks_of(backend), seed=4)
    batches = DecodeBatches(5, world.longest, world.block_size, world.cache.sink)
    static = batches.batch(5)
    attention = backend.decode(world.cache, static)
    plan = StepPlan(world.plan(3, 0).chunks[:2], 2)
    mine = {
        block
        for chunk in plan.chunks
        for block in chunk.sequence.blocks[: chunk.start // world.block_size + 1]
    }
    for cache in (world.cache, world.copy):
        for layer in cache.layers:
            layer[[block for block in range(16) if block not in mine]] = float("nan")
    batches.fill(plan, 5)
    backend.prepare(static)
    tokens = world.tokens(5)
    got = attention(0, *tokens)
    twin = PagedAttention(world.copy, make_batch(plan, world.block_size))
    assert got.isfinite().all()
    torch.testing.assert_close(got[:2], twin(0, *(x[:2] for x in tokens)), rtol=0.02, atol=0.02)


def test_two_steps_may_be_under_way(make: Callable[[ModelConfig], AttentionBackend]) -> None:
    """As the halves of one: each keeps what was planned for it, and a third takes over what is left behind."""
    config = model()
    backend = make(config)
    for _ in range(2):
        world = World(config, blocks_of(backend), seed=5)
        plan = world.plan(2, 3)
        singles, rest = StepPlan(plan.chunks[:2], 2), StepPlan(plan.chunks[2:], 0)
        for parts in ((singles, rest), (rest, StepPlan(plan.chunks[3:], 0)), (singles, singles)):
            batches = [make_batch(part, world.block_size) for part in parts]
            both = [backend.attention(world.cache, batch) for batch in batches]
            for layer in range(LAYERS):
                for attention, batch in zip(both, batches, strict=True):
                    tokens = world.tokens(len(batch.slots))
                    world.close(attention(layer, *tokens), PagedAttention(world.copy, batch)(layer, *tokens))
            del both, attention
    if isinstance(backend, FlashInferBackend):
        assert len(backend._mixed) == len(backend._singles) == 2
        assert all(planned.user() is None for planned in [*backend._mixed, *backend._singles])


@pytest.mark.parametrize("live", [2, 4])
def test_static_sdpa_computes_exactly_what_a_step_does(live: int) -> None:
    """Where neither is padded more than the other; a longer ladder only adds zeros."""
    config, backend = model(), SdpaBackend()
    world = World(config, 16, seed=6)
    plan = world.plan(live, 0)
    batches = DecodeBatches(5, world.longest, 16, world.cache.sink)
    longest = batches.fill(plan, live)
    twin = PagedAttention(world.copy, make_batch(plan, 16))
    tokens = world.tokens(live)
    wanted = twin(0, *tokens)
    assert torch.equal(backend.decode(world.cache, batches.batch(live, longest))(0, *tokens), wanted)
    world.close(backend.decode(world.cache, batches.batch(live))(0, *tokens), wanted)


def test_the_ladder_covers_every_length_with_few_rungs() -> None:
    backend = SdpaBackend()
    for most in (1, 100, 256, 1000, 4096):
        bounds = [backend.bound(longest, most) for longest in range(1, most + 1)]
        assert all(longest <= bound <= most for longest, bound in enumerate(bounds, 1))
        assert len(set(bounds)) <= 5
    for kind in LIBRARIES:
        assert kind(model(), DTYPE, CPU).bound(7, 4096) == 4096


# --- the choice ---


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine as the choice sees it: what is installed, what the GPU is, what fails when tried."""
    state: dict[str, Any] = {
        "installed": {"flash-attn": "2.8.3", "flashinfer-python": "0.6.0"},
        "capability": (9, 0),
        "fails": {},
    }

    def tried(
        kind: Any, config: ModelConfig, dtype: torch.dtype, device: torch.device, block_size: int
    ) -> Any:
        assert block_size % (kind.block_size or 1) == 0
        return state["fails"].get(kind.name) or kind(config, dtype, CPU)

    monkeypatch.setattr(choice, "probe", tried)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: state["capability"])
    for module in (sys.modules[FlashAttnBackend.__module__], sys.modules[FlashInferBackend.__module__]):
        monkeypatch.setattr(module, "version_of", lambda package: state["installed"].get(package))
    return state


def chosen(
    wanted: str = "auto",
    config: ModelConfig | None = None,
    dtype: torch.dtype = DTYPE,
    block_size: int | None = None,
) -> str:
    lines: list[str] = []
    backend = choose_backend(wanted, config or model(), dtype, CUDA, lines.append, block_size)
    assert [line.split()[1] for line in lines] == ([] if wanted == "sdpa" else [backend.name])
    return lines[0] if lines else "sdpa"


def test_the_first_that_can_is_taken(gpu: dict[str, Any]) -> None:
    assert chosen() == "attention: flashinfer (FlashInfer 0.6.0)"
    assert chosen("varlen") == "attention: varlen (torch's own FlashAttention)"
    assert chosen("sdpa") == "sdpa"
    gpu["fails"]["flashinfer"] = "it fails: ninja: not found"
    assert chosen() == "attention: flash-attn (FlashAttention 2.8.3; flashinfer: it fails: ninja: not found)"
    gpu["installed"] = {}
    assert chosen() == (
        "attention: varlen (torch's own FlashAttention; flashinfer: it is not installed; flash-attn: it is not installed)"
    )
    assert chosen(config=model(head_dim=20)).startswith(
        "attention: sdpa (flashinfer: it does not take heads of 20; flash-attn: it does"
    )
    assert "it does not compute in float32; flash" in chosen(dtype=torch.float32)
    gpu["capability"] = (7, 5)
    assert "varlen: it needs compute capability 8.0" in chosen()


def test_a_block_size_that_is_given_counts(gpu: dict[str, Any]) -> None:
    gpu["installed"] = {}
    assert chosen(block_size=512).startswith("attention: varlen")
    assert chosen(block_size=16).endswith("varlen: its KV blocks are multiples of 256 tokens, not 16)")
    with pytest.raises(
        ConfigError, match="varlen cannot be used: its KV blocks are multiples of 256 tokens, not 16"
    ):
        chosen("varlen", block_size=16)


def test_a_backend_that_is_named_must_work(gpu: dict[str, Any]) -> None:
    gpu["fails"]["varlen"] = "it fails: no kernel image"
    gpu["installed"] = {}
    for wanted, reason in (("varlen", "it fails: no kernel image"), ("flash-attn", "it is not installed")):
        with pytest.raises(ConfigError, match=f"attention_backend: {wanted} cannot be used: {reason}"):
            chosen(wanted)
    for wanted in ("flashinfer", "flash-attn", "varlen"):
        with pytest.raises(ConfigError, match=f"{wanted} cannot be used: it needs a CUDA device"):
            choose_backend(wanted, model(), DTYPE, CPU, print)


def test_a_torch_without_block_tables(gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def older(query: Tensor, key: Tensor, value: Tensor, *, seqused_k: Tensor | None = None) -> None: ...

    monkeypatch.setattr(sys.modules["torch.nn.attention.varlen"], "varlen_attn", older)
    with pytest.raises(ConfigError, match=r"that of torch .* takes no block tables"):
        chosen("varlen")
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    with pytest.raises(ConfigError, match="does not have it"):
        chosen("varlen")


def test_an_engine_takes_the_blocks_that_attention_wants(gpu: dict[str, Any]) -> None:
    for options, size in (
        ({}, 16),
        ({"attention_backend": "varlen"}, 256),
        ({"attention_backend": "varlen", "block_size": 512}, 512),
        ({"attention_backend": "sdpa", "block_size": 7}, 7),
    ):
        choices = Choices(EngineConfig(model="m", **options))
        choices.attention(model(), DTYPE, CUDA)
        assert choices.block_size == size
        assert choices.kv_size(model(), DTYPE, None).blocks * size >= 128
    on_cpu = tiny.engine(block_size=None)
    assert on_cpu.scheduler.block_size == 16
    assert "attention: sdpa (the only one on the CPU)" in on_cpu.choices


# --- the trial at start ---


@pytest.mark.parametrize("kind", LIBRARIES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("block_size", [1, 16, 256, 512])
def test_a_library_that_works_passes(kind: Any, block_size: int) -> None:
    if block_size % (kind.block_size or 1) == 0:
        assert isinstance(probe.probe(kind, model(), DTYPE, CPU, block_size), kind)


@pytest.mark.parametrize("kind", LIBRARIES, ids=lambda kind: kind.name)
def test_a_library_that_does_not_work_is_found_out(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    right = fake_attention.attend

    def tried(attend: Callable[..., Tensor]) -> str:
        monkeypatch.setattr(fake_attention, "attend", attend)
        reason = probe.probe(kind, model(), DTYPE, CPU, 256)
        assert isinstance(reason, str)
        return reason

    def fails(*_: Any) -> Tensor:
        raise RuntimeError("no kernel image is available\nCompile with …")

    def one_key_short(
        q: Tensor, k: Tensor, v: Tensor, queries: list[int], lengths: list[int], pages: Any
    ) -> Tensor:
        return right(q, k, v, queries, [n - (n == max(lengths)) for n in lengths], pages)

    assert tried(fails) == "it fails: no kernel image is available"
    assert tried(lambda *a: right(*a) * float("nan")) == "it differs from scaled_dot_product_attention by nan"
    assert tried(lambda *a: right(*a) * 1.1).startswith("it differs from scaled_dot_product_attention by 0.")
    assert tried(one_key_short).startswith("it differs")


def test_what_is_not_installed_has_no_version() -> None:
    assert library.version_of("torch") == torch.__version__
    assert library.version_of("a-package-of-nobody") is None


def test_the_stand_in_has_the_signature_of_the_torch_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch.nn.attention.varlen")
    from torch.nn.attention.varlen import varlen_attn

    real, ours = (inspect.signature(f).parameters for f in (varlen_attn, fake_attention.varlen_attn))
    assert [(p.name, p.kind) for p in ours.values()] == [(p.name, p.kind) for p in real.values()]
