"""Whether a chat template wrote what a row says: nothing left out of a prompt, nothing changed in an answer."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_cli.conversation import Message, RowError, name_of, reasoning_and_answer
from lora_cli.redact import cut


def squash(text: str) -> str:
    """Return a text without its white space, which templates change freely."""
    return re.sub(r"\s+", "", text)


def _leaves(value: Any) -> Iterator[str]:
    """Iterate over the keys, texts and whole numbers of a tool call's arguments; the rest has several spellings."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str | int) and not isinstance(value, bool):
        yield str(value)


def _stands_in(squashed: str, part: str) -> bool:
    """Return whether a text stands in another, which has no white space, as it is or as JSON writes it."""
    return squash(part) in squashed or squash(json.dumps(part, ensure_ascii=False)[1:-1]) in squashed


def require_asked(prompt: str, messages: Sequence[Message]) -> None:
    """Raise RowError where a template leaves out what was said: some drop a system message without a word.

    Earlier thinking may be left out; the answers and tool calls of earlier turns may not.
    """
    squashed = None
    for message in messages:
        said = reasoning_and_answer(message)[1].strip() if message.role == "assistant" else message.content.strip()
        names = [name for call in message.extra.get("tool_calls") or () if (name := name_of(call)) not in prompt]
        if names:
            raise RowError(f"has an earlier tool call ({names[0][:40]}) that the chat template leaves out")
        if said in prompt:
            continue
        squashed = squashed or squash(prompt)
        if not _stands_in(squashed, said):
            way = " (data.merge_system: true puts it in front of the first question)"
            raise RowError(
                f"has a {message.role} message that the chat template leaves out or changes: {said[:60]!r}"
                + (way if message.role == "system" else "")
            )


def require_parts(body: str, message: Message) -> None:
    """Raise RowError unless a rendered answer holds its reasoning, its content and its tool calls, in this order."""
    calls = message.extra.get("tool_calls") or ()
    names = [name_of(call) for call in calls]
    rest = whole = squash(body)
    thought, content = reasoning_and_answer(message)
    for what, part in (("reasoning", thought), ("text", content), *(("tool call", name) for name in names)):
        wanted = squash(part)
        place = rest.find(wanted)
        if place < 0:
            raise RowError(f"has an answer whose {what} the chat template leaves out or changes: {cut(part, 60)!r}")
        rest = rest[place + len(wanted) :]
    for call in calls:
        function = call.get("function", call)
        given = _leaves(function.get("arguments")) if isinstance(function, dict) else ()
        if lost := next((part for part in given if not _stands_in(whole, part)), None):
            raise RowError(
                f"has a tool call whose arguments the chat template leaves out or changes: {cut(lost, 60)!r}"
            )
    if rest and not calls:
        raise RowError(f"has an answer behind which the chat template writes more: {cut(body, -60)!r}")
