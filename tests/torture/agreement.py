"""One set of numbers for every way to run a config: any processes, the base whole or divided, steps divided anyhow.

python tests/torture/numbers.py    writes the set anew, from one process (only where numbers are to change)
"""

import itertools
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import conversation, save_base, write_config, write_rows
from processes import lora, run_ranks

from lora_cli import config_file, metrics
from lora_cli.run_dir import RunDir

GOLDEN = Path(__file__).with_name("losses.json")
CLOSE = 1e-5  # relative, of losses and gradient norms
SETTINGS = {
    "train.max_steps": 16,
    "train.early_stopping": {"patience": None},
    "eval.per_epoch": 2,
    "save.per_epoch": 4,
}
_DROPOUT = (0.0, 0.1)
_KEYS = ("event", "step", "targets", "tokens", "loss", "grad_norm")


@dataclass(frozen=True)
class Way:
    """One way to run the config. Only `dropout` may make a difference."""

    processes: int = 1
    dropout: float = 0.1
    shard: bool = False
    tokens: int = 64
    recompute: bool = False

    def settings(self) -> dict[str, Any]:
        return SETTINGS | {
            "lora.dropout": self.dropout,
            "train.shard": self.shard,
            "train.micro_batch_tokens": self.tokens,
            "train.activation_checkpointing": self.recompute,
        }


def ways() -> list[Way]:
    """All of them."""
    return [
        Way(processes, dropout, shard, tokens, recompute)
        for processes, shard in ((1, False), (2, False), (2, True), (4, False), (4, True))
        for dropout, tokens, recompute in itertools.product(_DROPOUT, (1, 64, 4096), (False, True))
    ]


def measure(way: Way, folder: Path, model: str) -> list[list[Any]]:
    """Run the config in a way; return what was measured. Raises RuntimeError when the run fails."""
    rows = write_rows(folder / "rows.jsonl", [conversation(number) for number in range(40)])
    config = write_config(folder, model, rows, way.settings())
    codes, said = run_ranks(way.processes, lambda rank: lora("train", config), folder)
    if any(codes):
        raise RuntimeError(f"{codes}: {' '.join(said)[-300:]}")
    return measured(RunDir(Path(config_file.load(config).output_dir)))


def measured(run: RunDir) -> list[list[Any]]:
    """Return of every record its step, how many tokens it saw, and its numbers."""
    return [[record.get(key, 0) for key in _KEYS] for record in metrics.read(run)]


def golden(dropout: float) -> list[list[Any]]:
    """Return the one set."""
    found: list[list[Any]] = json.loads(GOLDEN.read_text(encoding="utf-8"))[str(dropout)]
    return found


def difference(records: list[list[Any]], others: list[list[Any]]) -> float:
    """Return the largest relative difference of two sets; infinite where they are not of the same steps and tokens."""
    if [record[:4] for record in records] != [record[:4] for record in others]:
        return math.inf
    pairs = [pair for one, other in zip(records, others, strict=True) for pair in zip(one[4:], other[4:], strict=True)]
    return max(abs(one - other) / max(abs(other), 1e-9) for one, other in pairs)


def run(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Try ways (0: all) and hold each against the one set. Nothing is left to chance, so the seed has no use."""
    del seed
    model = str(save_base("llama", folder / "base"))
    failures, largest = list[str](), 0.0
    tried = ways()[: count or None]
    for number, way in enumerate(tried):
        place = folder / str(number)
        place.mkdir()
        try:
            far = difference(measure(way, place, model), golden(way.dropout))
        except RuntimeError as error:
            failures.append(f"{way}: {error}")
            continue
        largest = max(largest, far)
        if far > CLOSE:
            failures.append(f"{way}: {far:.2g}")
    return {"tried": len(tried), "largest_difference": largest, "failures": failures}


if __name__ == "__main__":
    found: dict[str, Any] = {}
    for share in _DROPOUT:
        with tempfile.TemporaryDirectory() as name:
            found[str(share)] = measure(Way(dropout=share), Path(name), str(save_base("llama", Path(name) / "base")))
    lines = (f'"{share}": [\n' + ",\n".join(map(json.dumps, records)) + "\n]" for share, records in found.items())
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
