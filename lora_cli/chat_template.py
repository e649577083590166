"""Chat templates: named ones, and the model's own, each run within limits of time, memory and output.

A template is a program that comes with a model. transformers renders it in Jinja's sandbox, which stops it from
reaching the machine but not from looping or from asking for memory; `limits` does.
"""

import datetime
import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from lora_cli import limits
from lora_cli.conversation import Conversation, Message, RowError, reasoning, thinks
from lora_cli.errors import NOTHING_LOADED, ConfigError, ModelError, shown
from lora_cli.limits import ANOTHER

SOURCE = 1 << 20  # characters a template may have
OUTPUT = 64 << 10  # characters a row may become; more by its own size, GROWTH times
GROWTH = 8

# ChatML and Zephyr as their model cards describe them, Alpaca as its README does; the two last need nothing of a
# vocabulary but an end token.
NAMED = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "alpaca": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
        "{% elif m.role == 'assistant' %}### Response:\n{{ m.content }}{{ eos_token }}\n\n"
        "{% else %}### {{ 'Instruction' if m.role == 'user' else 'Input' }}:\n{{ m.content }}\n\n{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
}
_TODAY = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<form>[^"'\\]*)(?P=quote)\s*\)""")
CHOICES = f"data.chat_template: a Jinja file, or one of {', '.join(NAMED)}"


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. `generated` are the character ranges that the template marks with {% generation %}."""

    text: str
    generated: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class ChatTemplate:
    """How conversations become text. `with_tools` is the template for rows with tools, where a model has its own."""

    source: str
    with_tools: str
    special_tokens: Mapping[str, Any]  # bos_token, eos_token, ... as a template may write them
    date: datetime.date
    merge_system: bool

    def files(self, default: str, tool_use: str) -> dict[str, str]:
        """Return the templates by the names they are saved under."""
        return {default: self.source} | ({tool_use: self.with_tools} if self.with_tools != self.source else {})

    @property
    def writes_date(self) -> bool:
        """Whether the template asks for today's date."""
        return "strftime_now" in self.source + self.with_tools

    @property
    def repeats(self) -> bool:
        """Whether it writes the same on every day: today's date only where it can be told another."""
        return not re.search(r"strftime_now(?!\s+is\s)", self._dated + self._dated_with_tools)

    @property
    def marks_generation(self) -> bool:
        """Whether the template says itself which part a model generates."""
        return re.search(r"{%-?\s*generation", self.source + self.with_tools) is not None

    @cached_property
    def _dated(self) -> str:
        return self._with_date(self.source)

    @cached_property
    def _dated_with_tools(self) -> str:
        return self._with_date(self.with_tools)

    def _with_date(self, source: str) -> str:
        """Return a template in which today's date is this template's date, where it is written in a fixed form."""
        return _TODAY.sub(lambda call: json.dumps(self.date.strftime(call["form"]), ensure_ascii=False), source)

    def render(self, row: Conversation, count: int, *, prompt: bool) -> Rendered:
        """Render the first `count` messages; `prompt` adds what the model sees before it answers.

        An answer without reasoning is asked for without thinking, where the template knows both ways. Raises RowError.
        Call it within `limits.limited()`, or by `render_apart`. Raises TemplateLimit too.
        """
        messages = row.messages
        if self.merge_system:
            messages = _merged(messages)
            count = max(1, count - (len(row.messages) - len(messages)))
        asked = next((m for m in messages[count - (not prompt) :] if m.role == "assistant"), None)
        limits.begin_rendering()
        try:
            texts, ranges = render_jinja_template(
                conversations=[[_as_dict(message) for message in messages[:count]]],
                tools=row.tools,
                chat_template=self._dated_with_tools if row.tools else self._dated,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=self.marks_generation,
                enable_thinking=asked is None or thinks(asked),
                **self.special_tokens,
            )
        except MemoryError:
            raise
        except Exception as error:  # a template is a program: it may fail in any way
            hint = f"; {ANOTHER}"
            if not self.merge_system and messages[0].role == "system":
                hint = "; if it knows no system role, data.merge_system: true puts it in front of the first question"
            raise RowError(f"is refused by the chat template: {shown(error, 160).rstrip('.')}{hint}") from None
        (text,) = texts
        if len(text) > OUTPUT and len(text) > (most := OUTPUT + GROWTH * _size(row)):
            raise limits.TemplateLimit(f"The chat template makes {len(text):,} characters of this; {most:,} are taken.")
        return Rendered(text, tuple(ranges[0]) if ranges else ())

    def render_apart(self, row: Conversation, count: int, *, prompt: bool) -> Rendered:
        """Render as `render` does, in a process of its own: whatever the template does, this one goes on."""

        def render() -> Rendered:
            with limits.limited():
                return self.render(row, count, prompt=prompt)

        return limits.apart(render)


def _size(row: Conversation) -> int:
    """Return how many characters a row holds."""
    return sum(len(m.content) + len(str(m.extra)) for m in row.messages) + len(str(row.tools))


def _as_dict(message: Message) -> dict[str, Any]:
    values = {"role": message.role, "content": message.content, **message.extra}
    if text := reasoning(message):  # by every name: each template reads its own
        values |= {"reasoning_content": text, "thinking": text}
    return values


def _merged(messages: Sequence[Message]) -> Sequence[Message]:
    """Return messages with a leading system message put in front of the first user message."""
    if [message.role for message in messages[:2]] != ["system", "user"]:
        return messages
    system, first, *rest = messages
    return (replace(first, content=f"{system.content}\n\n{first.content}"), *rest)


# --- choosing one ---


def choose(setting: str | None, tokenizer: Any, date: str, merge_system: bool) -> ChatTemplate | None:
    """Return the template that `data.chat_template` names, else the model's own; None where there is none.

    Raises ConfigError.
    """
    own = tokenizer.chat_template
    source = with_tools = None
    if setting in NAMED:
        source = ("{{ bos_token }}" if begins_with_bos(tokenizer) else "") + NAMED[setting]
        if setting == "chatml" and "<|im_end|>" not in tokenizer.get_vocab():
            raise ConfigError(
                "data.chat_template: chatml needs the token <|im_end|>, which this model's vocabulary has not: an "
                "answer would have no end. zephyr and alpaca use the model's own end token.",
                state=NOTHING_LOADED,
            )
    elif setting is not None:
        try:
            source = Path(setting).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            close = difflib.get_close_matches(setting, NAMED, n=1)
            hint = f'; did you mean "{close[0]}"?' if close else "."
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError(
                f"data.chat_template: {shown(setting)} is none of {', '.join(NAMED)}, and no file that can be read "
                f"({reason}){hint}",
                state=NOTHING_LOADED,
            ) from None
    elif isinstance(own, dict):
        source, with_tools = own.get("default"), own.get("tool_use")
    else:
        source = own
    if not source:
        return None
    if (longest := max(len(source), len(with_tools or ""))) > SOURCE:
        raise ModelError(
            f"The chat template has {longest:,} characters; at most {SOURCE:,} are taken.", state=NOTHING_LOADED
        )
    known = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return ChatTemplate(source, with_tools or source, known, datetime.date.fromisoformat(date), merge_system)


def begins_with_bos(tokenizer: Any) -> bool:
    """Return whether a tokenizer begins plain text with its start token."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
