"""The package as a library: what the commands do, called from Python."""

import csv
import inspect
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import TOKENS, Invoke, conversation, write_rows

from lora_cli import api as lora
from lora_cli import config_commands, config_file, metrics, run_commands, run_dir
from lora_cli.records import as_json
from lora_cli.run_dir import RunDir


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], str]) -> dict[str, Any]:
    """The keys of a small config."""
    folder = tmp_path_factory.mktemp("api")
    rows = write_rows(folder / "rows.jsonl", [conversation(number) for number in range(24)])
    return {
        "model": model_folder("llama"),
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": rows, "validation": 8},
        "train": {"batch_size": 4, "learning_rate": 0.01, "max_steps": 8, "micro_batch_tokens": 64},
        "eval": {"general_tokens": 256},
        "output_dir": folder / "run",
    }


@pytest.fixture(scope="module")
def run(values: dict[str, Any]) -> Path:
    """The directory of a small run that measured forgetting."""
    return lora.train(lora.load_config(values)).adapter.parent


def test_what_was_measured_is_a_table(run: Path):
    """Every row has every column, values are those of metrics.jsonl, and a CSV file takes them."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    table = lora.metrics(run)
    last = next(record for record in reversed(records) if record["event"] == "evaluated")

    assert [list(row) for row in table] == [list(metrics.COLUMNS)] * len(records)
    assert [row["loss"] for row in table] == [record["loss"] for record in records]
    row = next(row for row in reversed(table) if row["event"] == "evaluated")
    assert row["forgetting.rise.value"] == last["forgetting"]["rise"]["value"]
    assert row["forgetting.kl_tokens"] == last["forgetting"]["kl_tokens"] > 0
    assert {row["forgetting.rise.value"] for row in table if row["event"] == "step"} == {None}
    with (run.parent / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, metrics.COLUMNS)
        writer.writeheader()
        writer.writerows(table)
    assert len((run.parent / "metrics.csv").read_text().splitlines()) == len(records) + 1
    with pytest.raises(lora.AdapterError, match="is no run directory"):
        lora.metrics(run.parent)


def test_it_costs_no_torch_and_leaves_signals_alone():
    """Until something is computed; every name that is offered is there, functions explained."""
    program = (
        "import signal, sys\n"
        "before = [signal.getsignal(number) for number in signal.valid_signals()]\n"
        "from lora_cli import api\n"
        "api.load_config({'model': 'm', 'data': {'train': 't.jsonl'}, 'output_dir': 'o'})\n"
        "assert before == [signal.getsignal(number) for number in signal.valid_signals()]\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"
    assert all(inspect.getdoc(getattr(lora, name)) for name in lora.__all__ if inspect.isfunction(getattr(lora, name)))


def test_a_config_is_the_same_from_a_file_and_from_values(values: dict[str, Any], tmp_path: Path):
    """Overrides are those of the command line; all problems come at once, each at its key."""
    config = lora.load_config(values, {"lora.rank": 8, "lora.target_modules": ("q_proj",), "data.replay": None})
    path = tmp_path / "config.yaml"
    path.write_text(config_file.dump(config))
    assert lora.load_config(path) == config == config_file.load(path)
    assert (config.lora.rank, config.lora.target_modules) == (8, ("q_proj",))

    with pytest.raises(lora.ConfigError) as caught:
        lora.load_config(values | {"lora": {"r": 3}}, {"train.epochs": "3"})
    assert list(caught.value.problems) == [
        'config: unknown key "r" under lora; here that is lora.rank.',
        "override train.epochs='3': train.epochs: expected a whole number; found '3' (text).",
    ]


def test_functions_return_what_commands_print(run: Path, values: dict[str, Any], invoke: Invoke, tmp_path: Path):
    """check, train of a finished run, eval, scale, merge, several adapters as one, export."""
    config, path = lora.load_config(values), tmp_path / "config.yaml"
    path.write_text(config_file.dump(config))

    def printed(*arguments: object) -> Any:
        return json.loads(invoke(*arguments, "--json")[1])

    checked, said = as_json(lora.check(config)), printed("check", path)
    for one in (checked, said):  # what is free, and how fast it is, is measured anew
        one["memory"]["free"] = one["seconds"] = None
    assert checked == said
    assert list(map(as_json, lora.iter_train(config))) == [printed("train", path)]
    assert as_json(lora.evaluate(run, answers=3, general="false")) == printed(
        "eval", run, "--answers", 3, "--general", "false"
    )
    half, both = tmp_path / "half", tmp_path / "both"
    scaled = as_json(lora.scale(run, half, gain=0.5)) | {"output": "-"}
    assert scaled == printed("scale", run, "--gain", 0.5, "--output", tmp_path / "again") | {"output": "-"}
    merged = as_json(lora.merge(run, tmp_path / "merged")) | {"output": "-"}
    assert merged == printed("merge", run, "--output", tmp_path / "merged2") | {"output": "-"}
    assert lora.combine([run, half], both, weights=[1.0, 2.0]).adapted_tensors == merged["adapted_tensors"]
    assert lora.export(str(both), tmp_path / "a.gguf", "gguf-lora", "f32").notes == []


def test_what_is_loaded_is_what_peft_loads(run: Path, values: dict[str, Any]):
    """A model and a tokenizer of transformers, with PEFT's logits, that generate."""
    model, tokenizer = lora.load(run)
    base = transformers.AutoModelForCausalLM.from_pretrained(values["model"])
    ids = torch.tensor([TOKENS])
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(base, str(run / "adapter")).eval()
        assert torch.allclose(model(input_ids=ids).logits, theirs(input_ids=ids).logits, atol=1e-5)
    chat = [{"role": "user", "content": "Name colour number 1."}]
    asked = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ours, peft_s = (each.generate(**asked, max_new_tokens=5, do_sample=False) for each in (model, theirs))

    assert ours.tolist() == peft_s.tolist()
    assert ours.shape[1] > asked["input_ids"].shape[1]


def test_a_run_is_left_and_continued(values: dict[str, Any], run: Path, tmp_path: Path):
    """By leaving the loop, by Ctrl-C in a notebook, and by asking, which saves first; the end is the same."""
    config = lora.load_config(values, {"output_dir": tmp_path / "run"})
    place = RunDir(tmp_path / "run")
    for event in lora.iter_train(config):
        if isinstance(event, lora.Saved):
            break
    assert run_dir.read_status(place)["status"] == "stopped"

    def interrupted(event: lora.Event) -> None:
        if isinstance(event, lora.StepDone):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        lora.train(config, interrupted)
    assert run_dir.read_status(place)["status"] == "stopped"

    stop = lora.StopRequest()
    with pytest.raises(lora.Interrupted) as caught:
        lora.train(config, lambda event: stop.ask() if isinstance(event, lora.StepDone) else None, stop=stop)
    assert caught.value.exit_code == 128 + signal.SIGTERM
    last = max(step for step, _ in run_dir.step_folders(place))
    assert last == max(record["step"] for record in metrics.read(place) if record["event"] == "step") < 8

    finished = lora.train(config)
    assert (finished.step, finished.best_loss) == (8, lora.train(lora.load_config(values)).best_loss)


def test_ctrl_c_within_a_step_is_no_failure(values: dict[str, Any], tmp_path: Path):
    """KeyboardInterrupt raised inside the loop, as a notebook's interrupt is, leaves a run that was stopped."""
    config = lora.load_config(values, {"output_dir": tmp_path / "run"})
    events = lora.iter_train(config)
    assert any(isinstance(event, lora.StepDone) for event in events)
    with pytest.raises(KeyboardInterrupt):
        events.throw(KeyboardInterrupt())  # type: ignore[attr-defined]

    assert run_dir.read_status(RunDir(tmp_path / "run"))["status"] == "stopped"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda run: lora.merge(run, "x", dtype="fp16"), "dtype: expected keep, float32, bfloat16, float16, not fp16"),
        (lambda run: lora.export(run, "x", "safetensors"), "format: expected peft"),
        (lambda run: lora.scale(run, "x"), "give one of them"),
        (lambda run: lora.evaluate(run, metrics=["accuracy"]), "there is no accuracy"),
    ],
)
def test_a_wrong_argument_is_explained(call: Callable[[Path], object], said: str, run: Path):
    """As an error of the user, before anything is read."""
    with pytest.raises(lora.InputError, match=said):
        call(run)


OF_THE_FACE = {"json", "push", "nproc", "restarts", "config", "overrides", "quiet"}  # of commands alone


@pytest.mark.parametrize(
    ("command", "function", "elsewhere"),
    [
        (config_commands.check, lora.check, set()),
        (config_commands.train, lora.train, set()),
        (run_commands.evaluate, lora.evaluate, {"metric"}),  # metrics
        (run_commands.scale, lora.scale, set()),
        (run_commands.merge, lora.merge, {"adapter"}),  # combine
        (run_commands.export, lora.export, set()),
    ],
    ids=["check", "train", "evaluate", "scale", "merge", "export"],
)
def test_functions_take_what_commands_take(
    command: Callable[..., None], function: Callable[..., object], elsewhere: set[str]
):
    """Under the same names, with the same defaults."""
    typed = inspect.signature(command).parameters
    ours = inspect.signature(function).parameters

    assert set(typed) - OF_THE_FACE - elsewhere <= set(ours)
    for name in set(typed) & set(ours) - OF_THE_FACE - {"tasks"}:
        assert typed[name].default == ours[name].default, name
