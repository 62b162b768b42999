"""The sampling fields that completions and chat share, and how they become SamplingParams."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from memlane.errors import RequestError
from memlane.request import SamplingParams
from memlane_server.protocol.parsing import RequestBody

# A list's first bad element ends its checking: a million bad ones must not become a million errors.
TokenIds = Annotated[list[int], Field(fail_fast=True)]
Strings = Annotated[list[str], Field(fail_fast=True)]


class StreamOptions(RequestBody):
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool | None = None  # padding against traffic analysis: accepted, adds nothing


class GenerationRequest(RequestBody):
    """Fields of every request that generates. None means: the model's default, else OpenAI's."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | Strings | None = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int | None = None
    skip_special_tokens: bool = True
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None

    ignored = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key"})
    no_op: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "store": (False,),
        "service_tier": ("auto", "default"),
        "prompt_logprobs": (),
        "truncate_prompt_tokens": (),
        "structured_outputs": (),
        "allowed_token_ids": (),
        "bad_words": ([],),
        "use_beam_search": (False,),
        "length_penalty": (1, 1.0),
        "spaces_between_special_tokens": (True,),
        "return_tokens_as_token_ids": (False,),
        "response_format": ({"type": "text"},),
        "priority": (0,),
        "cache_salt": (),
    }

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def wants_running_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def check_stream_options(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options needs stream to be true", param="stream_options")


def sampling_params(
    request: GenerationRequest,
    defaults: Mapping[str, Any],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    vocab_size: int,
) -> SamplingParams:
    """`defaults` come from the model's generation_config.json. Raises RequestError naming the field."""
    given = {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_k": request.top_k,
        "min_p": request.min_p,
        "repetition_penalty": request.repetition_penalty,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "seed": request.seed,
        "min_tokens": request.min_tokens,
        "n": request.n,
    }
    chosen = dict(defaults) | {name: value for name, value in given.items() if value is not None}
    for token_id in request.stop_token_ids or []:
        _check_token(token_id, "stop_token_ids", vocab_size)
    stop = [request.stop] if isinstance(request.stop, str) else (request.stop or [])
    return SamplingParams(
        **chosen,
        max_tokens=max_tokens,
        logprobs=logprobs,
        logit_bias=_logit_bias(request.logit_bias, vocab_size),
        stop=stop,
        stop_token_ids=request.stop_token_ids or [],
        include_stop_str_in_output=request.include_stop_str_in_output,
        ignore_eos=request.ignore_eos,
        skip_special_tokens=request.skip_special_tokens,
    )


def _logit_bias(given: dict[str, float] | None, vocab_size: int) -> dict[int, float] | None:
    if not given:
        return None
    bias = {}
    for key, value in given.items():
        # isascii: int() would take digits of other scripts too
        if not (key.isascii() and key.isdigit()) or len(key) > 10:
            raise RequestError(f"logit_bias: {key[:32]!r} is not a token id", param="logit_bias")
        _check_token(int(key), "logit_bias", vocab_size)
        bias[int(key)] = value
    return bias


def _check_token(token_id: int, param: str, vocab_size: int) -> None:
    if not 0 <= token_id < vocab_size:
        raise RequestError(
            f"{param}: token id {token_id} is outside the vocabulary of {vocab_size}", param=param
        )
