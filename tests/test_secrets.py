"""Secrets are hidden where text leaves the program, refused in configs and arguments, and counted in rows."""

import importlib.metadata
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Invoke, conversation, write_rows

from lora_cli import run_dir
from lora_cli.config_file import load
from lora_cli.errors import UserError
from lora_cli.redact import HIDDEN, cut, holds_secret, redact

# In pieces, so that nobody who looks for secrets in source files finds one here.
SECRETS = {
    "hub": "hf_" + "aB3dE6gH9k" * 3,
    "openai": "sk-" + "proj-" + "Zx81" * 8,
    "github": "ghp_" + "k2J4m6N8p0" * 4,
    "github fine": "github_pat_" + "11ABCDE_" * 4,
    "gitlab": "glpat-" + "Ab3_" * 6,
    "amazon": "AKIA" + "IOSFODNN7EXAMPLE",
    "google": "AIza" + "Sy7Bq" * 7,
    "slack": "xoxb-" + "123456789012-abcdef",
    "jwt": "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0" + ".SflKxwRJSMeKKF2Q",
    "key": "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIEow",
    "address": "https://reader:" + "swordfish@mirror.example/path",
}


def leaked(folder: Path, *secrets: str) -> list[Path]:
    """The files under a folder that hold any of the secrets."""
    marks = [secret.encode() for secret in secrets]
    return [path for path in folder.rglob("*") if path.is_file() and any(m in path.read_bytes() for m in marks)]


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_hidden(name: str):
    """In the middle of a text, before it is cut, and in every error."""
    text = f"before {SECRETS[name]} after"
    secret = "reader:swordfish" if name == "address" else SECRETS[name][:20]

    assert holds_secret(text)
    for shown in (redact(text), cut(text, 20), UserError(text).paragraph(), str(UserError(text))):
        assert secret[:12] not in shown
    assert HIDDEN in redact(text)


@pytest.mark.parametrize(
    "text",
    ["half_" + "a" * 40, "task-" + "b" * 30, "https://example.com/a:b@c", "mailto:me@example.com", "0a" * 20,
     "train.jsonl:12:3", "hf_hub", "eyJ", "https://host:8080/x"],
)  # fmt: skip
def test_other_text_is_left_as_it_is(text: str):
    """What has not the form of a secret is not one."""
    assert redact(text) == text


def test_the_value_of_a_secret_variable_is_hidden(monkeypatch: pytest.MonkeyPatch):
    """By the variable's name, whatever form the value has; not those of other names, nor short ones."""
    monkeypatch.setenv("MIRROR_PASSWORD", "correct horse")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-false")
    monkeypatch.setenv("SOME_KEY", "short")

    assert redact("the correct horse is false-false, short") == f"the {HIDDEN} is false-false, short"


@pytest.mark.parametrize("name", SECRETS)
def test_a_config_with_a_secret_is_refused(invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path, name: str):
    """Named by its place, never repeated, and nothing is written; in an override it is refused as an argument."""
    config = make_config(**{"data.chat_template": SECRETS[name]})
    code, out, err = invoke("train", config, "--json")

    assert code == 2
    assert "data.chat_template holds what looks like a key" in err
    assert SECRETS[name] not in out + err
    assert not (tmp_path / "run").exists()
    code, out, err = invoke("train", make_config(), f"output_dir={SECRETS[name]}", "--json")
    assert (code, "Argument 3 of the command holds" in err, SECRETS[name] in out + err) == (2, True, False)


def test_rows_with_secrets_are_counted(invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path):
    """By number only: not in what is printed, not in the run's folder, nor in the answers that are kept."""
    rows = [conversation(number) for number in range(40)]
    for number, secret in zip((1, 4, 9), SECRETS.values(), strict=False):
        rows[number]["messages"][1]["content"] += f" {secret}"
    (tmp_path / "data").mkdir()
    data = write_rows(tmp_path / "data" / "secret.jsonl", rows)
    config = make_config(**{"data.train": data, "train.max_steps": 1, "data.validation": 8})
    said = ""
    for arguments in (("check", config), ("train", config), ("eval", tmp_path / "run", "--data", data, "--json")):
        code, out, err = invoke(*arguments)
        assert code == 0
        said += out + err

    assert "train: 3 rows hold what looks like a key or a password" in said or "2 rows hold" in said
    assert not [secret for secret in SECRETS.values() if secret in said]
    assert not leaked(tmp_path / "run", *SECRETS.values())


def test_no_planted_secret_comes_out(
    invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In variables, in .netrc, in an address of the hub: in no file of a run or an export, in no message or log."""
    planted = {
        "HF_TOKEN": SECRETS["hub"], "WANDB_API_KEY": "0123456789abcdef" * 2, "AWS_SECRET_ACCESS_KEY": "x+/Y" * 10,
        "PGPASSWORD": "open sesame 99", "HF_ENDPOINT": SECRETS["address"],
    }  # fmt: skip
    secrets = [*planted.values(), "swordfish", "netrc-pass-word"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".netrc").write_text("machine huggingface.co login me password netrc-pass-word\n")
    for name, value in (planted | {"HOME": str(tmp_path / "home")}).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "logs"))

    def fail(name: str) -> str:
        raise KeyError(os.environ["HF_TOKEN"])

    run, said = tmp_path / "run", ""
    missing = make_config(**{"model.path": "someone/nothing"}).rename(tmp_path / "missing.yaml")
    for code, *arguments in (
        (0, "train", make_config(**{"train.max_steps": 1})),
        (0, "export", run, "--output", tmp_path / "exported"),
        (0, "merge", run, "--output", tmp_path / "merged"),
        (3, "check", missing),
        (1, "version"),
    ):
        with monkeypatch.context() as broken:
            if arguments == ["version"]:
                broken.setattr(importlib.metadata, "version", fail)  # not ours: an installation that is broken
            found, out, err = invoke(*arguments)
        assert found == code, err
        said += out + err

    assert "a bug in lora" in said
    assert len(list((tmp_path / "logs").glob("lora-bug-*.log"))) == 1
    assert not [secret for secret in secrets if secret in said]
    for folder in ("run", "exported", "merged", "logs"):
        assert list((tmp_path / folder).iterdir())
        assert not leaked(tmp_path / folder, *secrets)


def test_a_failed_runs_reason_holds_no_secret(make_config: Callable[..., Path], tmp_path: Path):
    """What run.json keeps of an error went through the same door."""
    run = run_dir.of(load(make_config()))
    run.path.mkdir()
    error = UserError(f"cannot reach {SECRETS['address']}")
    run_dir.write_status(run, "failed", reason=error.problems[0])

    assert json.loads(run.status.read_text())["reason"] == f"cannot reach https://{HIDDEN}@mirror.example/path"
