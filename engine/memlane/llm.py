"""The offline API: `LLM(path).generate(prompts)`, shaped as users of vLLM know it. One thread uses it at a time."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from tqdm import tqdm

from memlane.answers import Answer, CompletionOutput, Logprob, RequestOutput
from memlane.config import EngineConfig, build
from memlane.errors import RequestError
from memlane.ipc import Add, Stats
from memlane.request import SamplingParams, TokenDelta
from memlane.text.chat import ChatTemplate
from memlane.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LLM", "CompletionOutput", "Logprob", "Prompts", "RequestOutput"]

Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
Message = Mapping[str, Any]


@dataclass(frozen=True)
class _Prompt:
    text: str | None
    token_ids: list[int]


class LLM:
    """A model in this process.

    Holds the model until `close`; use it as a context manager. Without tokenizer files in the model's directory it
    takes and gives token ids only.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        """`model`: a model directory, or any checkpoint that `memlane convert` reads (converted once, then cached).

        options: the fields of `EngineConfig`: placement ("host", "disk" or "auto"), row_cache ("64MiB", "25%"),
        dtype ("float32", "bfloat16" or "auto"), max_model_len, kv_cache and so on. Raises ConfigError on an unknown
        option or an impossible value, CheckpointError on a bad checkpoint.
        """
        config = build(EngineConfig, {**options, "model": os.fspath(model)}, environment={})
        # Before torch is loaded: OpenMP threads that spin while they wait stall each other on a shared machine.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        from memlane.engine import Engine  # here, because it loads torch

        self.engine = Engine(config)
        self.tokenizer = _load_tokenizer(config, self.engine.model.directory)
        self._requests = 0

    def generate(
        self,
        prompts: Prompts,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer every prompt (texts, or lists of token ids); results in the prompts' order.

        params: one for all, or one for each prompt. Raises RequestError if a prompt cannot be served as asked. An
        answer that fails on the way has finish_reason "error" and says why in `error`; the others are not affected.
        """
        return self._answer(self._prompts(prompts), params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **template_variables: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation ({role, content} messages) or several, through the model's chat template."""
        tokenizer = self._need_tokenizer("chat")
        if tokenizer.chat_template is None:
            raise RequestError("the model has no chat template; use generate", param="messages")
        special = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        template = ChatTemplate(tokenizer.chat_template, special_tokens=special)
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast(Sequence[Sequence[Message]], [messages] if one else messages)
        texts = [template.render(conversation, **template_variables) for conversation in conversations]
        # The template writes the special tokens itself.
        prompts = [_Prompt(text, tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        return self._answer(prompts, params, use_tqdm)

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """Logits after each token, fp32 [T, vocab], computed as in serving. Raises RequestError on bad ids."""
        return self.engine.logits(_ids(token_ids))

    def stats(self) -> Stats:
        """What the engine counted: steps, tokens, prefix cache, and per table rows, hits, bytes read, stall time."""
        return self.engine.stats()

    def close(self) -> None:
        """Give files and memory back. The object cannot be used any more."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(
        self,
        prompts: Sequence[_Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        answers: dict[str, Answer] = {}
        outputs = []
        try:
            for prompt, wanted in zip(prompts, _params(params, len(prompts)), strict=True):
                choices = [self._start(prompt, wanted, index, answers) for index in range(wanted.n)]
                outputs.append((prompt, choices))
            self._run(answers, use_tqdm)
        finally:
            self.engine.abort(answers)  # nothing is left unless an error or Ctrl-C ended this early
        return [RequestOutput(p.text, p.token_ids, [c.output() for c in choices]) for p, choices in outputs]

    def _start(
        self, prompt: _Prompt, params: SamplingParams, index: int, answers: dict[str, Answer]
    ) -> Answer:
        if params.stop:
            self._need_tokenizer("stop")
        self._requests += 1
        name = f"llm-{self._requests}"
        self.engine.add(
            Add(request_id=name, prompt_token_ids=prompt.token_ids, params=params.for_choice(index))
        )
        answers[name] = Answer(index, params, self.tokenizer)
        return answers[name]

    def _run(self, answers: dict[str, Answer], use_tqdm: bool) -> None:
        with tqdm(total=len(answers), disable=not use_tqdm, unit="answer", dynamic_ncols=True) as progress:
            while self.engine.unfinished:
                for delta in self.engine.step():
                    self._take(answers[delta.request_id], delta)
                    if answers[delta.request_id].finished:
                        progress.update()

    def _take(self, answer: Answer, delta: TokenDelta) -> None:
        answer.take(delta)
        if answer.finished and delta.finish_reason is None:  # a stop string: the engine does not know yet
            self.engine.abort([delta.request_id])

    def _prompts(self, prompts: Prompts) -> list[_Prompt]:
        if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Integral)):
            return [self._prompt(cast(str | Sequence[int], prompts))]
        return [self._prompt(prompt) for prompt in cast(Sequence[str | Sequence[int]], prompts)]

    def _prompt(self, prompt: str | Sequence[int]) -> _Prompt:
        if isinstance(prompt, str):
            return _Prompt(prompt, self._need_tokenizer("prompt").encode(prompt))
        return _Prompt(None, _ids(prompt))

    def _need_tokenizer(self, param: str) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError(f"{param}: the model has no tokenizer; it takes token ids only", param=param)
        return self.tokenizer


def _load_tokenizer(config: EngineConfig, directory: Path) -> Tokenizer | None:
    if config.tokenizer is not None:
        return Tokenizer.load(config.tokenizer)
    return Tokenizer.load(directory) if (directory / "tokenizer.json").is_file() else None


def _ids(prompt: Iterable[int]) -> list[int]:
    """Token ids as plain integers, whatever kind of integers and of sequence they came in."""
    try:
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        raise RequestError("a prompt is a text or a list of token ids", param="prompt") from error


def _params(params: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * prompts
    if len(params) != prompts:
        raise RequestError(f"{len(params)} params for {prompts} prompts", param="params")
    if not all(isinstance(each, SamplingParams) for each in params):
        raise RequestError(
            "params must be SamplingParams, one for all prompts or one for each", param="params"
        )
    return list(params)
