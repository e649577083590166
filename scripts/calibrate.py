"""Do 95 % intervals hold what they say? Trains a short run, measures a large held-out set once, then draws subsets.

    python scripts/calibrate.py MODEL DATA OUT [--rows 1200] [--steps 60] [--rate 1e-3] [--extract PATTERN]

DATA is a file of prompt, completion. Prints, for each figure, in how many of 200 subsets the interval computed from the
subset alone holds the value of the whole set, and how often an adapter is called better than itself.
"""

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_cli import config_file, lora, scoring, tuned
from lora_cli.distributed import current_world
from lora_cli.evaluate import BASE_AND_ADAPTER, measure
from lora_cli.generate import GREEDY
from lora_cli.held_out import held_out_rows
from lora_cli.interrupt import StopRequest
from lora_cli.intervals import compare, difference, estimate
from lora_cli.questions import answer, expected_texts, questions_of
from lora_cli.records import Estimate
from lora_cli.train import train

SUBSETS, SIZE = 200, 100


def prepare(model: Path, data: Path, out: Path, rows: int, steps: int, rate: float) -> tuple[Path, Path]:
    """Train a run on some rows of a file; return it and the file of the others."""
    out.mkdir(parents=True, exist_ok=True)
    lines = {json.loads(line)["prompt"]: line for line in data.read_text(encoding="utf-8").splitlines()}
    kept = sorted(lines.values())
    random.Random(0).shuffle(kept)
    (out / "held.jsonl").write_text("\n".join(kept[:rows]) + "\n", encoding="utf-8")
    (out / "train.jsonl").write_text("\n".join(kept[rows:]) + "\n", encoding="utf-8")
    (out / "config.yaml").write_text(
        f"""model: {model}
data: {{train: {out}/train.jsonl, validation: 0}}
train: {{max_steps: {steps}, epochs: 20, learning_rate: {rate}, batch_size: 16}}
save: {{per_epoch: 1}}
output_dir: {out}/run
""",
        encoding="utf-8",
    )
    for _ in train(config_file.load(out / "config.yaml"), StopRequest()):
        pass
    return out / "run", out / "held.jsonl"


def tables(run: Path, held_out: Path, extract: str | None) -> dict[str, Sequence[np.ndarray]]:
    """Return (base, adapter, adapter again) of each figure, a row of sums for each held-out row."""
    result = tuned.find(run)
    rows, _, _ = held_out_rows(result, str(held_out))
    loaded = tuned.load(result, current_world(result.base.device).device)
    losses = [each.per_target("loss") for each in measure(loaded, rows, 1024, (*BASE_AND_ADAPTER, 1.0))]
    asked = questions_of(rows, len(rows))
    expected, hits = expected_texts(loaded, result.header.tokenizer, asked), []
    for gain in BASE_AND_ADAPTER:
        with lora.gain(loaded.module, gain):
            said = answer(loaded, result.header.tokenizer, asked, result.header.max_positions, GREEDY, None)
        hits.append(scoring.score("exact-match", expected, said, extract)[0].sums)
    hits.append(hits[-1])  # greedy answers repeat
    return {"loss": losses, "exact match": hits}


def holds(found: Estimate, truth: Estimate) -> bool:
    assert None not in (found.low, found.high, truth.value)
    return bool(found.low <= truth.value <= found.high)  # type: ignore[operator]


def report(all_tables: dict[str, Sequence[np.ndarray]]) -> None:
    generator = np.random.default_rng(0)
    count = len(next(iter(all_tables.values()))[0])
    subsets = [generator.choice(count, SIZE, replace=False) for _ in range(SUBSETS)]
    print(f"{count} held-out rows, {SUBSETS} subsets of {SIZE}")
    for name, (base, adapted, again) in all_tables.items():
        figures = {f"{name} of the base": base, f"{name} of the adapter": adapted}
        for what, table in figures.items():
            truth = estimate(table)
            covered = sum(holds(estimate(table[chosen]), truth) for chosen in subsets)
            print(f"{what:32} {truth.value:8.4f}   covered {covered / SUBSETS:6.1%}")
        truth = difference(base, adapted)
        covered = sum(holds(difference(base[chosen], adapted[chosen]), truth) for chosen in subsets)
        print(f"{name + ', adapter less base':32} {truth.value:8.4f}   covered {covered / SUBSETS:6.1%}")
        verdicts = [
            compare(adapted[c], again[c], lower_is_better=name == "loss").verdict for c in (*subsets, np.arange(count))
        ]
        print(f"{name}: adapter against itself: {verdicts.count('better')} of {len(verdicts)} times called better")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--extract", help="as lora eval has it")
    asked = parser.parse_args()
    run, held_out = prepare(asked.model, asked.data, asked.out, asked.rows, asked.steps, asked.rate)
    report(tables(run, held_out, asked.extract))
