"""Every option once: name, type, default, limits and one line of help.

The command line, `--help`, the environment names (`MEMLANE_<FIELD>`) and docs/cli.md are generated from
these structs. They are built once, frozen, and refuse unknown keys.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from memlane.errors import ConfigError

Device = Literal["auto", "cpu", "cuda"]
Placement = Literal["auto", "device", "host", "disk"]
TableIO = Literal["auto", "direct", "buffered"]
CachePolicy = Literal["lru", "sieve", "s3fifo", "tinylfu"]
AttentionBackend = Literal["auto", "flashinfer", "flash-attn", "varlen", "sdpa"]
WarmStart = Literal["auto", "saved", "hot-rows", "off"]
Dtype = Literal["auto", "float32", "bfloat16"]
Help = Meta  # Annotated[type, Help(description="…")] reads as what it is

_PositiveInt = Annotated[int, Meta(ge=1)]


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the engine needs to know to load one model and run it."""

    model: Annotated[str, Help(description="model directory or a checkpoint that `memlane convert` reads")]
    tokenizer: Annotated[str | None, Help(description="tokenizer.json, when the checkpoint brings none")] = (
        None
    )
    device: Annotated[Device, Help(description="what computes; auto takes a GPU where there is one")] = "auto"
    placement: Annotated[
        Placement,
        Help(
            description="where value tables live: memory of the GPU (device), RAM (host), the file on disk (disk)"
        ),
    ] = "auto"
    row_cache: Annotated[
        str,
        Help(description="RAM for cached rows of tables on disk: bytes (64MiB) or part of the tables (25%)"),
    ] = "25%"
    gpu_row_cache: Annotated[
        str,
        Help(
            description="GPU memory for cached rows of tables elsewhere: bytes, part of the tables, or auto: see docs/gpu.md"
        ),
    ] = "auto"
    gpu_memory_utilization: Annotated[
        Annotated[float, Meta(gt=0, le=1)],
        Help(description="part of the GPU's memory to use, weights, tables, caches and all"),
    ] = 0.9
    cuda_graphs: Annotated[bool, Help(description="replay decode steps as CUDA graphs on a GPU")] = True
    attention_backend: Annotated[
        AttentionBackend, Help(description="what computes attention on a GPU; auto takes the first there is")
    ] = "auto"
    async_scheduling: Annotated[
        bool, Help(description="plan the next step while a GPU runs the current one")
    ] = True
    cache_policy: Annotated[
        CachePolicy, Help(description="which cached rows make way for others; see `memlane cache-sim`")
    ] = "lru"
    pin_rows: Annotated[
        str,
        Help(
            description="part of the row cache, or bytes, for the hottest rows of hot_rows.npy: never evicted"
        ),
    ] = "0%"
    table_io: Annotated[
        TableIO,
        Help(description="how rows on disk are read: past the page cache (direct), or through it (buffered)"),
    ] = "auto"
    read_timeout: Annotated[
        Annotated[float, Meta(gt=0)],
        Help(description="seconds after which a read of rows counts as failed"),
    ] = 30.0
    warm_start: Annotated[
        WarmStart,
        Help(
            description="rows the cache begins with: those of the last run (saved), hot_rows.npy, or either"
        ),
    ] = "auto"
    warm_wait: Annotated[bool, Help(description="be ready only when the cache is warm")] = False
    dtype: Annotated[Dtype, Help(description="type of the dense weights and activations")] = "auto"
    max_model_len: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        Help(description="longest prompt plus answer, in tokens [model's own]"),
    ] = None
    max_num_seqs: Annotated[_PositiveInt, Help(description="most sequences running at once")] = 64
    max_num_batched_tokens: Annotated[
        _PositiveInt, Help(description="most tokens computed in one step, prompts and answers together")
    ] = 2048
    kv_cache: Annotated[
        str,
        Help(
            description="memory for the KV cache: bytes (1GiB), or auto: what max_num_seqs can fill, to 1GiB in RAM"
        ),
    ] = "auto"
    block_size: Annotated[
        _PositiveInt | None,
        Help(description="tokens in one KV block [16, or what attention on the GPU wants]"),
    ] = None
    prefix_caching: Annotated[bool, Help(description="reuse KV blocks of equal prompt beginnings")] = True
    threads: Annotated[_PositiveInt | None, Help(description="CPU threads for computing [all cores]")] = None
    seed: Annotated[
        Annotated[int, Meta(ge=0)], Help(description="seed of requests that bring none of their own")
    ] = 0
    record_rows: Annotated[
        str | None,
        Help(description="new file that the rows asked for are recorded in, for `memlane cache-sim`"),
    ] = None
    record_rows_limit: Annotated[str, Help(description="size at which recording rows ends")] = "1GiB"

    def __post_init__(self) -> None:
        """Sizes that cannot be read are refused here, before anything is loaded."""
        parse_bytes(self.row_cache, whole=0, option="row_cache")
        parse_bytes(self.pin_rows, whole=0, option="pin_rows")
        parse_bytes(self.record_rows_limit, option="record_rows_limit")
        if self.kv_cache != "auto":
            parse_bytes(self.kv_cache, option="kv_cache")
        if self.gpu_row_cache != "auto":
            parse_bytes(self.gpu_row_cache, whole=0, option="gpu_row_cache")


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the HTTP side needs to know."""

    host: Annotated[str, Help(description="address to listen on")] = "127.0.0.1"
    port: Annotated[
        Annotated[int, Meta(ge=0, le=65535)], Help(description="port to listen on; 0 takes a free one")
    ] = 8000
    served_model_name: Annotated[
        str | None, Help(description="name clients use in `model` [the directory's name]")
    ] = None
    api_key: Annotated[
        str | None, Help(description="bearer token that clients must send; better set in MEMLANE_API_KEY")
    ] = None
    chat_template: Annotated[
        str | None, Help(description="file with a Jinja chat template in place of the model's own")
    ] = None
    max_queued_requests: Annotated[
        _PositiveInt, Help(description="requests waiting or running before new ones are refused with 429")
    ] = 256
    max_body_bytes: Annotated[_PositiveInt, Help(description="largest request body in bytes")] = 4 * 2**20
    shutdown_timeout: Annotated[
        Annotated[float, Meta(ge=0)],
        Help(description="seconds that running requests get to finish on SIGTERM"),
    ] = 30.0
    engine_timeout: Annotated[
        Annotated[float, Meta(gt=0)],
        Help(description="seconds without a sign of life before the engine is restarted"),
    ] = 120.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Help(description="least severe messages to log")
    ] = "info"


ConfigT = TypeVar("ConfigT", bound=msgspec.Struct)


class Option(msgspec.Struct, frozen=True):
    """One field of a config, as the command line and the docs present it."""

    name: str
    flag: str
    environment: str
    type: Any
    choices: tuple[str, ...] | None
    optional: bool
    required: bool
    default: Any
    help: str


def options(config: type[msgspec.Struct]) -> list[Option]:
    """The fields of a config struct in their order."""
    hints = get_type_hints(config, include_extras=True)
    found = []
    for field in msgspec.structs.fields(config):
        annotation = hints[field.name]
        description = next(m.description for m in annotation.__metadata__ if m.description)
        kind, optional = _bare(annotation)
        found.append(
            Option(
                name=field.name,
                flag="--" + field.name.replace("_", "-"),
                environment="MEMLANE_" + field.name.upper(),
                type=str if get_origin(kind) is Literal else kind,
                choices=get_args(kind) if get_origin(kind) is Literal else None,
                optional=optional,
                required=field.default is msgspec.NODEFAULT,
                default=None if field.default is msgspec.NODEFAULT else field.default,
                help=description,
            )
        )
    return found


def _bare(annotation: Any) -> tuple[Any, bool]:
    """Strip Annotated and `| None`; say whether None was allowed."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    alternatives = [a for a in get_args(annotation) if a is not type(None)]
    if type(None) in get_args(annotation):
        return _bare(alternatives[0])[0], True
    return annotation, False


def build(
    config: type[ConfigT], given: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> ConfigT:
    """Make a config from explicit values, then the environment, then defaults.

    Raises ConfigError naming the option and where its bad value came from.
    """
    environment = os.environ if environment is None else environment
    values: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    origin = {k: f"--{k.replace('_', '-')}" for k in values}
    for option in options(config):
        if option.name not in values and environment.get(option.environment):
            values[option.name] = environment[option.environment]
            origin[option.name] = option.environment
    try:
        # lax: environment values are strings, "8000" is a port
        return msgspec.convert(values, config, strict=False)
    except msgspec.ValidationError as error:
        message = str(error)
        where = re.search(r"\$\.(\w+)", message)
        source = origin.get(where.group(1), where.group(1)) if where else config.__name__
        raise ConfigError(f"{source}: {message.split(' - at')[0]}") from error


_UNITS = {"": 1, "b": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "t": 1000**4}
_UNITS |= {u + "b": n for u, n in _UNITS.items() if u and u != "b"}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def parse_bytes(text: str, *, whole: int | None = None, option: str = "size") -> int:
    """Bytes from `64MiB`, `1GB`, `4096`, or `25%` of `whole`. Raises ConfigError on anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*|%)\s*", text)
    unit = match.group(2).lower() if match else ""
    if match and unit == "%" and whole is not None and float(match.group(1)) <= 100:
        return int(whole * float(match.group(1)) / 100)
    if match and unit in _UNITS:
        return int(float(match.group(1)) * _UNITS[unit])
    percent = " or a percentage (25%)" if whole is not None else ""
    raise ConfigError(f"{option}: {text!r} is not a size; write bytes (4096, 64MiB, 1GB){percent}")
