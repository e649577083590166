"""Measure training steps: ours and those of other programs in turn, on the same rows, shapes and machine.

    scripts/bench smol10                       a shape with random weights and random rows
    scripts/bench --model FOLDER --data FILE   a real model, and the first rows of a file of prompts and completions
    scripts/bench tiny --losses 20             the losses of ours and of transformers' Trainer, step by step
    scripts/bench tiny --profile               where the time of one of our steps goes, one forward at a time
    scripts/bench --peers unshared,compiled    ours against ours with one setting changed

Before anything is timed, our gradients are compared with PEFT's. Then each peer takes two steps at each micro-batch;
at its fastest it takes steps in turn with ours: round after round, the order alternating. What counts are the ratios
within rounds. A contender whose loss is 0, is not finite or does not fall is refused.

The floor is the arithmetic that a step needs over the rate of matrix products on this machine: for each token 4 N of
the N frozen weights in the blocks and 6 r (in + out) of each adapter, causal attention, and the head at targets only.
"""

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from lora_cli import lora
from lora_cli.batches import Mixture, Part, plan_epoch
from lora_cli.config import ModelConfig, RunConfig
from lora_cli.data_config import DataConfig
from lora_cli.data_reader import DataReader, run_to_end
from lora_cli.lora_linear import linear_shape
from lora_cli.memory import estimate_memory
from lora_cli.model import ModelHeader, read_header

ROOT = Path(__file__).resolve().parents[1]
LITGPT_PYTHON = ROOT / ".venv-litgpt" / "bin" / "python"
PEERS = ("hf", "trl", "litgpt")
VARIANTS = ("unshared", "compiled", "recomputed")  # ours with one setting changed
SHAPES: dict[str, tuple[type[Any], dict[str, int]]] = {
    "smol10": (  # SmolLM2-135M with 10 of its 30 layers
        transformers.LlamaConfig,
        {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 10, "num_attention_heads": 9}
        | {"num_key_value_heads": 3, "vocab_size": 49152},
    ),
    "qwen6": (  # Qwen2.5-0.5B with 6 of its 24 layers
        transformers.Qwen2Config,
        {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 6, "num_attention_heads": 14}
        | {"num_key_value_heads": 2, "vocab_size": 151936},
    ),
    "tiny": (
        transformers.LlamaConfig,
        {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 4}
        | {"num_key_value_heads": 4, "vocab_size": 4096},
    ),
}
BATCH_SIZE, RANK, ALPHA, SEED = 16, 16, 32, 0
Row = dict[str, list[int]]  # input_ids, labels


# --- the model and the rows ---


def make_shape(name: str) -> Path:
    """Return the folder of a shape with random weights, made once."""
    folder = ROOT / ".bench" / name
    if not folder.exists():
        kind, shape = SHAPES[name]
        torch.manual_seed(SEED)
        config = kind(**shape, tie_word_embeddings=True, dtype="float32")
        unfinished = folder.with_name(f"{name}.tmp")
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(unfinished)
        unfinished.rename(folder)
    return folder


def random_rows(count: int, vocabulary: int) -> list[Row]:
    """Return prompts of 20-400 random tokens with answers of 10-200; ids with p ~ 1/id, so they can be learned."""
    choose = random.Random(SEED)
    rows = []
    for _ in range(count):
        prompt, answer = choose.randint(20, 400), choose.randint(10, 200)
        ids = [int(vocabulary ** choose.random()) for _ in range(prompt + answer)]
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def real_rows(count: int, model: Path, data: Path, folder: Path) -> list[Row]:
    """Return the first examples that lora's own reader makes of a file of rows."""
    os.environ["LORA_CACHE"] = str(folder / "cache")
    beginning = folder / "rows.jsonl"
    with data.open(encoding="utf-8") as file:
        beginning.write_text("".join(islice(file, 2 * count)), encoding="utf-8")
    config = DataConfig(train=str(beginning), validation=0, too_long="drop")
    reader = DataReader(config, read_header(ModelConfig(path=str(model))))
    examples, _ = run_to_end(reader.held_out(config.sources[0]))
    if len(examples) < count:
        raise SystemExit(f"{data} gives {len(examples)} examples; {count} are needed.")
    return [{"input_ids": list(one.input_ids), "labels": list(one.labels)} for one in examples[:count]]


def prompt_length(row: Row) -> int:
    """Return how many tokens stand before the first trained one."""
    return next(place for place, label in enumerate(row["labels"]) if label != -100)


def write_job(given: argparse.Namespace, folder: Path, steps: int) -> dict[str, Any]:
    """Write what all contenders read; `steps` are those that lora's own plan makes, so all see the same rows."""
    model = Path(given.model).resolve() if given.model else make_shape(given.shape)
    count = BATCH_SIZE * steps
    if given.data:
        rows = real_rows(count, model, Path(given.data), folder)
    else:
        rows = random_rows(count, json.loads((model / "config.json").read_text())["vocab_size"])
    prompts = [tuple(row["input_ids"][: prompt_length(row)]) for row in rows]
    numbers = {prompt: number for number, prompt in enumerate(prompts)}
    keys = [numbers[prompt] for prompt in prompts]
    together = keys if given.order == "prompts" else None
    plan = plan_epoch(Mixture((Part(0, count),)), BATCH_SIZE, SEED, epoch=0, keys=together)
    job = {
        "model": str(model),
        "folder": str(folder / "run"),
        "start": str(folder / "start.safetensors"),
        "rank": RANK,
        "alpha": ALPHA,
        "dropout": given.dropout,
        "learning_rate": given.learning_rate,
        "seed": SEED,
        "order": given.order,
        "rows": rows,
        "keys": keys,
        "steps": [list(step) for step in plan],
    }
    (folder / "job.json").write_text(json.dumps(job))
    return job


# --- the floor ---


def needed_flops(job: dict[str, Any]) -> list[float]:
    """Return the floating-point operations that each step needs."""
    config = transformers.AutoConfig.from_pretrained(job["model"])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shapes = [linear_shape(model.get_submodule(path)) for path in lora.find_targets(model, "all-linear")]
    token = sum(4 * rows * columns + 6 * job["rank"] * (rows + columns) for rows, columns in shapes)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or model.config.hidden_size // config.num_attention_heads
    )
    head = 4 * math.prod(model.get_output_embeddings().weight.shape)
    needed = []
    for step in job["steps"]:
        rows = [job["rows"][index] for index in step]
        lengths = [len(row["input_ids"]) for row in rows]
        targets = sum(label != -100 for row in rows for label in row["labels"][1:])
        forward = sum(2 * length**2 / 2 * width * 2 for length in lengths) * config.num_hidden_layers
        needed.append(token * sum(lengths) + 3 * forward + head * targets)
    return needed


def peak_rate() -> float:
    """Return the best rate of matrix products seen in a second or so, in FLOP/s: float32, on a GPU bfloat16."""
    on_gpu = torch.cuda.is_available()
    size = 8192 if on_gpu else 2048
    left = torch.rand(size, size, device="cuda", dtype=torch.bfloat16) if on_gpu else torch.rand(size, size)
    best = math.inf
    for _ in range(20):
        began = time.perf_counter()
        left @ left
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


# --- contenders ---


@dataclass(frozen=True)
class Taken:
    """One training step of a contender; memory in bytes, `peak_device` is 0 without a GPU."""

    seconds: float
    tokens: int
    loss: float
    peak_rss: int
    peak_device: int

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


class Contender:
    """A process that takes training steps, one when it is asked for one."""

    def __init__(self, name: str, setting: str, folder: Path) -> None:
        """Start it, and wait until it is ready."""
        self.name, self.setting = name, setting
        self.taken: list[Taken] = []
        self.log = folder / f"{name}-{setting}.log"
        python = str(LITGPT_PYTHON) if name == "litgpt" else sys.executable
        command = [python, str(ROOT / "scripts" / "bench_contenders.py"), name, str(folder / "job.json"), setting]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1
            )
        self.first = self.answer()

    def answer(self) -> dict[str, Any]:
        """Return what it says next."""
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise SystemExit(f"{self.name} ({self.setting}) ended:\n{self.log.read_text()[-3000:]}")

    def step(self) -> Taken:
        """Let it take a step."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        taken = Taken(**self.answer())
        if not math.isfinite(taken.loss) or taken.loss == 0:
            raise SystemExit(f"{self.name} ({self.setting}) is refused: its loss is {taken.loss}.")
        self.taken.append(taken)
        return taken

    def end(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def require_learning(contenders: list[Contender]) -> None:
    """Refuse contenders that do not do the same work: other tokens, another loss of the base, a loss that stays."""
    ours = contenders[0].taken
    for one in contenders:
        first, last = one.taken[0].loss, one.taken[-1].loss
        if [taken.tokens for taken in one.taken] != [taken.tokens for taken in ours]:
            raise SystemExit(f"{one.name} is refused: it saw other tokens than ours.")
        if abs(first / ours[0].loss - 1) > (0.02 if one.taken[0].peak_device else 1e-4):  # adapters begin at zero
            raise SystemExit(f"{one.name} is refused: its first loss is {first:.5f}, ours is {ours[0].loss:.5f}.")
        if last >= first:
            raise SystemExit(f"{one.name} is refused: its loss did not fall ({first:.4f}, then {last:.4f}).")


# --- what is measured ---


def check_gradients(tokens: str, folder: Path) -> dict[str, Any]:
    """Compare our gradients with PEFT's, and end where they differ."""
    found = Contender("check", tokens, folder).first
    print(
        f"gradients of {found['gradients']} matrices against PEFT's: largest relative error {found['error']:.1e} "
        f"({found['worst']}), of the loss {found['loss_error']:.1e}",
        flush=True,
    )
    if not max(found["error"], found["loss_error"]) < 1e-5:
        raise SystemExit("They should differ by less than 1e-5.")
    return found


def fastest_setting(name: str, folder: Path) -> tuple[str, dict[str, float]]:
    """Return a peer's fastest micro-batch, and the tokens a second at each: of the faster of its first two steps."""
    speeds = {}
    for setting in ("1", "2", "4"):
        contender = Contender(name, setting, folder)
        speeds[setting] = max(contender.step().speed, contender.step().speed)
        contender.end()
    print(f"{name}: " + ", ".join(f"micro-batch {s}: {speed:,.0f} tokens/s" for s, speed in speeds.items()), flush=True)
    return max(speeds, key=lambda setting: speeds[setting]), speeds


def measure(given: argparse.Namespace, job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Let all contenders take steps in turn; print and return what was measured."""
    fixed = dict(one.split("=") for one in given.micro_batch.split(",") if one)
    fixed |= dict.fromkeys(VARIANTS, given.tokens)
    sweeps = {name: fastest_setting(name, folder) for name in given.peers if name not in fixed}
    chosen = fixed | {name: setting for name, (setting, _) in sweeps.items()}
    rate = peak_rate()
    contenders = [Contender("ours", given.tokens, folder)]
    contenders += [Contender(name, chosen[name], folder) for name in given.peers]
    for one in contenders:
        one.step()
    for number in range(given.pairs):
        for one in contenders if number % 2 == 0 else reversed(contenders):
            time.sleep(1)  # threads of the one before go on spinning for a while
            one.step()
        speeds = ", ".join(f"{one.name} {one.taken[-1].speed:,.0f}" for one in contenders)
        print(f"round {number + 1}: {speeds} tokens/s", flush=True)
    rate = max(rate, peak_rate())
    for one in contenders:
        one.end()
    require_learning(contenders)
    return {"sweeps": {name: speeds for name, (_, speeds) in sweeps.items()}} | summarise(contenders, rate, job)


def summarise(contenders: list[Contender], rate: float, job: dict[str, Any]) -> dict[str, Any]:
    """Print and return medians over the rounds; the first step of each contender is left out."""
    ours, needed = contenders[0], needed_flops(job)[1:]
    results: dict[str, dict[str, Any]] = {}
    for one in contenders:
        rounds = one.taken[1:]
        ratios = [mine.speed / theirs.speed for mine, theirs in zip(ours.taken[1:], rounds, strict=True)]
        results[one.name] = {
            "setting": one.setting,
            "speed": median(taken.speed for taken in rounds),
            "share_of_floor": median(flops / rate / t.seconds for flops, t in zip(needed, rounds, strict=True)),
            "loaded": one.first["peak_rss"],  # before the first step
            "peak": max(taken.peak_device or taken.peak_rss for taken in rounds),
            "ratios": ratios,
            "ratio": median(ratios),
            "steps": [asdict(taken) for taken in one.taken],
        }
    print(f"\n{'':24}tokens/s  of floor  peak memory  ours is faster by (lowest, highest)")
    for name, result in results.items():
        unit = "micro-batch" if name in PEERS else "tokens"
        label = f"{name} ({unit} {result['setting']})"
        line = f"{label:24}{result['speed']:8,.0f}  {result['share_of_floor']:8.0%}"
        line += f"  {result['peak'] / 2**30:7.2f} GiB"
        low, high = min(result["ratios"]), max(result["ratios"])
        print(line if name == "ours" else f"{line}  {result['ratio']:.2f} ({low:.2f}, {high:.2f})")
    best = max((name for name in results if name != "ours"), key=lambda name: results[name]["speed"])
    memory = results["ours"]["peak"] / results[best]["peak"]
    print(f"\nagainst the best peer, {best}: {results[best]['ratio']:.2f} times as fast, {memory:.2f} times its memory")
    print(f"matrix products: {rate / 1e9:,.0f} GFLOP/s")
    estimated, measured = estimated_memory(job, ours.setting), results["ours"]["peak"]
    print(f"memory as lora check estimates it: {estimated / 2**30:.2f} GiB ({estimated / measured - 1:+.0%})")
    return {
        "contenders": results,
        "best": best,
        "memory_ratio": memory,
        "estimated": estimated,
        "matrix_product_rate": rate,
    }


def estimated_memory(job: dict[str, Any], tokens: str) -> int:
    """Return the bytes that lora expects to take for ours."""
    settings = {
        "model": job["model"],
        "lora": {"rank": job["rank"], "alpha": job["alpha"]},
        "data": {"train": "rows"},
        "train": {"micro_batch_tokens": tokens if tokens == "auto" else int(tokens)},
        "output_dir": job["folder"],
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    longest = max(len(row["input_ids"]) for row in job["rows"])
    config = RunConfig.model_validate(settings)
    header = ModelHeader(Path(job["model"]), transformers.AutoConfig.from_pretrained(job["model"]), None, None)  # type: ignore[arg-type]
    return estimate_memory(header, config, longest, device).total


def compare_losses(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Print the losses of ours and of transformers' Trainer from the same start, step by step."""
    ours, theirs = Contender("ours", given.tokens, folder), Contender("hf", "1", folder)
    print("step      ours        hf  difference")
    for number in range(given.losses):
        mine, other = ours.step().loss, theirs.step().loss
        print(f"{number + 1:4}  {mine:.6f}  {other:.6f}  {mine - other:+.1e}", flush=True)
    pairs = [(mine.loss, other.loss) for mine, other in zip(ours.taken, theirs.taken, strict=True)]
    largest = max(abs(mine - other) for mine, other in pairs)
    print(f"largest difference: {largest:.1e}")
    for one in (ours, theirs):
        one.end()
    return {"losses": pairs, "largest_difference": largest}


def show_profile(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Print where the time of one of our steps goes."""
    found = Contender("profile", given.tokens, folder).first
    groups = dict(sorted(found["seconds"].items(), key=lambda item: -item[1]))
    groups["outside operators"] = max(0.0, found["step"] - sum(groups.values()))
    for name, seconds in groups.items():
        print(f"{name:24}{seconds:8.3f} s {seconds / found['step']:6.1%}")
    print(f"{'one step':24}{found['step']:8.3f} s, the profiler's own time included")
    return found


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=SHAPES, default="smol10")
    parser.add_argument("--model", help="the folder of a model, instead of a shape")
    parser.add_argument("--data", help="a .jsonl file of prompts and completions, instead of random rows")
    parser.add_argument("--peers", default=",".join(PEERS), help="which peers, of " + ", ".join((*PEERS, *VARIANTS)))
    parser.add_argument("--micro-batch", default="", metavar="hf=1,trl=1", help="of these peers; the others are swept")
    parser.add_argument("--tokens", default="auto", help="train.micro_batch_tokens of ours")
    parser.add_argument("--order", choices=["rows", "prompts"], default="rows", help="train.order")
    parser.add_argument("--pairs", type=int, default=5, help="rounds")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--no-check", action="store_true", help="compare no gradients first")
    parser.add_argument("--losses", type=int, metavar="N", help="compare the losses of N steps, time nothing")
    parser.add_argument(
        "--profile", action="store_true", help="profile one of our steps, one forward at a time, time nothing"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    given = parser.parse_args()
    given.peers = [name for name in given.peers.split(",") if name]
    if unknown := set(given.peers) - {*PEERS, *VARIANTS}:
        parser.error(f"no peer is called {', '.join(sorted(unknown))}")
    if given.data and not given.model:
        parser.error("--data needs the tokenizer of a --model")
    return given


def main() -> None:
    given = parse()
    folder = Path(tempfile.mkdtemp(prefix="lora-bench-"))
    try:
        job = write_job(given, folder, steps=given.losses or max(2, given.pairs + 1))
        numbers: dict[str, Any] = {"arguments": {key: str(value) for key, value in vars(given).items()}}
        if not given.no_check:
            numbers["check"] = check_gradients(given.tokens, folder)
        if given.profile:
            numbers |= show_profile(given, folder)
        elif given.losses:
            numbers |= compare_losses(given, folder)
        else:
            numbers |= measure(given, job, folder)
        if given.json:
            given.json.write_text(json.dumps(numbers, indent=1) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
