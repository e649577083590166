"""Measure how the cost of a token grows: with sequence length, rank, tokens a forward, and layers.

    python scripts/bench_growth.py [--json FILE] [--plot docs/growth.svg]

On the shape of SmolLM2-135M with 10 layers, one thing is changed at a time; the unchanged setting is measured around
each point, so that what is compared was measured together. What is predicted is the arithmetic behind the floor of
scripts/bench.
"""

import argparse
import json
import math
import os
import random
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from lora_cli import tuning
from lora_cli.config import RunConfig
from lora_cli.distributed import ALONE
from lora_cli.examples import Example
from lora_cli.heap import keep_freed_memory
from lora_cli.lanes import Lanes, lanes_of
from lora_cli.model import ModelHeader, load_model
from lora_cli.step import add_gradients

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
VOCABULARY = 49152
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Point:
    """A setting: tokens of a sequence, of the adapter's rank, of one forward, and decoder layers."""

    length: int = 256
    rank: int = 16
    tokens: int = 1024
    layers: int = 10

    def flops(self) -> float:
        """Return the floating-point operations a token needs; a third of all tokens is trained."""
        D, ff, kv = 576, 1536, 192  # noqa: N806 - as in the papers
        shapes = [(D, D), (D, kv), (D, kv), (D, D), (D, ff), (D, ff), (ff, D)]
        linear = sum(4 * a * b + 6 * self.rank * (a + b) for a, b in shapes)
        attention = 3 * 2 * self.length * D  # causal: half of all pairs, two products, three times with the backward
        return self.layers * (linear + attention) + 4 * VOCABULARY * D / 3


BASE = Point()
AXES: dict[str, list[int]] = {
    "length": [128, 256, 512, 1024, 2048, 4096],
    "rank": [4, 8, 16, 32, 64, 128, 256],
    "tokens": [512, 1024, 2048, 4096, 8192, 16384],
    "layers": [2, 5, 10, 20, 30],
}
NAMES = {
    "length": "tokens a sequence",
    "rank": "rank",
    "tokens": "tokens a forward",
    "layers": "layers",
}


class Models:
    """Models by their number of layers and rank, kept while they are needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[tuple[int, int], tuple[RunConfig, Lanes]] = {}

    def get(self, layers: int, rank: int) -> tuple[RunConfig, Lanes]:
        """Return a config, and the lanes in which a run of it trains its model."""
        if (layers, rank) not in self.made:
            self.made = {key: model for key, model in self.made.items() if key == (BASE.layers, BASE.rank)}
            path = self.folder / str(layers)
            shape = transformers.LlamaConfig(
                **SHAPE, num_hidden_layers=layers, vocab_size=VOCABULARY, tie_word_embeddings=True, dtype="float32"
            )
            if not path.exists():
                transformers.AutoModelForCausalLM.from_config(shape).save_pretrained(path)
            header = ModelHeader(path, transformers.AutoConfig.from_pretrained(path), None, None)  # type: ignore[arg-type]
            values = {"model": str(path), "lora": {"rank": rank, "alpha": rank}, "output_dir": str(path)}
            config = RunConfig.model_validate(values | {"data": {"train": "rows"}})
            model = load_model(header, config.model, DEVICE)
            tuning.apply(model.module, config.lora, config.seed)
            self.made[layers, rank] = config, lanes_of(model, config)
        return self.made[layers, rank]


def seconds_a_token(models: Models, point: Point) -> float:
    """Return the time a token takes in the forward and backward passes of a step: the better of two."""
    config, lanes = models.get(point.layers, point.rank)
    choose = random.Random(0)
    count = max(len(lanes) * max(point.tokens, point.length), 2048) // point.length
    ids = [tuple(choose.randrange(VOCABULARY) for _ in range(point.length)) for _ in range(count)]
    trained = point.length // 3
    rows = [Example(one, (-100,) * (point.length - trained) + one[-trained:], "") for one in ids]
    best = math.inf
    for _ in range(2):
        began = time.perf_counter()
        add_gradients(lanes, config, 0, rows, point.tokens, ALONE)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best / (count * point.length)


def measure() -> list[dict[str, Any]]:
    """Measure every point beside the unchanged setting, and print a table."""
    found = []
    with tempfile.TemporaryDirectory(prefix="lora-bench-") as folder:
        models = Models(Path(folder))
        seconds_a_token(models, BASE)
        for axis, values in AXES.items():
            print(f"\n| {NAMES[axis]} | tokens/s | cost of a token, measured | predicted |\n|---|---|---|---|")
            for value in values:
                point = replace(BASE, **{axis: value})
                before = seconds_a_token(models, BASE)
                took = seconds_a_token(models, point)
                before = (before + seconds_a_token(models, BASE)) / 2
                row = {"axis": axis, "value": value, "speed": 1 / took, "base_speed": 1 / before}
                row |= {"measured": took / before, "predicted": point.flops() / BASE.flops()}
                found.append(row)
                print(f"| {value} | {1 / took:,.0f} | {row['measured']:.2f} | {row['predicted']:.2f} |", flush=True)
    return found


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Draw measured and predicted cost over each axis."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(AXES), figsize=(13, 3.2), constrained_layout=True)
    for (axis, values), panel in zip(AXES.items(), panels, strict=True):
        rows = [row for row in found if row["axis"] == axis]
        panel.plot(values, [row["predicted"] for row in rows], "--", color="0.5", label="predicted")
        panel.plot(values, [row["measured"] for row in rows], "o-", color="C0", label="measured")
        panel.set(xscale="log", xlabel=NAMES[axis], ylim=(0, None))
        panel.set_xticks(values, [str(value) for value in values], fontsize=7)
        panel.minorticks_off()
    panels[0].set_ylabel("cost of a token\n(1: the unchanged setting)")
    panels[0].legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write all numbers there")
    parser.add_argument("--plot", type=Path, help="draw them there")
    given = parser.parse_args()
    torch.set_flush_denormal(True)
    keep_freed_memory()
    found = measure()
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    if given.plot:
        draw(found, given.plot)


if __name__ == "__main__":
    main()
