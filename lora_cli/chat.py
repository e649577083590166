"""A conversation with what was trained: its turns so far, and how the next one is answered."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from lora_cli.chat_reports import Said
from lora_cli.conversation import Message
from lora_cli.decoding import never
from lora_cli.errors import InputError
from lora_cli.randomness import derive_seed
from lora_cli.speaker import Manner, Speaker


@dataclass
class Chat:
    """A conversation. An answer is asked for by `ask`, and its text comes piece by piece.

    The same seed gives the same answers to the same turns; `retry` draws another one.
    """

    speaker: Speaker
    manner: Manner = Manner()  # noqa: RUF009 - frozen
    system: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)  # (question, answer)
    said: Said | None = None  # the last answer, whoever gave it
    _draws: int = 0  # answers that the last question was given before

    def __post_init__(self) -> None:
        self.instruct(self.system)

    @property
    def templated(self) -> bool:
        """Whether turns go through a chat template; else every question is a text of its own to be continued."""
        return self.speaker.prompts[0].templated

    def instruct(self, system: str) -> None:
        """Set the system message; "" is none. Raises InputError where there is no chat template for it."""
        if system and not self.templated:
            raise InputError(
                "system: this was trained on plain text without a chat template, which has no system message.",
                state="The conversation is as it was.",
            )
        self.system = system

    def ask(self, question: str, stopped: Callable[[], bool] = never) -> Iterator[str]:
        """Ask, and iterate over the answer's text. What was said until it was stopped is kept. Raises InputError."""
        self._draws = 0
        yield from self._answer(question, stopped)

    def retry(self, stopped: Callable[[], bool] = never) -> Iterator[str]:
        """Answer the last question again in the place of its answer, drawn anew. Raises InputError."""
        self._require_turn()
        count, last = len(self.turns), self.turns.pop()
        self._draws += 1
        try:
            yield from self._answer(last[0], stopped)
        finally:
            if len(self.turns) < count:
                self.turns.append(last)

    def by_base(self, stopped: Callable[[], bool] = never) -> Iterator[str]:
        """Answer the last question by the base, on the same history; the conversation stays as it is."""
        self._require_turn()
        turns = self.turns
        self.turns = turns[:-1]
        try:
            yield from self._answer(turns[-1][0], stopped, gain=0.0)
        finally:
            self.turns = turns

    def _answer(self, question: str, stopped: Callable[[], bool], gain: float | None = None) -> Iterator[str]:
        sampling = self.manner.sampling
        seed = derive_seed(sampling.seed, "chat", len(self.turns), self._draws)
        gain = self.manner.gain if gain is None else gain
        manner = replace(self.manner, sampling=replace(sampling, seed=seed), gain=gain)
        answer = self.speaker.answer([*self.messages, Message("user", question, False)], manner)
        yield from answer.pieces(stopped)
        self.said = answer.said
        self.turns.append((question, self.said.text))

    def undo(self) -> None:
        """Take the last turn back. Raises InputError."""
        self._require_turn()
        self.turns.pop()
        self._draws = 0

    def reset(self) -> None:
        """Begin anew; the system message stays."""
        self.turns.clear()
        self._draws = 0

    def _require_turn(self) -> None:
        if not self.turns:
            raise InputError("There is no question yet.", state="The conversation is as it was.")

    @property
    def messages(self) -> list[Message]:
        """The conversation so far."""
        system = [Message("system", self.system, False)] if self.system else []
        pairs = (
            (Message("user", question, False), Message("assistant", answer, False)) for question, answer in self.turns
        )
        return [*system, *(message for pair in pairs for message in pair)]

    def rows(self) -> list[dict[str, Any]]:
        """Return the conversation as rows to train on: one of messages, or without a template one for each turn."""
        self._require_turn()
        if not self.templated:
            return [{"prompt": question, "completion": answer} for question, answer in self.turns if answer.strip()]
        return [{"messages": [_as_entry(message) for message in self.messages]}]


def _as_entry(message: Message) -> dict[str, Any]:
    """Return a message as a data file has it; an empty answer is not to be trained."""
    entry: dict[str, Any] = {"role": message.role, "content": message.content}
    return entry | {"weight": 0} if message.role == "assistant" and not message.content.strip() else entry
