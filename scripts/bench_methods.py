"""Variants of LoRA, each at the learning rate that it finds, on the same rows and steps: losses, intervals, agreement.

    python scripts/bench_methods.py OUT CONFIG [KEY=VALUE ...] [--methods lora,rslora,dora,lora+,pissa]

Each is trained with `train.learning_rate: auto` and measured on the held-out rows: its loss, and the difference from
plain LoRA's with a 95 % interval, row by row. Its adapter is run by PEFT too: the largest difference of the logits on
the first held-out row, over the largest logit.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lora_cli import config_file, intervals, metrics, run_dir, tuned  # noqa: E402
from lora_cli.evaluate import measure  # noqa: E402
from lora_cli.held_out import held_out_rows  # noqa: E402
from lora_cli.interrupt import StopRequest  # noqa: E402
from lora_cli.memory import tokens_worth_it  # noqa: E402
from lora_cli.records import with_interval  # noqa: E402
from lora_cli.run_dir import RunDir  # noqa: E402
from lora_cli.train import train  # noqa: E402

METHODS = {
    "lora": [],
    "rslora": ["lora.method=rslora"],
    "dora": ["lora.method=dora"],
    "lora+": ["train.loraplus_ratio=16"],
    "pissa": ["lora.init=pissa"],
}


def logits_of(run: RunDir, load: Callable[[Any], Any]) -> torch.Tensor:
    """Return the logits on the first held-out row."""
    result = tuned.find(run.path)
    ids = torch.tensor([held_out_rows(result, None)[0][0].input_ids])
    with torch.no_grad():
        logits: torch.Tensor = load(result)(input_ids=ids, use_cache=False).logits[0]
    return logits


def in_ours(result: tuned.Result) -> Any:
    """Return base + adapter as we run it."""
    module = tuned.load(result, torch.device("cpu"), "float32").module
    module.set_attn_implementation("eager")
    return module


def in_peft(result: tuned.Result) -> Any:
    """Return base + adapter as PEFT runs it."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(result.header.folder, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(base, str(result.adapter.folder)).eval()


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--methods", default=",".join(METHODS))
    arguments = parser.parse_args()
    plain = None
    for name in arguments.methods.split(","):
        settings = [*arguments.overrides, *METHODS[name], "train.learning_rate=auto"]
        config = config_file.load(arguments.config, [*settings, f"output_dir={arguments.out}/{name}"])
        for _ in train(config, StopRequest()):
            pass
        run = run_dir.of(config)
        result = tuned.find(run.path)
        held_out, _, _ = held_out_rows(result, None)
        loaded = tuned.load(result, torch.device("cpu"))
        (measured,) = measure(loaded, held_out, tokens_worth_it(loaded.device))
        losses = measured.per_target("loss")
        plain = losses if plain is None else plain
        ours = logits_of(run, in_ours)
        theirs = logits_of(run, in_peft)
        seconds = sorted(record["seconds"] for record in metrics.read(run) if record["event"] == "step")
        print(
            f"{name:7} rate {json.loads(run.probe.read_text())['chosen']:.2g}  loss "
            f"{with_interval(intervals.estimate(losses), '.4f')}  less that of LoRA "
            f"{with_interval(intervals.difference(plain, losses), '+.4f')}  {seconds[len(seconds) // 2]:.2f} s/step  "
            f"logits in PEFT {float((ours - theirs).abs().max() / ours.abs().max()):.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
