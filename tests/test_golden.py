"""Runs that earlier versions stopped in the middle go on in this one; tests/golden/ has one of each format.

python tests/test_golden.py FOLDER     stops a run of this version after two of its four steps, as FOLDER/run
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from conftest import conversation, save_base, write_rows

from lora_cli import config_file, metrics, run_dir
from lora_cli.errors import Interrupted
from lora_cli.interrupt import StopRequest
from lora_cli.records import Finished, Notice, StepDone
from lora_cli.run_dir import RunDir
from lora_cli.train import train

GOLDEN = Path(__file__).parent / "golden"


def begin(folder: Path) -> Path:
    """Write a base, rows and a config into the current folder, all named from there; return the config."""
    save_base("llama", folder / "base")
    write_rows(folder / "rows.jsonl", [conversation(number) for number in range(20)])
    values = {
        "model": {"path": "base"},
        "lora": {"rank": 2, "alpha": 4, "target_modules": ["q_proj"], "dropout": 0.1},
        "data": {"train": "rows.jsonl", "validation": 4},
        "train": {"batch_size": 4, "learning_rate": 0.02, "epochs": 1, "micro_batch_tokens": 256},
        "eval": {"general": False, "per_epoch": 2},
        "output_dir": "run",
    }
    (folder / "config.yaml").write_text(json.dumps(values))
    return folder / "config.yaml"


def stop_half_way(folder: Path) -> None:
    """Leave a run in the middle."""
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    stop = StopRequest()
    try:
        for event in train(config_file.load(begin(Path())), stop):
            if isinstance(event, StepDone) and event.step == 2:
                stop.signal_number = signal.SIGTERM
    except Interrupted as stopped:
        print(stopped)


@pytest.mark.parametrize("kept", sorted(GOLDEN.glob("*")), ids=lambda path: path.name)
def test_a_run_of_an_earlier_version_goes_on(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From its checkpoint to the losses of a run that this version does from the start."""
    monkeypatch.chdir(tmp_path)
    config = config_file.load(begin(Path()))
    straight = list(train(config, StopRequest()))
    fresh = run_dir.read_environment(RunDir(Path("run")))
    shutil.rmtree("run")
    shutil.copytree(kept, "run")
    # The same base and tokenizer are made here, but libraries of another day may write them into other bytes.
    path = Path("run/environment.json")
    environment = json.loads(path.read_text())
    environment |= {key: fresh[key] for key in environment if key.endswith("_fingerprint")}
    path.write_text(json.dumps(environment))
    resumed = list(train(config, StopRequest()))

    assert "Continuing after step 2" in "\n".join(event.text for event in resumed if isinstance(event, Notice))
    assert isinstance(resumed[-1], Finished)
    assert run_dir.read_environment(RunDir(Path("run"))).keys() >= {
        "format",
        "rows_fingerprint",
        "tokenizer_fingerprint",
    }
    losses = [[event.loss for event in events if isinstance(event, StepDone)] for events in (straight, resumed)]
    assert losses[1] == pytest.approx(losses[0][2:], rel=1e-3)
    assert [record["step"] for record in metrics.read(RunDir(Path("run"))) if record["event"] == "step"] == [
        *range(1, 5)
    ]


if __name__ == "__main__":
    stop_half_way(Path(sys.argv[1]))
