"""The life of the server process: bind early, be ready late, drain on SIGTERM, exit with a meaning.

exit status 0   drained          1   the engine cannot work, or a second signal cut the drain short
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence

import uvicorn

from memlane import ipc
from memlane.config import EngineConfig, ServerConfig, options
from memlane.errors import ConfigError
from memlane_server.app import make_app
from memlane_server.context import Context
from memlane_server.engine_client import EngineClient, EngineStartError
from memlane_server.engine_process import WORKER
from memlane_server.metrics import Metrics
from memlane_server.model import model_name

log = logging.getLogger(__name__)

SECRET = ("api_key",)
# Seconds that answers get to reach their clients once the engine has ended.
FLUSH = 5


class _Http(uvicorn.Server):
    """uvicorn without its signal handlers: ours decide when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(engine: EngineConfig, config: ServerConfig, command: Sequence[str] = WORKER) -> int:
    """Serve until told to stop; returns the exit status. Raises ConfigError before anything is started."""
    if config.api_key is not None and not config.api_key.strip():
        raise ConfigError("--api-key: is empty, which would let everybody in; leave it out for no key")
    _set_up_logging(config.log_level)
    if command is WORKER:
        command = (*WORKER, "--log-level", config.log_level)
    listener = bind(config.host, config.port)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(_serve(engine, config, listener, command))


def bind(host: str, port: int) -> socket.socket:
    """Listen before the model is loaded: a taken port is found out at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener


async def _serve(
    engine: EngineConfig, config: ServerConfig, listener: socket.socket, command: Sequence[str]
) -> int:
    begun = time.monotonic()
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    _log_config(engine, config)
    here = Context(engine, config, Metrics(config.served_model_name or model_name(engine.model)))

    def on_ready(ready: ipc.Ready) -> None:
        restarted = here.model is not None
        here.model_loaded(ready)
        _log_ready(here, ready, url, None if restarted else time.monotonic() - begun)

    here.client = EngineClient(
        engine,
        here.metrics,
        on_ready=on_ready,
        max_sequences=config.max_queued_requests,
        silence=config.engine_timeout,
        command=command,
    )
    http = _Http(
        uvicorn.Config(
            make_app(here),
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=FLUSH,
            lifespan="off",
        )
    )
    stop = _Signals()
    http_task = asyncio.create_task(http.serve(sockets=[listener]))
    engine_task = asyncio.create_task(here.client.run())
    log.info("listening on %s; loading %s", url, engine.model)
    status = await _until_over(here.client, engine_task, http_task, stop, config.shutdown_timeout)
    http.should_exit = True
    http.force_exit = stop.count > 1
    await http_task
    log.info("stopped")
    return status


async def _until_over(
    client: EngineClient,
    engine_task: asyncio.Task[None],
    http_task: asyncio.Task[None],
    stop: _Signals,
    patience: float,
) -> int:
    first = asyncio.create_task(stop.first.wait())
    await asyncio.wait({engine_task, http_task, first}, return_when=asyncio.FIRST_COMPLETED)
    first.cancel()
    if not stop.first.is_set() and engine_task.done():
        return _engine_failed(engine_task)
    log.info("shutting down: %d sequences get %.0f s to finish", client.in_flight, patience)
    draining = asyncio.create_task(client.drain(patience))
    second = asyncio.create_task(stop.second.wait())
    await asyncio.wait({draining, second}, return_when=asyncio.FIRST_COMPLETED)
    cut_short = not draining.done()
    if cut_short:
        log.warning("second signal: stopping at once")
        draining.cancel()
        client.kill()
    second.cancel()
    await asyncio.gather(draining, engine_task, return_exceptions=True)
    return 1 if cut_short else 0


def _engine_failed(engine_task: asyncio.Task[None]) -> int:
    try:
        engine_task.result()
    except EngineStartError as error:
        log.error("the engine cannot start: %s", error)
    return 1


class _Signals:
    """SIGTERM and SIGINT, counted: the first asks to drain, the second to stop at once."""

    def __init__(self) -> None:
        self.count = 0
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._received)

    def _received(self) -> None:
        self.count += 1
        (self.first if self.count == 1 else self.second).set()


def _set_up_logging(level: str) -> None:
    logging.basicConfig(
        stream=sys.stderr,
        level=level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    # Its news (started, stopped) are ours, said better.
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def _log_config(engine: EngineConfig, config: ServerConfig) -> None:
    for part in (engine, config):
        values = []
        for option in options(type(part)):
            value = getattr(part, option.name)
            shown = "(set)" if option.name in SECRET and value is not None else value
            values.append(f"{option.name}={shown}")
        log.info("%s: %s", type(part).__name__, " ".join(values))


def _log_ready(here: Context, ready: ipc.Ready, url: str, seconds: float | None) -> None:
    """`seconds`: since the server started; None when the engine was restarted."""
    for line in ready.choices:
        log.debug("chosen: %s", line)  # the engine, which shares our stderr, has told this already
    assert here.model is not None
    if here.model.tokenizer is None:
        log.warning("the model has no tokeniser: prompts must be token ids, answers hold no text")
    log.info(
        "%s: model %r, %d tokens of context, engine resident memory %.0f MiB",
        "ready again" if seconds is None else f"ready in {seconds:.1f} s",
        here.model.name,
        ready.max_model_len,
        ready.resident_bytes / 2**20,
    )
    log.info("serving at %s/v1 (pid %d)", url, os.getpid())


def _loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not made for this platform
        return None
    return uvloop.Loop
