"""Decoding on a GPU: tables in its memory, in pinned host memory, on disk, in one run and against both bounds.

    python benchmarks/gpu_decode.py [--json FILE] [--small] [--batches 64 1] [--formats bfloat16 int4]
    python benchmarks/gpu_decode.py --write FOLDER      only the models; a later run with --models FOLDER takes them

The shape is Meta's 373M: 24 layers, dim 1,024, memory layers at 4, 12 and 20 over one table of 1 M rows x 1,024, weights
random. A random model reads rows evenly, a trained one does not: row ids are drawn with the skew seen in practice (the top
1 / 10 / 20 / 50 % of rows take 11 / 40 / 56 / 83 % of the reads) and put in place of those that the layers choose, after
they have chosen. No draw comes twice while one batch size is measured. GPU caches have 10 % of the table's bytes, and
the larger batch, which comes first, fills them; "disk" is warm: its cache in RAM holds the whole table before the first
step.

Bounds beside each figure: bytes of dense weights and rows over the measured bandwidth of the device, and missing bytes
over the measured bandwidth of the link.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from gpu_kernels import FULL, SMALL, Clock, ceilings, device_of, gpu_header
from measuring import Result, finish, write
from random_model import random_prompt, write_random_model
from torch import Tensor

from memlane.config import EngineConfig
from memlane.engine import Engine
from memlane.ipc import Add
from memlane.models import MemoryConfig, ModelConfig
from memlane.models.loading import GpuOptions, TableOptions, load_model
from memlane.models.memory import MemoryLayer
from memlane.models.product_keys import Choice
from memlane.request import SamplingParams
from memlane.runner import decode_graphs

# Parts of the rows, hottest first, and the part of the reads that each takes.
SKEW = ((0.01, 0.11), (0.09, 0.29), (0.10, 0.16), (0.30, 0.27), (0.50, 0.17))
PLACEMENTS = ("device", "host", "disk")


class Size(NamedTuple):
    """The model, how many steps are measured, after how many, and how many draws of row ids there are for all of them."""

    config: ModelConfig
    warm_steps: int
    steps: int
    draws: int

    @classmethod
    def of(cls, config: ModelConfig, small: bool) -> Size:
        return cls(config, 4, 4, 64) if small else cls(config, 64, 96, 384)


def model(row_format: str, small: bool) -> ModelConfig:
    """Meta's 373M shape, or a tiny one of the same kind."""
    if small:
        memory = MemoryConfig(
            (1, 2), num_keys=32, num_heads=2, knn=4, key_dim=16, value_dim=32, row_format=row_format
        )
        return ModelConfig(
            vocab_size=64, hidden_size=32, num_layers=4, num_heads=4, intermediate_size=64,
            max_position_embeddings=512, dtype="bfloat16", memory=memory,
        )  # fmt: skip
    memory = MemoryConfig(
        (4, 12, 20), num_keys=1024, num_heads=4, knn=32, key_dim=512, value_dim=1024, row_format=row_format
    )
    return ModelConfig(
        vocab_size=32_000, hidden_size=1024, num_layers=24, num_heads=16, num_kv_heads=16, intermediate_size=2816,
        max_position_embeddings=2048, dtype="bfloat16", memory=memory,
    )  # fmt: skip


class SkewedRows:
    """Takes the place of MemoryLayer.choose, before graphs are captured: a layer chooses, then other ids are read, from a
    list that the device steps through. Prompts read what was chosen."""

    def __init__(self, most_tokens: int, draws: int) -> None:
        self._choose = MemoryLayer.choose
        self._most_tokens, self._draws = most_tokens, draws
        self._of: dict[MemoryLayer, tuple[Tensor, Tensor]] = {}

    def __enter__(self) -> None:
        MemoryLayer.choose = lambda layer, x, query=None: self.choose(layer, x, query)  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        MemoryLayer.choose = self._choose  # type: ignore[method-assign]

    def choose(self, layer: MemoryLayer, x: Tensor, query: Tensor | None) -> Choice:
        chosen = self._choose(layer, x, query)
        if len(x) > self._most_tokens:
            return chosen
        ids, at = self._lists(layer, x.device)
        drawn = ids.index_select(0, at)[0, : len(x)]
        at.add_(1).remainder_(len(ids))
        return Choice(drawn.to(chosen.ids.dtype), chosen.weights)

    def _lists(self, layer: MemoryLayer, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids int64 [draws, most_tokens, k], and which of the draws is next; made at a layer's first step."""
        if layer not in self._of:
            shape = (self._draws, self._most_tokens, layer.config.rows_per_token)
            ids = skewed_ids(layer.config.rows, shape, seed=len(self._of)).to(device)
            self._of[layer] = ids, torch.zeros(1, dtype=torch.int64, device=device)
        return self._of[layer]


def skewed_ids(rows: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """int64 ids of the stated skew; which rows are hot is the same for every seed."""
    rng = np.random.default_rng(seed)
    shares = np.array([part for part, _ in SKEW])
    edges = np.concatenate([[0], np.cumsum(shares)])
    group = rng.choice(len(SKEW), size=shape, p=[reads for _, reads in SKEW])
    rank = (edges[group] + rng.random(shape) * shares[group]) * rows
    order = np.random.default_rng(0).permutation(rows)
    return torch.from_numpy(order[np.minimum(rank.astype(np.int64), rows - 1)])


class Measured(NamedTuple):
    """Steps of one engine. hit_rate, missing_rows: of the GPU's cache; None where there is none."""

    seconds: float
    slowest: float
    hit_rate: float | None
    missing_rows: float | None


def decode(engine: Engine, batch: int, size: Size, device: torch.device) -> Measured:
    """Steady decoding of `batch` sequences: the median step, after as many steps as make the cache warm."""
    rng = np.random.default_rng(batch)
    total = size.warm_steps + size.steps + 8
    for i in range(batch):
        params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=total)
        engine.add(Add(request_id=str(i), prompt_token_ids=random_prompt(rng, 8, 60), params=params))
    for _ in range(size.warm_steps):
        engine.step()
    before = _counts(engine, device)
    seconds = []
    for _ in range(size.steps):
        started = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - started)
    after = _counts(engine, device)
    engine.abort([str(i) for i in range(batch)])
    requested, hits, unique = (b - a for a, b in zip(before, after, strict=True))
    cached = any(t.stats().placement != "device" for t in engine.model.tables.values())
    return Measured(
        statistics.median(seconds),
        max(seconds),
        hits / requested if cached and requested else None,
        unique / size.steps if cached else None,
    )


def _counts(engine: Engine, device: torch.device) -> tuple[int, int, int]:
    if device.type == "cuda":
        torch.cuda.synchronize()
    stats = [table.stats() for table in engine.model.tables.values()]
    return (
        sum(s.requested_rows for s in stats),
        sum(s.hits for s in stats),
        sum(s.unique_misses for s in stats),
    )


def measure(
    directory: Path, placement: str, batches: list[int], size: Size, device: torch.device, bounds: Result
) -> list[Result]:
    """One engine, several batch sizes."""
    started = time.perf_counter()
    engine = start(directory, placement, batches, device)
    results, ready = [], time.perf_counter()
    for line in engine.choices:
        print(f"    {line}")
    try:
        for table in engine.model.tables.values():
            if placement == "disk":
                assert table.on_disk is not None
                table.on_disk.warm(np.arange(table.rows))
        warm = time.perf_counter()
        weights = sum(p.numel() * p.element_size() for p in engine.model.transformer.parameters())
        if not size.config.tie_word_embeddings:  # of the vectors of tokens only a few are read
            weights -= engine.model.transformer.embed.weight.nbytes
        memory = size.config.memory
        assert memory is not None
        for batch in batches:
            done = decode(engine, batch, size, device)
            rows = batch * memory.rows_per_token * memory.row_bytes * len(memory.layers)
            missing = 0.0 if done.missing_rows is None else done.missing_rows * memory.row_bytes
            results.append(
                {
                    "placement": placement,
                    "row_format": memory.row_format,
                    "batch": batch,
                    "step_seconds": done.seconds,
                    "slowest_step_seconds": done.slowest,
                    "tokens_per_s": batch / done.seconds,
                    "hit_rate": done.hit_rate,
                    "missing_bytes_per_step": missing,
                    "bandwidth_bound_seconds": (weights + rows) / bounds["device_bytes_per_s"],
                    "link_bound_seconds": missing / bounds["host_to_device_bytes_per_s"],
                }
            )
    finally:
        engine.close()
        del engine  # with its KV and weights, before the next one asks what is free
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(
        f"    {placement}: engine started in {ready - started:.1f} s, its RAM warmed in {warm - ready:.1f} s, "
        f"measured in {time.perf_counter() - warm:.1f} s",
        flush=True,
    )
    return results


def start(directory: Path, placement: str, batches: list[int], device: torch.device) -> Engine:
    """An engine whose GPU cache has 10 % of the table. On a CPU the kernels' twins run, to try this program."""
    sequences = max(batches)
    decode_graphs.ladder = lambda most: sorted(
        n for n in batches if n <= most
    )  # other sizes would be captured in vain
    config = EngineConfig(
        model=str(directory), device=device.type, placement=placement, gpu_row_cache="10%", row_cache="100%",
        max_num_seqs=sequences, max_model_len=512, dtype="bfloat16", warm_start="off",
    )  # fmt: skip
    if device.type == "cuda":
        return Engine(config)
    gpu = GpuOptions(device, 1 << 20, sequences)
    tables = TableOptions(placement=placement, cache_bytes=1 << 20, gpu=gpu)  # type: ignore[arg-type]
    return Engine(config, load_model(directory, tables=tables, dtype="bfloat16"))


def compare(results: list[Result]) -> None:
    """Adds to each figure what it is of its bounds, and of the device's. Those of the device come first."""
    for r in results:
        same = [o for o in results if (o["row_format"], o["batch"]) == (r["row_format"], r["batch"])]
        on_device = next(o["step_seconds"] for o in same if o["placement"] == "device")
        r["of_bandwidth_bound"] = r["bandwidth_bound_seconds"] / r["step_seconds"]
        r["of_device"] = on_device / r["step_seconds"]
        r["over_limit"] = r["step_seconds"] / max(on_device, r["link_bound_seconds"])


def report(results: list[Result]) -> None:
    """One line a figure, with what it is to be compared with."""
    print(
        f"{'rows':>9} {'batch':>5} {'placed':>7} {'step ms':>8} {'tok/s':>8} {'hits':>5} {'MB missing':>10} "
        f"{'bound ms':>8} {'link ms':>7} {'of bound':>8} {'of device':>9} {'over limit':>10}"
    )
    for r in results:
        hits = "" if r["hit_rate"] is None else f"{r['hit_rate']:.2f}"
        print(
            f"{r['row_format']:>9} {r['batch']:>5} {r['placement']:>7} {1e3 * r['step_seconds']:>8.3f} "
            f"{r['tokens_per_s']:>8.0f} {hits:>5} {r['missing_bytes_per_step'] / 1e6:>10.2f} "
            f"{1e3 * r['bandwidth_bound_seconds']:>8.3f} {1e3 * r['link_bound_seconds']:>7.3f} "
            f"{r['of_bandwidth_bound']:>8.2f} {r['of_device']:>9.2f} {r['over_limit']:>10.2f}"
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="file to write the result to")
    parser.add_argument(
        "--small", action="store_true", help="a tiny model, on any machine: to test the program"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 1])
    parser.add_argument("--formats", nargs="+", default=["bfloat16", "int4"])
    parser.add_argument("--write", type=Path, help="folder to write the models to, and no more")
    parser.add_argument("--models", type=Path, help="folder that they were written to")
    options = parser.parse_args(arguments)
    if options.write is not None:
        print(write_models(options.write, options.formats, options.small))
        return
    device = device_of(options.small)
    result = gpu_header("gpu_decode", device)
    sizes = SMALL if options.small else FULL
    result["ceilings"] = ceilings(device, sizes, Clock(device, sizes.repetitions))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    result["decode"] = []
    with tempfile.TemporaryDirectory() as scratch:
        models = options.models
        if models is None or not all((models / row_format).is_dir() for row_format in options.formats):
            models = Path(scratch)
            print(write_models(models, options.formats, options.small), flush=True)
        for row_format in options.formats:
            size = Size.of(model(row_format, options.small), options.small)
            for placement in PLACEMENTS:
                print(f"{row_format}, {placement}", flush=True)
                with SkewedRows(max(options.batches), size.draws):
                    found = measure(
                        models / row_format, placement, options.batches, size, device, result["ceilings"]
                    )
                result["decode"] += found
                compare(result["decode"])
                write(result, options.json)
    report(result["decode"])
    finish(result, options.json)


def write_models(folder: Path, formats: list[str], small: bool) -> str:
    """A model for each row format, in a folder of its name; returns how long it took."""
    started = time.perf_counter()
    for row_format in formats:
        partial = folder / f".{row_format}"
        write_random_model(partial, model(row_format, small))
        partial.rename(folder / row_format)
    nbytes = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    return f"{len(formats)} models, {nbytes / 1e9:.1f} GB, written in {time.perf_counter() - started:.1f} s"


if __name__ == "__main__":
    main()
