"""A conversation at a terminal, and one question and answer for pipes: what is drawn of them."""

import sys
from collections.abc import Iterable
from json import dumps
from pathlib import Path

from lora_cli import console, interrupt, slash, storage
from lora_cli.chat import Chat
from lora_cli.chat_reports import ChatReport, Said
from lora_cli.errors import InputError, Interrupted, SurroundingsError, in_lines
from lora_cli.prompt_line import Lines
from lora_cli.records import as_json

_PROMPT = "> "


def _stopped() -> bool:
    return interrupt.requested().wanted


class View:
    """Talks with the user at a terminal until they leave."""

    def __init__(self, chat: Chat, name: str) -> None:
        self._chat = chat
        self._name = name
        self._gain = chat.manner.gain  # to which /base off goes back

    def run(self) -> None:
        """Read, answer, repeat. Raises Interrupted where SIGTERM ends an answer, KeyboardInterrupt at an empty line."""
        console.message(f"{self._name}: /help lists commands, Ctrl-C stops an answer, Ctrl-D leaves.")
        if not self._chat.templated:
            console.message(PLAIN)
        lines = Lines()
        while (text := lines.read(_PROMPT)) is not None:
            try:
                if slash.is_command(text):
                    name, argument = slash.parse(text)
                    if name == "exit":
                        return
                    self._obey(name, argument)
                elif text.strip():
                    self._show(self._chat.ask(text.removeprefix("/") if text.startswith("//") else text, _stopped))
            except Interrupted:
                raise
            except (InputError, SurroundingsError) as error:
                console.print_error(error)

    def _obey(self, name: str, argument: str) -> None:
        chat = self._chat
        if (now := slash.turn(chat, name, argument)) is not None:
            console.message(now)
            return
        match name:
            case "help":
                for line, indent in slash.listing():
                    console.say(line, indent=indent)
            case "base":
                self._base(argument)
            case "system":
                chat.instruct(argument)
                console.message("system message set" if argument else "no system message")
            case "retry":
                self._show(chat.retry(_stopped))
            case "undo":
                chat.undo()
                console.message(f"taken back; {_turns(len(chat.turns))}")
            case "history":
                console.print_text(
                    "\n".join(f"{m.role}: {in_lines(m.content)}" for m in chat.messages) or "nothing yet"
                )
            case "save":
                self._save(argument)
            case "reset":
                chat.reset()
                console.message("begun anew")

    def _base(self, argument: str) -> None:
        """Answer by the base once, or from now on, or no more."""
        if argument not in ("", "on", "off"):
            raise InputError(
                f"/base: expected on, off or nothing, found {argument[:40]}.", state="Nothing was changed."
            )
        if argument:
            if argument == "on" and self._chat.manner.gain:
                self._gain = self._chat.manner.gain
            slash.turn(self._chat, "gain", "0" if argument == "on" else str(self._gain))
            console.message("talking to the base" if argument == "on" else f"talking to {self._name}")
            return
        answer = self._chat.by_base(_stopped)
        console.message(f"{self._name} said:")
        console.print_text(in_lines(self._chat.turns[-1][1]) if self._chat.turns else "nothing yet")
        console.message("the base says:")
        self._show(answer)

    def _save(self, path: str) -> None:
        if not path:
            raise InputError("/save: expected a file to append to, such as /save talks.jsonl.")
        rows = self._chat.rows()
        with storage.appending(Path(path)) as file:
            for row in rows:
                storage.append_line(file, dumps(row, ensure_ascii=False))
        storage.keep(Path(path))
        console.message(f"appended {len(rows)} row{'s'[: len(rows) != 1]} to {path}")

    def _show(self, pieces: Iterable[str]) -> None:
        write(pieces, at_terminal=True)
        say_how_it_ended(self._chat.said)
        stop = interrupt.requested()
        if not interrupt.taken() and stop.signal_number is not None:
            raise Interrupted(stop.signal_number, "stopped on request.")


PLAIN_ONCE = "note: this was trained on plain text, or has no chat template: the text is continued as it is."
PLAIN = f"{PLAIN_ONCE} So is each text alone, without what came before."


def write(pieces: Iterable[str], at_terminal: bool) -> None:
    """Write an answer to stdout as it comes; at a terminal without what would make the terminal obey.

    Ctrl-C meanwhile is a request, which the answer asks for.
    """
    encoding = sys.stdout.encoding or "utf-8"
    with interrupt.patience():
        for piece in pieces:
            text = in_lines(piece) if at_terminal else piece
            sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
            sys.stdout.flush()
        sys.stdout.write("\n")
        sys.stdout.flush()


def say_how_it_ended(said: Said | None) -> None:
    """Say on stderr what the user cannot see of an answer."""
    if said is None:
        return
    if said.left_out_turns:
        console.message(
            f"note: the oldest {_turns(said.left_out_turns)} left out: the model has no positions for all of them."
        )
    if said.finish_reason == "length":
        console.message(f"note: ended after {said.tokens} tokens, the longest answer (max-new-tokens).")
    if said.finish_reason == "interrupted":
        console.message("note: stopped; what it said so far is kept.")


def _turns(count: int) -> str:
    return f"{count} turn{'' if count == 1 else 's'}"


def answer_once(chat: Chat, question: str, adapter: Path, json: bool) -> int | None:
    """Answer one question on stdout: its text alone as it comes, or one JSON object, which says how it ended.

    Returns the signal that ended the answer of a JSON object; raises Interrupted where one ended its text.
    """
    if not chat.templated:
        console.message(PLAIN_ONCE)
    pieces = chat.ask(question, _stopped)
    if json:
        with interrupt.patience():
            for _ in pieces:
                pass
    else:
        write(pieces, at_terminal=sys.stdout.isatty())
    said = chat.said
    assert said is not None, "it was asked"
    if json:
        console.print_json(as_json(_report(chat, question, said, adapter)))
        return interrupt.requested().signal_number
    say_how_it_ended(said)
    interrupt.poll()
    return None


def _report(chat: Chat, question: str, said: Said, adapter: Path) -> ChatReport:
    sampling = chat.manner.sampling
    return ChatReport(
        adapter=adapter,
        prompt=question,
        answer=said.text,
        finish_reason=said.finish_reason,
        prompt_tokens=said.prompt_tokens,
        tokens=said.tokens,
        first_seconds=said.first_seconds,
        seconds=said.seconds,
        tokens_per_second=said.tokens_per_second,
        gain=said.gain,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        templated=chat.templated,
    )
