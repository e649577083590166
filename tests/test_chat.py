"""Talking to what was trained: its tokens, its cache, its text as it comes, and the terminal."""

import json
import os
import pty
import select
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import (
    Invoke,
    build_examples,
    build_tokenizer,
    conversation,
    read_rows,
    save_base,
    save_with_peft,
    write_adapter,
    write_rows,
)
from processes import disturb, end, fork, lora, send
from shapes import require_shape

from lora_cli import console, decoding, model, slash, tuned
from lora_cli import speaker as speaking
from lora_cli.chat import Chat
from lora_cli.chat_reports import ChatReport
from lora_cli.config import LoraConfig, ModelConfig
from lora_cli.conversation import Message
from lora_cli.data_config import DataConfig
from lora_cli.data_reader import shared_system
from lora_cli.decoding import Decoder, choose
from lora_cli.ends import end_tokens
from lora_cli.errors import InputError
from lora_cli.examples import last_answer
from lora_cli.generate import GREEDY, Sampling, generate
from lora_cli.prompts import Prompts
from lora_cli.speaker import Manner, Speaker
from lora_cli.text_stream import TextStream

CPU = torch.device("cpu")
DRY = Manner(GREEDY, max_new_tokens=12)


@pytest.fixture(scope="session")
def speaker(undisturbed: Path) -> Speaker:
    """What speaks for the undisturbed run."""
    return Speaker([tuned.find(undisturbed)], CPU)


@pytest.fixture
def chat(speaker: Speaker) -> Chat:
    """A conversation that has not begun."""
    speaker.decoder.forget()
    return Chat(speaker, DRY)


def said(pieces: Sequence[str]) -> str:
    return "".join(pieces)


# --- tokens ---


def test_a_prompt_has_the_tokens_of_training(speaker: Speaker, tmp_path: Path):
    """System message, earlier turns and control tokens in a question: the ids are a training row's up to its answer."""
    messages = [("system", "Be brief."), ("user", "Sky?"), ("assistant", "Blue."), ("user", "And <|im_end|>\nred?")]
    entries = [{"role": role, "content": text} for role, text in messages]
    row = {"messages": [*entries, {"role": "assistant", "content": "A colour."}]}
    examples, _ = build_examples(write_rows(tmp_path / "rows.jsonl", [row]), allow_control_tokens=False)
    trained = last_answer(examples[0])
    prompt = speaker.prompts[0].of_conversation([Message(role, text, False) for role, text in messages])

    assert trained is not None
    assert prompt == trained[0]
    assert list(prompt).count(build_tokenizer().get_vocab()["<|im_end|>"]) == 4  # of its four turns, none of the user


THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


@pytest.mark.parametrize("think", [True, False])
def test_reasoning_is_asked_for_as_it_is_trained(undisturbed: Path, tmp_path: Path, think: bool):
    """A row with reasoning is trained behind another prompt than one without; chat asks by the one or the other."""
    tokenizer = build_tokenizer()
    tokenizer.chat_template = THINKING
    result = tuned.find(undisturbed)
    prompts = Prompts(replace(result, header=replace(result.header, tokenizer=tokenizer)))
    answer = {"role": "assistant", "content": "Blue."} | ({"reasoning_content": "Look up."} if think else {})
    row = {"messages": [{"role": "user", "content": "Sky?"}, answer]}
    examples, _ = build_examples(write_rows(tmp_path / "rows.jsonl", [row]), tokenizer)
    trained = last_answer(examples[0])

    assert trained is not None
    assert prompts.of_conversation([Message("user", "Sky?", False)], think) == trained[0]
    assert ("<think>" in tokenizer.decode(trained[0])) is not think


def test_reasoning_that_a_template_does_not_write_is_refused(chat: Chat):
    """--think has an effect, or it is an error."""
    chat.manner = replace(DRY, think=True)
    with pytest.raises(InputError, match="reasoning"):
        list(chat.ask("Sky?"))


def test_a_run_on_plain_text_is_continued_as_it_was_trained(make_config, tmp_path: Path, invoke: Invoke):
    """Rows of prompt and completion saw no template, so chat uses none, says so, and refuses a system message."""
    rows = [{"prompt": f"Q {number}? ", "completion": f"A {number}"} for number in range(20)]
    config = make_config(**{"data.train": write_rows(tmp_path / "plain.jsonl", rows), "train.max_steps": 1})
    assert invoke("train", config)[0] == 0
    prompts = Prompts(tuned.find(tmp_path / "run"))
    examples, _ = build_examples(str(tmp_path / "plain.jsonl"))
    code, out, err = invoke("chat", tmp_path / "run", "--prompt", "Q 3? ", "--json", "--max-new-tokens", 2)

    assert prompts.of_conversation([Message("user", "Q 3? ", False)]) == last_answer(examples[3])[0]
    assert (code, json.loads(out)["templated"]) == (0, False)
    assert "continued as it is" in err
    assert invoke("chat", tmp_path / "run", "--prompt", "x", "--system", "y")[0] == 2


def test_the_system_message_of_the_rows_is_taken_and_said(make_config, tmp_path: Path, invoke: Invoke):
    """Where all rows share one, what is asked is what was trained; "" takes none, and rows that differ have none."""
    rows = [conversation(number) for number in range(24)]
    for row in rows:
        row["messages"].insert(0, {"role": "system", "content": "Be brief."})
    train_rows = write_rows(tmp_path / "brief.jsonl", rows)
    assert invoke("train", make_config(**{"data.train": train_rows, "train.max_steps": 1}))[0] == 0
    asked = ("chat", tmp_path / "run", "--json", "--max-new-tokens", 1, "--prompt", "Name a colour.")

    code, out, err = invoke(*asked)
    assert (code, "The system message of the rows: Be brief." in err) == (0, True), err
    by_hand = invoke(*asked, "--system", "Be brief.")[1]
    without = invoke(*asked, "--system", "")[1]
    taken, given, none = (json.loads(each)["prompt_tokens"] for each in (out, by_hand, without))
    assert taken == given > none

    rows[5]["messages"][0]["content"] = "Be long."
    write_rows(tmp_path / "brief.jsonl", rows)
    assert shared_system(DataConfig(train=train_rows)) is None


def test_the_oldest_turns_make_room_and_it_is_said(tmp_path: Path):
    """Where positions run out the first turns go, the system message stays; a question that is too long is an error."""
    base = save_base("llama", tmp_path / "base", max_position_embeddings=96)
    write_adapter(str(base), tmp_path / "adapter", LoraConfig(rank=2))
    chat = Chat(Speaker([tuned.find(tmp_path / "adapter")], CPU), DRY, system="Be brief.")
    for _ in range(4):
        list(chat.ask("What is the colour of the sky?"))
    assert chat.said is not None
    begin, _ = chat.speaker.prompts[0].fitted(chat.messages[:1] + chat.messages[-2:-1], 12)

    assert chat.said.left_out_turns >= 2
    assert chat.said.prompt_tokens + 12 <= 96
    assert chat.said.prompt_tokens >= len(begin)
    with pytest.raises(InputError, match=r"alone takes \d+ tokens .* 96 positions"):
        list(chat.ask("sky " * 90))
    assert len(chat.turns) == 4


# --- the loop ---


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "qwen3", "mamba", "bloom"])
def test_the_loop_says_what_generate_says(kind: str, model_folder, monkeypatch: pytest.MonkeyPatch):
    """Greedy tokens are those of transformers' generation, read in pieces, cached, cut back, or begun anew."""
    monkeypatch.setattr(decoding, "_PIECE", 7)
    place = ModelConfig(path=model_folder(kind))
    header = model.read_header(place)
    loaded = model.load_model(header, place, CPU)
    prompts = [tuple(range(5, 35)), (*range(5, 35), 7, 8), (*range(5, 30), 9), (*range(60, 75),)]
    expected = generate(loaded, header.tokenizer, prompts, 10)
    loaded.module.set_attn_implementation(loaded.own_attention)
    decoder = Decoder(loaded, end_tokens(loaded, header.tokenizer))
    found, reused = [], []
    for prompt in prompts:
        tokens = list(decoder.decode(prompt, GREEDY, 10))
        found.append(tuple(token for token in tokens if token not in decoder.ends))
        reused.append(decoder.reused)

    assert found == expected
    assert reused == ([0, 0, 0, 0] if kind in ("mamba", "gemma2") else [0, 30, 25, 0])


def test_what_the_second_turn_shares_is_not_read_again(chat: Chat):
    """The cache holds the first turn; another gain drops it."""
    first = said(list(chat.ask("Name a colour.")))
    list(chat.ask("Another one."))
    second = chat.said
    chat.manner = replace(chat.manner, gain=0.5)
    list(chat.ask("Another one."))

    assert first
    assert second is not None
    assert second.reused_tokens > 10
    assert chat.said is not None
    assert chat.said.reused_tokens == 0


def test_drawing_keeps_to_the_likely_and_to_the_seed():
    """top_k and top_p leave the tokens they should, of few and of many; the same seed draws the same."""

    def drawn(logits: torch.Tensor, sampling: Sampling) -> set[int]:
        generator = torch.Generator().manual_seed(0)
        return {choose(logits, sampling, generator) for _ in range(300)}

    few = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    many = torch.zeros(1000)

    assert drawn(few, Sampling(1.0)) == {0, 1, 2, 3}
    assert drawn(few, Sampling(1.0, top_p=0.6)) == {0, 1}
    assert drawn(few, Sampling(1.0, top_p=0.5)) == {0}
    assert drawn(few, Sampling(1.0, top_k=3)) == {0, 1, 2}
    assert drawn(few, Sampling(1.0, top_k=3, top_p=0.8)) == {0, 1}
    assert drawn(few, Sampling(0.01)) == drawn(few, Sampling(1e-60)) == drawn(few, GREEDY) == {0}
    assert max(drawn(many, Sampling(1.0, top_p=0.5))) < 500
    assert len(drawn(many, Sampling(1.0, top_p=0.5))) > 200


def test_gain_nought_is_the_base(chat: Chat, undisturbed: Path):
    """The base answers as it does without any adapter, on the same history, which stays as it is."""
    answer = said(list(chat.ask("Name a colour.")))
    by_base = said(list(chat.by_base()))
    result = tuned.find(undisturbed)
    base = model.load_model(result.header, result.base, CPU)
    prompt = chat.speaker.prompts[0].of_conversation([Message("user", "Name a colour.", False)])
    (tokens,) = generate(base, result.header.tokenizer, [prompt], 12)

    assert by_base == result.header.tokenizer.decode(tokens) != answer
    assert chat.turns == [("Name a colour.", answer)]


def test_a_whole_model_and_a_foreign_adapter_are_talked_to(make_config, model_folder, tmp_path: Path, invoke: Invoke):
    """Full fine-tuning's result answers, and its base at gain 0; so does an adapter that PEFT made."""
    assert invoke("train", make_config(**{"lora": {"method": "full"}, "train.max_steps": 3}))[0] == 0
    save_with_peft(model_folder("llama"), tmp_path / "foreign")
    by_base = []
    for path in (tmp_path / "run", tmp_path / "foreign"):
        chat = Chat(Speaker([tuned.find_any(path)], CPU), DRY)
        answer = said(list(chat.ask("Name a colour.")))
        by_base.append(said(list(chat.by_base())))
        assert answer != by_base[-1]

    assert by_base[0] == by_base[1]


# --- text ---


def test_half_a_character_waits_for_its_other_half():
    """Tokens that are single bytes come out as whole characters, and a broken end is not lost."""
    tokenizer, text = build_tokenizer(), "é🙂 red"
    stream = TextStream(tokenizer)
    tokens = tokenizer(text)["input_ids"]
    pieces = [stream.push(token) for token in tokens]
    cut = TextStream(tokenizer)

    assert said(pieces) + stream.rest() == text
    assert len(tokens) > len(text)
    assert not any("\ufffd" in piece for piece in pieces)
    assert cut.push(tokens[0]) + cut.rest() == "\ufffd"


def test_a_stop_may_lie_across_tokens():
    """What could begin a stop is held back; the stop and what follows are left out."""
    tokenizer = build_tokenizer()

    def shown(text: str) -> tuple[str, bool]:
        stream = TextStream(tokenizer, ["blue."])
        return said([stream.push(token) for token in tokenizer(text)["input_ids"]]) + stream.rest(), stream.stopped

    assert shown("The sky is blue. Red") == ("The sky is ", True)
    assert shown("The sky is blue") == ("The sky is blue", False)


# --- the conversation ---


def test_a_conversation_is_kept_taken_back_and_saved(chat: Chat, tmp_path: Path):
    """Turns are answered anew, taken back, and saved as rows that training reads."""
    chat.manner = replace(DRY, sampling=Sampling(1.0))
    first = said(list(chat.ask("Name a colour.")))
    again = said(list(chat.retry()))
    assert first != again
    assert chat.turns == [("Name a colour.", again)]
    chat.undo()
    assert said(list(chat.ask("Name a colour."))) == first  # the same seed, the same answer
    (row,) = read_rows(write_rows(tmp_path / "saved.jsonl", chat.rows()))

    assert [(message.role, message.content) for message in row.messages] == [
        ("user", "Name a colour."),
        ("assistant", first),
    ]
    chat.reset()
    for action in (chat.undo, chat.rows, lambda: list(chat.retry()), lambda: list(chat.by_base())):
        with pytest.raises(InputError, match="no question yet"):
            action()


def test_an_answer_that_is_not_given_anew_stays(chat: Chat):
    """Whoever leaves a retry keeps the turn as it was, also where the question was asked twice."""
    for _ in range(2):
        list(chat.ask("Name a colour."))
    turns = list(chat.turns)
    pieces = chat.retry()
    next(iter(pieces))
    pieces.close()  # type: ignore[attr-defined]

    assert chat.turns == turns


def test_a_stopped_answer_is_kept_as_far_as_it_came(chat: Chat):
    """Asking to stop ends an answer, and what it said is the turn."""
    asked = iter([False] * 5)
    text = said(list(chat.ask("Name a colour.", lambda: next(asked, True))))

    assert chat.turns == [("Name a colour.", text)]
    assert chat.said is not None
    assert (chat.said.finish_reason, chat.said.tokens) == ("interrupted", 5)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("/hepl", "no /hepl; did you mean /help"),
        ("/gain much", "/gain: expected a number, found much"),
        ("/top-p 0", "/top-p: expected a number above 0 and at most 1, found 0"),
        ("/temperature nan", "expected a number that is 0 or more"),
        ("/seed 1.5", "expected a whole number"),
        ("/undo it", "/undo: takes nothing behind it, found it"),
    ],
)
def test_a_wrong_command_says_what_is_accepted(chat: Chat, typed: str, expected: str):
    """Nothing is changed by it."""
    with pytest.raises(InputError, match=expected):
        slash.turn(chat, *slash.parse(typed))
    assert chat.manner == DRY


def test_quit_is_taken_for_exit():
    """Other programs leave by it."""
    assert slash.parse("/quit") == slash.parse("/exit") == ("exit", "")


# --- the command ---


def test_one_question_is_one_object(invoke: Invoke, undisturbed: Path):
    """--json prints what was asked, answered and measured, the same for the same seed."""
    command = ("chat", undisturbed, "--prompt", "Name a colour.", "--json", "--max-new-tokens", 6, "--seed", 3)
    code, out, _ = invoke(*command)
    report, again = json.loads(out), json.loads(invoke(*command)[1])

    assert code == 0
    assert (report["prompt"], report["gain"], report["seed"]) == ("Name a colour.", 1.0, 3)
    assert report["finish_reason"] in ("stop", "length")
    assert 1 <= report["tokens"] <= 6
    assert again["answer"] == report["answer"]


def test_an_object_that_was_interrupted_is_the_only_one(undisturbed: Path, tmp_path: Path):
    """Ctrl-C within an answer: what was said by then, how it ended, and the exit code."""

    def work() -> None:
        disturb(speaking, "iter_pieces", 1, send(signal.SIGINT))
        lora("chat", undisturbed, "--prompt", "Name a colour.", "--json", "--max-new-tokens", 1900)

    assert end(fork(work, tmp_path / "said")) == 128 + signal.SIGINT
    (only,) = [line for line in (tmp_path / "said").read_text().splitlines() if line.startswith("{")]
    assert require_shape(ChatReport, only).finish_reason == "interrupted"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--json"], "There is no terminal"),
        (["--prompt", ""], "question is empty"),
        (["--prompt", "x", "--top-p", "0"], "--top-p: must be above 0"),
        (["--prompt", "x", "--gain", "nan"], "--gain: expected a finite number"),
        (["--prompt", "x", "--dtype", "float8"], "--dtype: expected auto"),
        (["--prompt", "x", "--max-new-tokens", "5000"], "2,048 positions"),
    ],
)
def test_what_cannot_be_asked_is_refused(invoke: Invoke, undisturbed: Path, options: list[str], expected: str):
    """With exit code 2, and nothing but an error object on stdout."""
    code, out, err = invoke("chat", undisturbed, *options)

    assert (code, out if "--json" not in options else "") == (2, "")
    assert expected in err


def test_a_pipe_is_a_question_and_its_answer_alone(undisturbed: Path, tmp_path: Path):
    """stdout has the answer and nothing else; --prompt comes before what is piped."""

    def work() -> None:
        reading, writing = os.pipe()
        os.write(writing, b"Name a colour.\n")
        os.close(writing)
        os.dup2(reading, 0)
        sys.stdin = os.fdopen(0, closefd=False)
        lora("chat", undisturbed, "--temperature", 0, "--max-new-tokens", 6, "--prompt", "Please:")

    speaker = Speaker([tuned.find(undisturbed)], CPU)
    chat = Chat(speaker, Manner(GREEDY, 6))
    expected = said(list(chat.ask("Please:\nName a colour.")))

    assert end(fork(work, tmp_path / "said")) == 0
    written = (tmp_path / "said").read_text()
    assert written.replace("note: ended after 6 tokens, the longest answer (max-new-tokens).\n", "") == f"{expected}\n"


class Terminal:
    """The program at a terminal of its own."""

    def __init__(self, *arguments: object) -> None:
        self.process, self._screen = pty.fork()
        if self.process == 0:
            os.environ["TERM"] = "dumb"
            sys.stdin, sys.stdout, sys.stderr = (
                os.fdopen(n, m, closefd=False) for n, m in ((0, "r"), (1, "w"), (2, "w"))
            )
            console.out.width = 80  # it was made where stdout is no terminal
            code = 70
            try:
                lora(*arguments)
                code = 0
            except SystemExit as left:
                code = int(left.code or 0)
            finally:
                sys.stdout.flush()
                os._exit(code)

    def type(self, text: str) -> None:
        os.write(self._screen, text.encode())

    def until(self, text: str, seconds: float = 20.0) -> str:
        """Return what the screen shows up to a text."""
        shown, limit = "", time.monotonic() + seconds
        while not shown.endswith(text):
            if not select.select([self._screen], [], [], max(0, limit - time.monotonic()))[0]:
                raise TimeoutError(shown)
            shown += os.read(self._screen, 1).decode(errors="replace")
        return shown


def test_a_conversation_at_a_terminal(undisturbed: Path, tmp_path: Path):
    """Several lines, a wrong command, Ctrl-C in an answer and in a line: it goes on; at an empty line it leaves."""
    terminal = Terminal("chat", undisturbed, "--temperature", "0", "--max-new-tokens", "1900")
    assert "/help" in terminal.until("\n> ")
    terminal.type("/hepl\n")
    assert "did you mean /help" in terminal.until("\n> ")
    terminal.type("/help\n")
    assert max(map(len, terminal.until("\n> ").splitlines())) <= 80
    terminal.type('"""one\n')
    terminal.until("... ")
    terminal.type('two"""\n')
    terminal.until('"""\r\n')
    terminal.until("e")  # the answer has begun
    terminal.type("\x03")
    assert "stopped; what it said so far is kept" in terminal.until("\n> ")
    terminal.type("/max-new-tokens 5\n")
    assert "max-new-tokens 5" in terminal.until("\n> ")
    terminal.type(f"/save {tmp_path / 'saved.jsonl'}\n")
    assert "appended 1 row" in terminal.until("\n> ")
    terminal.type("half a li")
    time.sleep(0.2)
    terminal.type("\x03")
    terminal.until("\n> ")
    time.sleep(0.5)  # the prompt stands there before the line is read
    terminal.type("\x03")

    assert end(terminal.process) == 130
    (row,) = [json.loads(line) for line in (tmp_path / "saved.jsonl").read_text().splitlines()]
    assert row["messages"][0] == {"role": "user", "content": "one\ntwo"}
    assert row["messages"][1]["content"]
