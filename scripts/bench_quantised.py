"""The quickstart on a base in float32, in eight and in four bits: losses, bytes, seconds; and what a merge changes.

    python scripts/bench_quantised.py OUT [--steps 100] [--batch 4] [KEY=VALUE ...]

Every run is the same but for model.quantization, on one thread, alone; the first is what the others are held against.
The quantised ones are merged, and `lora merge` says how far a merge onto the stored weights, and onto the dequantised
ones, is from what was trained.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("null", "int8", "nf4")


def lora(*arguments: object) -> str:
    """Run a command and return what it prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "lora_cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def measured(run: Path) -> dict[str, Any]:
    """Return what a run's metrics say: validation losses at its start and end, the median of a step's seconds."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [record["loss"] for record in records if record["event"] == "evaluated"]
    seconds = median(record["seconds"] for record in records if record["event"] == "step")
    return {"first": losses[0], "last": losses[-1], "seconds": seconds}


def base_bytes(model: str, kind: str) -> int:
    """Return what a base's weights take in memory, tied ones once."""
    import torch

    from lora_cli.config import ModelConfig
    from lora_cli.model import load_model, read_header

    config = ModelConfig.model_validate({"path": model, "quantization": None if kind == "null" else kind})
    module = load_model(read_header(config), config, torch.device("cpu")).module
    return sum({t.data_ptr(): t.nbytes for t in (*module.parameters(), *module.buffers())}.values())


def main() -> None:
    """Train, measure, merge and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--model", default="models/SmolLM2-135M-Instruct")
    arguments = parser.parse_args()
    out = arguments.out.absolute()
    settings = [
        f"model.path={arguments.model}",
        f"train.max_steps={arguments.steps}",
        f"train.batch_size={arguments.batch}",
        "train.micro_batch_tokens=512",
        "train.early_stopping.patience=null",
        "eval.general=false",
        "eval.per_epoch=2",
        *arguments.overrides,
    ]
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    plain: dict[str, Any] = {}
    for kind in KINDS:
        run = out / kind
        lora("train", "configs/quickstart.yaml", *settings, f"model.quantization={kind}", f"output_dir={run}")
        found = measured(run) | {"bytes": base_bytes(arguments.model, kind)}
        plain = plain or found
        print(
            f"{kind:5} validation loss {found['first']:.4f} -> {found['last']:.4f} "
            f"({found['last'] / plain['last'] - 1:+.2%}), base {found['bytes'] / 1e6:.1f} MB "
            f"({found['bytes'] / plain['bytes']:.3f}), {found['seconds']:.2f} s a step "
            f"({found['seconds'] / plain['seconds']:.2f})",
            flush=True,
        )
    for kind in KINDS[1:]:
        print(f"\n{kind}:\n{lora('merge', out / kind, '--output', out / f'{kind}-merged')}", flush=True)


if __name__ == "__main__":
    main()
