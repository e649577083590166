"""The package as a library: what the commands do, called from Python."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import conversation, write_config, write_rows

from lora_cli import config_file, metrics
from lora_cli.interrupt import StopRequest
from lora_cli.run_dir import RunDir
from lora_cli.train import train

SETTINGS = {"train.max_steps": 8, "eval.general": None, "eval.general_tokens": 256}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], str]) -> Path:
    """The config of a small run."""
    folder = tmp_path_factory.mktemp("api")
    rows = write_rows(folder / "rows.jsonl", [conversation(number) for number in range(24)])
    return write_config(folder, model_folder("llama"), rows, SETTINGS)


@pytest.fixture(scope="module")
def run(config: Path) -> Path:
    """The directory of a small run that measured forgetting."""
    list(train(config_file.load(config), StopRequest()))
    return config.parent / "run"


def test_what_was_measured_is_a_table(run: Path):
    """Every row has every column, values are those of metrics.jsonl, and a CSV file takes them."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    table = metrics.table(RunDir(run))
    last = next(record for record in reversed(records) if record["event"] == "evaluated")

    assert [list(row) for row in table] == [list(metrics.COLUMNS)] * len(records)
    assert [row["loss"] for row in table] == [record["loss"] for record in records]
    row = next(row for row in reversed(table) if row["event"] == "evaluated")
    assert row["forgetting.rise.value"] == last["forgetting"]["rise"]["value"]
    assert row["forgetting.kl_tokens"] == last["forgetting"]["kl_tokens"] > 0
    assert {row["forgetting.rise.value"] for row in table if row["event"] == "step"} == {None}
    with (run.parent / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, metrics.COLUMNS)
        writer.writeheader()
        writer.writerows(table)
    assert len((run.parent / "metrics.csv").read_text().splitlines()) == len(records) + 1
