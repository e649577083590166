"""`lora tune --against-full`: two runs of the same rows and steps, and what one reaches of the other."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Invoke
from shapes import require_shape

from lora_cli import config_file
from lora_cli.against_full import against_full
from lora_cli.compare import Asked, compare
from lora_cli.errors import ConfigError
from lora_cli.interrupt import StopRequest
from lora_cli.search_reports import AgainstFullReport

SETTINGS: dict[str, Any] = {"lora.rank": 2, "train.max_steps": 6, "data.validation": 8, "eval.general": False}


def test_lora_is_held_against_full_fine_tuning(make_config: Callable[..., Path], invoke: Invoke, tmp_path: Path):
    """The figures are those of `lora eval` on each run; a second call trains nothing."""
    path = make_config(**SETTINGS)
    config = config_file.load(path)
    report = against_full(config, StopRequest())
    place = tmp_path / "run-against-full"
    evaluated = {name: compare(place / name, Asked(answers=0)).figures["loss"] for name in ("lora", "full")}
    before = {path: path.stat().st_mtime_ns for path in place.rglob("metrics.jsonl")}

    for name, side in (("lora", report.lora), ("full", report.full)):
        assert side.loss.value == pytest.approx(evaluated[name].tuned.value)
        assert side.change == evaluated[name].difference
        assert side.steps == 6
        assert side.peak_memory > 1e8
        assert side.learning_rate == json.loads((place / name / "probe.json").read_text())["chosen"]
    assert (report.lora.learning_rate, report.full.learning_rate) == (0.006, 0.0003)
    assert report.lora.parameters < report.full.parameters
    gains = [evaluated[name].difference.value or 0.0 for name in ("lora", "full")]
    assert report.share is not None
    assert report.share.value == pytest.approx(gains[0] / gains[1])
    assert report.difference.value == pytest.approx((report.lora.loss.value or 0) - (report.full.loss.value or 0))
    assert require_shape(AgainstFullReport, invoke("tune", path, "--against-full", "--json")[1]) == report
    assert {path: path.stat().st_mtime_ns for path in place.rglob("metrics.jsonl")} == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora.method": "full", "lora.rank": 32, "lora.alpha": 32.0}, "lora.method: is full already"),
        ({"data.validation": 0}, "data.validation: is 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict[str, Any], said: str, make_config: Callable[..., Path]):
    """Before anything is trained."""
    with pytest.raises(ConfigError, match=said):
        against_full(config_file.load(make_config(**SETTINGS | change)), StopRequest())
