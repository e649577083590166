"""`lora export --format ollama`: a GGUF file, and the Modelfile that tells Ollama how conversations become text.

Ollama writes conversations by a template of its own language (Go's text/template), not by the model's. What stands
around the messages is read off the model's template, rendered; then both are compared on more conversations.
https://github.com/ollama/ollama/blob/main/docs/modelfile.md
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_cli import chat_template, ends, room, storage
from lora_cli.chat_template import ChatTemplate
from lora_cli.conversation import Conversation, Message, RowError
from lora_cli.errors import ModelError
from lora_cli.examples import Tokenizer
from lora_cli.formats import gguf_export
from lora_cli.formats.gguf_file import Kind
from lora_cli.reports import GgufReport
from lora_cli.tuned import Result

_PLAIN = "{{ .Prompt }}"
_DATE = "2026-01-01"  # of templates that write one; what they write is refused below


@dataclass(frozen=True)
class Frame:
    """The fixed text around messages: `start` or (`system_start`, `system_end`) lead up to the first question."""

    start: str
    system_start: str
    system_end: str
    user_start: str  # of later questions
    user_end: str
    assistant_start: str
    assistant_end: str
    opening: str  # after the last question, where the answer begins

    def expand(self, messages: Sequence[Message]) -> str:
        """Return what Ollama makes of a conversation by `template`."""
        system = [message.content for message in messages if message.role == "system"]
        text = self.system_start + "\n\n".join(system) + self.system_end if system else self.start
        first = True
        for message in messages:
            if message.role == "user":
                text += ("" if first else self.user_start) + message.content + self.user_end
                first = False
            elif message.role == "assistant":
                text += self.assistant_start + message.content + self.assistant_end
        return text + self.opening

    def template(self) -> str:
        """Return Ollama's template."""
        return (
            f"{{{{ if .System }}}}{self.system_start}{{{{ .System }}}}{self.system_end}"
            f"{{{{ else }}}}{self.start}{{{{ end }}}}{{{{ $first := true }}}}{{{{ range .Messages }}}}"
            f'{{{{ if eq .Role "user" }}}}{{{{ if not $first }}}}{self.user_start}{{{{ end }}}}{{{{ $first = false }}}}'
            f"{{{{ .Content }}}}{self.user_end}"
            f'{{{{ else if eq .Role "assistant" }}}}{self.assistant_start}{{{{ .Content }}}}{self.assistant_end}'
            f"{{{{ end }}}}{{{{ end }}}}{self.opening}"
        )


def export(result: Result, output: Path, kind: Kind) -> GgufReport:
    """Write a folder for `ollama create`. Raises ModelError where Ollama would write conversations otherwise."""
    plan, notes = gguf_export.model_plan(result, kind)
    text, more = modelfile(result.header.tokenizer, sorted(ends.configured_ends(result.header)))
    room.require_room(output, plan.size)
    with storage.new_directory(output) as folder:
        report = gguf_export.write(plan, folder / "model.gguf", "ollama", kind, [*notes, *more], shown=output)
        storage.add_file(folder / "Modelfile", text)
    return report


def modelfile(tokenizer: Tokenizer, ends: Sequence[int]) -> tuple[str, list[str]]:
    """Return a Modelfile's text, and in which cases Ollama differs all the same."""
    template, notes = _PLAIN, list[str]()
    if (own := chat_template.choose(None, tokenizer, _DATE, merge_system=False)) is not None:
        frame, notes = find_frame(own, tokenizer)
        template = frame.template()
    stops = [tokenizer.decode([end]) for end in ends]
    lines = ["FROM ./model.gguf", f'TEMPLATE """{template}"""', *(f'PARAMETER stop "{stop}"' for stop in stops)]
    return "\n".join(lines) + "\n", notes


def find_frame(template: ChatTemplate, tokenizer: Tokenizer) -> tuple[Frame, list[str]]:
    """Return what a chat template writes around messages, and what it does beyond that. Raises ModelError.

    A start token that Ollama adds by itself (tokenizer.ggml.add_bos_token) is left out.
    """
    try:
        once = _parts(template, "user")
        twice = _parts(template, "user", "assistant", "user")
        ended = _parts(template, "user", "assistant", prompt=False)
        with_system, notes = _with_system(template)
    except (RowError, ValueError) as error:
        raise ModelError(f"The chat template cannot be told to Ollama: it {error}.") from None
    user_end, assistant_end = _common_start(twice[1], twice[3]), _common_start(twice[2], ended[2])
    bos = str(template.special_tokens.get("bos_token", "")) if chat_template.begins_with_bos(tokenizer) else ""
    frame = Frame(
        start=once[0],
        system_start=with_system[0] if with_system else once[0],
        system_end=with_system[1] if with_system else "\n\n",
        user_start=twice[2].removeprefix(assistant_end),
        user_end=user_end,
        assistant_start=twice[1].removeprefix(user_end),
        assistant_end=assistant_end,
        opening=twice[3].removeprefix(user_end),
    )
    for system, turns in itertools.product((False, True) if with_system else (False,), (1, 2, 3)):
        messages = _conversation(*["system"] * system, *["user", "assistant"] * (turns - 1), "user")
        if frame.expand(messages) != _render(template, messages):
            raise ModelError(
                "The chat template cannot be told to Ollama: it does more than to write fixed text around messages. "
                "Export as gguf, which carries the chat template itself."
            )
    if any(mark in part for part in vars(frame).values() for mark in ("{{", '"""')):
        raise ModelError('The chat template cannot be told to Ollama: it writes {{ or """.')
    if template.writes_date:
        raise ModelError("The chat template cannot be told to Ollama: it writes the date.")
    starts = {"start": frame.start.removeprefix(bos), "system_start": frame.system_start.removeprefix(bos)}
    return Frame(**vars(frame) | starts), [*notes, *_trims(template, frame)]


def _with_system(template: ChatTemplate) -> tuple[list[str] | None, list[str]]:
    """Return the text around a system message and a question; None, and a note, where the template takes none."""
    try:
        return _parts(template, "system", "user"), []
    except RowError:
        return None, ["The chat template takes no system message; in Ollama one goes in front of the first question."]


def _trims(template: ChatTemplate, frame: Frame) -> list[str]:
    """Return notes where the template changes what is in messages, which Ollama does not."""
    space = [Message("user", " a \n", trained=False)]
    thought = [*_conversation("user", "assistant", "user")]
    thought[1] = Message("assistant", "<think>\na\n</think>\n\nb", trained=False)
    notes = {
        "The chat template drops white space around messages; Ollama keeps it.": space,
        "The chat template leaves out the reasoning of earlier answers; Ollama keeps it.": thought,
    }
    return [note for note, messages in notes.items() if frame.expand(messages) != _render(template, messages)]


def _conversation(*roles: str) -> list[Message]:
    return [Message(role, f"[{number}]{role}[{number}]", trained=False) for number, role in enumerate(roles)]


def _common_start(one: str, other: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _parts(template: ChatTemplate, *roles: str, prompt: bool = True) -> list[str]:
    """Return the text before, between and after the messages of a conversation. Raises RowError, ValueError."""
    messages = _conversation(*roles)
    rest, parts = _render(template, messages, prompt), []
    for message in messages:
        part, found, rest = rest.partition(message.content)
        if not found or message.content in rest:
            raise ValueError("does not write every message once, in its order")
        parts.append(part)
    return [*parts, rest]


def _render(template: ChatTemplate, messages: Sequence[Message], prompt: bool = True) -> str:
    return template.render_apart(Conversation(messages, templated=True), len(messages), prompt=prompt).text
