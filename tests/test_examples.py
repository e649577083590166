"""Only answers are trained, each with its end token; the model sees what it will see when it answers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import CHATML, build_examples, build_tokenizer, conversation, write_rows
from tokenizers import AddedToken

from lora_cli import examples
from lora_cli.errors import DataError, ModelError

TOKENIZER: Any = build_tokenizer()
# Drops what an assistant thought, once the conversation goes on, as Qwen3's template does.
FORGETS_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(tmp_path: Path, rows: list[Any], tokenizer: Any = TOKENIZER, **settings: Any) -> list[examples.Example]:
    return list(build_examples(write_rows(tmp_path / "r.jsonl", rows), tokenizer, **settings)[0])


def trained(example: examples.Example, tokenizer: Any = TOKENIZER) -> list[str]:
    return [piece.text for piece in examples.preview(example, tokenizer) if piece.trained]


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Red."},
    {"role": "user", "content": "Another, with an emoji?"},
    {"role": "assistant", "content": "Blue 🫐 sky."},
]


def test_every_answer_and_its_end_token(tmp_path: Path):
    """Several turns: both answers, each with one end token, and nothing else; pad equals eos here."""
    (example,) = build(tmp_path, [{"messages": TURNS}])

    assert trained(example) == ["Red.<|im_end|>", "Blue 🫐 sky.<|im_end|>"]
    assert TOKENIZER.decode(example.input_ids) == TOKENIZER.apply_chat_template(TURNS, tokenize=False).rstrip("\n")


def test_an_answer_that_ends_with_a_special_token_still_gets_its_end(tmp_path: Path):
    """A control token written in the answer is not taken for its end."""
    turns = [*TURNS[:2], {"role": "assistant", "content": "Done.<|endoftext|>"}]
    (example,) = build(tmp_path, [{"messages": turns}])

    assert trained(example) == ["Done.<|endoftext|><|im_end|>"]


def test_an_end_token_that_only_the_vocabulary_marks(tmp_path: Path):
    """A special token counts though the tokenizer gives it no name of its own, as Gemma 3's end of turn."""
    tokenizer: Any = build_tokenizer()
    tokenizer.add_tokens([AddedToken("<end_of_turn>", special=True)])
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<end_of_turn>")
    (example,) = build(tmp_path, [{"messages": TURNS[:3]}], tokenizer)

    assert "<end_of_turn>" not in tokenizer.all_special_tokens
    assert trained(example, tokenizer) == ["Red.<end_of_turn>"]


def test_the_prompt_is_what_generation_starts_from(tmp_path: Path):
    """The tokens before the last answer are the chat template's prompt, token for token."""
    (example,) = build(tmp_path, [{"messages": TURNS}])
    prompt, answer = examples.last_answer(example) or ((), ())
    asked = TOKENIZER.apply_chat_template(TURNS[:-1], add_generation_prompt=True)["input_ids"]

    assert list(prompt) == list(asked)
    assert TOKENIZER.decode(answer) == "Blue 🫐 sky.<|im_end|>"


def test_a_template_that_rewrites_earlier_answers(tmp_path: Path):
    """Each answer is then trained in the form it was given in, in a sequence of its own."""
    tokenizer: Any = build_tokenizer()
    tokenizer.chat_template = FORGETS_THOUGHTS
    found = build(tmp_path, [{"messages": TURNS}], tokenizer)

    assert [trained(example) for example in found] == [
        ["Red.<|im_end|>"],
        ["Blue 🫐 sky.<|im_end|>"],
    ]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "writes no end token"),
        (
            "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{{ m.content[:2] }}<|im_end|>"
            "{% endfor %}",
            "has an answer that the chat template leaves out",
        ),
        ("{% for m in messages %}{{ m.content[:2] }}<|im_end|>{% endfor %}", "a user message that the chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        (
            "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
            "{% if add_generation_prompt %}Thinking:{% endif %}",
            "differently by the chat template once message 2 is answered",
        ),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused(tmp_path: Path, template: str, expected: str):
    """No guess is made where the trained part cannot be told."""
    tokenizer: Any = build_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=expected):
        build(tmp_path, [conversation(0)], tokenizer)


def test_no_chat_template_is_said(tmp_path: Path):
    """A base model's tokenizer cannot render conversations."""
    tokenizer: Any = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="has no chat template"):
        build(tmp_path, [conversation(0)], tokenizer)


def test_a_named_template_begins_as_the_tokenizer_does(shared_model: str, tmp_path: Path):
    """A tokenizer with a start token: one, untrained, though the named template has none of its own."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(shared_model)
    (example,) = build(tmp_path, [{"messages": TURNS}], tokenizer, chat_template="zephyr")

    assert example.input_ids[0] == tokenizer.bos_token_id
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert [text.strip() for text in trained(example, tokenizer)] == ["Red.</s>", "Blue 🫐 sky.</s>"]


def test_a_conversation_that_begins_with_an_answer(tmp_path: Path):
    """Where the template has no prompt for it, the error says how to keep it; as context it is kept."""
    tokenizer: Any = build_tokenizer()
    tokenizer.chat_template = "{% if messages %}<|im_start|>system\nHi.<|im_end|>\n{% endif %}" + CHATML
    greeting = {"role": "assistant", "content": "Hello!"}
    with pytest.raises(DataError, match="it answers no question: weight: 0 would keep it as context"):
        build(tmp_path, [{"messages": [greeting, *TURNS[1:3]]}], tokenizer)
    (example,) = build(tmp_path, [{"messages": [greeting | {"weight": 0}, *TURNS[1:3]]}], tokenizer)

    assert "Hello!" in tokenizer.decode(example.input_ids)
    assert trained(example) == ["Red.<|im_end|>"]


def test_plain_prompt_and_completion(tmp_path: Path):
    """Plain rows are joined as they stand; the completion and the end token are trained."""
    (example,) = build(tmp_path, [{"prompt": "The sky is", "completion": " blue."}])

    assert trained(example) == [" blue.<|im_end|>"]
    assert TOKENIZER.decode(example.input_ids) == "The sky is blue.<|im_end|>"


def test_a_token_across_the_border_is_split(tmp_path: Path):
    """Where one token would hold the end of the prompt and the start of the answer, the prompt keeps its own tokens."""
    (example,) = build(tmp_path, [{"prompt": "The sk", "completion": "y is blue."}])
    prompt, _ = examples.last_answer(example) or ((), ())

    assert TOKENIZER.decode(TOKENIZER(["The sky"])["input_ids"][0][-1:]).endswith("y")
    assert list(prompt) == TOKENIZER(["The sk"])["input_ids"][0]
    assert trained(example) == ["y is blue.<|im_end|>"]


def test_text_is_trained_whole(tmp_path: Path):
    """Plain text: every token, and the end."""
    (example,) = build(tmp_path, [{"text": "The sky is blue."}])

    assert example.labels == example.input_ids
    assert example.targets == len(example) - 1
    assert examples.last_answer(example) is None


def test_a_tokenizer_with_bos_and_prefix_space(shared_model: str, tmp_path: Path):
    """A sentencepiece tokenizer: one BOS, untrained; the answer's own leading space is not doubled."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(shared_model)
    (example,) = build(tmp_path, [{"prompt": "Once upon a time", "completion": " there was."}], tokenizer)
    whole = tokenizer("Once upon a time there was.")["input_ids"]

    assert list(example.input_ids) == [*whole, tokenizer.eos_token_id]
    assert example.input_ids.count(tokenizer.bos_token_id) == 1
    assert trained(example, tokenizer)[0].strip() == "there was.</s>"


def test_a_border_inside_a_token_of_a_prefix_space_tokenizer(shared_model: str, tmp_path: Path):
    """No space is put between prompt and answer that the row does not have."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(shared_model)
    (example,) = build(tmp_path, [{"prompt": "Once upon a ti", "completion": "me there was."}], tokenizer)

    assert tokenizer.decode(example.input_ids, skip_special_tokens=True) == "Once upon a time there was."


LONG = {"prompt": "a " * 30, "completion": "b " * 30}
SHORT = {"prompt": "a", "completion": "b"}


def test_too_long_is_an_error_that_names_the_rows(tmp_path: Path):
    """By default nothing is cut."""
    with pytest.raises(DataError) as caught:
        build(tmp_path, [SHORT, LONG], max_length=50)

    assert "1 of 2 sequences are longer than data.max_length" in caught.value.problems[0]
    assert "r.jsonl:2:" in caught.value.problems[1]


@pytest.mark.parametrize(
    ("policy", "limit", "kept", "dropped", "truncated"),
    [("drop", 50, 1, 1, 0), ("truncate", 90, 2, 0, 1), ("truncate", 20, 1, 1, 0)],
)
def test_too_long_counts_what_is_lost(tmp_path: Path, policy: Any, limit: int, kept: int, dropped: int, truncated: int):
    """Dropped and cut rows are counted with the answer tokens that went; no row without a target stays."""
    source = write_rows(tmp_path / "r.jsonl", [SHORT, LONG])
    found, counts = build_examples(source, TOKENIZER, max_length=limit, too_long=policy)

    assert (counts.examples, counts.dropped, counts.truncated) == (kept, dropped, truncated)
    assert counts.lost_targets > 0
    assert all(example.targets and len(example) <= limit for example in found)


def test_the_models_own_limit_counts(tmp_path: Path):
    """No sequence is longer than the model has positions."""
    source = write_rows(tmp_path / "r.jsonl", [LONG])
    with pytest.raises(DataError, match="the model's number of positions"):
        build_examples(source, TOKENIZER, max_positions=16)


def test_counts(make_rows: Callable[[int], str]):
    """Tokens and targets add up."""
    source = make_rows(30)
    found, counts = build_examples(source, TOKENIZER)

    assert counts.tokens == sum(map(len, found))
    assert counts.targets == sum(label != -100 for example in found for label in example.labels)
    assert counts.length_percentiles[-1] == max(map(len, found))
