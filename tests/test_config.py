"""The config file: strict, all problems at once, each with its place."""

import json
from pathlib import Path

import pytest

from lora_cli import config_file
from lora_cli.config import RunConfig
from lora_cli.errors import ConfigError

GOOD = "model: some/model\ndata:\n  train: train.jsonl\noutput_dir: runs/x\n"


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
    """Every key of the public contract stands in the schema with the default it is given there."""
    text = config_file.commented("some/model", "train.jsonl", "runs/x")

    assert load(tmp_path, text) == load(tmp_path, GOOD)


def test_dump_and_load_agree(tmp_path: Path):
    """A resolved config is a config, and the same one."""
    config = load(tmp_path, GOOD, "lora.target_modules=[q_proj, v_proj]", "data.validation=25")

    assert config == load(tmp_path, config_file.dump(config))


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD + "lora:\n  rnak: 8\n", 'c.yaml:6:3: unknown key "rnak" under lora; did you mean "rank"?'),
        (GOOD + "rank: 8\n", 'c.yaml:5:1: unknown key "rank"; it belongs at lora.rank.'),
        (GOOD + "lora_r: 8\n", 'c.yaml:5:1: unknown key "lora_r"; here that is lora.rank.'),
        (GOOD + 'lora: {rank: "8"}\n', "c.yaml:5:8: lora.rank: expected a whole number; found '8' (text)."),
        (GOOD + "lora: {rank: true}\n", "lora.rank: expected a whole number; found True"),
        (GOOD + "lora: {rank: 0}\n", "lora.rank: expected greater than or equal to 1; found 0."),
        (GOOD + "lora: {dropout: 1.0}\n", "lora.dropout: expected less than 1; found 1.0."),
        (GOOD + "lora: {target_modules: q_proj}\n", "lora.target_modules: expected 'all-linear' or a list"),
        (GOOD + "train: {learning_rate: .nan}\n", "train.learning_rate: expected a finite number"),
        (GOOD + "train: {learning_rate: 0}\n", "c.yaml:5:9: train.learning_rate: expected greater than 0"),
        (GOOD + "train: {schedule: cosin}\n", 'Did you mean "cosine"?'),
        (GOOD + "model: b\n", 'c.yaml:5:1: duplicate key "model" (first on line 1).'),
        ("model: a\noutput_dir: o\n", "c.yaml: data is missing; it has no default."),
        ("model: {}\ndata: {train: a}\noutput_dir: o\n", "c.yaml:1:1: model.path is missing"),
        ("", "c.yaml: the file is empty."),
        ("- a\n", "found a list"),
        ("model:a\n", "A colon needs a space after it."),
        (GOOD + "\tlora: 1\n", "indent with spaces, not tabs"),
        (GOOD + "lora: {target_modules: *_proj}\n", "put the value in quotes"),
        (GOOD + "lora: &a {rank: *a}\n", "this value contains itself"),
        (GOOD + "lora: !!python/object:os.system {}\n", "is not accepted"),
        (GOOD + "---\nmodel: b\n", "a second document begins here"),
        (GOOD + "lora: " + "[" * 40 + "]" * 40, "nested too deeply"),
        (GOOD + "data2: {train: [1\n", "this is not YAML"),
    ],
)  # fmt: skip
def test_a_wrong_config_is_explained(tmp_path: Path, text: str, expected: str):
    """Each mistake is named with its place and the way out, and nothing is read."""
    shown = problems(tmp_path, text)

    assert expected in shown
    assert "nothing was written" in shown


def test_all_problems_at_once_in_the_order_of_the_file(tmp_path: Path):
    """Three mistakes are three lines."""
    shown = problems(tmp_path, "model: a\nseed: -1\ndata: {train: x, max_length: 1}\noutput_dir: ''\n").splitlines()

    assert [line.split(": ")[0] for line in shown[:3]] == ["c.yaml:2:1", "c.yaml:3:18", "c.yaml:4:1"]


def test_cross_checks_are_not_kept_back_by_wrong_keys(tmp_path: Path):
    """What no single field can see is reported together with unknown keys and wrong types."""
    shown = problems(
        tmp_path,
        GOOD + "lora: {rnak: 8, method: dora}\ntrain: {epochs: x}\neval: {forgetting_budget: 1, general: false}\n",
    )

    assert [line.split(": ")[0] for line in shown.splitlines()[:4]] == [
        "c.yaml:5:8", "c.yaml:5:17", "c.yaml:6:9", "c.yaml:7:8",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.quantization", "nf4"), ("lora.method", "dora"), ("train.learning_rate", "auto"),
        ("data.format", "preference"), ("data.train", "[{path: a, format: preference}]"),
    ],
)  # fmt: skip
def test_what_this_version_cannot_do_is_refused(tmp_path: Path, key: str, value: str):
    """A key of the contract that is not built yet is an error, never ignored."""
    shown = problems(tmp_path, GOOD, f"{key}={value}")

    assert f"override {key}={value}: {key}: this version cannot" in shown


def test_overrides(tmp_path: Path):
    """KEY=VALUE reads the value as YAML, also below a bare model string."""
    config = load(
        tmp_path, GOOD, "model.dtype=float32", "train.early_stopping.patience=null", "lora.target_modules=[a]"
    )

    assert (
        config.model.dtype, config.train.early_stopping.patience, config.lora.target_modules, config.model.path
    ) == ("float32", None, ("a",), "some/model")  # fmt: skip


def test_a_wrong_override_is_named(tmp_path: Path):
    """An override has no line; it is shown itself."""
    assert 'override lora.rnak=8: unknown key "rnak"' in problems(tmp_path, GOOD, "lora.rnak=8")
    assert "expected KEY=VALUE" in problems(tmp_path, GOOD, "lora.rank")


def test_a_missing_file_suggests_its_neighbour(tmp_path: Path):
    """A mistyped config name points at the one that is there."""
    (tmp_path / "train.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"Did you mean train\.yaml"):
        config_file.load(tmp_path / "trian.yaml")


def test_the_schema_describes_every_key():
    """Every field has a description, and unknown keys are refused in editors too."""
    schema = config_file.json_schema()
    for name, section in schema["$defs"].items():
        assert section["additionalProperties"] is False
        if name not in ("ReplayConfig", "SourceConfig"):
            assert all("description" in field or "$ref" in field for field in section["properties"].values()), name
    json.dumps(schema)
