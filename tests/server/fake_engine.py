"""An engine that speaks ipc and computes nothing: what it answers is written in the prompt.

    say:TEXT      the bytes of TEXT, then end of text        slow:TEXT    the same, 30 ms a token
    die           two tokens, then the process ends          hang         nothing, ever
    rows          fails: rows cannot be read                 rows-later   the same after three tokens
    silent        this process stops sending anything        anything     its own bytes again and again

Files in the model directory script the start: `fatal` (its content is the message), `crash` (exit status 7),
`delay` (seconds). What was received is appended to `received.log` there.
"""

from __future__ import annotations

import asyncio
import os
import sys
from itertools import cycle, islice
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from memlane import ipc
from memlane.config import EngineConfig
from memlane.errors import ErrorKind
from memlane.request import Failure, FinishReason, RequestTiming, TokenDelta, TokenLogprobs

EOS = 256
VOCAB = 260
TIMING = RequestTiming(queue=0.001, prefill=0.002, decode=0.003, prompt_tokens_computed=4)
ROWS = Failure(ErrorKind.ROWS_UNREADABLE, "table values: row 7 cannot be read: Input/output error")


class FakeEngine:
    def __init__(self, address: str, config: EngineConfig) -> None:
        self.directory = Path(config.model)
        self.max_model_len = config.max_model_len or 512
        if config.record_rows is not None:
            self.note(f"records rows in {config.record_rows}")
        self.socket = zmq.asyncio.Context().socket(zmq.PAIR)
        self.socket.connect(address)
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.silent = False
        self.generated = 0
        self.draining = asyncio.Event()

    def script(self, name: str) -> str | None:
        file = self.directory / name
        return file.read_text() if file.exists() else None

    def note(self, line: str) -> None:
        with (self.directory / "received.log").open("a") as log:
            log.write(line + "\n")

    async def send(self, message: ipc.FromEngine) -> None:
        if not self.silent:
            await self.socket.send(ipc.encode(message))

    async def delta(self, request_id: str, tokens: list[int], **more: object) -> None:
        self.generated += len(tokens)
        message = TokenDelta(request_id=request_id, token_ids=tokens, **more)  # type: ignore[arg-type]
        await self.send(ipc.Deltas([message]))

    async def run(self) -> None:
        await asyncio.sleep(float(self.script("delay") or 0))
        if (message := self.script("fatal")) is not None:
            await self.send(ipc.Fatal(message))
            await asyncio.sleep(0.1)
            os._exit(1)
        if self.script("crash") is not None:
            os._exit(7)
        await self.send(
            ipc.Ready(
                model_directory=str(self.directory),
                vocab_size=VOCAB,
                max_model_len=self.max_model_len,
                kv_blocks=100,
                block_size=16,
                choices=["placement: host (it is a toy)"],
                resident_bytes=2**20,
            )
        )
        heartbeat = asyncio.create_task(self.heartbeat())
        receiver = asyncio.create_task(self.receive())
        await self.draining.wait()
        receiver.cancel()
        await asyncio.gather(*self.tasks.values(), return_exceptions=True)
        heartbeat.cancel()
        await asyncio.sleep(0.05)

    async def heartbeat(self) -> None:
        while True:
            rows = float(10 * self.generated)
            table = ipc.TableStats(
                table="values",
                tier="disk",
                counters={
                    "requested_rows": rows,
                    "hits": rows / 2,
                    "bytes_read": 100 * rows,
                    "stall_seconds": 0.5,
                },
                gauges={"resident_bytes": 4096.0, "capacity_bytes": 8192.0},
            )
            await self.send(
                ipc.Stats(
                    running=len(self.tasks),
                    waiting=0,
                    kv_blocks_used=len(self.tasks),
                    kv_blocks_total=100,
                    prefix_cache_queries=8,
                    prefix_cache_hits=4,
                    preemptions=0,
                    steps=self.generated,
                    step_tokens=[1],
                    prompt_tokens=4,
                    generation_tokens=self.generated,
                    tables=[table],
                    resident_bytes=2**20,
                )
            )
            await asyncio.sleep(0.1)

    async def receive(self) -> None:
        while True:
            match ipc.decode_to_engine(await self.socket.recv()):
                case ipc.Add() as add:
                    self.note(f"add {add.request_id}")
                    task = asyncio.create_task(self.answer(add))
                    self.tasks[add.request_id] = task
                    task.add_done_callback(lambda _, i=add.request_id: self.tasks.pop(i, None))  # type: ignore[misc]
                case ipc.Abort() as abort:
                    for request_id in abort.request_ids:
                        self.note(f"abort {request_id}")
                        if request_id in self.tasks:
                            self.tasks[request_id].cancel()
                            await self.delta(request_id, [], finish_reason=FinishReason.ABORT, timing=TIMING)
                case ipc.Drain():
                    self.note("drain")
                    self.draining.set()

    async def answer(self, add: ipc.Add) -> None:
        text = bytes(t for t in add.prompt_token_ids if t < 256).decode("utf-8", "replace")
        command, _, argument = text.partition(":")
        name = add.request_id
        match command.removeprefix("<|user|>"):
            case "hang":
                await asyncio.sleep(1000)
            case "silent":
                self.silent = True
            case "die":
                await self.delta(name, [97, 98])
                await asyncio.sleep(0.2)
                os._exit(3)
            case "rows":
                await self.delta(name, [], finish_reason=FinishReason.ERROR, failure=ROWS)
            case "rows-later":
                for token in b"abc":
                    await self.delta(name, [token])
                await self.delta(name, [], finish_reason=FinishReason.ERROR, failure=ROWS)
            case "say" | "slow" as how:
                pause = 0.03 if how == "slow" else 0
                await self.tell(add, [*argument.encode(), EOS], pause, FinishReason.STOP)
            case _:
                await self.tell(add, list(islice(cycle(add.prompt_token_ids), 10_000)), 0, FinishReason.STOP)

    async def tell(self, add: ipc.Add, tokens: list[int], pause: float, end: FinishReason) -> None:
        limit = add.params.max_tokens or self.max_model_len
        if len(tokens) > limit:
            tokens, end = tokens[:limit], FinishReason.LENGTH
        for i, token in enumerate(tokens):
            await asyncio.sleep(pause)
            last = i + 1 == len(tokens)
            logprobs = None
            if add.params.logprobs is not None:
                top = [(t, -0.5 - t / 1000) for t in range(add.params.logprobs)]
                logprobs = [TokenLogprobs(token, -0.25, 1, top)]
            await self.delta(
                add.request_id,
                [token],
                logprobs=logprobs,
                finish_reason=end if last else None,
                cached_tokens=2 if i == 0 else None,
                timing=TIMING if last else None,
            )


async def main() -> None:
    loop = asyncio.get_running_loop()
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineConfig)
    loop.run_in_executor(None, lambda: (sys.stdin.buffer.read(), os._exit(0)))
    await FakeEngine(sys.argv[1], config).run()
    os._exit(0)


if __name__ == "__main__":
    asyncio.run(main())
