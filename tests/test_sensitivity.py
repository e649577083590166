"""`lora tune --one-at-a-time`: what is run, what is called more than noise, and the picture of it."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import Invoke, conversation, write_config, write_rows
from shapes import require_shape

from lora_cli import config_file, metrics, run_dir
from lora_cli.data_reader import run_to_end
from lora_cli.errors import TrainingStopped
from lora_cli.interrupt import StopRequest
from lora_cli.intervals import student
from lora_cli.records import TrialEnded
from lora_cli.run_dir import RunDir
from lora_cli.search_reports import SensitivityReport
from lora_cli.sensitivity import one_at_a_time

SETTINGS: dict[str, Any] = {
    "lora.rank": 1,
    "train.learning_rate": 0.02,
    "train.max_steps": 4,
    "train.epochs": 20,
    "eval.general": False,
    "tune.budget": 1,
}


def look(config: Path, seeds: int = 3) -> SensitivityReport:
    return run_to_end(one_at_a_time(config_file.load(config), StopRequest(), seeds))


def loss_of(folder: Path) -> float:
    finished = run_dir.read_finished(RunDir(folder))
    assert finished is not None
    assert finished.best_loss is not None
    return finished.best_loss


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], str]) -> Path:
    """A config, around which one of the tests looks first."""
    folder = tmp_path_factory.mktemp("sensitivity")
    rows = write_rows(folder / "rows.jsonl", [conversation(number) for number in range(40)])
    return write_config(folder, model_folder("llama"), rows, SETTINGS)


@pytest.fixture(scope="module")
def report(config: Path) -> SensitivityReport:
    return look(config)


def test_every_knob_is_halved_and_doubled(report: SensitivityReport, config: Path):
    """Around the mean of the seeds; changes are those of runs that lie there, knobs sorted by what they change."""
    trials = config.parent / "run-sensitivity" / "trials"
    losses = [loss_of(trials / f"seed={seed}") for seed in range(3)]
    knobs = {knob.key: knob for knob in report.knobs}

    assert report.loss == pytest.approx(statistics.fmean(losses))
    assert report.noise == pytest.approx(4.3027 * statistics.stdev(losses) * (4 / 3) ** 0.5, rel=0.04)
    assert knobs["train.learning_rate"].values == [0.01, 0.04]
    assert knobs["lora.rank"].values == [2]  # half a rank is none
    assert knobs["train.max_steps"].values == [2, 8]
    assert "train.epochs" not in knobs
    assert {"lora.dropout", "train.weight_decay"} <= set(report.left)
    for knob in report.knobs:
        for value, change in zip(knob.values, knob.changes, strict=True):
            assert change == pytest.approx(loss_of(trials / f"{knob.key}={value}") - report.loss)
        assert knob.matters == any(abs(change or 0) > (report.noise or 0) for change in knob.changes)
    sizes = [max(abs(change or 0) for change in knob.changes) for knob in report.knobs]
    assert sizes == sorted(sizes, reverse=True)
    assert {record["tokens"] for record in metrics.read(RunDir(trials / "seed=0")) if record["event"] == "step"}


def test_what_is_printed_has_its_shape(report: SensitivityReport, config: Path, invoke: Invoke):
    """The command finds the runs of the report, and prints it."""
    code, out, _ = invoke("tune", config, "--one-at-a-time", "--seeds", 3, "--json")

    assert (code, require_shape(SensitivityReport, out)) == (0, report)


def test_what_was_run_is_not_run_again(report: SensitivityReport, config: Path):
    """The second time nothing trains, and the report is the same."""
    events = one_at_a_time(config_file.load(config), StopRequest(), 3)
    seen = []
    while True:
        try:
            seen.append(next(events))
        except StopIteration as end:
            again = end.value
            break

    assert {type(event) for event in seen} == {TrialEnded}
    assert again == report


def test_the_picture_says_what_the_report_does(report: SensitivityReport):
    """One bar for each change, in the direction of it, and the noise behind them."""
    svg = ElementTree.fromstring(report.plot.read_text())
    names = {"half": "f0", "twice": "f1", "noise": "noise"}
    bars = {name: [b for b in svg.findall(".//{*}rect") if b.get("class") == kind] for name, kind in names.items()}
    texts = [text.text for text in svg.findall(".//{*}text")]
    halves = sum(value < knob.value for knob in report.knobs for value in knob.values)
    doubles = sum(value > knob.value for knob in report.knobs for value in knob.values)

    assert (len(bars["half"]), len(bars["twice"])) == (halves + 1, doubles + 1)  # one in the legend
    assert halves < doubles
    assert len(bars["noise"]) == 2
    assert {knob.key for knob in report.knobs} <= set(texts)
    assert json.loads(report.saved.read_text())["knobs"][0]["key"] == report.knobs[0].key


def test_students_quantiles_are_those_of_tables():
    """Within 3.5 % from two degrees of freedom on, within half a percent from five."""
    for freedom, quantile, within in ((2, 4.3027, 0.035), (3, 3.1824, 0.015), (5, 2.5706, 0.005), (30, 2.0423, 1e-4)):
        assert student(freedom) == pytest.approx(quantile, rel=within)


def test_a_rate_of_auto_is_settled_before(make_config: Callable[..., Path]):
    """By the config itself; then half and twice of it are tried."""
    report = look(make_config(**SETTINGS | {"train.learning_rate": "auto"}), seeds=1)
    (rate,) = (knob for knob in report.knobs if knob.key == "train.learning_rate")

    assert rate.values == [rate.value / 2, rate.value * 2]
    assert (report.noise, rate.matters) == (None, None)


def test_a_config_that_does_not_train_is_told(make_config: Callable[..., Path]):
    """There is nothing to compare with then."""
    with pytest.raises(TrainingStopped, match="stopped with each of 2 seeds"):
        look(make_config(**SETTINGS | {"train.learning_rate": 1e30}), seeds=2)
