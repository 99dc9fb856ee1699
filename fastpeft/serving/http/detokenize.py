"""Tokens become text one by one, up to a stop string.

``tokenizers.decoders.DecodeStream`` does not serve. It takes no tokenizer that is not of its library, keeps what is
held back at the end, and raises where bytes that were a character become none by those behind them (byte fallback).
"""

from collections.abc import Sequence

_INCOMPLETE = "\ufffd"  # what a tokenizer writes for bytes that are no whole character yet, or never will be
_CHARACTER = 4  # tokens that one character can fill: UTF-8 has no more bytes


class TextStream:
    """The text of one completion as its tokens arrive.

    Text is held back while its last character is incomplete, or while it may be the beginning of a stop string. The
    pieces together are ``tokenizer.decode`` of all tokens, up to the first stop string.

    Args:
        tokenizer: of transformers.
        stops: strings that end the text; the one that is found is not part of it.
    """

    def __init__(self, tokenizer, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, list(stops)
        self._tokens: list[int] = []
        self._start = self._read = 0  # tokens before _read are text already; from _start on they are decoded again
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain with this token; after ``stopped`` nothing more may be pushed."""
        self._tokens.append(token)
        return self._cut(self._decoded(last=False), last=False)

    def finish(self) -> str:
        """What was held back."""
        return "" if self.stopped else self._cut(self._decoded(last=True), last=True)

    def _decoded(self, last: bool) -> str:
        # A few earlier tokens are decoded with the new ones: some tokenizers write a text's first token differently.
        before = self._decode(self._tokens[self._start : self._read])
        text = self._decode(self._tokens[self._start :])
        end = len(self._tokens)
        if text.endswith(_INCOMPLETE) and not last:
            end = self._certain(text)
            text = self._decode(self._tokens[self._start : end])
        if len(text) <= len(before):
            return ""
        self._start, self._read = self._read, end
        return text[len(before) :]

    def _certain(self, text: str) -> int:
        """Up to which token ``text`` can be given out although its end is incomplete: where it falls into two.

        Without this a run of bytes that are no text would be held back, and decoded again, with every token.
        """
        end = len(self._tokens)
        if end - self._read >= 2 * _CHARACTER:
            for cut in range(end - _CHARACTER, end - 2 * _CHARACTER, -1):
                if self._decode(self._tokens[self._start : cut]) + self._decode(self._tokens[cut:]) == text:
                    return cut
        return self._read

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _cut(self, new: str, last: bool) -> str:
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` begins with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
