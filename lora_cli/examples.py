"""Conversation + tokenizer -> Example: the token ids one sequence is trained on, and which of them are targets.

Only answers are trained, each with its end token. Where an answer lies is found by rendering: the prompt as it stands
before the model answers (`add_generation_prompt`) must be the beginning of the same text with the answer.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

from lora_cli.config import DataConfig
from lora_cli.data import Conversation, Message
from lora_cli.errors import NOTHING_LOADED, DataError, ModelError
from lora_cli.records import DataCounts, Marked

IGNORED = -100  # the label of a token that is not trained


class Tokenizer(Protocol):
    """What is used of a fast Hugging Face tokenizer."""

    eos_token_id: int | None
    chat_template: str | None
    all_special_tokens: list[str]
    added_tokens_decoder: dict[int, Any]

    def __call__(self, text: list[str], **options: Any) -> Any: ...
    def decode(self, ids: Sequence[int], **options: Any) -> str: ...
    def apply_chat_template(self, conversation: list[dict[str, Any]], **options: Any) -> Any: ...


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


Segments = list[Marked]  # the text of one sequence, cut where it changes between trained and not


# --- text ---


def _render(conversation: Conversation, count: int, tokenizer: Tokenizer, prompt: bool) -> str:
    messages = [{"role": m.role, "content": m.content, **m.extra} for m in conversation.messages[:count]]
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tools=conversation.tools, tokenize=False, add_generation_prompt=prompt
        )
    except Exception as error:  # a template is a program: it may fail in any way
        raise DataError(
            f"{conversation.where}: the model's chat template refuses this row: {str(error)[:200]}.",
            state=NOTHING_LOADED,
        ) from None
    return text


def _squash(text: str) -> str:
    return re.sub(r"\s+", "", text)


def _answer_in(tail: str, message: Message, specials: re.Pattern[str], where: str) -> str:
    """Return the trained part of what the template writes for an answer: through its end token."""
    ends = list(specials.finditer(tail))
    whole = [end.end() for end in ends if _squash(message.content) in _squash(tail[: end.start()])]
    if not ends:
        raise DataError(
            f"{where}: the model's chat template writes no end token after an answer, so a model trained with it would "
            f"not learn to stop. It writes: {tail[-60:]!r}",
            state=NOTHING_LOADED,
        )
    if not whole:
        raise DataError(
            f"{where}: the model's chat template leaves out part of the answer; it writes {tail[:80]!r}.",
            state=NOTHING_LOADED,
        )
    return tail[: whole[-1] if message.extra else whole[0]]


def _iter_segments(row: Conversation, tokenizer: Tokenizer, specials: re.Pattern[str]) -> Iterator[Segments]:
    """Iterate over the sequences of a templated row: one, or one an answer.

    Some templates rewrite earlier answers once a conversation goes on (they drop earlier thinking). Such an answer is
    trained in the form in which it was given, in a sequence of its own that ends with it.
    """
    trained = [index for index, message in enumerate(row.messages) if message.trained]
    whole = _render(row, trained[-1] + 1, tokenizer, prompt=False)
    together: Segments = []
    apart: list[Segments] = []
    done: int | None = 0  # characters of `whole` that are cut so far; None once an answer is not in it
    for index in trained:
        before = _render(row, index, tokenizer, prompt=True)
        after = _render(row, index + 1, tokenizer, prompt=False)
        if not after.startswith(before):
            raise DataError(
                f"{row.where}: the model's chat template writes the prompt of message {index + 1} differently "
                "once it is answered, so what to train cannot be told.",
                state=NOTHING_LOADED,
            )
        answer = _answer_in(after[len(before) :], row.messages[index], specials, row.where)
        if done is not None and whole.startswith(before + answer):
            together += [Marked(whole[done : len(before)], False), Marked(answer, True)]
            done = len(before) + len(answer)
        else:
            done = None
        apart.append([Marked(before, False), Marked(answer, True)])
    yield from [together] if done is not None else apart


# --- tokens ---


def _encode(pieces: Sequence[Segments], tokenizer: Tokenizer, special: bool) -> Iterator[tuple[list[int], list[bool]]]:
    """Iterate over (token ids, trained?) of each sequence.

    A sequence is tokenised as one text. Where a token would lie across the border of prompt and answer, the segments
    are tokenised each alone, as the prompt is when the model answers, if that gives the same text; with a tokenizer
    that writes a space before every text it does not, and then that token counts as the answer's.
    """
    encoded = tokenizer(
        ["".join(s.text for s in segments) for segments in pieces],
        add_special_tokens=special,
        return_offsets_mapping=True,
        verbose=False,
    )
    for segments, ids, offsets in zip(pieces, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        borders, spans, end = set(), [], 0
        for segment in segments:
            begin, end = end, end + len(segment.text)
            borders.add(begin)
            if segment.trained:
                spans.append((begin, end))
        trained = [any(_overlaps(offset, span) for span in spans) for offset in offsets]
        if any(start < border < stop for border in borders for start, stop in offsets):
            apart: list[int] = []
            flags: list[bool] = []
            for number, segment in enumerate(segments):
                encoded_alone = tokenizer([segment.text], add_special_tokens=special and number == 0, verbose=False)
                apart += encoded_alone["input_ids"][0]
                flags += [segment.trained] * len(encoded_alone["input_ids"][0])
            if tokenizer.decode(apart) == tokenizer.decode(ids):
                ids, trained = apart, flags
        yield ids, trained


def _overlaps(offset: tuple[int, int], span: tuple[int, int]) -> bool:
    """Return whether a token's characters lie in a span; some tokenizers give white space an empty range."""
    (start, stop), (begin, end) = offset, span
    return max(start, begin) < min(stop, end) or (start == stop and begin <= start < end)


def _sequences(rows: Sequence[Conversation], tokenizer: Tokenizer) -> Iterator[tuple[str, list[int], list[bool]]]:
    """Iterate over (place, token ids, trained?) of every sequence of the rows, in their order."""
    names = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    names |= set(tokenizer.all_special_tokens)
    specials = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)")
    for begin in range(0, len(rows), 512):
        some = rows[begin : begin + 512]
        for templated, group in groupby(some, key=lambda row: row.templated):
            group_rows = list(group)
            if templated:
                pieces = [(row.where, s) for row in group_rows for s in _iter_segments(row, tokenizer, specials)]
            else:
                pieces = [(row.where, [Marked(m.content, m.trained) for m in row.messages]) for row in group_rows]
            for (where, _), (ids, trained) in zip(
                pieces, _encode([s for _, s in pieces], tokenizer, special=not templated), strict=True
            ):
                if not templated:
                    assert tokenizer.eos_token_id is not None, "checked by build"
                    if ids[-1] == tokenizer.eos_token_id:  # some tokenizers add it themselves
                        ids, trained = ids[:-1], trained[:-1]
                    ids, trained = [*ids, tokenizer.eos_token_id], [*trained, True]
                yield where, ids, trained


def _require_tokenizer(rows: Sequence[Conversation], tokenizer: Tokenizer) -> None:
    if any(row.templated for row in rows) and not tokenizer.chat_template:
        where = next(row.where for row in rows if row.templated)
        raise ModelError(
            f"{where}: is a conversation, but the model's tokenizer has no chat template. Use the instruct version "
            "of the model, or write the rows as prompt and completion.",
            state=NOTHING_LOADED,
        )
    if any(not row.templated for row in rows) and tokenizer.eos_token_id is None:
        raise ModelError(
            "The model's tokenizer has no end token (eos_token), so answers could not end.", state=NOTHING_LOADED
        )


def build(
    rows: Sequence[Conversation], tokenizer: Tokenizer, config: DataConfig, max_positions: int | None = None
) -> tuple[list[Example], DataCounts]:
    """Build the examples of a set and count what happened to its rows.

    Raises DataError naming the rows that are too long (`too_long: error`), that keep no target, or that the chat
    template cannot express.
    """
    _require_tokenizer(rows, tokenizer)
    limit = min(config.max_length, max_positions or config.max_length)
    named = "data.max_length" if limit == config.max_length else "the model's number of positions"
    examples: list[Example] = []
    too_long: list[str] = []
    dropped = truncated = lost = 0
    for where, ids, trained in _sequences(rows, tokenizer):
        if len(ids) > limit:
            too_long.append(f"{where}: {len(ids)} tokens, {named} is {limit}.")
            kept = sum(trained[:limit]) if config.too_long == "truncate" else 0
            lost += sum(trained) - kept
            truncated += kept > 0
            dropped += kept == 0
            if kept == 0:
                continue
            ids, trained = ids[:limit], trained[:limit]
        labels = tuple(token if target else IGNORED for token, target in zip(ids, trained, strict=True))
        example = Example(tuple(ids), labels, where)
        if example.targets:
            examples.append(example)
        else:
            dropped += 1
    if too_long and config.too_long == "error":
        raise DataError(
            f"data.too_long: {len(too_long)} of {len(rows)} rows are longer than {named}. Raise data.max_length, or "
            "choose drop (leave them out) or truncate (cut their end).",
            *too_long,
            state=NOTHING_LOADED,
        )
    if not examples:
        raise DataError("No row keeps a single token to train on.", state=NOTHING_LOADED)
    lengths = sorted(map(len, examples))
    counts = DataCounts(
        rows=len(rows),
        examples=len(examples),
        tokens=sum(lengths),
        targets=sum(example.targets for example in examples),
        dropped=dropped,
        truncated=truncated,
        lost_targets=lost,
        length_percentiles=tuple(lengths[min(len(lengths) - 1, len(lengths) * p // 100)] for p in (50, 90, 99, 100)),
    )
    return examples, counts


# --- looking at an example ---


def preview(example: Example, tokenizer: Tokenizer) -> list[Marked]:
    """Return the example's text, control tokens included, cut where it changes between trained and not."""
    pairs = zip(example.input_ids, example.labels, strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    return [Marked(tokenizer.decode([token for token, _ in run]), trained) for trained, run in runs]


def last_answer(example: Example) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return (prompt ids, answer ids with the end token) of the last answer; None where nothing comes before it."""
    end = max(i for i, label in enumerate(example.labels) if label != IGNORED) + 1
    begin = end
    while begin > 0 and example.labels[begin - 1] != IGNORED:
        begin -= 1
    prompt = example.input_ids[:begin]

    return (prompt, example.input_ids[begin:end]) if len(prompt) > 1 else None
