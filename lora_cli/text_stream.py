"""An answer's tokens as text while they come: nothing that later tokens could change, and nothing behind a stop."""

from collections.abc import Iterator, Sequence
from typing import Any

from lora_cli.examples import Tokenizer

_HALF = "\ufffd"  # what a decoder writes for bytes that are no whole character


class TextStream:
    """Makes text of tokens, one by one; half a character is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        """`stops` end the text where they appear in it, and are left out."""
        self._backend: Any = tokenizer.backend_tokenizer  # its text is what the tokens spell, not tidied up
        self._stops = [stop for stop in stops if stop]
        self._tokens: list[int] = []
        self._begin = self._end = 0  # tokens whose text is out; the first of them is where decoding begins anew
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Take a token; return the text that is certain now."""
        self._tokens.append(token)
        return self._out(self._decoded(whole=True))

    def rest(self) -> str:
        """Return what was held back, once no token comes any more."""
        text = self._out(self._decoded(whole=False))
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _decoded(self, whole: bool) -> str:
        """Return the text of the tokens behind those whose text is out; nothing while it ends in half a character."""
        before = self._decode(self._tokens[self._begin : self._end])
        text = self._decode(self._tokens[self._begin :])
        if (whole and text.endswith(_HALF)) or len(text) <= len(before):
            return ""
        self._begin, self._end = self._end, len(self._tokens)
        return text[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._backend.decode(tokens, skip_special_tokens=False)
        return text

    def _out(self, more: str) -> str:
        """Return the text up to a stop, or up to where one could have begun."""
        if self.stopped:
            return ""
        text = self._held + more
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text are the beginning of a stop."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


def iter_pieces(stream: TextStream, tokens: Iterator[int]) -> Iterator[str]:
    """Iterate over the text of tokens, up to a stop."""
    for token in tokens:
        if piece := stream.push(token):
            yield piece
        if stream.stopped:
            return
    if piece := stream.rest():
        yield piece
