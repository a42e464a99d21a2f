"""The text of a completion, and stop strings: found while it grows, wherever the tokens cut them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

__all__ = ["StopStrings", "cut", "text_of"]

_INCOMPLETE = "\ufffd"
"""What a tokenizer decodes the first bytes of a character to."""


class StopStrings:
    """Follows one completion. A token costs the decoding of the few tokens since the last complete character."""

    def __init__(self, tokenizer: Any, strings: tuple[str, ...]) -> None:
        self._tokenizer, self._strings = tokenizer, strings
        self._keep = max(map(len, strings)) - 1
        self._before = ""
        """The end of the text that is settled: as much of it as a stop string may begin in."""
        self._context = self._settled = 0
        """Tokens from `context` on are decoded together, because some show only behind others; those before `settled`
        are known to be whole characters."""

    def met(self, token_ids: Sequence[int]) -> bool:
        """Whether the text of these tokens, one more than at the last call, holds a stop string."""
        known = self._text(token_ids[self._context : self._settled])
        text = self._text(token_ids[self._context :])
        new = text[len(known) :]
        seen = self._before + new
        if any(string in seen for string in self._strings):
            return True
        if new and not text.endswith(_INCOMPLETE):
            self._before = seen[len(seen) - min(self._keep, len(seen)) :]
            self._context, self._settled = self._settled, len(token_ids)
        return False

    def _text(self, token_ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True) if token_ids else ""
        return text


def cut(text: str, strings: tuple[str, ...]) -> str:
    """The text before the first stop string; all of it if there is none."""
    return text[: min((at for string in strings if (at := text.find(string)) >= 0), default=len(text))]


def text_of(tokenizer: Any, token_ids: Sequence[int], stop_ids: Container[int], strings: tuple[str, ...]) -> str:
    """What sampled tokens say: without special tokens and the stop token, up to the first stop string."""
    spoken = token_ids[:-1] if token_ids and token_ids[-1] in stop_ids else token_ids
    return cut(tokenizer.decode(spoken, skip_special_tokens=True), strings)
