"""Kernels compile for GPUs that are not there, and their machine code keeps what their speed rests on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from memlane.kernels.aot import DEFAULT_TARGETS, compilations, compile_for, read_sass

# As cuobjdump prints it, shortened: a loop that has two loads under way when it needs the first, then a spill.
LISTING = """
        /*0000*/                   LDG.E R4, desc[UR4][R2.64] ;               /* 0x0000000402047981 */
                                                                              /* 0x000ea2000c1e1900 */
        /*0010*/                   LDG.E.128.STRONG.GPU R8, desc[UR4][R4.64] ;
        /*0020*/              @!P0 LDG.E.128.STRONG.GPU R12, desc[UR4][R6.64] ;
        /*0030*/                   FFMA R20, R21, R9, R20 ;
        /*0040*/                   LDG.E.128.STRONG.GPU R16, desc[UR4][R6.64] ;
        /*0050*/                   FFMA R20, R21, R13, R20 ;
        /*0060*/                   FFMA R20, R21, R16, R20 ;
        /*0070*/               @P0 BRA 0x10 ;
        /*0080*/                   STL [R1], R20 ;
        /*0090*/                   STG.E desc[UR4][R6.64], R20 ;
        /*00a0*/                   BRA 0xa0 ;
"""


def test_a_listing_is_read() -> None:
    code = read_sass(LISTING)
    assert code.loads == {"LDG.E": 1, "LDG.E.128.STRONG.GPU": 3}
    assert (code.widest_load, code.in_flight, code.spills) == (128, 2, 1)


def test_nothing_is_compiled_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_for(compilations()[0], "sm_90")


SUMS = ["weighted_sum, bfloat16", "weighted_sum from near and far, bfloat16"]
# A kernel takes about a second, until what it became is found in Triton's cache. So by default one of each kind is compiled
# for one target, and for the others what is known to depend on them.
SOME = ["copy of rows", *SUMS, "weighted_sum, int4", "dot, bfloat16", "gather", "choose 32 of 1024", "row cache, touch",
        "row cache, claim", "row cache, lookup of 128"]  # fmt: skip
FEW = ["copy of rows of 1040", *SUMS]


def jobs() -> list[tuple[str, str]]:
    """Kernels and targets; all of them with MEMLANE_AOT=all."""
    everything = os.environ.get("MEMLANE_AOT") == "all"
    return [
        (one.name, target)
        for one in compilations()
        for target in DEFAULT_TARGETS
        if everything or one.name.startswith(tuple(SOME if target == "sm_90" else FEW))
    ]


@pytest.fixture(scope="module")
def reports() -> dict[tuple[str, str], dict[str, Any]]:
    """What kernels become; by a process of its own, since this one may interpret kernels."""
    done = subprocess.run(
        [sys.executable, "-m", "memlane.kernels.aot", "--json", *(f"--job={n}@{t}" for n, t in jobs())],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {(report["name"], report["target"]): report for report in json.loads(done.stdout)}


def test_kernels_compile_without_spills(reports: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert set(reports) == set(jobs())
    assert all(any(name.startswith(some) for name, _ in reports) for some in SOME)
    import triton

    # Launches are tuned with Triton 3.6; 3.9 puts a register or two aside and takes them back, once a program.
    most = 0 if triton.__version__.startswith("3.6.") else 4
    spilling = {key: report["code"]["spills"] for key, report in reports.items()}
    assert {key: spills for key, spills in spilling.items() if spills > most} == {}


@pytest.mark.parametrize("target", DEFAULT_TARGETS)
def test_copies_read_whole_vectors_four_at_a_time(
    reports: dict[tuple[str, str], dict[str, Any]], target: str
) -> None:
    """What the grid of a copy is computed from; also where rows start within a vector."""
    copies = [
        report["code"]
        for (name, of), report in reports.items()
        if name.startswith("copy of rows") and of == target
    ]
    assert copies
    assert all((code["widest_load"], code["in_flight"]) == (128, 4) for code in copies)


@pytest.mark.parametrize("target", DEFAULT_TARGETS)
@pytest.mark.parametrize("name", SUMS)
def test_sums_have_enough_under_way(
    reports: dict[tuple[str, str], dict[str, Any]], name: str, target: str
) -> None:
    report = reports[name, target]
    assert report["code"]["widest_load"] == 128
    assert report["code"]["in_flight"] >= 4
    thread = report["code"]["in_flight"] * 16
    assert report["warps_per_sm"] * 32 * thread >= 64 << 10  # bytes a multiprocessor; about 30 KB are needed


def test_additions_are_fused(reports: dict[tuple[str, str], dict[str, Any]]) -> None:
    """The interpreter cannot show it: one fma a number and nothing that rounds in between."""
    ptx = reports["weighted_sum, bfloat16", "sm_90"]["ptx"]
    assert "fma.rn.f32" in ptx
    assert not any(instruction in ptx for instruction in ("mul.f32", "add.f32", "mul.rn.f32", ".ftz"))
