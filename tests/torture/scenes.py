"""Short runs of the real code on a tiny model, each in a folder of its own: what is disturbed, and what must come out.

Each scene is played in a process forked from this one, where torch has one thread: others do not survive a fork.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import conftest

from lora_cli import (
    checkpoint,
    config_file,
    corpus,
    export,
    manifest,
    merge,
    metrics,
    prepare,
    run_dir,
    scale,
    storage,
    train,
)
from lora_cli.data_reader import run_to_end
from lora_cli.interrupt import StopRequest
from lora_cli.run_dir import RunDir

Facts = Mapping[str, Any]
SECONDS = 120  # for a scene


@dataclass(frozen=True)
class Scene:
    """What is done, in the working directory, and what must be there at the end."""

    name: str
    act: Callable[[], None]
    facts: Callable[[], Facts]
    output: str = ""  # what is written, from a finished run beside it


def forked(act: Callable[[], Any], folder: Path) -> int:
    """Run something in a process of its own, in a folder, on one thread; return its status as subprocess does."""
    process = os.fork()
    if process:
        _, status = os.waitpid(process, 0)
        return os.waitstatus_to_exitcode(status)
    code = 1
    try:
        import torch

        torch.set_num_threads(1)
        signal.alarm(SECONDS)
        os.chdir(folder)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def build(folder: Path) -> None:
    """Make the base model, in three files, and the rows; a chat template of its own for tools."""

    def make() -> None:
        conftest.save_base("llama", folder / "base", shard="30KB", num_hidden_layers=1)
        tokenizer = conftest.build_tokenizer()
        tokenizer.chat_template = {"default": conftest.CHATML, "tool_use": conftest.CHATML + "{# tools #}"}
        tokenizer.save_pretrained(folder / "base")
        conftest.write_rows(folder / "rows.jsonl", [conftest.conversation(number) for number in range(30)])
        conftest.write_rows(folder / "general.jsonl", [{"text": f"The sky is {word}."} for word in conftest.COLOURS])

    folder.mkdir(parents=True, exist_ok=True)
    if forked(make, folder):
        raise RuntimeError(f"{folder}: the base model was not made")


def write_config(folder: Path, base: Path, **settings: Any) -> Path:
    """Write `config.yaml` of a run into the folder `run` of the working directory."""
    values: dict[str, Any] = {
        "model": {"path": str(base / "base")},
        "lora": {"rank": 2, "dropout": 0.1},
        "data": {"train": str(base / "rows.jsonl"), "validation": 6},
        "train": {"batch_size": 4, "learning_rate": 0.02, "epochs": 2, "micro_batch_tokens": 256},
        "eval": {"general": False},
        "output_dir": "run",
    }
    for section, more in settings.items():
        values[section] = {**values.get(section, {}), **more}
    path = folder / "config.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def train_to_end() -> None:
    """Train `config.yaml` to its end; a run that is finished is left as it is."""
    config = config_file.load(Path("config.yaml"))
    if train.ended(config) is None:
        for _ in train.train(config, StopRequest()):
            pass


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run_facts(place: Path = Path("run")) -> Facts:
    """What a run must end with: adapter, newest checkpoint, the steps of all, metrics and status without times."""
    run = RunDir(place)
    newest, problems = checkpoint.latest(run)
    if newest is None or problems:
        raise AssertionError(f"no whole checkpoint: {problems}")
    measured = [{k: v for k, v in record.items() if k != "seconds"} for record in metrics.read(run)]
    status = {k: v for k, v in run_dir.read_status(run).items() if k not in ("pid", "seconds")}
    return {
        "adapter": files(run.adapter),
        "newest": (newest.name, files(newest)),
        "kept": [step for step, _ in run_dir.step_folders(run)],
        "metrics": measured,
        "status": status,
        "config": run.config.read_bytes(),
    }


def writing(name: str, write: Callable[[Path, Path], Any], output: str = "out") -> Scene:
    """A scene that writes an output from a finished run, unless it is there: so would a user go on after a kill."""
    out = Path(output)

    def act() -> None:
        if not out.exists():
            write(Path("run"), out)

    return Scene(name, act, lambda: files(out) if out.is_dir() else {output: out.read_bytes()}, output)


def cache_data() -> None:
    """Turn the rows into tokens that are kept, in several processes."""
    small, corpus.SMALL = corpus.SMALL, 0
    elsewhere, os.environ["LORA_CACHE"] = os.environ["LORA_CACHE"], "cache"
    try:
        run_to_end(prepare.prepare(config_file.load(Path("config.yaml"))))
    finally:
        corpus.SMALL, os.environ["LORA_CACHE"] = small, elsewhere


def _exporting(format: export.Format) -> Scene:
    output = "out.gguf" if format in export.FILES else "out"
    return writing(f"export {format}", lambda run, out: export.export(run, format, out, "f16"), output)


FORMATS: Sequence[export.Format] = ("peft", "gguf", "gguf-lora", "ollama", "mlx")  # onnx writes by its library
SCENES = [
    Scene("run", train_to_end, run_facts),
    Scene("run without validation", train_to_end, run_facts),
    Scene("run with forgetting", train_to_end, run_facts),
    Scene("short run", train_to_end, run_facts),
    Scene("data cache", cache_data, lambda: files(Path("cache"))),
    writing("merge", lambda run, out: merge.merge([run], out)),
    writing("merge two", lambda run, out: merge.combine([run, run], out, None, merge.Together())),
    writing("scale", lambda run, out: scale.scale(run, out, 0.5, None)),
    *map(_exporting, FORMATS),
]
SETTINGS: dict[str, dict[str, Any]] = {
    "short run": {
        "train": {"max_steps": 3},
        "save": {"per_epoch": 6, "keep": 1},
        "eval": {"general": False, "per_epoch": 6},
    },
    "run": {"eval": {"general": False, "per_epoch": 3}, "save": {"per_epoch": 3, "keep": 1}},
    "run without validation": {"data": {"validation": 0}, "save": {"per_epoch": 4, "keep": 2}},
    "run with forgetting": {
        "save": {"per_epoch": 2, "keep": 1},
        "train": {"early_stopping": {"patience": 2, "min_delta": 0.6}},
    },
}


def prepared(scene: Scene, base: Path, folder: Path) -> Path:
    """Make the folder in which a scene is played."""
    folder.mkdir(parents=True)
    settings = {name: dict(values) for name, values in SETTINGS.get(scene.name, {}).items()}
    if scene.name == "run with forgetting":
        settings["eval"] = {"general": str(base / "general.jsonl")}
    for name in ("data", "train"):
        defaults = json.loads(write_config(folder, base).read_text())[name]
        settings[name] = {**defaults, **settings.get(name, {})}
    write_config(folder, base, **settings)
    if scene.output:
        os.symlink(base / "run", folder / "run")
    return folder


def facts_of(scene: Scene, place: Path, act: Callable[[], None]) -> Any:
    """Play a scene in a process of its own and return its facts, or what went wrong."""
    read, write = os.pipe()

    def whole() -> None:
        os.close(read)
        act()
        with os.fdopen(write, "w") as pipe:
            pipe.write(repr(scene.facts()))

    process = os.fork()
    if process == 0:
        os._exit(forked(whole, place) and 1)
    os.close(write)
    with os.fdopen(read) as pipe:
        facts = pipe.read()
    os.waitpid(process, 0)
    return facts or "it failed"


def half_made(folder: Path) -> list[str]:
    """What stands under a final name and is not whole: sealed folders, and files of JSON."""
    found = [path.parent for path in folder.rglob(manifest.MANIFEST)]
    found += [*folder.glob("run/checkpoints/step-*"), *folder.glob("run/adapter")]
    if (out := folder / "out").is_dir():
        found.append(out)
    problems = []
    for sealed in sorted(set(found)):
        if not any(storage.is_temporary(part) for part in (sealed, *sealed.parents)):
            problems += manifest.problems_in(sealed)
    for file in (*folder.glob("run/*.json"), *folder.glob("run/evaluations/*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            problems.append(f"{file}: is not whole")
    return problems


def left_over(folder: Path) -> list[str]:
    """What was still being written, and is still there."""
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if storage.is_temporary(path)]
