"""What holds forgetting down, on a task that forgets and on one that hardly does: train, then report.

    python scripts/bench_forgetting.py train  MODEL DATA OUT    a run of each task, method and seed
    python scripts/bench_forgetting.py report MODEL DATA OUT    evaluates what is there and prints the tables

DATA holds banking77/, tldr/ (train.jsonl: prompt, completion) and wikitext2/valid.txt. General text for measuring is
the second half of wikitext2, rows for replay are the first half.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
from pathlib import Path

TASKS = {"banking77": ["train.learning_rate=1e-3"], "tldr": ["train.learning_rate=3e-4"]}
STEPS, BATCH = 150, 8
VALIDATION, TEST, GENERAL = 200, 400, 6144  # prompts held out, tokens of general text
SEEDS = (0, 1, 2)


def methods(out: Path) -> dict[str, list[str]]:
    replay = f"data.replay={{path: {out / 'replay.jsonl'}, ratio: 0.05}}"
    return {
        "plain": [],
        "replay": [replay],
        "kl": ["train.kl_to_base=0.3"],
        "replay + kl": [replay, "train.kl_to_base=0.3"],
    }


def write_data(data: Path, out: Path) -> None:
    """Write the splits, the same every time: test and validation rows, training rows, replay, general text."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [line.strip() for line in (data / "wikitext2/valid.txt").read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if len(line) > 200]
    half = len(lines) // 2
    write_rows(out / "replay.jsonl", [{"text": line} for line in lines[:half]])
    (out / "general.txt").write_text("\n".join(lines[half:]) + "\n", encoding="utf-8")
    for task in TASKS:
        rows = [json.loads(line) for line in (data / task / "train.jsonl").read_text(encoding="utf-8").splitlines()]
        prompts = sorted({row["prompt"] for row in rows})
        random.Random(0).shuffle(prompts)
        held_out = {"test": set(prompts[:TEST]), "validation": set(prompts[TEST : TEST + VALIDATION])}
        held_out["train"] = set(prompts[TEST + VALIDATION :])
        for name, wanted in held_out.items():
            write_rows(out / f"{task}-{name}.jsonl", [row for row in rows if row["prompt"] in wanted])


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def place(out: Path, task: str, method: str, seed: int) -> Path:
    return out / "runs" / f"{task}-{method.replace(' ', '-').replace(',', '')}-{seed}"


def lora(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "lora_cli", *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def train(model: Path, out: Path, tasks: list[str]) -> None:
    for seed, task in itertools.product(SEEDS, tasks):
        config = out / f"{task}.yaml"
        config.write_text(
            f"""model: {model}
data:
  train: {out}/{task}-train.jsonl
  validation: {out}/{task}-validation.jsonl
train:
  epochs: 1
  batch_size: {BATCH}
  max_steps: {STEPS}
  early_stopping: {{patience: null}}
eval:
  general: {out}/general.txt
  general_tokens: {GENERAL}
  per_epoch: 1
save:
  per_epoch: 1
output_dir: unset
""",
            encoding="utf-8",
        )
        for method, more in methods(out).items():
            folder = place(out, task, method, seed)
            print(lora("train", str(config), *TASKS[task], *more, f"seed={seed}", f"output_dir={folder}"), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "report"))
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", action="append", choices=list(TASKS))
    asked = parser.parse_args()
    write_data(asked.data, asked.out)
    train(asked.model, asked.out, asked.task or list(TASKS))
