"""POST /v1/completions: the request, and the objects it is answered with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeAlias

from pydantic import AfterValidator

from memlane.errors import RequestError
from memlane_server.protocol.sampling import GenerationRequest


def _check_prompt(value: Any) -> Any:
    """A string, strings, token ids, or lists of token ids; the first thing that is neither is named."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string, an array of strings, or token ids")
    if not value:
        raise ValueError("must not be an empty array")
    first = type(value[0])
    if first is list:
        for i, inner in enumerate(value):
            if type(inner) is not list or any(type(t) is not int for t in inner):
                raise ValueError(f"element {i} is not an array of token ids, as element 0 is")
    elif first not in (str, int):
        raise ValueError("element 0 is neither a string, a token id nor an array of token ids")
    else:
        for i, inner in enumerate(value):
            if type(inner) is not first:
                raise ValueError(f"element {i} is not {'a string' if first is str else 'a token id'}")
    return value


Prompt: TypeAlias = str | list[str] | list[int] | list[list[int]]


class CompletionRequest(GenerationRequest):
    # Checked by hand: a union of list types would report every element once for each alternative.
    prompt: Annotated[Any, AfterValidator(_check_prompt)]
    max_tokens: int | None = None
    logprobs: int | None = None
    echo: bool | None = None
    add_special_tokens: bool = True

    no_op: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **GenerationRequest.no_op,
        "suffix": ("",),
        "best_of": (1,),
    }

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, one entry each."""
        given: Prompt = self.prompt
        if isinstance(given, str):
            return [given]
        if isinstance(given[0], int):
            return [given]
        return given

    def check(self) -> None:
        self.check_stream_options()
        if self.echo and self.logprobs is not None:
            raise RequestError("echo together with logprobs is not supported", param="echo")


def completion(
    request_id: str, created: int, model: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None
) -> dict[str, Any]:
    """A whole answer, or one chunk of it: both have the same shape."""
    return {
        "id": request_id,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage,
    }


def choice(
    index: int,
    text: str,
    *,
    logprobs: dict[str, Any] | None,
    finish_reason: str | None,
    stop_reason: str | int | None,
) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": logprobs,
        "finish_reason": finish_reason,
        "stop_reason": stop_reason,
    }
