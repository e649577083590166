"""`lora tune --against-full`: the run of a config, and full fine-tuning on the same rows, held against each other.

Each is trained by a process of its own, so that its memory is its own; both look for their learning rates themselves.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from lora_cli import (
    config_file,
    interrupt,
    intervals,
    json_file,
    metrics,
    run_dir,
    search_dir,
    storage,
)
from lora_cli.config import LoraConfig, RunConfig
from lora_cli.errors import ConfigError, Interrupted, SurroundingsError
from lora_cli.interrupt import StopRequest
from lora_cli.memory_use import PEAK_UNIT
from lora_cli.records import as_json
from lora_cli.search_dir import SearchDir
from lora_cli.search_reports import AgainstFullReport, Side

KIND = "against-full"
_PEAK = "peak-memory.json"


def against_full(config: RunConfig, stop: StopRequest) -> AgainstFullReport:
    """Train both, or what is left of them, and compare them on the rows that are held out. Raises UserError."""
    if config.lora.method == "full":
        raise ConfigError("lora.method: is full already; name the method that is held against it.")
    search_dir.require_untracked(config)
    place = search_dir.of(config, KIND)
    search_dir.require_ready(config, place, "both runs are started here")
    sides = {name: _config_of(name, config, place) for name in ("lora", "full")}
    with storage.explained(place.path):
        storage.make_folder(place.path)
    storage.write_file(place.config, config_file.dump(config))
    for name, ours in sides.items():
        if run_dir.read_finished(run_dir.of(ours)) is None:
            _train(ours, place.path / f"{name}.yaml", stop)
    report = _compare(sides, place)
    storage.write_json(place.report, as_json(report))
    return report


def _config_of(name: str, config: RunConfig, place: SearchDir) -> RunConfig:
    """Return the config of one side: the same rows and steps, the learning rate looked for."""
    plain = config.model_dump(mode="json")
    plain["train"]["learning_rate"] = "auto"
    plain["output_dir"] = str(place.path / name)
    if name == "full":
        plain["lora"] = LoraConfig(method="full").model_dump(mode="json")
        plain["model"] |= {"dtype": "float32", "quantization": None}
        plain["train"] |= {"loraplus_ratio": 1.0, "shard": False}
    return RunConfig.model_validate(plain)


def _train(config: RunConfig, file: Path, stop: StopRequest) -> None:
    """Run `lora train` in a process, which says how it goes; note the most memory it took. Raises UserError."""
    storage.write_file(file, config_file.dump(config))
    run = run_dir.of(config)
    here = () if os.getcwd() in sys.path else ("-P",)
    command = [sys.executable, *here, "-m", "lora_cli", "train", str(file), "--json"]
    with interrupt.patience():
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        peak = _wait(process, stop)
    if run.path.is_dir():
        before = json_file.read_object(run.path / _PEAK)["bytes"] if (run.path / _PEAK).exists() else 0
        storage.write_json(run.path / _PEAK, {"bytes": max(before, peak)})
    code = process.returncode
    if stop.signal_number is not None:
        raise Interrupted(stop.signal_number, f"stopped on request while {run.path} was trained.", state="It is saved.")
    if code:
        raise SurroundingsError(f"{file}: lora train ended with the exit code {code}, as it says above.")


def _wait(process: "subprocess.Popen[bytes]", stop: StopRequest) -> int:
    """Wait for a process, hand a request to stop on to it, and return the most memory it took, in bytes."""
    asked = False
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if ended:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage.ru_maxrss * PEAK_UNIT
        if stop.signal_number is not None and not asked:
            asked = True
            process.send_signal(stop.signal_number)
        time.sleep(0.1)


def _compare(sides: dict[str, RunConfig], place: SearchDir) -> AgainstFullReport:
    """Measure both, and the base below each, on the same tokens."""
    measured, tables = {}, list[np.ndarray]()
    rows, targets = "", 0
    for name, ours in sides.items():
        side, base, tuned_losses, rows = _measure(ours)
        measured[name] = side
        tables += [base, tuned_losses]
        targets = int(base[:, 1].sum())
    together = np.concatenate(tables, axis=1)
    return AgainstFullReport(
        data=rows,
        targets=targets,
        lora=measured["lora"],
        full=measured["full"],
        share=intervals.estimate(together, _share_of_gain) if float(measured["full"].change.value or 0) < 0 else None,
        difference=intervals.difference(tables[3], tables[1]),
        saved=place.report,
    )


def _share_of_gain(sums: np.ndarray) -> np.ndarray:
    """Return what LoRA takes off the loss, as a share of what full does; of sums [..., 8]: loss, targets of each."""
    base, tuned, full_base, full = (intervals.ratio(sums[..., at : at + 2]) for at in range(0, 8, 2))
    share: np.ndarray = (base - tuned) / (full_base - full)
    return share


def _measure(config: RunConfig) -> tuple[Side, np.ndarray, np.ndarray, str]:
    """Return what a finished run is, the losses of base and tuned model [units, 2] each, and the rows' name."""
    from lora_cli import tuned, tuning
    from lora_cli.distributed import current_world
    from lora_cli.evaluate import BASE_AND_ADAPTER, measure
    from lora_cli.held_out import held_out_rows
    from lora_cli.memory import tokens_worth_it

    run = run_dir.of(config)
    result = tuned.find_any(run.path)
    held_out, _, name = held_out_rows(result, None)
    loaded = tuned.load(result, current_world(config.model.device).device)
    base, own = (
        each.per_target("loss") for each in measure(loaded, held_out, tokens_worth_it(loaded.device), BASE_AND_ADAPTER)
    )
    steps = [record for record in metrics.read(run) if record["event"] == "step"]
    side = Side(
        method=config.lora.method,
        learning_rate=float(json_file.read_object(run.probe)["chosen"]),
        steps=len(steps),
        parameters=sum(parameter.numel() for parameter in tuning.trainable(loaded.module).values()),
        peak_memory=int(json_file.read_object(run.path / _PEAK)["bytes"]),
        seconds=statistics.median(record["seconds"] for record in steps),
        loss=intervals.estimate(own),
        change=intervals.difference(base, own),
    )
    return side, base, own, name
