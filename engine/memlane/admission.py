"""What the engine refuses: requests that could not be served as asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from memlane.errors import ErrorKind, RequestError
from memlane.ipc import Add

__all__ = ["Admission"]


class Admission(NamedTuple):
    """The model's limits. Its methods raise RequestError."""

    vocab_size: int
    max_model_len: int
    eos_ids: frozenset[int]

    def check(self, request: Add) -> None:
        """One sequence, with room for one token more, whose parameters fit the vocabulary."""
        params, prompt = request.params, request.prompt_token_ids
        if params.n != 1:
            raise RequestError("the engine takes one sequence at a time; n must be 1", param="n")
        self.check_tokens(prompt)
        if len(prompt) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens; with room for one more, the model's context of "
                f"{self.max_model_len} takes at most {self.max_model_len - 1}",
                param="prompt",
                kind=ErrorKind.CONTEXT_LENGTH,
            )
        for token in params.logit_bias or ():
            if token >= self.vocab_size:
                raise RequestError(
                    f"logit_bias: {token} is not in the vocabulary of {self.vocab_size}", param="logit_bias"
                )
        ends = self.eos_ids.union(params.stop_token_ids)
        if params.min_tokens and sum(token < self.vocab_size for token in ends) >= self.vocab_size:
            raise RequestError("min_tokens forbids every token of the vocabulary", param="min_tokens")

    def check_tokens(self, token_ids: Sequence[int]) -> None:
        """At least one token, and all of them in the vocabulary."""
        vocab = self.vocab_size
        if not token_ids:
            raise RequestError("the prompt is empty", param="prompt")
        if not (min(token_ids) >= 0 and max(token_ids) < vocab):
            bad = next(token for token in token_ids if not 0 <= token < vocab)
            raise RequestError(f"token id {bad} is not in the vocabulary of {vocab}", param="prompt")
