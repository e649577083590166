"""The commands of a conversation: a line that begins with a slash."""

import difflib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from lora_cli.chat import Chat
from lora_cli.errors import InputError, shown

_UNCHANGED = "Nothing was changed."


@dataclass(frozen=True)
class Command:
    """A command: what stands behind its name, and what it does."""

    argument: str
    does: str


COMMANDS = {
    "help": Command("", "list these commands"),
    "base": Command("[on|off]", "answer the last question by the base too; on: talk to the base from now on"),
    "gain": Command("NUMBER", "how strong what was trained is: 1 as it is, 0 the base"),
    "system": Command("[TEXT]", "the system message; without text: none"),
    "temperature": Command("NUMBER", "how freely answers are drawn; 0: the most likely token each time"),
    "top-p": Command("NUMBER", "draw among the fewest tokens that together have this share"),
    "top-k": Command("NUMBER", "draw among so many of the most likely tokens; 0: all"),
    "max-new-tokens": Command("NUMBER", "the longest answer"),
    "seed": Command("NUMBER", "of drawn answers"),
    "retry": Command("", "answer the last question anew"),
    "undo": Command("", "take the last question and its answer back"),
    "history": Command("", "show the conversation"),
    "save": Command("FILE.jsonl", "append the conversation to a file, as a row to train on"),
    "reset": Command("", "begin anew"),
    "exit": Command("", "leave"),
}


def is_command(text: str) -> bool:
    """Return whether a typed text is a command; two slashes begin a text that begins with one."""
    return text.startswith("/") and not text.startswith("//")


def parse(text: str) -> tuple[str, str]:
    """Return a command's name and what stands behind it. Raises InputError."""
    name, _, argument = text[1:].strip().partition(" ")
    name, argument = "exit" if name == "quit" else name, argument.strip()
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean /{close[0]}?" if close else "/help lists those there are."
        raise InputError(f"There is no /{shown(name, 40)}; {hint}", state="A text that begins with / is typed //.")
    if argument and not COMMANDS[name].argument:
        raise InputError(f"/{name}: takes nothing behind it, found {shown(argument, 40)}.", state=_UNCHANGED)
    return name, argument


def listing() -> Iterator[tuple[str, int]]:
    """Yield what there is, a line each, with the columns by which what does not fit in a line is indented."""
    usages = {f"/{name} {command.argument}".strip(): command.does for name, command in COMMANDS.items()}
    width = max(map(len, usages))
    for usage, does in usages.items():
        yield f"{usage:{width}}  {does}", width + 2
    yield 'A line that ends in \\ goes on in the next one; """ begins and ends a text of several lines.', 0
    yield "Ctrl-C stops an answer. Ctrl-D leaves, and so does Ctrl-C where nothing stands.", 0


_KNOBS: dict[str, tuple[Callable[[str], Any], Callable[[Any], bool], str]] = {
    "gain": (float, math.isfinite, "a number"),
    "temperature": (float, lambda value: 0 <= value < math.inf, "a number that is 0 or more"),
    "top-p": (float, lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
    "top-k": (int, lambda value: value >= 0, "a whole number that is 0 or more"),
    "max-new-tokens": (int, lambda value: value >= 1, "a whole number that is 1 or more"),
    "seed": (int, lambda value: value >= 0, "a whole number that is 0 or more"),
}


def turn(chat: Chat, name: str, text: str) -> str | None:
    """Turn one of a conversation's knobs; return what it is now, None where the command is no knob.

    Without a value nothing is turned. Raises InputError.
    """
    if name not in _KNOBS:
        return None
    key = name.replace("-", "_")
    if text:
        value = _value(name, text)
        of_manner = key in ("gain", "max_new_tokens")
        chat.manner = (
            replace(chat.manner, **{key: value})
            if of_manner
            else replace(chat.manner, sampling=replace(chat.manner.sampling, **{key: value}))
        )
    now = getattr(chat.manner, key, None) if key in ("gain", "max_new_tokens") else getattr(chat.manner.sampling, key)
    return f"{name} {'as the model has room for' if now is None else f'{now:g}' if isinstance(now, float) else now}"


def _value(name: str, text: str) -> Any:
    read, is_good, expected = _KNOBS[name]
    try:
        value = read(text)
    except ValueError:
        value = None
    if value is None or not is_good(value):
        raise InputError(f"/{name}: expected {expected}, found {shown(text, 40)}.", state=_UNCHANGED)
    return value
