"""Turns the tokens of one answer into text as they arrive.

    token ids ─ bytes ─ incremental UTF-8 ─ stop strings ─ text that is safe to show
                        holds ≤ 3 bytes     holds what may become a stop string

Each token is looked at once, so a long answer costs linear time.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from memlane.text.stopping import StopFinder
from memlane.text.tokenizer import Tokenizer


class Detokenizer:
    """Text of one growing token sequence that continues a prompt. Not thread-safe.

    Text given out is final: never part of a character, never the beginning of what turns out to be a stop
    string. `stopped` names the stop string that ended the text; tokens after it are ignored, and
    `token_count` counts the tokens up to and including the one that completed it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        *,
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        """`min_tokens`: the text of this many first tokens is not searched for stop strings."""
        self._tokenizer = tokenizer
        self._stops = StopFinder(list(stop))
        self._include_stop = include_stop
        self._skip_special = skip_special_tokens
        self._min_tokens = min_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.token_count = 0

    @property
    def stopped(self) -> str | None:
        return self._stops.found

    def push(self, token_ids: Sequence[int], *, ended_by_last: bool = False) -> str:
        """Take new tokens, give back the text that became safe to show.

        `ended_by_last`: generation ended because of the last token (end of text or a stop token id); its
        text is shown only with `include_stop`.
        """
        shown: list[str] = []
        for position, token_id in enumerate(token_ids, start=1):
            if self.stopped is not None:
                break
            self.token_count += 1
            hidden = ended_by_last and position == len(token_ids) and not self._include_stop
            if hidden or (self._skip_special and self._tokenizer.is_special(token_id)):
                continue
            shown.append(self._search(self._utf8.decode(self._tokenizer.token_bytes(token_id))))
        return "".join(shown)

    def finish(self) -> str:
        """The text still held back, once no more tokens come. An incomplete character becomes U+FFFD."""
        if self.stopped is not None:
            return ""
        return self._search(self._utf8.decode(b"", final=True)) + self._stops.finish()

    def _search(self, text: str) -> str:
        if self.token_count <= self._min_tokens:
            return text
        safe = self._stops.push(text)
        if self._include_stop and self.stopped is not None:
            safe += self.stopped
        return safe
