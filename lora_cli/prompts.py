"""What is said to a model as the tokens it was trained to answer: those of a training row, up to its answer."""

from collections.abc import Sequence

from lora_cli import adapter
from lora_cli.conversation import Conversation, Message
from lora_cli.data_config import DataConfig
from lora_cli.data_reader import DataReader
from lora_cli.errors import InputError
from lora_cli.tuned import AnyResult, Result

_ANSWER = "Ok."  # stands where the model's answer will
_NOTHING_CHANGED = "The conversation is as it was."


class Prompts:
    """Makes prompts for one result, by the template and the settings it was trained with."""

    def __init__(self, result: AnyResult) -> None:
        reader = DataReader(result.data or DataConfig(train="-"), result.header)
        self._encoder = reader.encoder
        self.max_positions = reader.max_positions
        self.templated = reader.template is not None and _is_templated(result)

    def of_conversation(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the tokens after which an answer follows. Raises InputError, TemplateLimit.

        Without a chat template that is the last message alone, which is to be continued.
        """
        if not self.templated:
            return self.of_text(messages[-1].content)
        given = tuple(Message(m.role, m.content, False, m.extra) for m in messages)
        return self._before(Conversation((*given, Message("assistant", _ANSWER, True)), True), "this conversation")

    def of_text(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text that is to be continued. Raises InputError."""
        row = Conversation((Message("prompt", text, False), Message("completion", _ANSWER, True)), False)
        return self._before(row, "this text")

    def _before(self, row: Conversation, what: str) -> tuple[int, ...]:
        encoded, problems = self._encoder.encode([row])
        if problems:
            raise InputError(f"{what} {problems[0][1]}.", state=_NOTHING_CHANGED)
        begin, _ = encoded[0].answers[-1]
        if not begin:
            raise InputError(f"{what} is empty: there is nothing to answer.", state=_NOTHING_CHANGED)
        return tuple(encoded[0].input_ids[:begin])

    def fitted(self, messages: Sequence[Message], room: int) -> tuple[tuple[int, ...], int]:
        """Return the prompt of a conversation that leaves room for so many tokens, and how many turns it is without.

        The oldest turns are left out first; a system message and the last question stay. Raises InputError.
        """
        system = messages[:1] if messages[0].role == "system" else messages[:0]
        turns = [index for index, message in enumerate(messages) if message.role == "user"] or [len(system)]
        for left_out, begin in enumerate(turns):
            kept = messages[begin:] if left_out else messages[len(system) :]
            prompt = self.of_conversation([*system, *kept])
            if self.max_positions is None or len(prompt) + room <= self.max_positions or not self.templated:
                break
        self.require_fit(prompt, room)
        return prompt, left_out if self.templated else 0

    def require_fit(self, prompt: Sequence[int], room: int) -> None:
        """Raise InputError where a prompt leaves no room for so many tokens."""
        if self.max_positions is not None and len(prompt) + room > self.max_positions:
            raise InputError(
                f"the last question alone takes {len(prompt):,} tokens and the answer up to {room:,}, and the model "
                f"has {self.max_positions:,} positions: ask for less, or for a shorter answer (max_new_tokens).",
                state=_NOTHING_CHANGED,
            )


def _is_templated(result: AnyResult) -> bool:
    """Return whether a result was trained on conversations: one of a run says so by the template saved with it."""
    if result.config is None:
        return True
    return bool(result.adapter.chat_templates if isinstance(result, Result) else adapter.read_templates(result.folder))
