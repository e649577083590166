"""`lora init`: it looks before it writes; what it writes is read, checked and trained as it stands."""

import json
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import Invoke, build_tokenizer, conversation, save_base, write_rows
from json_schema import problems
from processes import end, fork, lora
from tokenizers import Tokenizer

from lora_cli import config_file, config_text, first_config, model, recipe, strict_yaml, survey
from lora_cli.config import ModelConfig
from lora_cli.init_report import DataFacts, Decision, Fit, MachineFacts, ModelFacts, Survey

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]


def decided(out: str) -> dict[str, Any]:
    """What a report decided, by key."""
    return {each["key"]: each["value"] for each in json.loads(out)["decisions"]}


# --- recipes ---


def labelled(number: int) -> Row:
    return {"prompt": f"Name number {number}: ", "completion": " red" if number % 2 else " blue"}


def tool_call(number: int) -> Row:
    turns = [("user", f"What is {number} and 2?"), ("assistant", '{"name": "add"}'), ("tool", "3"), ("assistant", "3.")]
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
    return {"messages": [{"role": role, "content": content} for role, content in turns], "tools": tools}


def document(number: int) -> Row:
    return {"text": f"The sky is blue, number {number}. " * 60}


PURPOSES: dict[str, Callable[[int], Row]] = {
    "classification": labelled,
    "keep-knowledge": conversation,
    "long-documents": document,
    "quality": conversation,
    "search": conversation,
    "style-few-rows": conversation,
    "tool-calls": tool_call,
}


@pytest.mark.parametrize("name", PURPOSES)
def test_a_recipe_is_accepted_for_rows_of_its_kind(
    name: str, invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Callable[[str], str]
):
    """With the user's model, data and folder in it, and everything else as it stands in the package."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "general.jsonl", [conversation(number) for number in range(500, 520)])
    rows = write_rows(tmp_path / "my rows.jsonl", [PURPOSES[name](number) for number in range(60)])
    given = ["--model", model_folder("llama"), "--data", rows, "--output-dir", "runs/mine"]
    assert invoke("init", "c.yaml", "--recipe", name, *given)[0] == 0
    config = config_file.load(Path("c.yaml"))

    assert (config.model.path, config.data.train, config.output_dir) == (model_folder("llama"), rows, "runs/mine")
    code, out, said = invoke("check", "c.yaml", "--json")
    assert (code, json.loads(out).get("train", {}).get("dropped")) == (0, 0), said


def test_recipes_are_listed_with_what_they_are_for(invoke: Invoke, tmp_path: Path):
    """One line each, by --list or as a recipe's name; an unknown one is answered with the nearest one."""
    listed = invoke("init", "--list")[1]

    assert [line.split()[0] for line in listed.splitlines()] == sorted(recipe.names())
    assert all(20 < len(what) < 120 for what in recipe.names().values())
    assert json.loads(invoke("init", "--recipe", "list", "--json")[1])["recipes"] == recipe.names()
    code, _, said = invoke("init", tmp_path / "c.yaml", "--recipe", "clasification")
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert "did you mean classification?" in said


# --- schema ---

SCHEMA = config_file.json_schema()
GOOD = {"model": "a", "data": {"train": "t.jsonl"}, "output_dir": "o"}


@pytest.mark.parametrize("name", [*recipe.names(), "configs/quickstart.yaml"])
def test_the_schema_accepts_every_recipe(name: str):
    """An editor underlines nothing in them, nor in the quickstart's config."""
    text = recipe.text(name, {}) if name in recipe.names() else (ROOT / name).read_text(encoding="utf-8")
    values = strict_yaml.parse(text, name).values

    assert list(problems(values, SCHEMA, SCHEMA)) == []


@pytest.mark.parametrize(
    ("more", "at"),
    [
        ({"model": {"path": "a", "dtype": "bfloat16"}}, None),
        ({"data": {"train": ["a.jsonl", {"path": "b.jsonl", "weight": 0.5}], "fields": {"prompt": "q"}}}, None),
        ({"train": {"learning_rate": "auto"}, "lora": {"target_modules": ["q_proj"]}}, None),
        ({"tune": {"space": {"lora.rank": [8, 32], "train.learning_rate": {"low": 1e-4, "high": 1e-2}}}}, None),
        ({"eval": {"general": False}, "data": {"train": "t.jsonl", "validation": "v.jsonl"}}, None),
        ({"lora": {"rnak": 8}}, "/lora/rnak"),
        ({"lora": {"rank": 0}}, "/lora/rank"),
        ({"lora": {"rank": True}}, "/lora/rank"),
        ({"lora": {"dropout": 1.0}}, "/lora/dropout"),
        ({"model": ""}, "/model"),
        ({"model": {"revision": "main"}}, "/model"),
        ({"data": {"train": "t.jsonl", "too_long": "cut"}}, "/data/too_long"),
        ({"data": {"train": "t.jsonl", "fields": {"answer": "a"}}}, "/data/fields"),
        ({"data": {"train": []}}, "/data/train"),
        ({"train": {"learning_rate": "fast"}}, "/train/learning_rate"),
        ({"train": {"early_stopping": {"patience": 0}}}, "/train/early_stopping/patience"),
        ({"eval": {"general": True}}, "/eval/general"),
    ],
)
def test_an_editor_sees_what_the_loader_refuses(more: Row, at: str | None, tmp_path: Path):
    """The schema and the loader agree on what is wrong, and where."""
    values = GOOD | more
    (tmp_path / "c.yaml").write_text(json.dumps(values))
    refused = ""
    try:
        config_file.load(tmp_path / "c.yaml")
    except config_file.ConfigError as error:
        refused = str(error)

    assert list(problems(values, SCHEMA, SCHEMA)) == ([] if at is None else [at])
    assert bool(refused) == (at is not None), refused


# --- looking at rows ---


def answer(number: int) -> str:
    return ("red", "blue", "green")[number % 3]


SHAPES: dict[str, tuple[int, Callable[[int], Row], dict[str, Any]]] = {
    "conversations": (40, conversation, {"data.validation": 8, "train.batch_size": 4, "data.max_length": 64}),
    "very few rows": (6, conversation, {"data.validation": 0, "train.batch_size": 2}),
    "one prompt": (
        30,
        lambda n: {"prompt": "A colour: ", "completion": f"no. {n}"},
        {"data.split_by": "row", "data.allow_overlap": True},
    ),
    "other columns": (
        30,
        lambda n: {"Question": f"What is {n}?", "response": answer(n)},
        {"data.fields": {"instruction": "Question", "output": "response"}},
    ),
    "text and label": (
        30,
        lambda n: {"text": f"This is {n}.", "label": answer(n)},
        {"data.fields": {"instruction": "text", "output": "label"}},
    ),
    "preference pairs": (
        30,
        lambda n: {"prompt": f"What is {n}?", "chosen": answer(n), "rejected": "no"},
        {"data.format": "prompt-completion", "data.fields": {"completion": "chosen"}},
    ),
    "whole preference pairs": (
        30,
        lambda n: {"chosen": conversation(n)["messages"], "rejected": conversation(n + 1)["messages"]},
        {"data.format": "messages", "data.fields": {"messages": "chosen"}},
    ),
    "a template applied": (
        30,
        lambda n: {"text": f"<|im_start|>user\n{n}?<|im_end|>\n<|im_start|>assistant\n{answer(n)}"},
        {"data.allow_control_tokens": True},
    ),
    "long texts": (
        30,
        lambda n: document(n) if n else {"text": "The sky is blue. " * 2000},
        {"data.max_length": 2048, "data.too_long": "truncate"},
    ),
    "a long answer": (
        30,
        lambda n: {"prompt": f"No. {n}: ", "completion": "blue sky " * (3000 if n == 7 else 3)},
        {"data.max_length": 2048, "data.too_long": "drop"},
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_written_is_right_for_the_rows(
    name: str, invoke: Invoke, tmp_path: Path, model_folder: Callable[[str], str]
):
    """The config says what was decided and why, an editor accepts it, and so does `lora check`."""
    count, row, expected = SHAPES[name]
    rows, path = write_rows(tmp_path / "rows.jsonl", [row(number) for number in range(count)]), tmp_path / "c.yaml"
    given = ["--model", model_folder("llama"), "--data", rows, "--output-dir", tmp_path / "run"]
    code, out, said = invoke("init", path, *given, "--json")
    assert code == 0, said
    values, text = decided(out), path.read_text()

    assert expected.items() <= values.items()
    assert all(f" # {each['reason']}\n" in text for each in json.loads(out)["decisions"])
    assert text.startswith("# yaml-language-server: $schema=.lora-schema.json\n")
    schema = json.loads((tmp_path / ".lora-schema.json").read_text())
    assert list(problems(strict_yaml.parse(text, "c").values, schema, schema)) == []
    code, out, said = invoke("check", path, "--json")
    assert code == 0, said


def test_what_is_written_trains(invoke: Invoke, tmp_path: Path, model_folder: Callable[[str], str], rows_file: str):
    """As it stands, for three steps."""
    path = tmp_path / "c.yaml"
    given = ["--model", model_folder("qwen3"), "--data", rows_file, "--output-dir", tmp_path / "run"]
    assert invoke("init", path, *given)[0] == 0

    assert invoke("train", path, "train.max_steps=3", "eval.general=false")[0] == 0


def test_a_model_without_a_template_gets_one_it_can_write(invoke: Invoke, tmp_path: Path, rows_file: str):
    """ChatML where the vocabulary has its marks, else the template that needs none."""
    for marks, chosen in ((True, "chatml"), (False, "alpaca")):
        folder = save_base("llama", tmp_path / chosen)
        tokenizer = build_tokenizer()
        tokenizer.chat_template = None
        if not marks:
            tokenizer = plain(tokenizer)
        tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        code, out, said = invoke("init", tmp_path / f"{chosen}.yaml", "--model", folder, "--data", rows_file, "--json")

        assert code == 0, said
        assert decided(out)["data.chat_template"] == chosen
        assert invoke("check", tmp_path / f"{chosen}.yaml", "--json")[0] == 0


def plain(tokenizer: Any) -> Any:
    """The same tokenizer, its marks of ChatML renamed."""
    text = tokenizer.backend_tokenizer.to_str().replace("<|im_start|>", "<|begin|>").replace("<|im_end|>", "<|end|>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text), eos_token="<|end|>")


def test_what_is_not_here_is_said_and_the_rest_is_defaults(invoke: Invoke, tmp_path: Path):
    """Neither model nor rows: the config loads, with its defaults; only rows: counted, but not in tokens."""
    path = tmp_path / "c.yaml"
    code, out, said = invoke("init", path, "--model", "a/b", "--data", "x.jsonl")
    assert (code, config_file.load(path).data.max_length) == (0, 2048)
    assert "a/b was not fetched yet" in said
    assert "x.jsonl is not here yet" in said
    assert "lora check" in out
    rows = write_rows(tmp_path / "rows.jsonl", [conversation(number) for number in range(30)])
    report = json.loads(invoke("init", tmp_path / "d.yaml", "--model", "a/b", "--data", rows, "--json")[1])

    assert (report["seen"]["data"]["rows"], report["seen"]["data"]["counts"], report["seen"]["model"]) == (
        30,
        None,
        None,
    )
    assert config_file.load(tmp_path / "d.yaml").data.validation == 6


def test_a_model_that_cannot_be_used_is_a_note(invoke: Invoke, tmp_path: Path):
    """The rows are counted all the same, and the config is written; so is where rows to hold out lie."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(
        '{"model_type": "llama", "auto_map": 1, "is_encoder_decoder": true}'
    )
    rows = write_rows(tmp_path / "train.jsonl", [conversation(number) for number in range(30)])
    beside = write_rows(tmp_path / "valid.jsonl", [conversation(number) for number in range(50, 60)])
    path = tmp_path / "c.yaml"
    report = json.loads(invoke("init", path, "--model", tmp_path / "model", "--data", rows, "--json")[1])

    assert (report["seen"]["data"]["rows"], report["seen"]["model"]) == (30, None)
    assert any("is an encoder-decoder model" in text for text in report["warnings"])
    assert any(text.startswith(f"{beside} lies beside it") for text in report["warnings"])
    assert config_file.load(path).model.path == str(tmp_path / "model")


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "has no rows"), ('{"messages": 3}\n', "messages"), ('{"a": 1}\n', "has the keys a"), ("{\n", "not JSON")],
)
def test_rows_that_are_wrong_are_said_before_anything_is_written(
    content: str, says: str, invoke: Invoke, tmp_path: Path, model_folder: Callable[[str], str]
):
    """With the row, as `lora check` would say it."""
    (tmp_path / "rows.jsonl").write_text(content)
    given = ["--model", model_folder("llama"), "--data", tmp_path / "rows.jsonl"]
    code, _, said = invoke("init", tmp_path / "c.yaml", *given)

    assert (code, sorted(path.name for path in tmp_path.iterdir())) == (2, ["rows.jsonl"]), said
    assert says in said


def test_the_folder_one_stands_in_may_hold_the_rows(invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`.` has no name of its own, beside which held-out rows could lie."""
    write_rows(tmp_path / "train.jsonl", map(labelled, range(30)))
    monkeypatch.chdir(tmp_path)
    code, out, err = invoke("init", "--model", "not/here", "--data", ".", "--json")
    assert (code, json.loads(out)["seen"]["data"]["rows"]) == (0, 30), err


@pytest.mark.parametrize("name", ["it's mine.yaml", "a b.yaml"])
def test_what_to_type_next_is_quoted_for_the_shell(name: str, invoke: Invoke, tmp_path: Path):
    """A config may be called anything, and the commands can be pasted all the same."""
    asked = ("init", tmp_path / name, "--recipe", "laptop")
    code, out, err = invoke(*asked)
    assert (code, f"  lora check {shlex.quote(str(tmp_path / name))} " in out) == (0, True), err
    (tmp_path / name).unlink()
    following = [shlex.split(command) for command in json.loads(invoke(*asked, "--json")[1])["next"]]
    assert following == [["lora", verb, str(tmp_path / name)] for verb in ("check", "train")]


def test_a_folder_of_rows_is_looked_at(invoke: Invoke, tmp_path: Path, model_folder: Callable[[str], str]):
    """Every file of it."""
    (tmp_path / "rows").mkdir()
    for part in range(2):
        write_rows(tmp_path / "rows" / f"{part}.jsonl", [conversation(part * 50 + n) for n in range(20)])
    given = ["--model", model_folder("llama"), "--data", tmp_path / "rows", "--json"]

    assert json.loads(invoke("init", tmp_path / "c.yaml", *given)[1])["seen"]["data"]["rows"] == 40


# --- deciding ---


def seen(rows: int) -> Survey:
    """A survey of so many rows."""
    facts = DataFacts(("messages",), rows, rows, 300, None, {}, {})
    known = ModelFacts("llama", 10**8, 576, 8e-4, 8192, True, True)
    return Survey(facts, known, MachineFacts("cpu", 1, 2, 10**10, [Fit({}, 300, 0, 10**9, 10**10, True)]))


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (5, {"data.validation": 0, "train.batch_size": 2, "train.learning_rate": 8e-4}),
        (50, {"data.validation": 10, "train.batch_size": 4, "eval.per_epoch": 2, "train.learning_rate": 8e-4}),
        (400, {"eval.per_epoch": None, "train.learning_rate": 8e-4}),
        (2_000, {"data.validation": None, "train.batch_size": None, "train.learning_rate": "auto"}),
        (30_000, {"data.validation": 1000, "train.epochs": 2, "train.learning_rate": "auto"}),
        (300_000, {"data.validation": 1000, "train.epochs": 1, "train.learning_rate": "auto"}),
    ],
)
def test_decisions_follow_from_how_many_rows_there_are(rows: int, expected: Row):
    """None is a key that keeps its default."""
    made = {each.key: each.value for each in first_config.decide(seen(rows))}

    assert {key: made.get(key) for key in expected} == expected


def test_what_makes_training_fit_is_set_with_the_figures():
    """The last way that was tried, and a warning where not even that fits."""
    before = seen(2_000)
    assert before.machine is not None
    tried = [Fit({}, 300, 0, 9 * 10**9, 8 * 10**9, False)]
    tried.append(Fit({"train.activation_checkpointing": True}, 300, 0, 7 * 10**9, 8 * 10**9, True))
    tight = replace(before, machine=replace(before.machine, fits=tried))
    (made,) = [each for each in first_config.decide(tight) if each.key == "train.activation_checkpointing"]

    assert made == Decision(
        "train.activation_checkpointing", True, "without it about 9.0 GB are needed, and 8.0 GB are free"
    )
    assert not [text for text in first_config.warnings(tight) if "does not fit" in text]
    hopeless = replace(before, machine=replace(before.machine, fits=[tried[0]]))
    assert any("about 9.0 GB are needed and 8.0 GB are free" in text for text in first_config.warnings(hopeless))


def test_every_way_is_tried_for_a_model_that_is_too_large(tmp_path: Path):
    """A model of 500 B on a CPU: activations again, four bits, and last without the longest hundredth of the rows."""
    shape = transformers.LlamaConfig(
        vocab_size=400, hidden_size=65536, intermediate_size=229376, num_hidden_layers=8, num_attention_heads=64
    )
    shape.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    header = model.read_header(ModelConfig(path=str(tmp_path)), weights=False)
    fits = list(survey._fits(header, np.array([100] * 500 + [2000]), torch.device("cpu")))

    assert [(dict(fit.settings), fit.length, fit.longer) for fit in fits] == [
        ({}, 2000, 0),
        ({"train.activation_checkpointing": True}, 2000, 0),
        ({"train.activation_checkpointing": True, "model.quantization": "nf4"}, 2000, 0),
        ({"train.activation_checkpointing": True, "model.quantization": "nf4"}, 100, 1),
    ]
    assert sorted((fit.total for fit in fits), reverse=True) == [fit.total for fit in fits]


def test_keeping_what_it_knows_is_a_budget():
    """The answer yes to the last question, and a word on what does more."""
    assert "data.replay" in " ".join(first_config.warnings(seen(400), keep=True))
    assert Decision("eval.forgetting_budget", 0.1, "what it knows is to stay: nats on general text") in (
        first_config.decide(seen(400), keep=True)
    )


# --- asking ---


class Terminal:
    """`lora init` in a process whose input and messages belong to a terminal."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.said = ""

        def work() -> None:
            os.chdir(folder)
            os.dup2(slave, 0)
            os.dup2(slave, 2)
            sys.stdin = open(0, closefd=False)  # noqa: SIM115 - for as long as the process lives
            lora("init", *arguments)

        self.process = fork(work, folder.parent / "stdout")
        os.close(slave)

    def wait_for(self, text: str) -> None:
        """Read until something was said."""
        while text not in self.said:
            assert select.select([self.master], [], [], 30)[0], self.said
            self.said += os.read(self.master, 4096).decode()

    def answer(self, question: str, text: str) -> None:
        """Answer a question when it comes."""
        self.wait_for(question)
        self.said = ""
        os.write(self.master, text.encode() + b"\n")


def test_questions_are_asked_in_a_terminal(tmp_path: Path, model_folder: Callable[[str], str]):
    """Four; a wrong answer is asked again with what is wrong, Enter takes what is offered."""
    folder = tmp_path / "work"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [conversation(number) for number in range(30)])
    (folder / "broken.jsonl").write_text("{\n")
    terminal = Terminal(folder)
    terminal.answer("Training data", "nothing.jsonl")
    terminal.answer("no such file", "broken.jsonl")
    terminal.answer("not JSON", "1")
    terminal.answer("Model to train", "./nothing")
    terminal.answer("no model folder", model_folder("llama"))
    terminal.answer("Folder for the run", "")
    terminal.answer("Must it keep", "y")

    assert end(terminal.process) == 0, terminal.said
    config = config_file.load(folder / "train.yaml")
    assert (config.model.path, config.data.train, config.output_dir, config.eval.forgetting_budget) == (
        model_folder("llama"), "train.jsonl", "runs/first", 0.1,
    )  # fmt: skip
    assert "Wrote train.yaml" in (tmp_path / "stdout").read_text()


@pytest.mark.parametrize("way", ["ctrl-c", "ctrl-d"])
def test_who_does_not_answer_leaves_nothing_behind(way: str, tmp_path: Path):
    """Ctrl-C ends with 130, a closed input with what to give instead; neither writes."""
    folder = tmp_path / "work"
    folder.mkdir()
    terminal = Terminal(folder)
    terminal.wait_for("Training data")
    if way == "ctrl-c":
        os.kill(terminal.process, signal.SIGINT)
    else:
        os.write(terminal.master, b"\x04")

    assert end(terminal.process) == (130 if way == "ctrl-c" else 2)
    assert list(folder.iterdir()) == []


def test_nothing_is_asked_with_yes(tmp_path: Path):
    """Also in a terminal."""
    (tmp_path / "work").mkdir()

    assert end(Terminal(tmp_path / "work", "--yes").process) == 0
    assert (tmp_path / "work" / "train.yaml").is_file()


def test_torch_is_not_imported_where_there_is_nothing_to_look_at(tmp_path: Path):
    """A config for what is elsewhere costs no more than its text."""
    program = "import sys\nfrom lora_cli.cli import main\ntry:\n    main()\nfinally:\n    print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program, "init", str(tmp_path / "c.yaml"), "--model", "a/b"],
        capture_output=True,
        text=True,
    )

    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "False"), done.stderr
    assert config_text.SCHEMA in {path.name for path in tmp_path.iterdir()}
