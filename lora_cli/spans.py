"""Where the answers lie in a rendered conversation: found by rendering, and proven, never guessed.

The prompt of an answer is the conversation before it, rendered as the model will see it (`add_generation_prompt`). What
follows it is what the model must write. It is taken only where it is the answer, letter for letter, between what the
template writes around *any* answer: that is learned once by rendering a probe in the answer's place.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lora_cli.chat_template import ChatTemplate
from lora_cli.conversation import Conversation, Message, RowError, reasoning_and_answer, thinks
from lora_cli.fidelity import require_asked, require_parts, squash
from lora_cli.limits import ANOTHER
from lora_cli.redact import cut

_PROBE = "Zx9qz"
_EMPTY_THINKING = re.compile(r"\s*(?:<think>\s*)?</think>\s*")
_OPEN_THINKING = re.compile(r"<think>\s*$")


@dataclass(frozen=True)
class Rendering:
    """One sequence: its text, and the character ranges that are trained, in their order."""

    text: str
    answers: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class _Frame:
    """What a template writes around a plain answer: between its prompt and it, its end token, and behind that."""

    before: str
    end: str
    rest: str


class SpanFinder:
    """Finds the answers of conversations; it learns how the template frames them as it goes."""

    def __init__(self, template: ChatTemplate, added: re.Pattern[str]) -> None:
        """`added` finds any token that was added to the tokenizer's vocabulary, special or not."""
        self.template = template
        self._token = re.compile(rf"\s*(?:{added.pattern})")
        self._run = re.compile(rf"\s*(?:{added.pattern})+")
        self._frames: list[_Frame] = []

    def find(self, row: Conversation) -> list[Rendering]:
        """Return the sequences of a row: one, or one an answer.

        Some templates rewrite earlier answers once a conversation goes on (they drop earlier thinking). Such an answer
        is trained in the form in which it was given, in a sequence of its own that ends with it. Raises RowError. Call
        it within `limits.limited()`.
        """
        trained = [index for index, message in enumerate(row.messages) if message.trained]
        whole = self.template.render(row, trained[-1] + 1, prompt=False)
        together: list[tuple[int, int]] | None = []
        apart: list[Rendering] = []
        for index in trained:
            try:
                before, skipped, answer = self._prompt_and_answer(row, index, whole.text, index == trained[-1])
            except RowError as error:
                if any(message.role == "user" for message in row.messages[:index]):
                    raise
                raise RowError(f"{error}; it answers no question: weight: 0 would keep it as context") from None
            span = (len(before) + skipped, len(before) + len(answer))
            apart.append(Rendering(before + answer, (span,)))
            if together is not None and whole.text.startswith(before + answer):
                together.append(span)
            else:
                together = None
        if together is not None:
            apart = [Rendering(whole.text[: together[-1][1]], tuple(together))]
        if self.template.marks_generation:
            return [self._as_marked(row, rendering, trained[-len(apart) + n]) for n, rendering in enumerate(apart)]
        return apart

    def _as_marked(self, row: Conversation, rendering: Rendering, last: int) -> Rendering:
        """Return a sequence, which ends with answer `last`, with its answers as {% generation %} marks them.

        Their end tokens are trained with them. Raises RowError where the marks leave out part of an answer.
        """
        marked = self.template.render(row, last + 1, prompt=False)
        if not marked.text.startswith(rendering.text):
            return rendering  # its prompt is another once it is answered; the marks are not of this text
        messages = [message for message in row.messages[: last + 1] if message.trained][-len(rendering.answers) :]
        answers = []
        for (begin, end), message in zip(rendering.answers, messages, strict=True):
            marks = [max(begin, start) for start, stop in marked.generated if start < end and stop > begin]
            if len(marks) != 1 or squash(message.content) not in squash(rendering.text[marks[0] : end]):
                raise RowError("has an answer that the chat template's {% generation %} marks do not hold")
            answers.append((marks[0], end))
        return replace(rendering, answers=tuple(answers))

    def _prompt_and_answer(self, row: Conversation, index: int, whole: str, last: bool) -> tuple[str, int, str]:
        """Return the prompt of an answer, how much of what follows it is prompt too, and what follows it."""
        before = self.template.render(row, index, prompt=True).text
        require_asked(before, row.messages[:index])
        found = self._plain_answer(whole, before, row.messages[index], last)
        if found is None:
            after = whole if last else self.template.render(row, index + 1, prompt=False).text
            found = self._answer(row, index, before, after)
        return before, *found

    def _plain_answer(self, text: str, before: str, message: Message, last: bool) -> tuple[int, str] | None:
        """Return (characters that are prompt, what follows the prompt through the end token) of a plain answer.

        None where no known frame fits to the letter; `last`: nothing but the frame's rest may follow.
        """
        if not _is_plain(message) or not text.startswith(before):
            return None
        opened = _OPEN_THINKING.search(before) is not None
        for frame in self._frames:
            if opened and "</think>" not in frame.before:
                continue
            for content in _forms(message.content):
                answer = frame.before + content + frame.end
                if text.startswith(answer, len(before)) and (not last or text == before + answer + frame.rest):
                    return _empty_thinking(frame.before), answer
        return None

    def _answer(self, row: Conversation, index: int, before: str, after: str) -> tuple[int, str]:
        """Return the same of any answer: `after` is the conversation that ends with it."""
        message = row.messages[index]
        found = self._plain_answer(after, before, message, last=True)
        if found is None and (_is_plain(message) or not self._frames):
            self._learn(row, index, before)
            found = self._plain_answer(after, before, message, last=True)
        if found is not None:
            return found
        if _OPEN_THINKING.search(before) and not (after.startswith(before) and "</think>" in after[len(before) :]):
            return self._thought(before, after, message)
        if not after.startswith(before):
            return 0, self._reordered(before, after, row, index)
        tail = after[len(before) :]
        for frame in self._frames:
            if tail.endswith(frame.end + frame.rest):
                body, end = tail.removesuffix(frame.end + frame.rest), frame.end
                break
        else:  # a tool call may end otherwise
            ends = list(self._run.finditer(tail))
            if not ends or tail[ends[-1].end() :].strip():
                raise RowError(f"ends without an end token in the chat template: {cut(tail, -60)!r}")
            body, end = tail[: ends[-1].start()], ends[-1][0]
        require_parts(body, message)
        return 0 if thinks(message) else _empty_thinking(body), body + end

    # --- what a template writes around answers ---

    def _learn(self, row: Conversation, index: int, before: str) -> None:
        """Learn how the template frames a plain answer at this place, by rendering a probe there."""
        probe = replace(row.messages[index], content=_PROBE, extra={})
        probed = replace(row, messages=(*row.messages[:index], probe))
        text = self.template.render(probed, index + 1, prompt=False).text
        head, found, behind = text.rpartition(_PROBE)
        if not found:
            raise RowError(f"has an answer that the chat template leaves out; {ANOTHER}")
        end = self._end_of(behind, probed, index)
        if not end:
            raise RowError(
                "has an answer behind which the chat template writes no end token of the model's vocabulary, so a "
                f"model trained with it would not learn to stop; it writes {behind[:40]!r}"
            )
        prompt = self.template.render(probed, index, prompt=True).text if thinks(row.messages[index]) else before
        frame = _Frame(head.removeprefix(prompt) if head.startswith(prompt) else "", end, behind[len(end) :])
        if frame not in self._frames:
            self._frames.append(frame)

    def _end_of(self, behind: str, probed: Conversation, index: int) -> str:
        """Return the end token with which `behind`, what the template writes behind an answer, begins; "" if none.

        It may be several tokens in a row. Those that end the whole text (Phi-3) or open the next turn (Llama 3) are
        not of them: they differ once the conversation goes on, or stand there whatever is asked for.
        """
        run, first = self._run.match(behind), self._token.match(behind)
        if run is None or first is None:
            return ""
        if self.template.render(probed, index, prompt=True) == self.template.render(probed, index, prompt=False):
            return first[0]  # the next turn is opened in any case
        try:
            on = replace(probed, messages=(*probed.messages, Message("user", _PROBE, False)))
            text = self.template.render(on, index + 2, prompt=False).text
        except RowError:
            return run[0]
        going_on = text.split(_PROBE)[1] if text.count(_PROBE) == 2 else behind
        ends = [match.end() for match in self._token.finditer(run[0])]
        return next((run[0][:end] for end in reversed(ends) if going_on.startswith(run[0][:end])), run[0])

    def _thought(self, before: str, after: str, message: Message) -> tuple[int, str]:
        """Return the answer to a prompt that opens the model's thinking, where the template does not close it after.

        DeepSeek-R1's forgets it. The model writes its reasoning, closes it, and answers; an answer without reasoning is
        given the closed block as part of its prompt.
        """
        thought, content = reasoning_and_answer(message)
        for frame in self._frames if not message.extra.get("tool_calls") else ():
            for form in _forms(content):
                asked = after.removesuffix(form + frame.end + frame.rest)
                if asked != after and before.startswith(asked.rstrip()):
                    closed = "\n</think>\n\n"
                    answer = thought + closed + form + frame.end
                    return 0 if thought else len(closed), answer
        raise RowError("has an answer that the chat template leaves out or changes")

    def _reordered(self, before: str, after: str, row: Conversation, index: int) -> str:
        """Return an answer whose prompt the template writes differently once it is answered.

        Mistral's puts the system message in front of the last question only. The prompt is what the model sees; the
        answer is taken from behind the last question, where both texts must go on alike.
        """
        message, question = row.messages[index], row.messages[index - 1].content.strip() if index else ""
        for frame in self._frames if question and _is_plain(message) else ():
            for content in _forms(message.content):
                answer = content + frame.end
                head, _, behind = after.rpartition(answer + frame.rest)
                _, asked, closing = before.rpartition(question)
                _, found, between = head.rpartition(question)
                if not behind and asked and found and between.startswith(closing):
                    return between.removeprefix(closing) + answer
        raise RowError(
            f"is written differently by the chat template once message {index + 1} is answered, so what to train "
            f"cannot be told: ...{cut(before, -60)!r} before, ...{cut(after, -60)!r} after"
        )


def _is_plain(message: Message) -> bool:
    """Return whether an answer is its content and nothing else."""
    return not message.extra.get("tool_calls") and not thinks(message)


def _forms(content: str) -> Sequence[str]:
    """Return an answer as templates write it: as it stands, or without the white space around it."""
    forms = (content, content.strip(), content.lstrip(), content.rstrip(), content.lstrip("\n"), content.strip("\n"))
    return tuple(dict.fromkeys(forms))


def _empty_thinking(body: str) -> int:
    """Return the length of an empty thinking block at the start: it is the template's, not the answer's."""
    empty = _EMPTY_THINKING.match(body)
    return empty.end() if empty else 0
