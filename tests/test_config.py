"""The config file: strict, all problems at once, each with its place."""

import json
import re
from pathlib import Path

import pytest

from lora_cli import config_file, config_text
from lora_cli.config import RunConfig
from lora_cli.errors import ConfigError
from lora_cli.schema import flat

GOOD = "model: some/model\ndata:\n  train: train.jsonl\noutput_dir: runs/x\n"
GIVEN = {"model.path": "some/model", "data.train": "train.jsonl", "output_dir": "runs/x"}


def load(tmp_path: Path, text: str, *overrides: str) -> RunConfig:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return config_file.load(path, overrides)


def problems(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, *overrides)
    return caught.value.paragraph().replace(str(tmp_path) + "/", "")


def test_the_shortest_config_gets_every_default(tmp_path: Path):
    """Four lines are a config; a bare string is the model's path."""
    config = load(tmp_path, GOOD)

    assert (
        config.model.path, config.lora.rank, config.train.learning_rate, config.train.early_stopping.patience
    ) == ("some/model", 32, 3e-4, 3)  # fmt: skip


def test_the_whole_contract_is_accepted(tmp_path: Path):
    """The text of `lora init` has every key once, at its default; what is behind # is one as well."""
    text = config_text.text(GIVEN, {})
    whole = "\n".join(re.sub(r"^( *)# (?=[ \w]+:)", r"\1", line) for line in text.splitlines())

    assert load(tmp_path, text) == load(tmp_path, whole) == load(tmp_path, GOOD)
    assert config_file.parse(whole, "whole").places.keys() >= {
        tuple(key.split(".")) for key, _ in flat(load(tmp_path, GOOD))
    }


def test_dump_and_load_agree(tmp_path: Path):
    """A resolved config is a config, and the same one."""
    config = load(tmp_path, GOOD, "lora.target_modules=[q_proj, v_proj]", "data.validation=25")

    assert config == load(tmp_path, config_file.dump(config))


@pytest.mark.parametrize("name", ["1e5", "08", "no", "~", "1_000", "0x10", "2026-01-01", "a: b", "é\n\\", "=", "<<"])
def test_a_name_stays_a_name(tmp_path: Path, name: str):
    """Text that either version of YAML takes for something else is written in quotes."""
    config = load(tmp_path, GOOD.replace("runs/x", json.dumps(name)))

    assert config.output_dir == name
    assert load(tmp_path, config_file.dump(config)) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("1e-4", 1e-4), ("2E-5", 2e-5), (".5", 0.5), ("1", 1), ("0.001", 0.001)],
)
def test_yaml_1_2_numbers(tmp_path: Path, text: str, value: float):
    """3e-4 is a number, as YAML 1.2 says."""
    assert value == load(tmp_path, GOOD + f"train: {{learning_rate: {text}}}\n").train.learning_rate


def test_no_octal_no_sexagesimal_no_norway(tmp_path: Path):
    """010 is ten, and `no` is text."""
    config = load(tmp_path, GOOD.replace("some/model", "no") + "lora: {rank: 010}\n")

    assert (config.lora.rank, config.model.path) == (10, "no")


def test_all_problems_at_once_in_the_order_of_the_file(tmp_path: Path):
    """Three mistakes are three lines."""
    shown = problems(tmp_path, "model: a\nseed: -1\ndata: {train: x, max_length: 1}\noutput_dir: ''\n").splitlines()

    assert [line.split(": ")[0] for line in shown[:3]] == ["c.yaml:2:1", "c.yaml:3:18", "c.yaml:4:1"]


def test_cross_checks_are_not_kept_back_by_wrong_keys(tmp_path: Path):
    """What no single field can see is reported together with unknown keys and wrong types."""
    shown = problems(
        tmp_path,
        GOOD
        + "lora: {rnak: 8}\ntrain: {epochs: x, kl_without_target: true}\neval: {forgetting_budget: 1, general: false}",
    )

    assert [line.split(": ")[0] for line in shown.splitlines()[:4]] == [
        "c.yaml:5:8", "c.yaml:6:9", "c.yaml:6:20", "c.yaml:7:8",
    ]  # fmt: skip


def test_overrides(tmp_path: Path):
    """KEY=VALUE reads the value as YAML, also below a bare model string."""
    config = load(
        tmp_path, GOOD, "model.dtype=float32", "train.early_stopping.patience=null", "lora.target_modules=[a]"
    )

    assert (
        config.model.dtype, config.train.early_stopping.patience, config.lora.target_modules, config.model.path
    ) == ("float32", None, ("a",), "some/model")  # fmt: skip


def test_the_schema_describes_every_key():
    """Every field has a description, and unknown keys are refused in editors too."""
    schema = config_file.json_schema()
    for name, section in schema["$defs"].items():
        assert section["additionalProperties"] is False
        if name not in ("Range", "ReplayConfig", "SourceConfig"):
            assert all("description" in field or "$ref" in field for field in section["properties"].values()), name
    json.dumps(schema)
