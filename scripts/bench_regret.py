"""What `train.learning_rate: auto` loses against the best of eight rates, and what its trials cost.

    python scripts/bench_regret.py OUT CONFIG [KEY=VALUE ...] [--seeds 1]

Eight runs of the config, whose rates double from an eighth of the one that the model's width gives, and one with the
rate that `auto` finds; all on one base in memory. Regret is the loss of that run over the best of the eight, as a
share of it. Cost is the processor time of the trials over that of the run.
"""

import argparse
import sys
import time
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lora_cli import config_file, environment, probe, run_dir  # noqa: E402
from lora_cli.config import RunConfig  # noqa: E402
from lora_cli.data_reader import run_to_end  # noqa: E402
from lora_cli.distributed import current_world  # noqa: E402
from lora_cli.errors import TrainingStopped  # noqa: E402
from lora_cli.interrupt import StopRequest  # noqa: E402
from lora_cli.optim import start_rate  # noqa: E402
from lora_cli.prepare import prepare  # noqa: E402
from lora_cli.session import Session, open_session, with_rate  # noqa: E402
from lora_cli.trial import train_whole  # noqa: E402


def loss_of(session: Session, config: RunConfig) -> float:
    """Return a run's validation loss, infinite where training stopped."""
    try:
        loss = run_to_end(train_whole(session, config, run_dir.of(config))).best_loss
    except TrainingStopped as stopped:
        print(f"  {stopped.problems[0]}", file=sys.stderr)
        loss = None
    return float("inf") if loss is None else loss


def main() -> None:
    """Run, and print one line a rate and one a seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    regrets, costs = [], []
    for seed in range(arguments.seeds):
        folder = arguments.out / f"seed-{seed}"
        settings = [*arguments.overrides, f"seed={seed}", "train.learning_rate=auto", f"output_dir={folder}/auto"]
        config = config_file.load(arguments.config, settings)
        prepared, world = run_to_end(prepare(config)), current_world(config.model.device)
        here = environment.describe(config, run_dir.of(config), prepared, [], world)
        session = open_session(config, prepared, here, StopRequest(), world)
        began = time.process_time()
        chosen = run_to_end(probe.choose_rate(session, config, run_dir.of(config)))
        tried = time.process_time()
        loss = loss_of(session, with_rate(config, chosen).model_copy(update={"output_dir": f"{folder}/chosen"}))
        costs.append((tried - began) / (time.process_time() - tried))
        print(f"seed {seed}: auto takes {chosen:.2g}: {loss:.4f}; trials cost {costs[-1]:.0%} of the run", flush=True)
        start = start_rate(session.prepared.width, config)
        grid = dict[float, float]()
        for power in range(-3, 5):
            rate = start * 2.0**power
            one = with_rate(config, rate).model_copy(update={"output_dir": f"{folder}/{rate:.2g}"})
            grid[rate] = loss_of(session, one)
            print(f"  {rate:.2g}: {grid[rate]:.4f}", flush=True)
        best = min(grid.values())
        regrets.append(loss / best - 1)
        print(f"  regret {regrets[-1]:+.2%}", flush=True)
    print(f"mean regret {mean(regrets):+.2%}, largest {max(regrets):+.2%}; mean cost {mean(costs):.0%}")


if __name__ == "__main__":
    main()
