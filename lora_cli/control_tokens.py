"""Content is content: a control token that stands inside a row's text is tokenised as the text it is.

A user who writes `<|im_end|>` must not end a turn. Such a string is broken before the row is rendered, by a character
that no text uses; once the text is tokenised, the tokens of that character are left out again, and what remains spells
the string without being it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_cli.chat_template import ChatTemplate
from lora_cli.conversation import Conversation, Message, RowError

BREAK = "\ue0b7"  # of Unicode's private use area
_THINKING = re.compile("think", re.IGNORECASE)  # such marks belong to answers, which may hold them
_SENTINELS = ("Qx1q", "Qx2q", "Qx3q")


def alternatives(strings: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of the strings, the longest first; quick, since few characters begin one."""
    by_start: dict[str, list[str]] = {}
    for string in sorted(filter(None, strings), key=len, reverse=True):
        by_start.setdefault(string[0], []).append(re.escape(string[1:]))
    groups = (f"{re.escape(start)}(?:{'|'.join(rests)})" for start, rests in by_start.items())
    return re.compile("|".join(groups) or "(?!)")


@dataclass(frozen=True)
class ControlTokens:
    """The strings that a tokenizer or a chat template treats as more than text."""

    pattern: re.Pattern[str]

    def in_row(self, row: Conversation) -> int:
        """Return how many stand in a row's content."""
        return sum(self._count(m.content) + self._count(m.extra) for m in row.messages) + self._count(row.tools)

    def _count(self, value: Any) -> int:
        if isinstance(value, str):
            return len(self.pattern.findall(value))
        if isinstance(value, Mapping):
            return sum(map(self._count, value.values()))
        return sum(map(self._count, value)) if isinstance(value, list | tuple) else 0

    def broken(self, row: Conversation) -> Conversation:
        """Return a row whose control tokens are broken by BREAK. Raises RowError where BREAK stands in it already."""
        messages = tuple(replace(m, content=self._break(m.content), extra=self._break(m.extra)) for m in row.messages)
        return replace(row, messages=messages, tools=self._break(row.tools))

    def _break(self, value: Any) -> Any:
        if isinstance(value, str):
            if BREAK in value:
                raise RowError("holds a control token, and the private character U+E0B7 that would mark it")
            return self.pattern.sub(lambda found: f"{found[0][:1]}{BREAK}{found[0][1:]}", value)
        if isinstance(value, Mapping):
            return {key: self._break(inner) for key, inner in value.items()}
        return [self._break(inner) for inner in value] if isinstance(value, list | tuple) else value


def find_control_tokens(tokenizer: Any, template: ChatTemplate | None) -> ControlTokens:
    """Return a tokenizer's special tokens, and what the template writes around a turn, special token or not.

    Call it within `limits.limited()`.
    """
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(map(str, tokenizer.all_special_tokens))
    special = {token for token in special if not _THINKING.search(token)}
    return ControlTokens(
        alternatives(special | (_role_markers(template, added_tokens(tokenizer)) if template else set()))
    )


def added_tokens(tokenizer: Any) -> set[str]:
    """Return the tokens that stand in a vocabulary as whole strings, special or not; not those of white space."""
    tokens = map(str, [*tokenizer.added_tokens_decoder.values(), *tokenizer.all_special_tokens])
    return {token for token in tokens if token.strip()}


def _role_markers(template: ChatTemplate, added: set[str]) -> set[str]:
    """Return what a template writes around turns, special token or not: `<|user|>`, `### Response:`, `[INST]`.

    It is read off a rendered conversation: the lines around its contents, without plain words.
    """
    asked, answered, again = _SENTINELS
    turns = (Message("user", asked, False), Message("assistant", answered, True), Message("user", again, False))
    try:
        text = template.render(Conversation(turns, True), 3, prompt=False).text
    except RowError:  # a template that takes no such conversation: its rows will say so
        return set()
    if not all(text.count(sentinel) == 1 for sentinel in _SENTINELS):
        return set()
    before, between = text.split(asked)[0], re.split("|".join(_SENTINELS), text)[1:-1]
    scaffold = [before.rsplit("\n", 2)[-2:], *(part.split("\n") for part in between)]
    token = alternatives(added)
    lines = [line for part in scaffold for line in part]
    pieces = {piece.strip() for line in lines for piece in (*token.split(line), *token.findall(line))}
    return {piece for piece in pieces if len(piece) > 2 and not piece.isalnum() and not _THINKING.search(piece)}


def without_breaks(
    text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Leave out the tokens of every BREAK; what remains spells the text without it."""
    kept = [
        (token, (start, stop))
        for token, (start, stop) in zip(ids, offsets, strict=True)
        if start == stop or text[start:stop].strip() != BREAK
    ]
    return [token for token, _ in kept], [offset for _, offset in kept]
