"""What a run that goes on may change, and what it must find as it was."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import CHATML, Invoke, conversation, facts, save_base, write_rows
from torture import faults

from lora_cli import checkpoint, config_file, manifest, metrics, resume, run_dir, storage, strict_yaml
from lora_cli.config import RunConfig
from lora_cli.errors import AdapterError, ConfigError, DataError, Interrupted
from lora_cli.interrupt import StopRequest
from lora_cli.records import Event, Finished, Notice, Started, StepDone
from lora_cli.run_dir import RunDir
from lora_cli.schema import OnResume, rules
from lora_cli.train import ended, train

# Every key, and a value that a run could be continued with.
OTHERS: dict[str, Any] = {
    "model.path": "another/model",
    "model.revision": "main",
    "model.dtype": "bfloat16",
    "model.quantization": "nf4",
    "model.device": "cpu",
    "model.trust_remote_code": True,
    "lora.method": "rslora",
    "lora.init": "pissa",
    "lora.rank": 2,
    "lora.alpha": 16,
    "lora.dropout": 0.1,
    "lora.target_modules": ["q_proj"],
    "data.train": "another.jsonl",
    "data.validation": 9,
    "data.test": 2,
    "data.split_by": "row",
    "data.allow_overlap": True,
    "data.format": "messages",
    "data.fields": {"messages": "messages"},
    "data.prompt_template": "{messages}",
    "data.chat_template": "chatml",
    "data.template_date": "2026-02-02",
    "data.merge_system": True,
    "data.allow_control_tokens": False,
    "data.max_length": 1000,
    "data.too_long": "drop",
    "data.replay": {"path": "general.jsonl"},
    "train.epochs": 4,
    "train.max_steps": 5,
    "train.batch_size": 2,
    "train.learning_rate": 0.02,
    "train.loraplus_ratio": 4.0,
    "train.schedule": "linear",
    "train.trackers": ["tensorboard"],
    "train.warmup_ratio": 0.1,
    "train.weight_decay": 0.1,
    "train.max_grad_norm": 0.5,
    "train.max_loss_jump": 9.0,
    "train.micro_batch_tokens": 32,
    "train.order": "prompts",
    "train.share_prefixes": False,
    "train.activation_checkpointing": True,
    "train.shard": True,
    "train.compile": True,
    "train.early_stopping.patience": 5,
    "train.early_stopping.min_delta": 0.01,
    "train.kl_to_base": 0.1,
    "train.kl_without_target": True,
    "train.surprise_limit": 4.0,
    "train.neftune_alpha": 5.0,
    "eval.per_epoch": 3,
    "eval.general": None,
    "eval.general_tokens": 512,
    "eval.forgetting_budget": 0.5,
    "save.per_epoch": 3,
    "save.keep": 5,
    "tune.trials": 7,
    "tune.budget": 0.5,
    "tune.space": {"lora.rank": [2, 4]},
    "tune.objective": "loss-and-forgetting",
    "tune.prune": False,
    "tune.storage": "study.log",
    "seed": 1,
    "output_dir": "moved",
}


def with_values(config: Path, **dotted: Any) -> Path:
    """Write other values into a config; return it."""
    values = json.loads(config.read_text())
    for key, value in dotted.items():
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    config.write_text(json.dumps(values))
    return config


def going(config: Path, override: bool = False) -> list[Event]:
    """Train to the end in this process; return the events."""
    return list(train(config_file.load(config), StopRequest(), override))


def stop_after(config: Path, step: int) -> RunDir:
    """Train, and be asked to stop in a step."""
    stop = StopRequest()
    try:
        for event in train(config_file.load(config), stop):
            if isinstance(event, StepDone) and event.step == step:
                stop.signal_number = signal.SIGTERM
    except Interrupted:
        return run_dir.of(config_file.load(config))
    raise AssertionError("it was to be stopped")


def said(events: list[Event]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Notice))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, data, a config of six steps, and a run of it that was stopped after three."""
    folder = tmp_path_factory.mktemp("stopped")
    save_base("llama", folder / "base")
    write_rows(folder / "rows.jsonl", [conversation(number) for number in range(40)])
    values = {
        "model": {"path": str(folder / "base")},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": str(folder / "rows.jsonl"), "validation": 8},
        "train": {"batch_size": 4, "learning_rate": 0.01, "max_steps": 6, "micro_batch_tokens": 64},
        "eval": {"general": False},
        "output_dir": str(folder / "run"),
    }
    (folder / "config.yaml").write_text(json.dumps(values))
    stop_after(folder / "config.yaml", 3)
    return folder


@pytest.fixture
def config(stopped: Path, tmp_path: Path) -> Path:
    """The config of the stopped run, with a copy of the run to itself."""
    shutil.copytree(stopped / "run", tmp_path / "run")
    shutil.copy(stopped / "config.yaml", tmp_path)
    return with_values(tmp_path / "config.yaml", output_dir=str(tmp_path / "run"))


def run_of(config: Path) -> RunDir:
    return run_dir.of(config_file.load(config))


# --- keys ---


def test_every_key_has_a_rule_and_a_row():
    """A key that is added to the schema says what becomes of a run that goes on with another value."""
    found = dict(rules(RunConfig))

    assert [key for key, rule in found.items() if rule is None] == []
    assert sorted(found) == sorted(OTHERS)


@pytest.mark.parametrize("key", OTHERS)
def test_the_rule_of_a_key_decides(key: str, config: Path, tmp_path: Path):
    """Free and noted changes go on, others need --override, what is fixed names another output_dir as the way out."""
    rule, run = dict(rules(RunConfig))[key], run_of(config)
    value = str(tmp_path / "moved") if key == "output_dir" else OTHERS[key]
    if key == "output_dir":
        shutil.move(run.path, value)
        run = RunDir(Path(value))
    changed = RunConfig.model_validate(json.loads(with_values(config, **{key: value}).read_text()))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}

    def begin(override: bool) -> str:
        events: list[Event] = []
        for event in train(changed, StopRequest(), override):
            events.append(event)
            if isinstance(event, Started):
                assert event.step == 3
                break
        return said(events)

    if rule is OnResume.FIXED:
        with pytest.raises(ConfigError, match=rf"(?s)another config:.*{key}: .* there, .* now.*another output_dir"):
            begin(override=True)
    if rule is OnResume.OVERRIDE:
        with pytest.raises(ConfigError, match=rf"(?s)other settings:.*{key}: .* there, .* now.*add --override"):
            begin(override=False)
    if rule in (OnResume.FIXED, OnResume.OVERRIDE):
        assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    if rule is OnResume.FIXED:
        return
    told = begin(override=rule is OnResume.OVERRIDE)
    record = run_dir.read_status(run).get("changes", [])
    assert (f"{key}: " in told) == (rule is not OnResume.FREE)
    assert [(c["step"], c["key"], c["after"]) for c in record] == (
        [(3, key, value)] if rule is not OnResume.FREE else []
    )
    written = RunConfig.model_validate(strict_yaml.parse(run.config.read_text(), "config.yaml").values)
    assert resume.changes(written, changed) == []


def test_a_change_is_said_as_a_config_writes_it(invoke: Invoke, config: Path):
    """null, true and false, not what Python calls them."""
    _, _, err = invoke("train", config, "train.neftune_alpha=5", "train.kl_without_target=true", "train.kl_to_base=0.1")

    assert "train.neftune_alpha: null there, 5.0 now" in err
    assert "train.kl_without_target: false there, true now" in err


def test_a_change_that_needs_override_through_the_command(invoke: Invoke, config: Path):
    """Exit 2 without --override and 0 with it; later starts need it no more; the card tells of it."""
    config = with_values(config, **{"train.learning_rate": 0.02})
    code, _, err = invoke("train", config)
    assert (code, "train.learning_rate: 0.01 there, 0.02 now" in err, "--override" in err) == (2, True, True)

    code, _, err = invoke("train", config, "--override")
    assert (
        code,
        "train.learning_rate: 0.01 there, 0.02 now (from step 4 on: the rest is trained in another way)" in err,
    ) == (0, True)
    assert (invoke("train", config)[0], run_dir.read_status(run_of(config))["status"]) == (0, "finished")
    assert (
        "From step 4 on with another train.learning_rate: 0.02, not 0.01."
        in (run_of(config).adapter / "README.md").read_text()
    )


def test_a_finished_run_goes_on_for_longer(invoke: Invoke, config: Path):
    """More steps need --override; the new end is trained, and what was measured on the old adapter is not the new's."""
    first = going(config)[-1]
    assert isinstance(first, Finished)
    run = run_of(config)
    run.evaluations.mkdir()
    (run.evaluations / "adapter-rows.json").write_text("{}")
    with_values(config, **{"train.max_steps": 9})
    assert invoke("train", config)[0] == 2
    assert run.adapter.is_dir()

    code, _, err = invoke("train", config, "--override")
    second = ended(config_file.load(config))
    assert (code, "The run was finished and goes on" in err) == (0, True)
    assert second is not None
    assert (first.step, second.step) == (6, 9)
    assert [path.name for path in run.evaluations.iterdir()] == [f"step-{first.best_step:06d}-rows.json"]
    steps = [record["step"] for record in metrics.read(run) if record["event"] == "step"]
    assert steps == list(range(1, 10))
    newest = run_dir.checkpoint_path(run, second.best_step or 9) / "adapter_model.safetensors"
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == newest.read_bytes()


def test_another_budget_judges_the_best_anew(config: Path):
    """What the best so far forgets over a budget is counted from the budget that holds now."""
    stopping = checkpoint.Stopping()
    stopping.update(1, 1.0, 0.0, forgetting=0.3, budget=0.1)
    stopping.judge_anew(0.4)

    assert not stopping.update(2, 1.1, 0.0, forgetting=0.2, budget=0.4)
    assert stopping.update(3, 0.9, 0.0, forgetting=0.2, budget=0.4)


# --- places ---


def test_a_moved_run_and_a_copied_one_go_on_where_they_are(config: Path, tmp_path: Path):
    """Nothing in a run directory names its own place: both end with the bytes of the run that stayed."""
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tmp_path / "run", tmp_path / "copied")
    shutil.copytree(tmp_path / "run", tmp_path / "to-move")
    (tmp_path / "to-move").rename(tmp_path / "elsewhere" / "moved")
    places = [tmp_path / "run", tmp_path / "copied", tmp_path / "elsewhere" / "moved"]
    found = []
    for place in places:
        assert "Continuing after step 3" in said(going(with_values(config, output_dir=str(place))))
        found.append(facts(place))
        assert str(place) in (place / "config.yaml").read_text()

    assert found[1:] == found[:1] * 2


# --- what a run saw ---


@pytest.mark.parametrize("what", ["the data", "the tokenizer", "the chat template", "the base model"])
def test_what_changed_is_named_alone(what: str, stopped: Path, config: Path, tmp_path: Path):
    """A row, the tokenizer, the template or the base: each is refused by its own name, with both hashes."""
    away = stopped.with_name("aside")
    shutil.copytree(stopped / "base", away / "base")
    shutil.copy(stopped / "rows.jsonl", away)
    tokenizer = transformers.AutoTokenizer.from_pretrained(stopped / "base")
    try:
        match what:
            case "the data":
                rows = (stopped / "rows.jsonl").read_text()
                (stopped / "rows.jsonl").write_text(rows.replace("It is red.", "It is violet.", 1))
            case "the tokenizer":
                tokenizer.add_tokens(["colour number"])
                tokenizer.save_pretrained(stopped / "base")
            case "the chat template":
                tokenizer.chat_template = "{{ 'Talk.' }}" + CHATML
                tokenizer.save_pretrained(stopped / "base")
            case "the base model":
                weights = stopped / "base" / "model.safetensors"
                raw = bytearray(weights.read_bytes())
                raw[-2] ^= 1
                weights.write_bytes(raw)
        with pytest.raises(DataError) as caught:
            going(config)
    finally:
        shutil.rmtree(stopped / "base")
        shutil.move(away / "base", stopped / "base")
        shutil.move(away / "rows.jsonl", stopped / "rows.jsonl")
        away.rmdir()

    (name,) = (name for name in resume._SEEN.values() if what == f"the {name.split(' (')[0]}")
    before = f"{tmp_path / 'run'}: the {name} changed since this run began ("
    assert [problem.startswith(before) for problem in caught.value.problems[:-1]] == [True]
    assert run_dir.read_status(run_of(config))["status"] == "stopped"


def test_other_versions_are_said_and_written_down(config: Path):
    """Bit equality is promised for equal versions and threads; what differs is named once, and nothing is refused."""
    run = run_of(config)
    environment = json.loads(run.environment.read_text()) | {"torch": "2.10.0", "threads": 77}
    run.environment.write_text(json.dumps(environment))
    events = going(config)

    assert f"differ from the run's start: torch 2.10.0 -> {torch.__version__}, threads 77 -> " in said(events)
    assert {change["key"] for change in run_dir.read_status(run)["changes"]} == {"torch", "threads"}
    assert run_dir.read_environment(run)["torch"] == "2.10.0"


@pytest.mark.parametrize("name", ["run.json", "environment.json", "checkpoints/step-000003/state.json"])
def test_a_newer_format_is_refused_by_name(name: str, invoke: Invoke, config: Path):
    """A file that a newer version wrote is neither guessed at nor passed over."""
    path = run_of(config).path / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    if path.parent != run_of(config).path:
        (path.parent / manifest.MANIFEST).unlink()
        resealed = path.parent.with_name("resealed")
        path.parent.rename(resealed)
        with storage.new_directory(path.parent) as folder:
            shutil.copytree(resealed, folder, dirs_exist_ok=True)
        shutil.rmtree(resealed)
    code, _, err = invoke("train", config)

    assert code == 2
    assert f"{path}: is of format 99, and this version reads those up to 1: a newer lora wrote it." in err


def test_files_without_a_format_are_read(config: Path):
    """They are of the version before formats were counted."""
    for path in (run_of(config).status, run_of(config).environment):
        values = json.loads(path.read_text())
        del values["format"]
        path.write_text(json.dumps(values))

    assert isinstance(going(config)[-1], Finished)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": "x"}'])
def test_a_damaged_status_is_named(content: str, invoke: Invoke, config: Path):
    """Not a bug of ours, and not passed over."""
    run_of(config).status.write_text(content)
    code, _, err = invoke("train", config)

    assert (code, "run.json:" in err) == (2, True)


def test_checkpoints_of_other_tools(config: Path, tmp_path: Path):
    """Beside ours they are passed over with words; a folder of them is not continued."""
    (tmp_path / "run" / "checkpoints" / "checkpoint-500").mkdir()
    events = going(config)
    assert "checkpoint-500: is no checkpoint of this program, and is passed over" in said(events)

    (tmp_path / "theirs" / "checkpoint-500").mkdir(parents=True)
    with pytest.raises(ConfigError, match="checkpoint-500 is a checkpoint of another tool"):
        going(with_values(config, output_dir=str(tmp_path / "theirs")))


# --- metrics.jsonl ---


def test_metrics_that_were_damaged_are_said_and_mended(config: Path):
    """A line cut short, foreign lines, a line twice, and lost steps are each named; each step stands there once."""
    path = run_of(config).metrics
    lines = path.read_text().splitlines()
    kept = [line for line in lines if '"step": 2,' not in line]
    path.write_bytes("\n".join([*kept, lines[-1], "[3]", '{"a": 1}', '{"event": "st']).encode() + b"\xff")
    told = said(going(config))

    assert "3 lines are cut short or no measurements" in told
    assert "1 lines stood there twice" in told
    assert "the measurements of 1 steps up to the checkpoint are lost (the first is step 2)" in told
    steps = [record["step"] for record in metrics.read(run_of(config)) if record["event"] == "step"]
    assert steps == [1, 3, 4, 5, 6]


def test_metrics_are_on_the_disk_before_their_checkpoint(config: Path, monkeypatch: pytest.MonkeyPatch):
    """Else a power cut could leave a checkpoint that knows more than metrics.jsonl."""
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    going(config)

    first = synced.index("optimizer.safetensors")
    assert "metrics.jsonl" in synced[:first]


# --- one process at a time ---


def test_a_killed_holder_leaves_no_lock(config: Path, tmp_path: Path):
    """The kernel lets go; what the killed process wrote names no one, here and in a copy."""
    run = run_of(config)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with run_dir.held(run):
            os.write(writing, b"1")
            signal.pause()
    os.read(reading, 1)
    with (
        pytest.raises(AdapterError, match=f"another process is using this run directory. It is process {child} on"),
        run_dir.held(run),
    ):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert run.holder.exists()
    shutil.copytree(run.path, tmp_path / "copied")

    with run_dir.held(run), run_dir.held(RunDir(tmp_path / "copied")):
        assert json.loads(run.holder.read_text())["pid"] == os.getpid()
    assert not run.holder.exists()


@pytest.mark.parametrize("is_new", [True, False], ids=["new", "stopped before"])
def test_of_two_that_start_together_one_wins(is_new: bool, tmp_path: Path):
    """0 to 50 ms apart, exactly one trains; the other says who does, in under a second, and loaded no model.

    Where the run was there before, it has not even read the data.
    """
    inputs = faults.prepare(tmp_path)
    for delay in (0.0, 0.02, 0.05):
        folder = tmp_path / str(delay)
        folder.mkdir()
        pair = [faults.Place(folder, inputs, name) for name in ("first", "second")]
        if not is_new:
            stop_after(pair[0].config(), 2)
        processes = []
        for place in pair:
            processes.append(faults.begun(lambda place=place: faults.train_in(place)))
            time.sleep(delay)
        codes = [faults.code_of(process) for process in processes]
        winner, loser = (codes.index(code) for code in (0, 2))
        told = pair[loser].said.read_text()

        assert f"another process is using this run directory. It is process {processes[winner]} on " in told
        assert faults.counted(pair[loser])["seconds"] < 1
        assert "parameters trained" not in told
        assert is_new or "rows.jsonl" not in faults.counted(pair[loser])["inputs"]
        assert "rows.jsonl" in faults.counted(pair[winner])["inputs"]
        assert isinstance(ended(config_file.load(pair[0].config())), Finished)
