"""Hostile artefacts: how each is made, and the commands that touch it."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import conftest
import yaml

from lora_cli import json_file, manifest
from torture.bombs import CONFIGS, TEMPLATES

SECRET = "hf_" + "aB3dE6gH9k" * 3
PASSWORD = "swordfish-4711"
NAMES = (
    "../secret", "a/../../secret", "..", "/etc/passwd", "//server/share", "~/x", "~root/x", "C:\\x", "C:x", "a\\..\\x",
    "\\\\server\\share", "x\0.safetensors", "a\nb", "x\u202egnp.exe", "a" * 300, "a/" * 600 + "a", "nul", "COM1.txt",
    "x.", "file:stream",
)  # fmt: skip
Commands = list[list[str]]


@dataclass(frozen=True)
class Materials:
    """What artefacts are made from: a model, an adapter of it, a finished run, rows; the canary they must not touch."""

    model: Path
    adapter: Path
    run: Path
    rows: Path
    canary: Path

    def config(self, folder: Path, model: object = None, **data: Any) -> list[str]:
        """Write a config into a folder; return it as an argument."""
        values = {
            "model": str(model or self.model), "lora": {"rank": 4, "alpha": 8},
            "data": {"train": str(self.rows), "validation": 8, **data}, "train": {"batch_size": 4, "max_steps": 1},
            "eval": {"general": False}, "output_dir": str(folder / "out"),
        }  # fmt: skip
        (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
        return [str(folder / "config.yaml")]


@dataclass(frozen=True)
class Artefact:
    """One hostile thing. `build` makes it in a folder and returns the commands that touch it."""

    name: str
    build: Callable[[Path, Materials], Commands]


# --- pickles in disguise ---


class _Touch:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.canary}'",)


def _pickled(file: Path, have: Materials, zipped: bool = False) -> None:
    """Write a pickle that touches the canary, plain or as torch.save packs it."""
    raw = pickle.dumps(_Touch(have.canary))
    if not zipped:
        file.write_bytes(raw)
        return
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", raw)
        archive.writestr("archive/version", "3")


def _users_of(adapter: Path, folder: Path) -> Commands:
    return [["eval", str(adapter), "--data", str(folder.parent / "rows.jsonl"), "--answers", "1"],
            ["export", str(adapter), "--output", str(folder / "out")],
            ["merge", str(adapter), "--output", str(folder / "out-merged")]]  # fmt: skip


def _adapter_pickle(zipped: bool, name: str) -> Callable[[Path, Materials], Commands]:
    def build(folder: Path, have: Materials) -> Commands:
        copied = shutil.copytree(have.adapter, folder / "adapter")
        (copied / "adapter_model.safetensors").unlink()
        _pickled(copied / name, have, zipped)
        return _users_of(copied, folder)

    return build


def _pickles_beside(folder: Path, have: Materials) -> Commands:
    copied = shutil.copytree(have.adapter, folder / "adapter")
    for name in ("adapter_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"):
        _pickled(copied / name, have)
    return _users_of(copied, folder)


def _polyglot(folder: Path, have: Materials) -> Commands:
    copied = shutil.copytree(have.adapter, folder / "adapter")
    with zipfile.ZipFile(copied / "adapter_model.safetensors", "a") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(_Touch(have.canary)))
    return _users_of(copied, folder)


def _model_pickle(zipped: bool, name: str, index: bool = False) -> Callable[[Path, Materials], Commands]:
    def build(folder: Path, have: Materials) -> Commands:
        copied = shutil.copytree(have.model, folder / "model")
        if name == "model.safetensors" or not index:
            (copied / "model.safetensors").unlink()
        _pickled(copied / name, have, zipped)
        if index:
            (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        config = have.config(folder, copied)
        return [["check", *config], ["train", *config], ["merge", str(have.adapter), "--base", str(copied), "--output",
                                                         str(folder / "out-merged")]]  # fmt: skip

    return build


def _optimizer_pickle(folder: Path, have: Materials) -> Commands:
    copied = shutil.copytree(have.run, folder / "run")
    (step,) = (copied / "checkpoints").iterdir()
    _pickled(step / "optimizer.safetensors", have)
    listed = json.loads((step / manifest.MANIFEST).read_text())
    written = step / "optimizer.safetensors"
    listed["files"][written.name] = {"size": written.stat().st_size, "sha256": manifest.sha256(written)}
    (step / manifest.MANIFEST).write_text(json_file.as_text(listed))
    (copied / "run.json").unlink()
    return [["train", str(copied / "config.yaml"), f"output_dir={copied}"]]


def _data_pickle(name: str) -> Callable[[Path, Materials], Commands]:
    def build(folder: Path, have: Materials) -> Commands:
        _pickled(folder / name, have)
        return [["check", *have.config(folder, train=str(folder / name))]]

    return build


def _tokenizer_pickle(folder: Path, have: Materials) -> Commands:
    copied = shutil.copytree(have.model, folder / "model")
    _pickled(copied / "tokenizer.json", have)
    return [["check", *have.config(folder, copied)]]


# --- code of a model's own ---


def _code(file: str, **keys: Any) -> Callable[[Path, Materials], Commands]:
    def build(folder: Path, have: Materials) -> Commands:
        copied = shutil.copytree(have.adapter if file == "adapter_config.json" else have.model, folder / "coded")
        for name in ("modeling_own.py", "generate.py", "__init__.py"):
            (copied / name).write_text(f"import pathlib\npathlib.Path({str(have.canary)!r}).touch()\nclass Own: pass\n")
        before = json.loads((copied / file).read_text()) if (copied / file).exists() else {}
        (copied / file).write_text(json.dumps(before | keys))
        if file == "adapter_config.json":
            return _users_of(copied, folder)
        config = have.config(folder, copied)
        return [["check", *config], ["train", *config]]

    return build


# --- templates, names, configs, secrets ---


def _template(text: str) -> Callable[[Path, Materials], Commands]:
    def build(folder: Path, have: Materials) -> Commands:
        (folder / "bomb.jinja").write_text(text.replace("CANARY", str(have.canary)) + conftest.CHATML)
        return [["check", *have.config(folder, chat_template=str(folder / "bomb.jinja"))]]

    return build


def _index_names(folder: Path, have: Materials) -> Commands:
    commands = []
    for number, name in enumerate(NAMES):
        copied = shutil.copytree(have.model, folder / f"model-{number}")
        (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
        commands.append(["eval", str(have.adapter), "--base", str(copied), "--data", str(have.rows)])
    return commands


def _manifest_names(folder: Path, have: Materials) -> Commands:
    commands = []
    for number, name in enumerate(NAMES):
        copied = shutil.copytree(have.adapter, folder / f"adapter-{number}")
        (copied / manifest.MANIFEST).write_text(json.dumps({"files": {name: {"size": 1, "sha256": "0"}}}))
        commands.append(["export", str(copied), "--output", str(folder / f"out-{number}")])
    return commands


def _links(folder: Path, have: Materials) -> Commands:
    copied = shutil.copytree(have.run, folder / "run")
    shutil.move(copied / "adapter", folder / "elsewhere")
    (copied / "adapter").symlink_to(folder / "elsewhere")
    return [["eval", str(copied)], ["export", str(copied), "--output", str(folder / "out")]]


def _yaml(text: str) -> Callable[[Path, Materials], Commands]:
    def build(folder: Path, have: Materials) -> Commands:
        (folder / "config.yaml").write_text(text.replace("CANARY", str(have.canary)))
        return [["check", str(folder / "config.yaml")]]

    return build


def _secret_in_config(folder: Path, have: Materials) -> Commands:
    return [["train", *have.config(folder, prompt_template=f"{SECRET} {{text}}")]]


def _secret_in_address(folder: Path, have: Materials) -> Commands:
    return [["train", *have.config(folder, f"https://me:{PASSWORD}@mirror.example/model")]]


def _secret_in_arguments(folder: Path, have: Materials) -> Commands:
    config = have.config(folder)
    return [["check", *config, f"model.token={SECRET}"], ["check", f"{SECRET}.yaml"], ["eval", SECRET, "--json"]]


def _secret_in_rows(folder: Path, have: Materials) -> Commands:
    rows = [conftest.conversation(number) for number in range(40)]
    for row in rows:
        row["messages"][1]["content"] += f" {SECRET} https://me:{PASSWORD}@mirror.example/"
    rows_file = conftest.write_rows(folder / "rows.jsonl", rows)
    return [["check", *have.config(folder, train=rows_file)], ["train", str(folder / "config.yaml"), "--json"],
            ["eval", str(folder / "out"), "--answers", "2", "--json"]]  # fmt: skip


def _secret_in_a_broken_row(folder: Path, have: Materials) -> Commands:
    row = {"messages": [{"role": f"assistnt {SECRET}", "content": f"{SECRET}"}, {"role": "assistant", "content": "a"}]}
    rows_file = conftest.write_rows(folder / "rows.jsonl", [row, {SECRET: 1}, f"https://me:{PASSWORD}@x"])
    return [["check", *have.config(folder, train=rows_file)]]


ARTEFACTS: Sequence[Artefact] = (
    Artefact("adapter: pickle", _adapter_pickle(False, "adapter_model.safetensors")),
    Artefact("adapter: torch.save", _adapter_pickle(True, "adapter_model.safetensors")),
    Artefact("adapter: .bin only", _adapter_pickle(True, "adapter_model.bin")),
    Artefact("adapter: pickles beside", _pickles_beside),
    Artefact("adapter: polyglot", _polyglot),
    Artefact("model: pickle", _model_pickle(False, "model.safetensors")),
    Artefact("model: torch.save", _model_pickle(True, "model.safetensors")),
    Artefact("model: .bin only", _model_pickle(True, "pytorch_model.bin")),
    Artefact("model: index names .bin", _model_pickle(True, "pytorch_model.bin", index=True)),
    Artefact("checkpoint: pickled optimizer", _optimizer_pickle),
    Artefact("data: .pkl", _data_pickle("rows.pkl")),
    Artefact("data: pickle as parquet", _data_pickle("rows.parquet")),
    Artefact("tokenizer: pickle", _tokenizer_pickle),
    Artefact("code: config auto_map", _code("config.json", auto_map={
        "AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"})),
    Artefact("code: foreign architecture", _code("config.json", model_type="brand-new", auto_map={
        "AutoConfig": "modeling_own.Own", "AutoModelForCausalLM": "modeling_own.Own"})),
    Artefact("code: tokenizer auto_map", _code("tokenizer_config.json", tokenizer_class="Own", auto_map={
        "AutoTokenizer": ["modeling_own.Own", "modeling_own.Own"]})),
    Artefact("code: model_file", _code("config.json", model_file="modeling_own.py", custom_generate="generate.py")),
    Artefact("code: generation", _code("generation_config.json", custom_generate="generate.py", auto_map={
        "GenerationConfig": "modeling_own.Own"})),
    Artefact("code: adapter auto_mapping", _code("adapter_config.json", auto_mapping={
        "base_model_class": "Own", "parent_library": "modeling_own"})),
    Artefact("names: in an index", _index_names),
    Artefact("names: in a manifest", _manifest_names),
    Artefact("names: links out of a run", _links),
    Artefact("secrets: config", _secret_in_config),
    Artefact("secrets: address", _secret_in_address),
    Artefact("secrets: arguments", _secret_in_arguments),
    Artefact("secrets: rows", _secret_in_rows),
    Artefact("secrets: broken row", _secret_in_a_broken_row),
    *(Artefact(f"template: {name}", _template(text)) for name, text in TEMPLATES.items()),
    *(Artefact(f"yaml: {name}", _yaml(text)) for name, text in CONFIGS.items()),
)  # fmt: skip
