"""The model card: README.md of what training, `lora merge` and `lora export` write. It names no place on this machine.

The hub reads its head (https://huggingface.co/docs/hub/model-cards); the licence is the user's to choose.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_cli import config_file, how_to_load, json_file, metrics, run_dir, sources, storage, strict_yaml
from lora_cli.adapter import Adapter
from lora_cli.adapter_folder import Origin
from lora_cli.config import RunConfig
from lora_cli.records import Estimate, Evaluated, Finished, with_interval
from lora_cli.reports import Comparison
from lora_cli.run_dir import RunDir
from lora_cli.runtimes import Produced
from lora_cli.tuned import Result

FILE = "README.md"
Kind = Literal["peft", "mlx", "merged", "onnx", "full"]
_LIBRARY = {
    "peft": "peft",
    "mlx": "mlx",
    "merged": "transformers",
    "onnx": "onnx",
    "full": "transformers",
}  # as the hub calls what loads a folder
_WHAT = {
    "peft": "A LoRA adapter for",
    "mlx": "A LoRA adapter, in the format of mlx-lm, for",
    "merged": "A model: a LoRA adapter merged into",
    "onnx": "An ONNX graph of a LoRA adapter merged into",
    "full": "A model: full fine-tuning of",
}
_PLACES = frozenset(("path", "train", "validation", "test", "general", "chat_template"))


@dataclass(frozen=True)
class Facts:
    """What a card tells of the run an adapter comes from. `before` and `after` are of its validation rows."""

    config: RunConfig
    environment: Mapping[str, Any]
    changes: Sequence[Mapping[str, Any]]  # of its settings, while it ran
    before: Evaluated | None  # the base
    after: Evaluated | None  # the adapter
    finished: Finished | None  # where it is the run's best
    evaluations: Sequence["Evaluation"]
    chosen_rate: float | None  # by train.learning_rate: auto


@dataclass(frozen=True)
class Evaluation:
    """One `lora eval` of the adapter."""

    data: str
    rows: int
    figures: Mapping[str, Comparison]


def peft_card(adapter: Adapter, run: RunDir | None, finished: Finished | None = None) -> str:
    """Return the card of an adapter's folder; `finished` is how its run ended, where run.json does not say so yet."""
    facts = _facts_of(adapter.folder, run, finished)
    model_type = str(facts.environment.get("model_type", "")) if facts else ""
    return _adapter_card("peft", adapter, model_type, facts)


def full_card(chosen: Path, origin: Origin, run: RunDir, finished: Finished) -> str:
    """Return the card of a model all of whose weights a run trained; `chosen` is the checkpoint it is made of."""
    what = "All of its weights were trained; they are in float32."
    facts = _facts_of(chosen, run, finished)
    return _card("full", origin.base, origin.base_fingerprint, what, how_to_load.WHOLE["merged"], facts)


def mlx_card(result: Result) -> str:
    """Return the card of an adapter that was written for mlx-lm."""
    return _card_of(result, "mlx")


def merged_card(result: Result) -> str:
    """Return the card of base + adapter as one model."""
    return _card_of(result, "merged")


def onnx_card(result: Result) -> str:
    """Return the card of base + adapter as one ONNX graph."""
    return _card_of(result, "onnx")


def _card_of(result: Result, kind: Kind) -> str:
    facts = _facts_of(result.adapter.folder, result.run)
    return _adapter_card(kind, result.adapter, str(result.header.config.model_type), facts)


def _adapter_card(kind: Kind, adapter: Adapter, model_type: str, facts: Facts | None) -> str:
    ranks = [down.shape[0] for down in adapter.lora_A.values()]
    modules = frozenset(path.rsplit(".", 1)[-1] for path in adapter.lora_A)
    what = f"Its rank is {_span(ranks)}, on {len(ranks)} layers ({', '.join(sorted(modules))})."
    produced = Produced(model_type, "dora" if adapter.magnitudes else "lora", max(ranks), modules)
    how = how_to_load.text(kind, _called(adapter.base), adapter, produced)
    return _card(kind, adapter.base, adapter.base_fingerprint, what, how, facts)


def _card(kind: Kind, place: str, fingerprint: str | None, what: str, how: str, facts: Facts | None) -> str:
    base, on_hub = _called(place), sources.is_hub_id(place)
    known = ["" if on_hub else "a local folder", fingerprint and f"fingerprint `{fingerprint}`"]
    exactly = f" ({', '.join(filter(None, known))})" if any(known) else ""
    head = {
        **({"base_model": base} if on_hub else {}),
        "library_name": _LIBRARY[kind],
        "pipeline_tag": "text-generation",
        "tags": [*(["lora"] if kind != "full" else []), "text-generation"],
        **({"datasets": named} if (named := _hub_data(facts)) else {}),
    }
    return f"""---
{strict_yaml.dump(head)}---

# {base}, fine-tuned

{_WHAT[kind]} `{base}`{exactly}. {what}

## Results

{_results(facts)}

## How to load it

{how}

## How it was made

{_making(facts)}
"""


def write(folder: Path, text: str) -> None:
    """Write a card into a folder that is not sealed yet."""
    storage.add_file(folder / FILE, text)


def public_name(place: str) -> str:
    """Return how a model, file or folder is called in public: a hub id as it is, of a place here the last part."""
    return place if sources.is_hub_id(place) else Path(place).name


def _called(place: str) -> str:
    return public_name(place) or "a base model"


def _hub_data(facts: Facts | None) -> list[str]:
    named = [source.path for source in facts.config.data.sources] if facts else []
    return [name for name in named if sources.is_hub_id(name)]


def _span(ranks: Sequence[int]) -> str:
    return str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"


# --- what is known of the run ---


def _facts_of(folder: Path, run: RunDir | None, finished: Finished | None = None) -> Facts | None:
    if run is None:
        return None
    if folder == run.adapter:
        finished = run_dir.read_finished(run)
    evaluated = metrics.read_evaluated(run)
    name, config = folder.name, config_file.load(run.config)
    checkpoint = re.fullmatch(r"step-(\d+)", name)
    step = finished.best_step if finished else int(checkpoint[1]) if checkpoint else None
    return Facts(
        config=config,
        environment=run_dir.read_environment(run),
        changes=run_dir.read_status(run).get("changes", []),
        before=evaluated.get(0),
        after=evaluated.get(step) if step is not None else None,
        finished=finished,
        evaluations=list(_evaluations(run, name)),
        chosen_rate=_chosen_rate(config, run),
    )


def _chosen_rate(config: RunConfig, run: RunDir) -> float | None:
    if config.train.learning_rate != "auto":
        return None
    chosen = run_dir.read_facts(run.probe).get("chosen")
    return chosen if json_file.is_number(chosen) else None


def _evaluations(run: RunDir, name: str) -> Iterator[Evaluation]:
    for path in sorted(run.evaluations.glob(f"{name}-*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # of another version
            values = json.loads(path.read_text(encoding="utf-8"))
            figures = {name: _comparison(figure) for name, figure in values["figures"].items()}
            yield Evaluation(public_name(values["data"]), int(values["rows"]), figures)


def _comparison(figure: Mapping[str, Any]) -> Comparison:
    base, tuned, difference = (Estimate(**figure[part]) for part in ("base", "tuned", "difference"))
    return Comparison(base, tuned, difference, figure["verdict"])


# --- what was measured ---


def _results(facts: Facts | None) -> str:
    rows = list(_measured(facts)) if facts else []
    if not rows:
        return "Nothing is known here: the adapter came without its run, or without validation rows."
    return "\n".join(
        [
            "| | rows or tokens | base | fine-tuned | change, with its 95 % interval |",
            "|---|---|---|---|---|",
            *(f"| {' | '.join(row)} |" for row in rows),
            "",
            "Losses are in nats a token. The validation rows chose this checkpoint among those of its run.",
        ]
    )


def _measured(facts: Facts) -> Iterator[Sequence[str]]:
    """Iterate over the rows of the table: what, on how much, base, fine-tuned, change."""
    before, after = facts.before, facts.after
    if before is not None and after is not None:
        change = f"{after.loss - before.loss:+.4f}"
        yield ("validation loss", f"{after.targets:,} tokens", f"{before.loss:.4f}", f"{after.loss:.4f}", change)
    test = facts.finished.test if facts.finished else None
    if test is not None:
        change = with_interval(test.change, "+.4f")
        yield ("test loss", f"{test.targets:,} tokens", f"{test.base_loss:.4f}", f"{test.loss:.4f}", change)
    if after is not None and (general := after.forgetting) is not None and general.rise.value is not None:
        figures = (f"{general.base_loss:.4f}", f"{general.base_loss + general.rise.value:.4f}")
        change = with_interval(general.rise, "+.4f")
        yield ("loss on general text (forgetting)", f"{general.tokens:,} tokens", *figures, change)
    for evaluation in facts.evaluations:
        for name, figure in evaluation.figures.items():
            base, tuned = (with_interval(each, ".4f") for each in (figure.base, figure.tuned))
            change = with_interval(figure.difference, "+.4f")
            yield (f"{evaluation.data}: {name}", f"{evaluation.rows:,} rows", base, tuned, change)


# --- how it was made ---


def _making(facts: Facts | None) -> str:
    if facts is None:
        return "Its run is not known here."
    environment = facts.environment
    counts = "\n".join(
        f"- {name}: {count['rows']:,} rows, {count['targets']:,} trained tokens"
        for name, count in environment.get("data", {}).items()
    )
    changed = "".join(
        f"\nFrom step {one['step'] + 1} on with another {one['key']}: {one['after']}, not {one['before']}.\n"
        for one in facts.changes
    )
    if facts.chosen_rate is not None:
        changed += f"\nThe learning rate that `auto` found is {facts.chosen_rate:g}.\n"
    versions = ", ".join(
        f"{name} {environment[name]}" for name in ("lora", "torch", "transformers") if name in environment
    )
    return f"""Data (fingerprint `{environment.get("data_fingerprint")}`):

{counts}

With {versions}, on {environment.get("device")}, by this config:
{changed}
```yaml
{strict_yaml.dump(_published(facts.config.model_dump(mode="json", exclude={"output_dir"})))}```"""


def _published(values: Any, key: str = "") -> Any:
    """Return a config's values with the places of this machine cut to their last part."""
    if isinstance(values, Mapping):
        return {name: _published(value, name) for name, value in values.items()}
    if isinstance(values, list):
        return [_published(value, key) for value in values]
    return public_name(values) if key in _PLACES and isinstance(values, str) else values
