"""What one step of decoding launches on a GPU, counted without one.

    python benchmarks/launches.py [--rows 1] [--list]

The step is the one that is captured: the model of gpu_decode.py over tables in the GPU's memory, by the code that runs
there. Compiled parts count as inductor generates them for compute capability 9.0, others by torch's operations, each of
which is a launch unless it is a view. Attention, choosing rows and summing them are a launch each: attention may be two
where a library splits long sequences.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from fake_gpu import FakeGpu
from torch import Tensor

from memlane.kernels import selection
from memlane.models import MemoryConfig, ModelConfig, Transformer
from memlane.models.attention import Lines
from memlane.models.fused import Fused, _Compiled
from memlane.models.layers import RMSNorm
from memlane.runner.decode_graphs import DecodeGraphs
from memlane.runner.kv import KVCache

__all__ = ["MODEL", "Launches", "count"]

MODEL = ModelConfig(
    vocab_size=32_000, hidden_size=1024, num_layers=24, num_heads=16, num_kv_heads=16, intermediate_size=2816,
    max_position_embeddings=2048, dtype="bfloat16",
    memory=MemoryConfig((4, 12, 20), num_keys=1024, num_heads=4, knn=32, key_dim=512, value_dim=1024),
)  # fmt: skip


class Launches(NamedTuple):
    """Names of kernels by part: the beginning of a step, one layer of each kind, the end."""

    begin: list[str]
    dense_layer: list[str]
    memory_layer: list[str]
    end: list[str]

    def step(self, config: ModelConfig) -> int:
        """Launches of a whole step."""
        memory = len(config.memory.layers) if config.memory is not None else 0
        layers = memory * len(self.memory_layer) + (config.num_layers - memory) * len(self.dense_layer)
        return len(self.begin) + layers + len(self.end)


class _Attention:
    def __init__(self, gpu: FakeGpu, cache: KVCache, slots: Tensor) -> None:
        self._gpu, self._cache, self._slots = gpu, cache, slots

    def lines(self, layer: int) -> Lines:
        self._gpu.note(f"-- layer {layer}")
        return self._cache.lines(layer, self._slots)

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, written: bool = False) -> Tensor:
        if not written:
            self._cache.write(layer, self._slots, k, v)
        self._gpu.note("attention")
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)


class _Table:
    """Rows in the GPU's memory."""

    def __init__(self, gpu: FakeGpu, name: str, rows: int, width: int) -> None:
        self._gpu, self.name, self.rows, self.width = gpu, name, rows, width

    def begin(self, ids: Tensor, live: Tensor | None = None) -> _Table:
        return self

    def fetch(self) -> None:
        pass

    def weighted_sum(self, weights: Tensor) -> Tensor:
        self._gpu.note("weighted_sum")
        return torch.empty(len(weights), self.width, device=weights.device)

    def close(self) -> None:
        pass


def count(rows: int = 1, config: ModelConfig = MODEL) -> Launches:
    """Of a step of so many sequences. Of layers of a kind, which launch the same, one is computed."""
    assert config.memory is not None
    short = dataclasses.replace(config, num_layers=2, memory=dataclasses.replace(config.memory, layers=(1,)))
    gpu = FakeGpu()
    with gpu.running(), _noted(gpu):
        _step(gpu, short, rows)
    parts: list[list[str]] = [[]]
    for name in gpu.launches:
        if name.startswith("--"):
            parts.append([])
        else:
            parts[-1].append(name)
    begin, dense, last = parts
    return Launches(begin, dense, *_cut(last))


def _cut(names: list[str]) -> tuple[list[str], list[str]]:
    at = names.index("END")
    return names[:at], names[at + 1 :]


def _step(gpu: FakeGpu, config: ModelConfig, rows: int) -> None:
    memory, dtype = config.memory, torch.bfloat16
    assert memory is not None
    tables = {name: _Table(gpu, name, memory.rows, memory.value_dim) for name in config.table_names()}
    with torch.device("meta"):
        model = Transformer(config, tables)  # type: ignore[arg-type]
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            exact = (
                name == "keys"
                or isinstance(module, RMSNorm)
                or weight.shape[0] == memory.num_heads * memory.key_dim
            )
            placed = torch.empty(weight.shape, dtype=torch.float32 if exact else dtype, device="cuda")
            setattr(module, name, torch.nn.Parameter(placed, requires_grad=False))
    model.fused = Fused(config)
    cache = KVCache(config, 64, 16, dtype, "cuda")
    graphs = DecodeGraphs.__new__(DecodeGraphs)
    graphs.transformer = model
    graphs._previous = torch.empty(256, dtype=torch.int64, device="cuda")
    graphs._logits = torch.empty(rows, config.vocab_size, device="cuda")
    graphs._choices = torch.empty(256, dtype=torch.int64, device="cuda")
    token_ids, positions, slots = (torch.empty(rows, dtype=torch.int64, device="cuda") for _ in range(3))
    live = torch.empty(1, dtype=torch.int64, device="cuda")
    batch: Any = argparse.Namespace(token_ids=token_ids, positions=positions, slots=slots, live=live)
    gpu.launches.clear()
    pieces = graphs._pieces(batch, _Attention(gpu, cache, slots))
    try:
        while True:
            next(pieces)
    except StopIteration as end:
        graphs._tail([end.value])


@contextmanager
def _noted(gpu: FakeGpu) -> Iterator[None]:
    """What the counter cannot see by itself."""

    def compiled(self: _Compiled, *args: Any) -> Any:
        chosen = self.chosen(*args)
        return gpu.compiled(chosen, *args)

    def choose(scores: Tensor, k: int, log_scale: Tensor | None = None) -> selection.Chosen:
        gpu.note("choose")
        shape = (len(scores), scores.shape[1] * k)
        return selection.Chosen(
            torch.empty(shape, dtype=torch.int64, device="cuda"), torch.empty(shape, device="cuda")
        )

    def norm(self: Fused, *args: Any) -> Tensor:
        gpu.note("END")
        return final(self, *args)

    final = Fused.norm
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Fused, "norm", norm))
        stack.enter_context(mock.patch.object(_Compiled, "__call__", compiled))
        stack.enter_context(mock.patch.object(selection, "choose", choose))
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=1, help="sequences of the step")
    parser.add_argument("--list", action="store_true", help="name every launch")
    parser.add_argument("--json", action="store_true", help="print names by part as JSON, and nothing else")
    options = parser.parse_args()
    found = count(options.rows)
    if options.json:
        print(json.dumps(found._asdict()))
        return
    for part, names in found._asdict().items():
        print(f"{part:14}{len(names):4}")
        if options.list:
            for name in names:
                print(f"    {name}")
    print(f"{'step':14}{found.step(MODEL):4}")


if __name__ == "__main__":
    main()
