"""What the engine decides by itself: right, within the limits, and said in words that can be acted upon."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from memlane import choices
from memlane.choices import Choices, KVSize, available_memory
from memlane.config import EngineConfig
from memlane.errors import ConfigError
from memlane.runner import KVCache

GIB = 1 << 30
POSITIONS = tiny.CONFIG.max_position_embeddings


def make(**options: Any) -> Choices:
    return Choices(EngineConfig(model="m", **options))


def block_bytes(block_size: int = 16) -> int:
    return KVCache.block_bytes(tiny.CONFIG, block_size, torch.float32)


def kv_size(available: int | None = None, **options: Any) -> KVSize:
    return make(**options).kv_size(tiny.CONFIG, torch.float32, available)


def test_a_block_takes_what_its_tensors_take() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        cache = KVCache(tiny.CONFIG, 3, 16, dtype)
        assert cache.nbytes == (3 + 1) * KVCache.block_bytes(tiny.CONFIG, 16, dtype)  # and the sink


@pytest.mark.parametrize(
    ("table", "available", "placement", "reason"),
    [
        (GIB, 2 * GIB, "host", "tables of 1.0 GiB take at most 50% of the 2.0 GiB of memory available"),
        (GIB + 1, 2 * GIB, "disk", "take more than 50% of the 2.0 GiB"),
        (3 << 20, 0, "disk", "tables of 3.0 MiB take more than 50% of the 0.0 KiB"),
        (1, None, "disk", "unknown"),
    ],
)
def test_automatic_placement(table: int, available: int | None, placement: str, reason: str) -> None:
    made = make()
    assert made.placement(table, available) == placement
    [line] = made.lines
    assert line.startswith(f"placement: {placement} (")
    assert reason in line


def test_no_choice_no_line() -> None:
    made = make(placement="disk", dtype="bfloat16", kv_cache="1MiB")
    assert (made.placement(1, 100 * GIB), made.dtype("cpu")) == ("disk", "bfloat16")
    made.kv_size(tiny.CONFIG, torch.float32, GIB)
    assert make(placement="host").placement(100 * GIB, 1) == "host"
    assert make().placement(0, None) == "host"  # a dense model has nothing to place
    assert made.lines == []


def test_automatic_dtype() -> None:
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        made = make()
        assert made.dtype(device) == dtype
        assert made.lines[0].startswith(f"dtype: {dtype} (")


def test_the_row_cache_is_part_of_the_tables_or_a_size() -> None:
    assert make().cache_bytes(1000) == 250
    assert make(row_cache="64MiB").cache_bytes(1000) == 64 << 20
    assert make(row_cache="0").cache_bytes(1000) == make(row_cache="25%").cache_bytes(0) == 0


def test_automatic_kv_cache_holds_every_sequence_at_full_length() -> None:
    made = make(max_num_seqs=3, block_size=10)
    assert made.kv_size(tiny.CONFIG, torch.float32, 100 * GIB) == (3 * 13, POSITIONS)  # 128 tokens: 13 blocks
    [line] = made.lines
    assert line.startswith("kv_cache: ")
    assert "390 tokens (3 sequences of 128 tokens, to 1.0 GiB)" in line


def test_automatic_kv_cache_takes_a_quarter_of_memory_and_at_most_1_gib() -> None:
    assert kv_size(GIB, max_num_seqs=10**6).blocks == GIB // 4 // block_bytes()
    for much in (64 * GIB, None):
        assert kv_size(much, max_num_seqs=10**6).blocks == GIB // block_bytes()


def test_a_small_kv_cache_shortens_the_context_and_says_so() -> None:
    for made, available in ((make(), 4 * 3 * block_bytes()), (make(kv_cache=f"{3 * block_bytes()}"), None)):
        assert made.kv_size(tiny.CONFIG, torch.float32, available) == (3, 48)
        assert made.lines[-1] == "max_model_len: 48 (all that the KV cache holds; the model has 128)"


@pytest.mark.parametrize(
    ("available", "options", "message"),
    [
        (None, {"max_model_len": 129}, "max_model_len: 129 is beyond the 128 positions"),
        (
            None,
            {"max_model_len": 64, "kv_cache": str(3 * block_bytes())},
            "kv_cache: 6.0 KiB hold 48 tokens, fewer than one sequence of 64; give it 8.0 KiB or lower",
        ),
        (4 * block_bytes(), {"max_model_len": 17}, "2.0 KiB hold 16 tokens, fewer than one sequence of 17"),
        (0, {}, "hold 0 tokens"),
        (None, {"kv_cache": "100"}, "hold 0 tokens"),
        (None, {"kv_cache": str(block_bytes(1)), "block_size": 1}, "hold 1 tokens"),  # no room for an answer
        (GIB, {"kv_cache": "100TiB"}, "102400.0 GiB is more than the 1.0 GiB of memory available"),
    ],
)
def test_limits_that_cannot_be_kept(available: int | None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        kv_size(available, **options)


def test_whatever_is_decided_one_sequence_fits_and_whatever_is_advised_suffices() -> None:
    rng = random.Random(5)
    advised = 0
    for _ in range(500):
        options: dict[str, Any] = {
            "block_size": rng.choice([1, 3, 7, 16, 100]),
            "max_num_seqs": rng.randint(1, 9),
        }
        if rng.random() < 0.5:
            options["max_model_len"] = rng.randint(2, POSITIONS)
        if rng.random() < 0.7:
            options["kv_cache"] = str(rng.randrange(20_000))
        try:
            blocks, longest = kv_size(rng.choice([None, rng.randrange(20_000, 80_000)]), **options)
        except ConfigError as error:
            advice = re.search(r"give it (.*) or lower", str(error))
            blocks, longest = kv_size(None, **options | {"kv_cache": advice[1] if advice else "-"})
            advised += 1
        assert 2 <= longest <= options.get("max_model_len", POSITIONS)
        assert blocks * options["block_size"] >= longest
    assert 50 < advised < 450


def test_memory_available_here_is_plausible() -> None:
    found = available_memory()
    assert found is None or 0 <= found < 1 << 50


def group(folder: Path, limit: str, used: int = 700) -> Path:
    folder.mkdir()
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text("anon 500\ninactive_file 150\nactive_file 50\n")
    return folder


def test_the_limit_of_a_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = choices._group_available
    assert left(group(tmp_path / "some", "1000")) == 1000 - 700 + 150  # the page cache can be had back
    assert left(group(tmp_path / "over", "600", used=900)) == 0
    assert left(group(tmp_path / "none", "max")) is None
    assert left(tmp_path / "not there") is None
    monkeypatch.setattr(choices, "_group_available", lambda: 450)
    for system, least in ((None, 450), (400, 400), (500, 450)):
        monkeypatch.setattr(choices, "_system_available", lambda system=system: system)
        assert available_memory() == least
    monkeypatch.setattr(choices, "_group_available", lambda: None)
    monkeypatch.setattr(choices, "_system_available", lambda: None)
    assert available_memory() is None
