"""`lora tune` beside random search and a grid that may train on as many tokens, from several seeds.

    python scripts/bench_tune.py OUT CONFIG [KEY=VALUE ...] [--seeds 5] [--alone]

For each seed `lora tune` searches as the config says; its trained tokens are counted. Random search draws from the same
space, a grid goes through it in even steps, in an order of chance. Neither gives a trial up; each tries the config
itself first, as `lora tune` does, and stops before the trial that would take it over those tokens. Every trial is a
whole run (tune.budget=1), so that the best trial's validation loss is what a user ends with. Overhead is the share of a
trial's time that is neither step nor validation. With --alone only `lora tune` searches.
"""

import argparse
import itertools
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import optuna  # noqa: E402

from lora_cli import config_file, space, study, tune  # noqa: E402
from lora_cli.config import Range, RunConfig  # noqa: E402
from lora_cli.data_reader import run_to_end  # noqa: E402
from lora_cli.interrupt import StopRequest  # noqa: E402
from lora_cli.records import TrialEnded  # noqa: E402
from lora_cli.search_reports import TuneReport  # noqa: E402


class Grid(optuna.samplers.BaseSampler):
    """The points of a grid, in an order that follows from the seed."""

    def __init__(self, values: dict[str, list[Any]], seed: int) -> None:
        points = list(itertools.product(*values.values()))
        random.Random(seed).shuffle(points)
        self.points = [dict(zip(values, point, strict=True)) for point in points]

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return {}

    def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
        return {}

    def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
        return self.points[(trial.number - 1) % len(self.points)][param_name]


def grid_of(searched: space.Space, points: int) -> dict[str, list[Any]]:
    """Return the values of a grid: all of a list, so many of a range."""
    values: dict[str, list[Any]] = {}
    for key, wanted in searched.items():
        if isinstance(wanted, Range):
            steps = [step / (points - 1) for step in range(points)]
            values[key] = [wanted.low * (wanted.high / wanted.low) ** step for step in steps]
        else:
            values[key] = [repr(value) for value in wanted]
    return values


def best_within(trials: Sequence[TrialEnded], tokens: int) -> tuple[TrialEnded, int]:
    """Return the best of the trials that fit into so many trained tokens, and how many they are."""
    fitting = [
        one
        for one, total in zip(trials, itertools.accumulate(one.tokens for one in trials), strict=True)
        if total <= tokens
    ]
    finished = [one for one in fitting if one.state == "finished" and one.loss is not None]
    return min(finished, key=lambda one: one.loss or 0.0), len(fitting)


def searched(config: RunConfig, name: str, sampling: study.Sampling | None, prune: bool, trials: int) -> TuneReport:
    """Search in a folder of its own."""
    own = config.tune.model_copy(update={"prune": prune, "trials": trials})
    config = config.model_copy(update={"tune": own, "output_dir": f"{config.output_dir}-{name}"})
    return run_to_end(tune.tune(config, StopRequest(), sampling))


def main() -> None:
    """Search and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--alone", action="store_true")
    arguments = parser.parse_args()
    losses: dict[str, list[float]] = {"tune": [], "random": [], "grid": []}
    overhead: dict[str, list[float]] = {}
    for seed in range(arguments.seeds):
        settings = [*arguments.overrides, "tune.budget=1", f"seed={seed}", f"output_dir={arguments.out}/seed-{seed}"]
        config = config_file.load(arguments.config, settings)
        assert config.tune.space is not None, "the config says what is searched"
        values = grid_of(config.tune.space, 4)
        size = len(list(itertools.product(*values.values())))
        report = searched(config, "tune", None, True, config.tune.trials)
        tokens = sum(one.tokens for one in report.trials)
        for one in report.trials:
            overhead.setdefault(one.state, []).append(1 - one.training / one.seconds)
        spent = sum(one.seconds for one in report.trials), sum(one.training for one in report.trials)
        enough = tokens // min(one.tokens for one in report.trials if one.state == "finished") + 1
        kinds: dict[str, tuple[study.Sampling, int]] = {
            "random": (lambda number: optuna.samplers.RandomSampler(number), enough),
            "grid": (lambda number: Grid(values, seed), min(size + 1, enough)),  # noqa: B023
        }
        found = {"tune": (report, tokens)}
        for name, (sampling, trials) in kinds.items() if not arguments.alone else ():
            found[name] = (searched(config, name, sampling, False, trials), tokens)
        for name, (result, most) in found.items():
            best, tried = best_within(result.trials, most)
            losses[name].append(best.loss or 0.0)
            print(
                f"seed {seed} {name:6} {tried:2} trials in {min(most, sum(o.tokens for o in result.trials)):,} tokens: "
                f"best {best.loss:.4f} at {dict(best.values)}",
                flush=True,
            )
        print(f"seed {seed} overhead of the search's trials: {1 - spent[1] / spent[0]:.1%}", flush=True)
    for name, each in losses.items():
        if each:
            print(f"{name:6} median {median(each):.4f}, {min(each):.4f} to {max(each):.4f}")
    for state, shares in overhead.items():
        print(f"overhead of {len(shares)} {state} trials: median {median(shares):.1%}, largest {max(shares):.1%}")


if __name__ == "__main__":
    main()
