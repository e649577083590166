"""What holds forgetting down, on a task that forgets and on one that hardly does: train, then report.

    python scripts/bench_forgetting.py train  MODEL DATA OUT    a run of each task, method and seed
    python scripts/bench_forgetting.py measure MODEL DATA OUT   measures what is there; can be run several times
    python scripts/bench_forgetting.py report MODEL DATA OUT    prints the tables
    python scripts/bench_forgetting.py budget MODEL DATA OUT    holds a run to half of the plain run's forgetting

DATA holds banking77/, tldr/ (train.jsonl: prompt, completion) and wikitext2/valid.txt. General text for measuring is
the second half of wikitext2, rows for replay are the first half.
"""

import argparse
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_cli.intervals import difference, estimate
from lora_cli.records import Estimate

TASKS = {"banking77": ["train.learning_rate=1e-3"], "tldr": ["train.learning_rate=3e-4"]}
STEPS, BATCH = 150, 8
VALIDATION, TEST, GENERAL = 200, 400, 6144  # prompts held out, tokens of general text
ONE_IN = 2  # of the test rows one in so many is measured on
SEEDS = (0, 1, 2)
POINTS = [("plain", 1.0), ("replay", 1.0), ("kl", 1.0), ("replay + kl", 1.0), ("plain", 0.7), ("plain", 0.5)]


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


# --- the report ---


def measure_all(out: Path, tasks: list[str]) -> None:
    """Measure every finished run on its test rows and on general text; the base once a task. Kept in OUT/measured."""
    import torch

    from lora_cli import adapter, scoring, tuned
    from lora_cli import lora as layers
    from lora_cli.evaluate import measure
    from lora_cli.generate import GREEDY
    from lora_cli.held_out import general_text, held_out_rows
    from lora_cli.questions import answer, expected_texts, questions_of

    (out / "measured").mkdir(exist_ok=True)
    for task in tasks:
        due = [
            (tuned.find(run), kept, gain)
            for seed, (method, gain) in itertools.product(SEEDS, POINTS)
            if ((run := place(out, task, method, seed)) / "adapter").exists()
            and not (kept := measured_at(out, task, method, seed, gain)).exists()
        ]
        if not due:
            continue
        first = due[0][0]
        loaded = tuned.load(first, torch.device("cpu"))
        rows = held_out_rows(first, str(out / f"{task}-test.jsonl"))[0]
        rows = rows.where(np.arange(len(rows)) % ONE_IN == 0)
        general = general_text(first, None)
        (base_general,) = measure(loaded, general, 1024, (0.0,))
        for result, kept, gain in due:
            adapter.load_weights(loaded.module, result.adapter)
            tokenizer = result.header.tokenizer
            base, tuned_on_task = measure(loaded, rows, 1024, (0.0, gain))
            (tuned_general,) = measure(loaded, general, 1024, (gain,))
            asked = questions_of(rows, len(rows))
            with layers.gain(loaded.module, gain):
                said = answer(loaded, tokenizer, asked, result.header.max_positions, GREEDY, None)
            hits = scoring.score("exact-match", expected_texts(loaded, tokenizer, asked), said)[0].sums
            np.savez(
                kept,
                loss=tuned_on_task.per_target("loss"),
                kl=tuned_on_task.per_target("kl"),
                base_loss=base.per_target("loss"),
                general=tuned_general.per_target("loss"),
                base_general=base_general.per_target("loss"),
                hits=hits,
            )
            print(f"measured {kept.name}", flush=True)


def measured_at(out: Path, task: str, method: str, seed: int, gain: float) -> Path:
    return out / "measured" / f"{place(out, task, method, seed).name}-{gain:g}.npz"


def report(out: Path) -> None:
    """Print, for each task, a row a method: means over seeds, their intervals over rows, and the spread of seeds."""
    points: list[tuple[str, float, float]] = []  # method, KL to the base, rise on general text
    for task in TASKS:
        print(f"\n{task}: {STEPS} steps of {BATCH}, {' '.join(TASKS[task])}\n")
        print("| | seeds | test loss | exact match | rise on general text | spread over seeds | KL to the base |")
        print("|---|---|---|---|---|---|---|")
        for method, gain in POINTS:
            files = [measured_at(out, task, method, seed, gain) for seed in SEEDS]
            found = [np.load(file) for file in files if file.exists()]
            if not found:
                continue
            mean = {name: np.mean([each[name] for each in found], axis=0) for name in found[0].files}
            rise = difference(mean["base_general"], mean["general"])
            each_rise = [difference(each["base_general"], each["general"]).value or 0.0 for each in found]
            kls = [estimate(each["kl"]).value or 0.0 for each in found]
            points += [(method, kl, up) for kl, up in zip(kls, each_rise, strict=True)]
            cells = [
                method if gain == 1 else f"{method}, gain {gain:g}",
                str(len(found)),
                in_words(estimate(mean["loss"]), ".3f"),
                in_words(estimate(mean["hits"]), ".1%"),
                in_words(rise, "+.3f"),
                f"{min(each_rise):+.3f} to {max(each_rise):+.3f}",
                in_words(estimate(mean["kl"]), ".2f"),
            ]
            print(f"| {' | '.join(cells)} |")
        plain = [
            np.load(measured_at(out, task, "plain", s, 1))
            for s in SEEDS
            if measured_at(out, task, "plain", s, 1).exists()
        ]
        print(f"\nexact match less the plain run's, over the same rows and seeds ({task}):")
        for method, gain in POINTS[1:]:
            files = [measured_at(out, task, method, seed, gain) for seed in SEEDS]
            if all(file.exists() for file in files[: len(plain)]) and plain:
                both = [
                    np.mean([each["hits"] for each in some], axis=0)
                    for some in (plain, [np.load(f) for f in files[: len(plain)]])
                ]
                print(f"  {method}, gain {gain:g}: {in_words(difference(*both), '+.1%')}")
    for name, some in (("all", points), ("those without replay", [p for p in points if "replay" not in p[0]])):
        kls, rises = [kl for _, kl, _ in some], [rise for *_, rise in some]
        print(f"\nSpearman of KL and rise over {len(some)} runs and gains ({name}): {spearman(kls, rises):.2f}")


def budget(out: Path, task: str = "banking77") -> None:
    """Hold a run to half of the plain run's forgetting, in training and afterwards; PEFT has to agree on the result."""
    import peft
    import torch
    import transformers

    from lora_cli import lora as layers
    from lora_cli import tuned

    plain = place(out, task, "plain", 0)
    rise = json.loads((plain / "run.json").read_text(encoding="utf-8"))["best_forgetting"]
    print(f"{task}: the plain run forgot {rise:+.4f}; the budget is {rise / 2:.4f}", flush=True)
    print(
        lora(
            "train", str(out / f"{task}.yaml"), *TASKS[task], f"output_dir={out / 'runs' / 'held'}",
            f"eval.forgetting_budget={rise / 2}", "eval.per_epoch=48", "save.per_epoch=48",
            "train.early_stopping.patience=3",
        ),
        flush=True,
    )  # fmt: skip
    scaled = out / "scaled"
    if not scaled.exists():
        print(lora("scale", str(plain), "--budget", str(rise / 2), "--output", str(scaled)), flush=True)
    gain = json.loads((scaled / "adapter_config.json").read_text(encoding="utf-8"))["lora_alpha"] / 32
    result = tuned.find(plain)
    ours = tuned.load(result, torch.device("cpu"), "float32")
    ours.module.set_attn_implementation(ours.own_attention)
    base = transformers.AutoModelForCausalLM.from_pretrained(result.header.folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, scaled)
    text = (out / "general.txt").read_text(encoding="utf-8")[:2000]
    ids = torch.tensor(result.header.tokenizer([text])["input_ids"])
    with torch.no_grad(), layers.gain(ours.module, gain):
        wanted, got = ours.module(input_ids=ids).logits, theirs(input_ids=ids).logits
    print(
        f"PEFT with the scaled adapter, ours at gain {gain:g}: "
        f"largest logit difference {(wanted - got).abs().max():.2g} of {wanted.abs().max():.1f}"
    )


def in_words(found: Estimate, spec: str) -> str:
    return f"{format(found.value, spec)} ({format(found.low, spec)} to {format(found.high, spec)})"


def spearman(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's rank correlation."""
    one, other = (np.argsort(np.argsort(values)).astype(float) for values in (first, second))
    return float(np.corrcoef(one, other)[0, 1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "measure", "report", "budget"))
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", action="append", choices=list(TASKS))
    asked = parser.parse_args()
    tasks = asked.task or list(TASKS)
    if asked.what == "train":
        write_data(asked.data, asked.out)
        train(asked.model, asked.out, tasks)
    elif asked.what == "budget":
        budget(asked.out)
    elif asked.what == "measure":
        measure_all(asked.out, tasks)
    else:
        report(asked.out)
