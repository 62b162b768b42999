"""Finds stop strings in text that arrives in pieces, without looking at any character twice."""

from __future__ import annotations


class StopString:
    """Knuth-Morris-Pratt search for one string, fed one character at a time.

    `matched` is the length of the longest prefix of the string that ends the text so far: exactly what must
    not be shown yet. The failure table grows only as far as the text has ever matched, so that a huge stop
    string costs nothing until its beginning appears.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._failure = [0]  # _failure[i]: longest proper prefix of text[:i+1] that is also its suffix

    def feed(self, character: str) -> bool:
        """Take one character; True when it completes the string."""
        text, k = self.text, self.matched
        while k and text[k] != character:
            k = self._failure[k - 1]
        if text[k] == character:
            k += 1
        self.matched = k
        if k == len(text):
            return True
        self._extend(k)
        return False

    def _extend(self, length: int) -> None:
        """Make the failure table cover prefixes of up to `length` characters."""
        text, failure = self.text, self._failure
        while len(failure) < length:
            k, character = failure[-1], text[len(failure)]
            while k and text[k] != character:
                k = failure[k - 1]
            failure.append(k + 1 if text[k] == character else k)


class StopFinder:
    """Several stop strings at once. The one that is complete first wins; of those, the longest.

    So the answer depends on the text alone, not on how it was cut into tokens.
    """

    def __init__(self, stops: list[str]) -> None:
        self._stops = [StopString(s) for s in stops]
        self._held = ""  # the end of the text, which may be the beginning of a stop string
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Take new text, give back what is safe to show. Once `found` is set, the rest is dropped.

        The stop string itself is not part of what is given back.
        """
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        known = len(self._held)
        text = self._held + text
        for end in range(known, len(text)):
            complete = [s.text for s in self._stops if s.feed(text[end])]
            if complete:
                self.found = max(complete, key=len)
                self._held = ""
                return text[: end + 1 - len(self.found)]
        safe = len(text) - max(s.matched for s in self._stops)
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """No more text comes: what was held back is ordinary text after all."""
        held, self._held = self._held, ""
        return held
