"""Flipped bits and files that end too early, in all that is sealed: a checkpoint, an adapter, a merged model."""

import random
from pathlib import Path
from typing import Any

from lora_cli import base_folder, checkpoint, merge, model, results, run_dir
from lora_cli.config import ModelConfig
from lora_cli.errors import AdapterError, ModelError
from lora_cli.run_dir import RunDir
from torture import scenes
from torture.scenes import forked


def said_of(folder: Path) -> list[str]:
    """What the readers of a sealed folder say is wrong with it: those that commands read it with."""
    try:
        if folder.name == "merged":
            base_folder.require_whole(folder)
        elif folder.name == "adapter":
            results.find_adapter(folder.parent)
        else:
            newest, problems = checkpoint.latest(RunDir(folder.parent.parent))
            return problems if newest != folder else []
    except (AdapterError, ModelError) as error:
        return list(error.problems)
    return []


def model_is_refused(folder: Path) -> bool:
    """Whether a model is refused by what commands read it with: its header, or its weights when they are loaded."""
    try:
        model.load_model(model.read_header(ModelConfig(path=str(folder))), ModelConfig(path=str(folder)), _cpu())
    except ModelError:
        return True
    return False


def _cpu() -> Any:
    import torch

    return torch.device("cpu")


def run(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Flip `count` single bits and cut `count` / 10 files, one at a time; each must be found, and its file named."""
    base = folder / "base"
    scenes.build(base)

    def make() -> None:
        scenes.write_config(base, base)
        scenes.train_to_end()
        merge.merge([Path("run")], Path("merged"))

    if forked(make, base):
        raise RuntimeError("the run and its merge fail")
    newest = run_dir.step_folders(RunDir(base / "run"))[0][1]
    folders = [newest, base / "run" / "adapter", base / "merged"]
    files = [file for sealed in folders for file in sorted(sealed.rglob("*")) if file.is_file()]
    chance, failures, loaded = random.Random(seed), list[str](), 0
    flips, cuts = count, count // 10
    for number in range(flips + cuts):
        file = files[number % len(files)]
        sealed = next(each for each in folders if each in file.parents)
        before = file.read_bytes()
        if number < flips:
            place = chance.randrange(8 * len(before))
            changed = bytearray(before)
            changed[place // 8] ^= 1 << place % 8
            what = f"bit {place} of {file.relative_to(base)} flipped"
        else:
            length = chance.choice((0, 1, len(before) // 2, len(before) - 1, chance.randrange(len(before))))
            changed = bytearray(before[:length])
            what = f"{file.relative_to(base)} cut to {length} bytes"
        file.write_bytes(changed)
        problems = said_of(sealed)
        if not problems:
            failures.append(f"{what}: is not noticed")
        elif file.name != "MANIFEST.json" and not any(str(file) in problem for problem in problems):
            failures.append(f"{what}: the file is not named: {problems[0]}")
        if sealed.name == "merged" and number % 10 == 0:
            loaded += 1
            if not model_is_refused(sealed):
                failures.append(f"{what}: the model is loaded all the same")
        file.write_bytes(before)
    return {
        "tried": flips + cuts,
        "flips": flips,
        "cuts": cuts,
        "files": len(files),
        "loaded": loaded,
        "failures": failures,
    }
