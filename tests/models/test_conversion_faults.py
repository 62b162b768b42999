"""Conversions that the system stops: a full disk, a limit, a kill. The destination stays what it was."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from golden import DATA

from memlane.checkpoints import check, convert, resolve
from memlane.errors import CheckpointError

SMLM, LINGUA = DATA / "smlm" / "q4" / "model", DATA / "lingua" / "a_memplus"


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def test_a_full_disk(tmp_path: Path) -> None:
    """On a small file system of its own, mounted where no other process sees it."""
    program = f"""
from pathlib import Path
from memlane.checkpoints import convert
from memlane.errors import CheckpointError
small = Path({str(tmp_path)!r})
(small / "filler").write_bytes(bytes(700_000))
out = convert({str(LINGUA)!r}, small / "out", rows="int4", progress=False)
before = {{file.name: file.read_bytes() for file in out.iterdir()}}
try:
    convert({str(SMLM)!r}, out, rows="float32", overwrite=True, progress=False)
except CheckpointError as error:
    assert "cannot be written: No space left on device" in str(error), error
else:
    raise AssertionError("there was room")
assert {{file.name: file.read_bytes() for file in out.iterdir()}} == before
assert sorted(file.name for file in small.iterdir()) == ["filler", "out"]
(small / "filler").unlink()
convert({str(SMLM)!r}, out, overwrite=True, progress=False)
print("done")
"""
    mount = f"mount -t tmpfs -o size=1200k none {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("a file system of its own is not available")
    command = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$0" "$@"', sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """Stops a write in the middle of the table, without a file system of its own."""
    out = convert(LINGUA, tmp_path / "out", progress=False)
    before = contents(out)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, old[1]))  # Python ignores the signal: writes fail
    try:
        with pytest.raises(CheckpointError, match="out: cannot be written: File too large"):
            convert(SMLM, out, rows="float32", overwrite=True, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert contents(out) == before
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def killed_while_converting(call: str, environment: dict[str, str]) -> None:
    """Runs `call` in another process and kills that once the table is written and nothing after it."""
    program = f"""
import time, memlane.checkpoints.converter as converter
from memlane.checkpoints import convert, resolve
write = converter._write_table
converter._write_table = lambda *a: (write(*a), print("written", flush=True), time.sleep(60))
{call}
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL


def test_kill_9(tmp_path: Path) -> None:
    killed_while_converting(f"convert({str(SMLM)!r}, {str(tmp_path / 'out')!r}, progress=False)", {})
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    assert (left / "table-values.safetensors").exists()
    assert not (tmp_path / "out").exists()
    with pytest.raises(CheckpointError, match="unfinished model directory"):
        check(left, progress=False)
    assert check(convert(SMLM, tmp_path / "out", progress=False), progress=False).clean


def test_kill_9_in_the_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"MEMLANE_CACHE": str(tmp_path)}
    killed_while_converting(f"resolve({str(SMLM)!r}, progress=False)", environment)
    (left,) = (tmp_path / "models").glob(".*.partial-*")
    assert (left / "table-values.safetensors").exists()
    monkeypatch.setenv("MEMLANE_CACHE", str(tmp_path))
    made = resolve(SMLM, progress=False)
    assert not left.exists()
    assert [file.name for file in (tmp_path / "models").iterdir() if not file.name.endswith(".lock")] == [
        made.name
    ]
    assert check(made, progress=False).clean
