"""From a checked request to token ids and sampling parameters that the engine will not have to refuse."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from memlane.errors import ErrorKind, RequestError
from memlane.request import SamplingParams
from memlane.text import Tokenizer
from memlane_server.engine_client import SequenceRequest
from memlane_server.model import ServedModel
from memlane_server.protocol.chat import ChatRequest
from memlane_server.protocol.completions import CompletionRequest
from memlane_server.protocol.sampling import GenerationRequest, sampling_params

# OpenAI's default length of a completion; chat goes on to the end of the context.
COMPLETION_TOKENS = 16

# Longer texts are tokenised in a thread, so that they hold up nobody else (about 10 ms of work).
LONG_TEXT = 20_000


@dataclass(frozen=True)
class Prepared:
    """A request the engine can run: each prompt answered `params.n` times."""

    prompts: list[list[int]]
    params: SamplingParams

    def sequences(self) -> list[SequenceRequest]:
        """All choices, those of one prompt side by side: choice `p * n + j`."""
        return [
            SequenceRequest(prompt, self.params.for_choice(j))
            for prompt in self.prompts
            for j in range(self.params.n)
        ]


async def prepare_completion(model: ServedModel, request: CompletionRequest) -> Prepared:
    """Raises RequestError naming what to change."""
    model.check_name(request.model)
    request.check()
    prompts = []
    for prompt in request.prompts():
        if isinstance(prompt, str):
            tokenizer = model.need_tokenizer("prompt")
            ids = await _encode(model, tokenizer, prompt, request.add_special_tokens, "prompt")
        else:
            ids = _checked_ids(model, prompt)
        prompts.append(ids)
    longest = max(len(p) for p in prompts)
    max_tokens = _max_tokens(model, longest, request.max_tokens, "max_tokens", COMPLETION_TOKENS)
    return Prepared(prompts, _params(model, request, max_tokens, request.logprobs))


async def prepare_chat(model: ServedModel, request: ChatRequest) -> Prepared:
    """Raises RequestError naming what to change."""
    model.check_name(request.model)
    request.check()
    tokenizer = model.need_tokenizer("messages")
    text = render_messages(model, request.flat_messages(), request.add_generation_prompt)
    prompt = await _encode(model, tokenizer, text, request.add_special_tokens, "messages")
    name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    asked = getattr(request, name)
    max_tokens = _max_tokens(model, len(prompt), asked, name, model.max_model_len)
    return Prepared(
        [prompt],
        _params(model, request, max_tokens, (request.top_logprobs or 0) if request.logprobs else None),
    )


def render_messages(model: ServedModel, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    """The conversation as the model's template lays it out."""
    return model.need_template().render(messages, add_generation_prompt=add_generation_prompt)


async def tokenize_text(tokenizer: Tokenizer, text: str, special: bool) -> list[int]:
    if len(text) < LONG_TEXT:
        return tokenizer.encode(text, add_special_tokens=special)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=special)


async def _encode(
    model: ServedModel, tokenizer: Tokenizer, text: str, special: bool, param: str
) -> list[int]:
    """Token ids of a prompt, checked against the model's limits."""
    at_least = len(text) // max(tokenizer.longest_token, 1)
    if at_least > model.max_model_len:  # hopeless: not worth the time to count exactly
        raise _too_long(model, f"at least {at_least}", param)
    ids = await tokenize_text(tokenizer, text, special)
    return _checked_ids(model, ids, param)


def _checked_ids(model: ServedModel, ids: Sequence[int], param: str = "prompt") -> list[int]:
    if not ids:
        raise RequestError(f"{param} is empty: there is nothing to continue", param=param)
    if len(ids) >= model.max_model_len:
        raise _too_long(model, str(len(ids)), param)
    for token_id in ids:
        if not 0 <= token_id < model.vocab_size:
            raise RequestError(
                f"{param}: token id {token_id} is outside the vocabulary of {model.vocab_size}", param=param
            )
    return list(ids)


def _too_long(model: ServedModel, count: str, param: str) -> RequestError:
    return RequestError(
        f"this model's context is {model.max_model_len} tokens for prompt and answer together; "
        f"the prompt has {count}. Shorten it",
        param=param,
        kind=ErrorKind.CONTEXT_LENGTH,
    )


def _max_tokens(model: ServedModel, prompt: int, asked: int | None, name: str, default: int) -> int:
    """How long answers may become. What is asked for is honoured or refused; a default is cut to fit."""
    room = model.max_model_len - prompt
    if asked is None:
        return min(int(model.defaults.get("max_tokens", default)), room)
    if asked > room:
        raise RequestError(
            f"this model's context is {model.max_model_len} tokens; the prompt has {prompt} and {name} "
            f"asks for {asked} more. Shorten the prompt or ask for at most {room}",
            param=name,
            kind=ErrorKind.CONTEXT_LENGTH,
        )
    return asked


def _params(
    model: ServedModel, request: GenerationRequest, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    defaults = {name: value for name, value in model.defaults.items() if name != "max_tokens"}
    params = sampling_params(
        request, defaults, max_tokens=max_tokens, logprobs=logprobs, vocab_size=model.vocab_size
    )
    if params.stop:
        model.need_tokenizer("stop")
    return params
