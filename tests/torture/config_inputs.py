"""Configs made wrong, for `config_file.load`."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_cli import config_file, strict_yaml
from lora_cli.config import RunConfig
from torture.mutations import mutated_bytes, mutated_json, mutated_lines, mutated_words

SHORTEST = "model: a/b\ndata:\n  train: t.jsonl\noutput_dir: o\n"
TEXTS = (
    SHORTEST,
    SHORTEST + "lora: {rank: 8, alpha: 16, target_modules: [q_proj, v_proj]}\ntrain: {learning_rate: 3e-4}\n",
    SHORTEST + "lora:\n  rnak: 8\n  method: dora\ntrain:\n  early_stopping:\n    patience: null\nseed: 7\n",
    "model: &m {path: a, dtype: float32}\ndata:\n  train:\n  - {path: a, weight: 2}\n  - path: b\n    format: text\n"
    "output_dir: o\neval: {general: false}\n",
    "model: a\ndata: {train: a, validation: 20, fields: {prompt: q, completion: a}, prompt_template: 'Q: {q}'}\n"
    "output_dir: 'o'\nsave: {keep: 2}\n",
    "base: &base\n  rank: 8\nlora:\n  <<: *base\n  alpha: 16\n" + SHORTEST,
    "model: |\n  a\ndata:\n  train: >-\n    b\n  replay: {path: g.jsonl, ratio: 0.05}\noutput_dir: \"o\"\n",
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    {"model": "a", "data": {"train": "t"}, "output_dir": "o"},
    {
        "model": {"path": "a", "revision": None, "quantization": None},
        "lora": {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj"]},
        "data": {"train": [{"path": "a", "weight": 1.0, "fields": {"text": "t"}}], "validation": 0.2, "test": 3},
        "train": {"epochs": 1, "learning_rate": 1e-4, "early_stopping": {"patience": 2, "min_delta": 0.1}},
        "eval": {"general": None, "forgetting_budget": 0.1},
        "seed": 1,
        "output_dir": "o",
    },
)
_OVERRIDES = ((), (), (), ("lora.rank=8",), ("model.dtype=float32", "train.epochs=2"), ("data=[1]", "data.train=x"))


def prepare(folder: Path) -> tuple[Callable[[random.Random], None], Callable[[], object]]:
    """Return what writes one more config, and what reads it."""
    path, overrides = folder / "config.yaml", [tuple[str, ...]()]
    path.write_text(SHORTEST)

    def make(random: random.Random) -> None:
        overrides[0], raw = made(random)
        path.write_bytes(raw)

    def read() -> None:
        config = config_file.load(path, overrides[0])
        again = RunConfig.model_validate(strict_yaml.parse(config_file.dump(config), "again").values)
        assert again == config, "what is written is not what was read"

    return make, read


def made(random: random.Random) -> tuple[tuple[str, ...], bytes]:
    """Return overrides and a config."""
    overrides = random.choice(_OVERRIDES)
    whole = config_file.dump(
        RunConfig.model_validate({"model": "a/b", "data": {"train": "t.jsonl"}, "output_dir": "o"})
    )
    return overrides, _changed(whole if random.random() < 0.03 else random.choice(TEXTS), random)


def _changed(text: str, random: random.Random) -> bytes:
    if random.random() < 0.3:
        return mutated_json(random.choice(VALUES), random)
    for _ in range(random.choice((1, 1, 2))):
        text = mutated_lines(text, random) if random.random() < 0.5 else mutated_words(text, random)
    raw = text.encode("utf-8", "surrogatepass")
    return mutated_bytes(raw, random) if random.random() < 0.2 else raw
