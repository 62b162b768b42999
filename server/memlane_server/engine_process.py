"""One engine process: started, spoken to, watched, ended. Knows nothing about requests."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from memlane import ipc
from memlane.config import EngineConfig

WORKER = (sys.executable, "-m", "memlane.worker")

# After the process has ended, its last messages may still be on their way through the socket.
_LAST_WORDS = 0.2

_LONGEST_PARENT = 80


class EngineProcess:
    """Use as an async context manager: leaving it ends the process, whatever state it is in.

    All methods are for the event loop's thread.
    """

    def __init__(self, config: EngineConfig, command: Sequence[str] = WORKER) -> None:
        self._config = config
        self._command = command
        # Mode 0700: the socket is ours alone. Its whole path may have about 100 bytes.
        parent = None if len(tempfile.gettempdir()) < _LONGEST_PARENT else "/tmp"
        self._directory = Path(tempfile.mkdtemp(prefix="memlane-", dir=parent))
        self._context = zmq.asyncio.Context()
        self._receiving: asyncio.Future[bytes] | None = None

    async def __aenter__(self) -> EngineProcess:
        self._socket = self._context.socket(zmq.PAIR)
        # No limits: admission bounds what is sent, and a full pipe would stop the event loop.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        address = f"ipc://{self._directory}/engine"
        self._socket.bind(address)
        # Its own session: Ctrl-C in a terminal is for the server, which then drains the engine.
        self._process = await asyncio.create_subprocess_exec(
            *self._command, address, stdin=asyncio.subprocess.PIPE, start_new_session=True
        )
        self._exited = asyncio.ensure_future(self._process.wait())
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(self._config) + b"\n")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        await self._exited
        if self._receiving is not None:
            self._receiving.cancel()
        self._socket.close()
        self._context.term()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: ipc.ToEngine) -> None:
        self._socket.send(ipc.encode(message))

    def kill(self) -> None:
        """SIGKILL: the engine holds nothing that must be put in order."""
        if self._process.returncode is None:
            self._process.kill()

    async def receive(self, silence: float | None = None) -> ipc.FromEngine | None:
        """The next message; None once the process has ended and all it said was received.

        Raises TimeoutError after `silence` seconds without a message.
        """
        if self._receiving is None:
            self._receiving = asyncio.ensure_future(self._socket.recv())
        either: set[asyncio.Future[Any]] = {self._receiving, self._exited}
        await asyncio.wait(either, timeout=silence, return_when=asyncio.FIRST_COMPLETED)
        if not self._receiving.done():
            if not self._exited.done():
                raise TimeoutError
            await asyncio.wait({self._receiving}, timeout=_LAST_WORDS)
            if not self._receiving.done():
                return None
        frame, self._receiving = self._receiving.result(), None
        return ipc.decode_from_engine(frame)

    async def ended(self) -> None:
        """Wait until the process has ended by itself."""
        await asyncio.wait({self._exited})

    def obituary(self) -> str:
        """How the process ended, for people."""
        code = self._process.returncode
        if code is None:
            return "the engine process stopped answering"
        if code < 0:
            return f"the engine process was killed by {signal.Signals(-code).name}"
        return f"the engine process ended with exit status {code}"
