"""What RUN names on the command line: an adapter, or the whole model of a run of full fine-tuning."""

from pathlib import Path

from lora_cli import manifest
from lora_cli.errors import AdapterError
from lora_cli.nearby import did_you_mean
from lora_cli.run_dir import RunDir, is_run_dir, require_own, step_folders


def find_adapter(path: Path) -> tuple[Path, RunDir | None]:
    """Return the adapter folder that RUN names, and the run it belongs to.

    RUN is a run directory (its finished adapter), a checkpoint, or any PEFT adapter folder. Raises AdapterError.
    """
    folder, run = find_result(path)
    if run is not None and is_whole_model(folder):
        raise AdapterError(
            f"{path}: is of a run of full fine-tuning (lora.method: full), which makes a whole model and no adapter: "
            "there is nothing to merge, to scale or to export.",
            f"{run.model} is an ordinary Hugging Face model as it is, to load with from_pretrained, to serve or to "
            f"convert; `lora eval {run.path}` measures it beside its base.",
        )
    return folder, run


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


def is_whole_model(folder: Path) -> bool:
    """Return whether a result holds all weights of a model."""
    weights = (folder / "model.safetensors", folder / "config.json")  # a checkpoint's, a model's
    return (folder / "base.json").is_file() and any(map(Path.is_file, weights))


def find_result(path: Path) -> tuple[Path, RunDir | None]:
    """Return the folder with what was trained that RUN names, and the run it belongs to. Raises AdapterError."""
    above = [parent for parent in (path.parent, path.parent.parent) if is_run_dir(parent)]
    if _is_adapter(path) or (above and is_whole_model(path)):
        if above:
            require_own(RunDir(above[0]))
        _require_whole(path)
        return path, RunDir(above[0]) if above else None
    if is_run_dir(path):
        run = RunDir(path)
        require_own(run)
        if found := [folder for folder in (run.adapter, run.model) if _is_adapter(folder) or is_whole_model(folder)]:
            _require_whole(found[0])
            return found[0], run
        steps = [folder for _, folder in step_folders(run)]
        expected = run.model if any(map(is_whole_model, steps)) else run.adapter
        raise AdapterError(
            f"{path}: this run is not finished, so it has no {expected.name}/ yet. "
            + (
                f"Its checkpoints can be used: {', '.join(map(str, steps[:3]))}."
                if steps
                else "It has no checkpoint either."
            )
            + f" `lora train {run.config}` goes on with it.",
            state="Nothing was read.",
        )
    what = "is neither a run directory nor an adapter (no adapter_config.json)" if path.exists() else "does not exist"
    hint = did_you_mean(path, lambda beside: is_run_dir(beside) or _is_adapter(beside))
    raise AdapterError(
        f"{path}: {what}; name a run directory, a checkpoint or an adapter folder.{hint}", state="Nothing was read."
    )


def _require_whole(folder: Path) -> None:
    """Raise AdapterError when a folder of ours is not as it was written; others have no manifest."""
    if (folder / manifest.MANIFEST).is_file() and (problems := manifest.problems_in(folder)):
        way_out = "The folder is not as it was written: copy it again, or use another checkpoint."
        raise AdapterError(*problems, way_out, state="Nothing was read.")
