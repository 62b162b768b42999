"""Compiles every Triton kernel of the package for GPUs that need not be there, and says what became of it.

    python -m memlane.kernels.aot --target sm_90 --match weighted_sum

A module with kernels to compile has `AOT: list[Compilation]`. Registers, spills and the reads that a thread has under way
before it waits for the first of them are read from the machine code.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Compilation", "MachineCode", "Report", "compilations", "compile_for", "read_sass"]

DEFAULT_TARGETS = ("sm_80", "sm_90", "sm_100")


@dataclass(frozen=True)
class Compilation:
    """A kernel with arguments it will be launched with.

    name: of this compilation, unique. kernel: a function under @triton.jit. signature: type of each argument that is no
    constant, as Triton spells it ("*bf16", "*i32", "i32"); pointers are taken to be multiples of 16.
    maxnreg: registers of a thread, None to leave it to the compiler.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int
    maxnreg: int | None = None


class MachineCode(NamedTuple):
    """What a listing of machine code (SASS) shows."""

    loads: dict[str, int]  # loads from global memory: instruction, how many in the listing
    widest_load: int  # bits one thread loads at once
    in_flight: int  # most loads of that width that a thread has under way when it first needs one, within a loop if any
    spills: int  # instructions that store to or load from local memory


class Report(NamedTuple):
    """One kernel compiled for one target."""

    name: str
    target: str
    registers: int
    shared_bytes: int
    warps_per_sm: int  # that registers leave room for
    code: MachineCode
    ptx: str


def compilations() -> list[Compilation]:
    """What the modules of memlane.kernels list in AOT."""
    import memlane.kernels as package

    names = (module.name for module in pkgutil.iter_modules(package.__path__) if module.name != "aot")
    modules = [importlib.import_module(f"{package.__name__}.{name}") for name in names]
    found = [one for module in modules for one in getattr(module, "AOT", ())]
    assert len({one.name for one in found}) == len(found), "two compilations of the same name"
    return found


def compile_for(one: Compilation, target: str) -> Report:
    """Compiles for `target` ("sm_90"). RuntimeError under Triton's interpreter; whatever Triton raises if it cannot."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if triton.knobs.runtime.interpret:
        raise RuntimeError("Triton is told to interpret kernels (TRITON_INTERPRET): nothing can be compiled")
    names = one.kernel.arg_names
    unknown = {*one.signature, *one.constants} ^ set(names)
    if unknown:
        raise ValueError(f"{one.name}: arguments do not match the kernel's: {sorted(unknown)}")
    source = ASTSource(
        fn=one.kernel,
        signature={name: one.signature.get(name, "constexpr") for name in names},
        constexprs=dict(one.constants),
        attrs={
            (at,): [["tt.divisibility", 16]]
            for at, name in enumerate(names)
            if one.signature.get(name, "").startswith("*")
        },
    )
    options: dict[str, Any] = {"num_warps": one.num_warps}
    if one.maxnreg is not None:
        options["maxnreg"] = one.maxnreg
    compiled = triton.compile(
        source, target=GPUTarget("cuda", int(target.removeprefix("sm_")), 32), options=options
    )
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+)", done.stdout + done.stderr)
    assert found, done.stderr
    registers = int(found[1])
    return Report(
        one.name,
        target,
        registers,
        compiled.metadata.shared,
        _warps_per_sm(registers, one.num_warps),
        read_sass(done.stdout),
        compiled.asm["ptx"],
    )


def _warps_per_sm(registers: int, num_warps: int) -> int:
    """65,536 registers, handed out to warps in pieces of 256; at most 64 warps and 32 programs."""
    warps = 65536 // (-(-registers * 32 // 256) * 256)
    return min(warps // num_warps, 32, 64 // num_warps) * num_warps


class _Instruction(NamedTuple):
    address: int
    name: str  # with its modifiers: LDG.E.128.CONSTANT
    operands: str


def read_sass(listing: str) -> MachineCode:
    """Reads what `cuobjdump -sass` prints of one kernel."""
    code = list(_instructions(listing))
    loads: dict[str, int] = {}
    for instruction in code:
        if instruction.name.startswith("LDG"):
            loads[instruction.name] = loads.get(instruction.name, 0) + 1
    widest = max((_bits(name) for name in loads), default=0)
    bodies = [body for body in _loops(code) if any(_is_load(one, widest) for one in body)] or [code]
    return MachineCode(
        loads=loads,
        widest_load=widest,
        in_flight=max(_most_under_way(body, widest) for body in bodies),
        spills=sum(instruction.name.startswith(("LDL", "STL")) for instruction in code),
    )


def _instructions(listing: str) -> Iterator[_Instruction]:
    #      /*04a0*/                   @!P0 LDG.E.128.STRONG.GPU R28, desc[UR10][R28.64] ;    /* 0x... */
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
    for match in re.finditer(pattern, listing):
        yield _Instruction(int(match[1], 16), match[2], match[3])


def _loops(code: Sequence[_Instruction]) -> Iterator[Sequence[_Instruction]]:
    """What lies between a branch backwards and where it leads to. The endless loop after the end is none."""
    for at, instruction in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)\s*$", instruction.operands)
        if not instruction.name.startswith("BRA") or not target or int(target[1], 16) >= instruction.address:
            continue
        yield [one for one in code[: at + 1] if one.address >= int(target[1], 16)]


def _is_load(instruction: _Instruction, bits: int) -> bool:
    return instruction.name.startswith("LDG") and _bits(instruction.name) == bits


def _bits(load: str) -> int:
    for mark, bits in ((".128", 128), (".64", 64), (".U16", 16), (".S16", 16), (".U8", 8), (".S8", 8)):
        if mark in load:
            return bits
    return 32


def _most_under_way(code: Sequence[_Instruction], bits: int) -> int:
    """Walks straight through: a load is under way until a register it writes is read; older loads are there by then."""
    most = 0
    waiting: list[set[int]] = []
    for instruction in code:
        written, _, read = instruction.operands.partition(",")
        if instruction.name.startswith("ST"):
            read = instruction.operands
        used = {int(number) for number in re.findall(r"\bR(\d+)", read)}
        for at in reversed(range(len(waiting))):
            if waiting[at] & used:
                most = max(most, len(waiting))
                del waiting[: at + 1]
                break
        if _is_load(instruction, bits):
            first = re.search(r"\bR(\d+)", written)
            if first:
                waiting.append(set(range(int(first[1]), int(first[1]) + max(1, bits // 32))))
    return max(most, len(waiting))


def _compile_one(job: tuple[str, str]) -> Report:
    name, target = job
    return compile_for(next(one for one in compilations() if one.name == name), target)


def main() -> None:
    """Compiles what is asked for and prints one line each, or all of it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m memlane.kernels.aot", description=main.__doc__)
    parser.add_argument("--target", action="append", help="such as sm_90; may be repeated")
    parser.add_argument("--match", default="", help="only those with this in their name")
    parser.add_argument("--job", action="append", help="NAME@TARGET, no others; may be repeated")
    parser.add_argument("--json", action="store_true", help="print JSON, with the PTX")
    options = parser.parse_args()
    targets = options.target or list(DEFAULT_TARGETS)
    jobs = [(one.name, target) for one in compilations() if options.match in one.name for target in targets]
    if options.job:
        jobs = [(name, target) for name, _, target in (job.rpartition("@") for job in options.job)]
    with ProcessPoolExecutor() as pool:
        reports = list(pool.map(_compile_one, jobs))
    if options.json:
        print(json.dumps([{**report._asdict(), "code": report.code._asdict()} for report in reports]))
        return
    print(f"{'kernel':40} {'target':7} registers  warps/SM  shared  spills  loads in flight")
    for report in reports:
        code = report.code
        print(
            f"{report.name:40} {report.target:7} {report.registers:9} {report.warps_per_sm:9}"
            f" {report.shared_bytes:7} {code.spills:7}  {code.in_flight} of {code.widest_load} bits"
        )


if __name__ == "__main__":
    main()
