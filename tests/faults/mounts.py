"""File systems of a test's own: one that fails on command, an ext4 in a file, a memory file system of a given size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SERVER = Path(__file__).with_name("fuse_server.py")


class FaultyMount:
    """`path` shows the files of a folder; `rules` says how reads of them fail. See fuse_server.py."""

    def __init__(self, process: subprocess.Popen[bytes], path: Path) -> None:
        self.path = path
        self._process = process

    def rules(self, *rules: dict[str, Any]) -> None:
        self.tell({"rules": list(rules)})

    def release(self) -> None:
        """Reads that hang go on, and no others will hang."""
        self.tell({"rules": [], "release": True})

    def tell(self, command: dict[str, Any]) -> dict[str, int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command).encode() + b"\n")
        self._process.stdin.flush()
        answer: dict[str, int] = json.loads(self._process.stdout.readline())
        return answer

    @property
    def held(self) -> int:
        return self.tell({})["held"]


@contextmanager
def faulty_mount(folder: Path, mount_point: Path, *options: str) -> Iterator[FaultyMount]:
    """Skips the test where the machine has no /dev/fuse, or does not let us mount."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("FUSE is not available: no /dev/fuse")
    mount_point.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(SERVER), str(folder), str(mount_point), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        if not process.stdout.readline():
            said = process.stderr.read().decode()
            if "Operation not permitted" in said:
                pytest.skip(f"FUSE is not available: {said}")
            raise AssertionError(said)
        yield FaultyMount(process, mount_point)
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()  # by itself that fails the reads that hang
            process.wait()
            subprocess.run(["umount", "-l", str(mount_point)], check=False)
        process.stdout.close()
        process.stderr.close()


@contextmanager
def mounted(mount_point: Path, *arguments: str) -> Iterator[Path]:
    """`mount ARGUMENTS MOUNT_POINT` for a while. Skips the test where that is refused."""
    mount_point.mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", *arguments, str(mount_point)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"a file system of its own is not available: {done.stderr.strip()}")
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", str(mount_point)], check=True)
