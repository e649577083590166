"""Conversation + tokenizer -> Encoded: the token ids one sequence is trained on, and which of them are targets.

Only answers are trained, each with its end token. `spans` says where they lie in the text; here it becomes tokens.
"""

import enum
import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, pairwise
from typing import Any, Protocol

from lora_cli.chat_template import ChatTemplate
from lora_cli.control_tokens import (
    BREAK,
    ControlTokens,
    added_tokens,
    alternatives,
    find_control_tokens,
    without_breaks,
)
from lora_cli.conversation import Conversation, RowError, name_of, reasoning
from lora_cli.limits import begin_row, limited
from lora_cli.redact import holds_secret, redact
from lora_cli.reports import Marked
from lora_cli.spans import Rendering, SpanFinder

IGNORED = -100  # the label of a token that is not trained


class Tokenizer(Protocol):
    """What is used of a fast Hugging Face tokenizer."""

    eos_token_id: int | None
    bos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None
    chat_template: Any
    all_special_tokens: list[str]
    added_tokens_decoder: dict[int, Any]
    special_tokens_map: dict[str, Any]
    backend_tokenizer: Any

    def __call__(self, text: list[str], **options: Any) -> Any: ...
    def decode(self, ids: Sequence[int], **options: Any) -> str: ...
    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class Example:
    """One sequence: `labels[i]` is `input_ids[i]` where the token is trained, else IGNORED."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    where: str

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def targets(self) -> int:
        """Trained tokens: the first token has nothing before it that could predict it."""
        return sum(label != IGNORED for label in self.labels[1:])


class Flag(enum.IntFlag):
    """What a user should know of a sequence."""

    NONE = 0
    LOSSY = 1  # the answers' tokens spell another text than the answers
    BLANK = 2  # a question is white space
    WITHOUT_TOOLS = 4  # the chat template leaves out the row's tools
    SECRET = 8  # it holds what looks like a key or a password


@dataclass(frozen=True)
class Encoded:
    """One sequence as tokens, whole: nothing is cut yet.

    `answers` are the trained token ranges. The keys are hashes: of the whole row, of what comes before its first
    answer, and of the field that `data.split_by` names. `controls` counts the control tokens in the row's content.
    """

    number: int  # of the row in its file
    input_ids: Sequence[int]
    answers: Sequence[tuple[int, int]]
    row_key: int
    prompt_key: int
    group_key: int
    controls: int
    flags: Flag


@dataclass(frozen=True)
class _Rendered:
    """One sequence of a row as text; `controls` counts the control tokens in the row's content."""

    row: Conversation
    controls: int
    broken: bool  # they are broken by BREAK, which is not to be tokenised
    rendering: Rendering


class Encoder:
    """Turns conversations into tokens; one for each process."""

    def __init__(
        self, tokenizer: Tokenizer, template: ChatTemplate | None, keep_controls: bool, vocabulary: int | None = None
    ) -> None:
        """`keep_controls`: control tokens inside content stay control tokens. `vocabulary`: tokens the model knows."""
        self.tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer  # of tokenizers: as the tokenizer's own call, without its detours
        self._backend.no_truncation()
        self._backend.no_padding()
        self.template = template
        self.keep_controls = keep_controls
        self.vocabulary = vocabulary
        known, added = tokenizer.get_vocab(), added_tokens(tokenizer)
        self.added_ids = {known[token] for token in added if token in known}
        self.finder = SpanFinder(template, alternatives(added)) if template else None

    @cached_property
    def controls(self) -> ControlTokens:
        """The strings that are more than text; what asks for them first renders, so within `limited()`."""
        return find_control_tokens(self.tokenizer, self.template)

    def encode(self, rows: Sequence[Conversation]) -> tuple[list[Encoded], list[tuple[int, str]]]:
        """Return the sequences of some rows in their order, and (row number, what is wrong) for rows that have none.

        Raises TemplateLimit.
        """
        problems: list[tuple[int, str]] = []
        found: list[_Rendered] = []
        with limited():
            for row in rows:
                begin_row(row.number)
                try:
                    count = self.controls.in_row(row)
                    broken = count > 0 and not self.keep_controls
                    renderings = self._render(self.controls.broken(row) if broken else row)
                    found += [_Rendered(row, count, broken, rendering) for rendering in renderings]
                except RowError as error:
                    problems.append((row.number, str(error)))
                except RecursionError:
                    problems.append((row.number, "is nested too deeply"))
        encoded: list[Encoded] = []
        for templated, group in groupby(found, key=lambda entry: entry.row.templated):
            entries = list(group)
            sequences = self._tokenise(entries, special=not templated)
            lossless = self._lossless(entries, sequences)
            for entry, (ids, answers), exact in zip(entries, sequences, lossless, strict=True):
                number = entry.row.number
                if wrong := self._wrong_tokens(ids, answers, entry):
                    problems.append((number, wrong))
                else:
                    flags = _flags(entry.row, entry.rendering.text) | (Flag.NONE if exact else Flag.LOSSY)
                    encoded.append(Encoded(number, ids, answers, *_keys(entry.row), entry.controls, flags))
        return encoded, problems

    def _render(self, row: Conversation) -> list[Rendering]:
        if row.templated:
            if self.finder is None:
                raise RowError("is a conversation, but there is no chat template")
            return self.finder.find(row)
        *before, answer = row.messages
        prompt = "".join(message.content for message in before)
        return [Rendering(prompt + answer.content, ((len(prompt), len(prompt) + len(answer.content)),))]

    def _tokenise(
        self, entries: Sequence["_Rendered"], special: bool
    ) -> list[tuple[Sequence[int], list[tuple[int, int]]]]:
        """Return (ids, trained ranges) of texts; plain ones (`special`) get the tokenizer's own start and an end."""
        batch = self._backend.encode_batch([entry.rendering.text for entry in entries], add_special_tokens=special)
        found = []
        end_token = self.tokenizer.eos_token_id
        for entry, encoding in zip(entries, batch, strict=True):
            ids, offsets = self._spelt(entry.rendering.text, encoding, entry.broken)
            answers, across = _ranges(offsets, entry.rendering.answers)
            if across and (apart := self._apart(entry, ids, special)):
                ids, answers = apart
            if special:
                assert end_token is not None, "checked before"
                ids = [*ids, end_token]
                answers = [*answers[:-1], (answers[-1][0], len(ids))]
            found.append((ids, answers))
        return found

    def _spelt(self, text: str, encoding: Any, broken: bool) -> tuple[Sequence[int], Sequence[tuple[int, int]]]:
        """Return the (ids, offsets) that spell a text: without an end token that is added to it, and without BREAKs."""
        ids, offsets = encoding.ids, encoding.offsets
        if ids and ids[-1] == self.tokenizer.eos_token_id and offsets[-1] == (0, 0):
            ids, offsets = ids[:-1], offsets[:-1]
        return without_breaks(text, ids, offsets) if broken else (ids, offsets)

    def _apart(
        self, entry: "_Rendered", ids: Sequence[int], special: bool
    ) -> tuple[list[int], list[tuple[int, int]]] | None:
        """Tokenise the pieces of a text each alone, where a token would lie across the border of prompt and answer.

        So the prompt has the tokens it has when the model answers. None where that gives another text: with a tokenizer
        that writes a space before every text; then the token across the border counts as the answer's.
        """
        tokens: list[int] = []
        answers: list[tuple[int, int]] = []
        text = entry.rendering.text
        edges = [0, *(edge for answer in entry.rendering.answers for edge in answer), len(text)]
        for number, (begin, end) in enumerate(pairwise(edges)):
            if begin < end:
                encoding = self._backend.encode(text[begin:end], add_special_tokens=special and not tokens)
                more, _ = self._spelt(text[begin:end], encoding, entry.broken)
                if number % 2:
                    answers.append((len(tokens), len(tokens) + len(more)))
                tokens += more
        return (tokens, answers) if self.tokenizer.decode(tokens) == self.tokenizer.decode(ids) else None

    def _lossless(
        self,
        entries: Sequence["_Rendered"],
        sequences: Sequence[tuple[Sequence[int], list[tuple[int, int]]]],
    ) -> list[bool]:
        """Return whether the trained tokens of each sequence, decoded, are its answers; white space at ends aside."""
        pieces = [ids[begin:end] for ids, answers in sequences for begin, end in answers]
        decoded = iter(self._backend.decode_batch(pieces, skip_special_tokens=False))
        result = []
        for entry, (_, answers) in zip(entries, sequences, strict=True):
            said = [next(decoded) for _ in answers]
            wanted = [entry.rendering.text[begin:end] for begin, end in entry.rendering.answers]
            if entry.broken:
                wanted = [text.replace(BREAK, "") for text in wanted]
            if not entry.row.templated:
                said[-1] = said[-1].removesuffix(self.tokenizer.decode([self.tokenizer.eos_token_id or 0]))
            result.append([s.strip() for s in said] == [w.strip() for w in wanted])
        return result

    def _wrong_tokens(self, ids: Sequence[int], answers: Sequence[tuple[int, int]], entry: "_Rendered") -> str | None:
        """Return what is wrong with a sequence's tokens, or None."""
        bos = self.tokenizer.bos_token_id
        if self.vocabulary is not None and (largest := max(ids, default=0)) >= self.vocabulary:
            return f"has the token {largest}, and the model knows {self.vocabulary}: is its tokenizer another model's?"
        if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
            return "begins with two start tokens"
        if any(begin >= end for begin, end in answers):
            return "has an answer of no token"
        if entry.broken and BREAK in self.tokenizer.decode(ids):
            return "holds a control token that this tokenizer cannot take as text"
        if entry.row.templated and any(ids[end - 1] not in self.added_ids for _, end in answers):
            return "has an answer whose end token falls to pieces in the tokenizer"
        return None


def _ranges(
    offsets: Sequence[tuple[int, int]], answers: Sequence[tuple[int, int]]
) -> tuple[list[tuple[int, int]], bool]:
    """Return the token ranges of character ranges, and whether a token lies across the edge of one."""
    starts = [start for start, _ in offsets]
    stops = [stop for _, stop in offsets]
    found = []
    across = False
    for begin, end in answers:
        first, last = bisect_right(stops, begin), bisect_left(starts, end)
        while first > 0 and starts[first - 1] == stops[first - 1] == begin and begin > 0:  # white space of no width
            first -= 1
        if first < last:
            across |= starts[first] < begin or stops[last - 1] > end
        found.append((first, last))
    return found, across


def _flags(row: Conversation, text: str) -> Flag:
    blank = any(not m.content.strip() for m in row.messages if m.role in ("user", "prompt"))
    names = [name_of(tool) for tool in row.tools or ()]
    left_out = any(name.replace(BREAK, "") not in text.replace(BREAK, "") for name in names)
    plain = (Flag.BLANK if blank else Flag.NONE) | (Flag.WITHOUT_TOOLS if left_out else Flag.NONE)
    return plain | (Flag.SECRET if holds_secret(text) else Flag.NONE)


def _keys(row: Conversation) -> tuple[int, int, int]:
    """Return hashes of a row, of what comes before its first answer (of the row, where nothing does), of its group.

    Two rows that ask the same for their last answer ask the same for their first. What else a message carries (an id, a
    time) is left out.
    """
    plain = [(m.role, m.content.strip(), reasoning(m), m.extra.get("tool_calls")) for m in row.messages]
    first = next((index for index, m in enumerate(row.messages) if m.role in ("assistant", "completion")), 0)
    return _key((plain, row.tools)), _key((plain[:first] or plain, row.tools)), _key(row.group) if row.group else 0


def _key(value: Any) -> int:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


# --- looking at an example ---


def preview(example: Example, tokenizer: Tokenizer) -> list[Marked]:
    """Return the example's text with its control tokens, secrets hidden, cut where training begins or ends."""
    pairs = zip(example.input_ids, example.labels, strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    return [Marked(redact(tokenizer.decode([token for token, _ in run])), trained) for trained, run in runs]


def last_answer(example: Example) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return (prompt ids, answer ids with the end token) of the last answer; None where nothing comes before it."""
    end = max(i for i, label in enumerate(example.labels) if label != IGNORED) + 1
    begin = end
    while begin > 0 and example.labels[begin - 1] != IGNORED:
        begin -= 1
    prompt = example.input_ids[:begin]

    return (prompt, example.input_ids[begin:end]) if len(prompt) > 1 else None
