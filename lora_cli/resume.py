"""What a run that goes on may change: keys by the rule the schema gives them, never its base, data or tokenizer."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_cli import config_file, manifest, run_dir, storage
from lora_cli.config import RunConfig
from lora_cli.errors import AdapterError, ConfigError, DataError
from lora_cli.records import Start, as_json
from lora_cli.run_dir import FORMAT, RunDir
from lora_cli.schema import OnResume, rules, value_of
from lora_cli.strict_yaml import dump_inline

_ELSEWHERE = "To start anew, set another output_dir (output_dir=...)."
# What a run saw, by its hash in environment.json.
_SEEN = {
    "base_fingerprint": "base model (its config.json or weights)",
    "remote_code": "model's own code",
    "tokenizer_fingerprint": "tokenizer",
    "template_fingerprint": "chat template",
    "rows_fingerprint": "data (the rows of its files)",
}
_TOKENS = "data, tokenizer, template or general text (the tokens that come of them)"
# What bit equality depends on beside them.
_VERSIONS = ("lora", "torch", "transformers", "bitsandbytes", "device", "cpu", "threads", "processes")


@dataclass(frozen=True)
class Change:
    """A key of the config, or a version of the surroundings, that is not what it was."""

    key: str
    before: Any
    after: Any
    rule: OnResume

    def __str__(self) -> str:
        return f"{self.key}: {_as_written(self.before)} there, {_as_written(self.after)} now"


def _as_written(value: Any) -> Any:
    """Return what YAML writes in another way than Python as it stands in a config."""
    return dump_inline(value) if value is None or isinstance(value, bool) else value


def changes(old: RunConfig, new: RunConfig) -> list[Change]:
    """Return the keys whose values differ."""
    return [
        Change(key, value_of(old, key), value_of(new, key), rule or OnResume.FIXED)
        for key, rule in rules(RunConfig)
        if value_of(old, key) != value_of(new, key)
    ]


def is_changed(found: Sequence[Change]) -> bool:
    """Return whether a run is trained in another way from here on, so that a finished one is not finished."""
    return any(change.rule is OnResume.OVERRIDE for change in found)


def plan(run: RunDir, config: RunConfig, override: bool) -> list[Change]:
    """Return what a config changes of the run in its folder; nothing where there is none.

    Raises ConfigError where the folder is used by something else, or the change is not allowed.
    """
    if not run_dir.require_place(run):
        return []
    found = changes(config_file.load(run.config), config)
    if fixed := [change for change in found if change.rule is OnResume.FIXED]:
        raise ConfigError(
            f"output_dir: {run.path} holds a run of another config:",
            *(f"  {change}" for change in fixed),
            f"To go on with that run, use its config. {_ELSEWHERE}",
        )
    if is_changed(found) and not override:
        raise ConfigError(
            f"output_dir: {run.path} holds a run that began with other settings:",
            *(f"  {change}" for change in found if change.rule is OnResume.OVERRIDE),
            "To go on with that run, use its config, or add --override: it then continues from its last checkpoint "
            "with these settings, which is written down in it, and is no longer the run of one config.",
            _ELSEWHERE,
        )
    return found


# --- what a run saw ---


def require_same(run: RunDir, environment: Mapping[str, Any]) -> None:
    """Raise DataError where base, tokenizer, template or data are not those the run began with."""
    before = run_dir.read_environment(run)
    changed = [key for key in _SEEN if key in before and before[key] != environment.get(key)]
    if (
        not changed
        and before.get("data_fingerprint", environment["data_fingerprint"]) != environment["data_fingerprint"]
    ):
        changed = ["data_fingerprint"]
    if changed:
        raise DataError(
            *(
                f"{run.path}: the {_SEEN.get(key, _TOKENS)} changed since this run began "
                f"({before[key]} then, {environment.get(key)} now)."
                for key in changed
            ),
            f"Put it back to continue. {_ELSEWHERE}",
        )


def other_versions(run: RunDir, environment: Mapping[str, Any]) -> list[Change]:
    """Return the versions and settings of the machine that differ from those the run began with."""
    before = run_dir.read_environment(run)
    return [
        Change(key, before[key], environment[key], OnResume.NOTED)
        for key in _VERSIONS
        if key in before and before[key] != environment.get(key)
    ]


# --- what is written down ---


def create(run: RunDir, config: RunConfig, environment: Mapping[str, Any]) -> None:
    """Create the run directory, or sweep what a killed process left in an existing one."""
    storage.sweep(run.path)
    with storage.explained(run.path):
        storage.make_folder(run.checkpoints)
    storage.sweep(run.checkpoints)
    before = run_dir.read_environment(run)
    now = {"format": FORMAT, **(before or environment)}
    # A run of an older version has not all the hashes; it was found to be the same by those that it has.
    now |= {key: value for key, value in environment.items() if key.endswith("_fingerprint") and key not in now}
    now |= {"format": FORMAT, "micro_batch_tokens": environment["micro_batch_tokens"]}
    if now != before:
        storage.write_json(run.environment, now)
    if not run.config.exists():
        storage.write_file(run.config, config_file.dump(config))


def write_start(run: RunDir, start: Start, found: Sequence[Change]) -> None:
    """Write start.json; of a run that goes on, what is there stays, but for the origins of keys that change."""
    before = None
    with contextlib.suppress(AdapterError):  # it is for readers, and nothing is computed from it
        before = run_dir.read_start(run)
    if before is not None:
        kept = {key: origin for key, origin in before.origins.items() if key not in {change.key for change in found}}
        start = replace(start, origins={**start.origins, **kept})
    if start != before:
        storage.write_json(run.start, {"format": FORMAT, **as_json(start)})


def write_down(run: RunDir, config: RunConfig, found: Sequence[Change], step: int, best_step: int) -> Iterator[str]:
    """Write what changes after a step into run.json and config.yaml; iterate over what to tell the user.

    A finished run is none any more then: killed at any moment of this, it goes on with the old config or the new one.
    """
    known = [change | {"step": min(change["step"], step)} for change in run_dir.read_status(run).get("changes", [])]
    seen = {(change["key"], change["before"], change["after"]) for change in known}
    for change in found:
        if change.rule is not OnResume.FREE:
            yield f"{change} (from step {step + 1} on: {change.rule.value.split(':')[0]})."
            if (change.key, change.before, change.after) not in seen:
                known.append({"step": step, "key": change.key, "before": change.before, "after": change.after})
    if known:
        run_dir.write_status(run, "running", step=step, changes=known)
    result = run.result(config.lora.method)
    if is_changed(found) and result.exists():
        yield _take_back(run, result, run_dir.checkpoint_path(run, best_step))
    if any(change.key not in _VERSIONS for change in found):
        storage.write_file(run.config, config_file.dump(config))


def _take_back(run: RunDir, result: Path, kept: Path) -> str:
    """Delete the result of a finished run, made of a checkpoint; what was measured on it is the checkpoint's."""
    if manifest.problems_in(kept):
        raise AdapterError(
            f"{kept}: the checkpoint that {result.name}/ is a copy of is not whole; so the run stays as it is."
        )
    with storage.explained(run.evaluations):
        for path in run.evaluations.glob(f"{result.name}-*"):
            storage.rename(path, path.with_name(path.name.replace(result.name, kept.name, 1)))
    storage.remove_directory(result)
    return f"The run was finished and goes on: {result} is gone until it is finished again; the same is in {kept}."
