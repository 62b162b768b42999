"""The wire between the process that holds text and the process that holds tensors.

One ZeroMQ PAIR socket per engine process, on a Unix socket in a private directory; msgpack frames, typed
both ways. The HTTP side binds, starts the engine and waits for `Ready`; a new engine gets a new socket, so
nothing of a dead one can be mistaken for the living.

            Add, Abort, Drain                      client → engine
            Ready, Deltas, Stats, Fatal            engine → client

The engine is started as `python -m memlane.worker ADDRESS` and finds its EngineConfig as one line of JSON
on standard input. It ignores SIGINT and SIGTERM, which are for its client to handle; it ends by Drain, by
SIGKILL, or with its client.
"""

from __future__ import annotations

import msgspec

from memlane.request import SamplingParams, TokenDelta


class Add(msgspec.Struct, frozen=True, tag="add", kw_only=True):
    """Accept one sequence. The engine answers with deltas until one of them carries a finish reason."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams  # with n = 1: choices are separate sequences that share cached prefix blocks


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Forget these sequences. Unknown ids are ignored: the end of a request may cross its cancellation.

    Each one that was still alive ends with a delta whose finish reason is ABORT.
    """

    request_ids: list[str]


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Finish what has been accepted, then exit with status 0."""


class Ready(msgspec.Struct, frozen=True, tag="ready", kw_only=True):
    """The engine has loaded its model and takes requests. Facts that the HTTP side needs to check them."""

    model_directory: str  # where tokenizer.json and config.json lie (a converted model's cache directory)
    vocab_size: int
    max_model_len: int
    kv_blocks: int
    block_size: int
    choices: list[str]  # one line for each automatic choice made at start, with its reason
    resident_bytes: int


class Deltas(msgspec.Struct, frozen=True, tag="deltas"):
    """What one engine step produced."""

    deltas: list[TokenDelta]


class TableStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters of one value table since it was opened. Rows are requested by token and slot of the top-k;
    unique rows are counted per batch. `tier` is where misses are read from."""

    table: str
    tier: str
    counters: dict[
        str, float
    ]  # ever-growing: calls, requested_rows, unique_rows, hits, misses, bytes_read, ...
    gauges: dict[str, float]  # present state: resident_bytes, capacity_bytes, used_slots, in_flight, ...
    info: dict[str, str] = {}  # how it is served: placement, backend, policy


class Stats(msgspec.Struct, frozen=True, tag="stats", kw_only=True):
    """State of the engine. Sent at least once a second while the engine lives: it is also the heartbeat."""

    running: int
    waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    prefix_cache_queries: int  # tokens, since start
    prefix_cache_hits: int
    preemptions: int
    steps: int
    step_tokens: list[int]  # tokens scheduled in each step since the last Stats
    prompt_tokens: int  # computed, since start
    generation_tokens: int
    tables: list[TableStats]
    resident_bytes: int
    step_seconds: float = 0.0  # age of the step under way: large when it is stuck, though the process lives


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The engine cannot start or go on; it exits after sending this."""

    message: str


ToEngine = Add | Abort | Drain
FromEngine = Ready | Deltas | Stats | Fatal

_encoder = msgspec.msgpack.Encoder()
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    return _encoder.encode(message)


def decode_to_engine(frame: bytes) -> ToEngine:
    """Raises msgspec.DecodeError on a frame that is not one of ours."""
    return _to_engine.decode(frame)


def decode_from_engine(frame: bytes) -> FromEngine:
    """Raises msgspec.DecodeError on a frame that is not one of ours."""
    return _from_engine.decode(frame)
