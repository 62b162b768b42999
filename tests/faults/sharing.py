"""A process that shares a table in memory: it does what it is told through a pipe, and says what it does."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from memlane.tables import TableError, TableLayout, host_rows
from memlane.tables.source import FileSource

PIECES = 10  # that the table is loaded in
STRIDE = 272

# Processes are forked from one that has imported what they need, and has no threads: 30 ms in place of 3 s.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["memlane.tables.host_rows"])


def digest(layout: TableLayout) -> str:
    """Of the rows in the file."""
    content = layout.path.read_bytes()[layout.offset : layout.offset + layout.nbytes]
    return hashlib.sha256(content).hexdigest()


class _Slow(FileSource):
    """Asks before each piece."""

    pipe: Connection

    def start(self, *arguments: Any) -> Any:
        self.pipe.send("piece")
        if not self.pipe.recv():
            raise RuntimeError("told to stop")
        return super().start(*arguments)


def _use(pipe: Connection, path: Path, shm: Path) -> None:
    layout = TableLayout.from_safetensors(path, "values")
    host_rows._LOAD_BYTES = layout.nbytes // PIECES
    source = _Slow(layout)
    source.pipe = pipe
    pipe.send("opens")
    try:
        rows = host_rows.HostRows(layout, source, stride=STRIDE, shared=True, directory=shm)
    except TableError as error:
        pipe.send(str(error))
        return
    content = np.ascontiguousarray(rows.memory.data[:, : layout.stride].numpy())
    pipe.send(("loaded" if rows.loaded else "found", hashlib.sha256(content).hexdigest()))
    while (command := pipe.recv()) != "close":
        assert command == "fork"
        child = os.fork()
        if child == 0:
            del rows  # as at the child's end
            os._exit(0)
        pipe.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    rows.close()


class User:
    """The process, as its test sees it."""

    def __init__(self, layout: TableLayout, shm: Path) -> None:
        self.pipe, theirs = FORKS.Pipe()
        self.process = FORKS.Process(target=_use, args=(theirs, layout.path, shm), daemon=True)
        self.process.start()
        theirs.close()
        assert self.hear() == "opens"

    def hear(self, seconds: float = 30.0) -> Any:
        """What it says next."""
        assert self.pipe.poll(seconds), "it says nothing"
        return self.pipe.recv()

    def is_quiet(self, seconds: float = 0.2) -> bool:
        return not self.pipe.poll(seconds)

    def load(self, pieces: int) -> None:
        """Has it load so many pieces and ask for the next."""
        for _ in range(pieces):
            assert self.hear() == "piece"
            self.pipe.send(True)

    def outcome(self) -> Any:
        """("loaded" or "found", digest), or the text of the error, whatever is left to be loaded."""
        while (said := self.hear()) == "piece":
            self.pipe.send(True)
        return said

    def close(self) -> None:
        self.pipe.send("close")
        self.process.join(30)
        assert self.process.exitcode == 0

    def kill(self) -> None:
        """As the kernel does when memory runs out."""
        self.process.kill()
        self.process.join()
        self.pipe.close()
