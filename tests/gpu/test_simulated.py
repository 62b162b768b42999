"""A whole engine on a simulated GPU: the tokens of the same engine without one, and nothing that a GPU would refuse, wait
for, or do in another order. What is meant by that: simulated_cuda, whose own tests come last.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_cuda import CudaTensor, Simulation
from simulated_graphs import DEVICE, Refused
from simulated_kernels import replace_kernels
from simulated_streams import Race
from simulated_torch import simulated
from test_placements import MODEL, PEER, answers, tokens, write_model

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))

import tiny

from memlane.config import EngineConfig
from memlane.engine import Engine
from memlane.models import ModelConfig, Transformer
from memlane.models.loading import GpuOptions, TableOptions, load_model
from memlane.request import FinishReason
from memlane.runner import DecodeSplit, decode_graphs, halves
from memlane.runner.captured import Cut, Whole
from memlane.runner.graphs import CudaCapture
from memlane.tables import RowFormat, RowReadError, ServedTable, TableLayout, write_table
from memlane.tables.gpu_disk import DiskStore
from memlane.tables.gpu_host import HostStore
from memlane.tables.gpu_open import GpuTableOptions, least_cache_bytes, open_gpu_table
from memlane.tables.gpu_table import GpuLookup, GpuTable
from memlane.tables.table import Placement

SMALL = dataclasses.replace(
    MODEL,
    num_layers=3,
    memory=dataclasses.replace(tiny.MEMORY, layers=(0, 2), value_dim=64, row_format="bfloat16"),
)
assert PEER.memory is not None
SMALL_PEER = dataclasses.replace(PEER, num_layers=2, memory=dataclasses.replace(PEER.memory, layers=(1,)))
REQUESTS = 5


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of few tokens run as halves; nothing is compiled for a GPU that is not there."""
    monkeypatch.setattr(decode_graphs, "MIN_HALVES", 4)
    monkeypatch.setattr(halves, "MIN_TOKENS", 8)
    monkeypatch.setattr("memlane.tables.gpu_open._SCRATCH_ROWS", 192)
    monkeypatch.setattr("memlane.tables.side_stream._LINK_BYTES", 1 << 10)
    monkeypatch.setattr(Transformer, "fuse", lambda self: None)


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulation]:
    with simulated() as made:
        replace_kernels(monkeypatch, made)
        yield made


def engine(directory: Path, device: str, placement: Placement, *, graphs: bool = True) -> Engine:
    gpu = GpuOptions(torch.device(device), row_cache_bytes=90_000, sequences=4)
    tables = TableOptions(placement=placement, cache_bytes=20_000, gpu=gpu)
    config = EngineConfig(
        model=str(directory), max_num_seqs=4, max_num_batched_tokens=48, kv_cache="2MiB", block_size=4,
        warm_start="off", attention_backend="sdpa", cuda_graphs=graphs,
    )  # fmt: skip
    return Engine(config, load_model(directory, tables=tables, dtype="bfloat16"))


def expected_tokens(directory: Path) -> dict[str, list[int]]:
    """By the processor, in batches padded alike."""
    made = engine(directory, "cpu", "device")
    made.runner.pad_decodes(
        4, made.max_model_len, None, cut=False, halves=True, split=made.decode_split.wanted
    )
    found = tokens(answers(made, 3, REQUESTS))
    made.close()
    return found


def counts_at_any_moment(table: ServedTable) -> None:
    """A snapshot of counters waits for nothing, and may be of any moment."""
    assert isinstance(table, GpuTable)
    if isinstance(table.store, HostStore | DiskStore):
        counters = table.store.cache.counters
        assert isinstance(counters, CudaTensor)
        counters.memory.racy = True


def strict(simulation: Simulation, made: Engine) -> None:
    """From now on no step may wait for the device, other than by events and streams."""
    for table in made.model.tables.values():
        counts_at_any_moment(table)
    step = made.step

    def checked() -> Any:
        simulation.strict = True
        try:
            return step()
        finally:
            simulation.strict = False

    made.step = checked  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("model", "placement", "graphs", "split"),
    [
        (SMALL, "device", True, False),
        (SMALL, "host", True, True),
        (SMALL, "disk", True, True),
        (SMALL, "disk", False, False),
        (SMALL_PEER, "host", False, True),
        (SMALL_PEER, "disk", True, False),
    ],
    ids=lambda value: "peer" if value is SMALL_PEER else "memory" if value is SMALL else str(value),
)
def test_an_engine_gives_the_same_tokens_and_breaks_no_rule_of_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    model: ModelConfig, placement: Placement, graphs: bool, split: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(DecodeSplit, "wanted", lambda self, sequences: split and sequences > 1)
    directory = write_model(tmp_path / "model", model)
    expected = expected_tokens(directory)
    with caplog.at_level(logging.WARNING), simulated() as simulation:
        replace_kernels(monkeypatch, simulation)
        made = engine(directory, str(DEVICE), placement, graphs=graphs)
        assert made.lookahead
        strict(simulation, made)
        assert tokens(answers(made, 3, REQUESTS)) == expected
        assert made.runner.decode is not None
        kinds = {type(each.captured) for each in made.runner.decode._sets.values()}
        assert not graphs or kinds == {Cut if placement == "disk" else Whole}
        made.close()
    assert not caplog.records, "no step was tried in vain, no batch could not be captured"


def test_rows_that_cannot_be_read_leave_no_race_and_nothing_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DecodeSplit, "wanted", lambda self, sequences: sequences > 1)
    directory = write_model(tmp_path / "model", SMALL)
    expected = expected_tokens(directory)
    with simulated() as simulation:
        replace_kernels(monkeypatch, simulation)
        made = engine(directory, str(DEVICE), "disk")
        strict(simulation, made)
        locate = GpuLookup._located

        def located(lookup: GpuLookup, error: RowReadError) -> RowReadError:
            simulation.strict = False  # this once
            return locate(lookup, error)

        monkeypatch.setattr(GpuLookup, "_located", located)
        table = made.model.tables["values"]
        assert table.on_disk is not None
        table.on_disk.source.inject_fault(300, 320, errno.EIO, 1_000_000)
        found = answers(made, 3, REQUESTS)
        failed = {name for name, deltas in found.items() if deltas[-1].finish_reason is FinishReason.ERROR}
        assert failed, "the fault was meant to be met"
        table.on_disk.source.inject_fault(0, -1, 0, 0)
        assert tokens(answers(made, 3, REQUESTS)) == expected
        made.close()


def a_table(tmp_path: Path, placement: Placement, scratch: int) -> GpuTable:
    path, values = tmp_path / "values.safetensors", torch.randn(300, 16)
    layout: TableLayout = write_table(path, "values", 300, 16, RowFormat.FLOAT32, [values])
    cache_bytes = least_cache_bytes(300, layout.stride, 0)
    options = GpuTableOptions(DEVICE, placement, cache_bytes, decode_ids=scratch)
    return open_gpu_table(layout, options, ram_cache_bytes=4096)


def test_counters_can_be_read_while_another_thread_captures(tmp_path: Path, simulation: Simulation) -> None:
    """On whatever stream it does: torch has 32, and hands them out again."""
    with torch.cuda.device(DEVICE):
        table = a_table(tmp_path, "host", 0)
        counts_at_any_moment(table)
        ids = torch.zeros(2, 3, dtype=torch.int64).to(DEVICE)
        found: list[int] = []

        def look_up() -> None:
            table.begin(ids).gather()
            thread = threading.Thread(target=lambda: found.append(table.stats().requested_rows))
            thread.start()
            thread.join()

        for capture in [CudaCapture(DEVICE) for _ in range(32)]:
            capture.warm_up(look_up)
            capture.capture(look_up).replay()
        # Each time one lookup before, one that is captured and counts nothing yet, and then one that is replayed.
        assert found == [12 * i + 6 for i in range(32) for _ in range(2)]
        table.close()


def test_a_lookup_that_is_given_up_is_waited_for(tmp_path: Path, simulation: Simulation) -> None:
    """Its buffers go back to the main stream while the side stream may still read them."""
    with torch.cuda.device(DEVICE):
        table = a_table(tmp_path, "host", 0)
        for first in range(5):
            table.begin(torch.arange(first, first + 8).view(2, 4).to(DEVICE)).close()
        assert table.begin(torch.arange(8).view(2, 4).to(DEVICE)).gather().shape == (8, 16)
        table.close()


@pytest.mark.parametrize("placement", ["host", "disk"])
def test_what_was_forgotten_is_known_once_it_is(
    tmp_path: Path, simulation: Simulation, placement: Placement
) -> None:
    """Also rows of a lookup that is still to run: counters are read by a stream that waits for none."""
    with torch.cuda.device(DEVICE):
        table = a_table(tmp_path, placement, 64)
        for first in range(3):
            table.begin(torch.arange(first, first + 8).view(2, 4).to(DEVICE)).close()
            table.abandon()
            assert table.stats().used_slots == 0
        counts_at_any_moment(table)  # the host has waited for the last reading of them
        table.close()


def test_a_lookup_in_parts_is_not_captured(
    tmp_path: Path, simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memlane.tables.gpu_open._SCRATCH_ROWS", 32)
    with torch.cuda.device(DEVICE):
        table, capture = a_table(tmp_path, "disk", 32), CudaCapture(DEVICE)
        ids = (torch.arange(48).view(12, 4) * 5).to(DEVICE)
        rows = table.begin(ids).gather()
        assert rows.shape == (48, 16)
        with pytest.raises(RuntimeError, match="in parts"):
            capture.capture(lambda: table.begin(ids).gather())
        table.close()


def test_the_simulation_finds_what_a_stream_does_not_wait_for(simulation: Simulation) -> None:
    with torch.cuda.device(DEVICE):
        x, side = torch.zeros(4, device=DEVICE), torch.cuda.Stream(DEVICE)
        with torch.cuda.stream(side), pytest.raises(Race, match="does not wait for"):
            x.add_(1)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            y = x + 1
        with pytest.raises(Race):  # what is read there may not be written here
            x.add_(1)
        torch.cuda.current_stream().wait_stream(side)
        x.add_(1)
        del y


def test_the_simulation_finds_memory_that_is_given_back_too_early() -> None:
    def forget() -> None:
        with simulated(), torch.cuda.device(DEVICE):
            x, side = torch.zeros(4, device=DEVICE), torch.cuda.Stream(DEVICE)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                x.add_(1)
            del x

    with pytest.raises(AssertionError, match="given back before"):
        forget()


def test_the_simulation_refuses_what_a_step_and_a_capture_may_not_do(simulation: Simulation) -> None:
    there, here = torch.ones(4).to(DEVICE), torch.ones(4)
    with pytest.raises(Refused, match="on the GPU and on the CPU"):
        there + here
    with torch.cuda.device(DEVICE):
        simulation.strict = True
        for wait in (
            lambda: there.cpu(), lambda: there.sum().item(), lambda: there.nonzero(), lambda: here.to(DEVICE),
            lambda: torch.tensor([1], device=DEVICE), lambda: there[there > 0], lambda: there.tolist(),
            lambda: here.to(DEVICE, non_blocking=True),
        ):  # fmt: skip
            with pytest.raises(Refused, match="within a step"):
                wait()
        pinned = torch.ones(4, pin_memory=True)
        pinned.to(DEVICE, non_blocking=True)
        simulation.strict = False
        side, capture = torch.cuda.Stream(DEVICE), CudaCapture(DEVICE)

        def fork() -> None:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                there.add_(1)

        for wrong, why in (
            (lambda: there.sum().item(), "not permitted"),
            (lambda: torch.ones(1, pin_memory=True), "pinned memory"),
            (lambda: there.copy_(pinned, non_blocking=True), "captured"),
            (torch.cuda.synchronize, "waited for"),
            (fork, "not joined"),
        ):
            with pytest.raises(Refused, match=why):
                capture.capture(wrong)
        graph = capture.capture(lambda: there.add_(1))
        assert isinstance(there, CudaTensor)
        assert there.host.tolist() == [1] * 4, "a capture computes nothing"
        graph.replay()
        assert there.host.tolist() == [2] * 4
