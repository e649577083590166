"""`lora doctor`: what it finds, and that what it finds is so."""

import json
import resource
import socket
import threading
from pathlib import Path

import pytest
import torch
from conftest import Invoke
from shapes import require_shape

from lora_cli import doctor, hub, model, packages, self_test, storage, surroundings
from lora_cli.doctor_report import DoctorReport, Package

CPU = torch.device("cpu")


def test_doctor_says_what_is_here_and_that_training_works(invoke: Invoke, tmp_path: Path):
    """Exit code 0, figures that the system gives too, nothing left behind; the verdict in words."""
    code, out, err = invoke("doctor", "--json")
    report = json.loads(out)

    assert (code, err) == (0, "")
    assert report["versions"]["torch"] == torch.__version__
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert report["machine"]["open_files"] == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert report["machine"]["memory"] > report["machine"]["free_memory"] > 0
    assert not list(Path.cwd().glob(".lora-tmp-*"))
    tested = report["self_test"]
    assert tested["passed"]
    assert tested["last_loss"] < 0.9 * tested["first_loss"]
    assert tested["difference"] < 1e-3 * tested["effect"]
    assert report["findings"][-1]["text"].startswith("Training works: 12 steps on cpu")
    levels = [finding["level"] for finding in report["findings"]]
    assert levels == sorted(levels, key=["problem", "note", "ok"].index)


def test_a_token_and_a_proxys_password_are_not_shown(invoke: Invoke, monkeypatch: pytest.MonkeyPatch):
    """Only that they are there."""
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 30)
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret-word@proxy:3128")
    monkeypatch.setenv("COLUMNS", "60")
    code, out, _ = invoke("doctor", "--no-test")

    assert code == 0
    assert "a token is here" in out
    assert "HTTPS_PROXY" in out
    assert "secret-word" not in out
    assert "aaaaaa" not in out
    assert "\x1b" not in out


def test_what_is_no_hub_does_not_answer(monkeypatch: pytest.MonkeyPatch):
    """Something listens there that speaks another protocol; the thread that asked ends quietly."""
    raised: list[object] = []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def greet() -> None:
            with listening.accept()[0] as caller:
                caller.recv(1000)
                caller.sendall(b"SSH-2.0-other\r\n")

        threading.Thread(target=greet, daemon=True).start()
        assert not hub._answers(f"http://127.0.0.1:{listening.getsockname()[1]}")
    assert raised == []


def test_numbers_that_are_none_are_a_problem(invoke: Invoke, monkeypatch: pytest.MonkeyPatch):
    """A library that makes NaN: said as a problem, and the figures are left out of what is printed as JSON."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: ruin(self.param_groups[0]["params"]))
    code, out, _ = invoke("doctor", "--json")
    report = require_shape(DoctorReport, out)

    assert (code, report.self_test, report.findings[0].level) == (3, None, "problem")
    assert report.findings[0].text == (
        "Training does not work on cpu: FloatingPointError: a loss or a logit is not finite"
    )


@torch.no_grad()
def ruin(parameters: list[torch.nn.Parameter]) -> None:
    """Make every number NaN."""
    for parameter in parameters:
        parameter.fill_(torch.nan)


def test_numbers_that_are_wrong_are_a_problem(invoke: Invoke, monkeypatch: pytest.MonkeyPatch):
    """A library that loses updates: the loss does not fall, and the exit code says so."""
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: None)
    code, out, _ = invoke("doctor")

    assert code == 3
    assert out.split("\n\n")[1].startswith("problem: Training computes wrong numbers here")


def test_a_library_that_is_broken_is_a_problem(invoke: Invoke, monkeypatch: pytest.MonkeyPatch):
    """Whatever it raises is in the finding, and no traceback."""

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", broken)
    monkeypatch.setattr(torch.nn.functional, "linear", broken)
    code, out, _ = invoke("doctor", "--json")

    (problem,) = [finding for finding in json.loads(out)["findings"] if finding["level"] == "problem"]
    assert code == 3
    assert "no kernel image is available" in problem["text"]


def test_a_disk_without_hard_links_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Where a new file cannot appear under its name at once, results would not be safe."""

    def refuse(path: Path, new: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    assert surroundings._problem(tmp_path) is None
    monkeypatch.setattr(storage.disk, "link", refuse)

    assert "cannot be written: Operation not permitted" in str(surroundings._problem(tmp_path))
    assert not list(tmp_path.iterdir())


def test_what_is_missing_or_too_old_is_said_with_its_line():
    """Of lora itself a problem; of an extra a note with what cannot be done."""
    wanted = [
        Package("torch", None, ">=2.10,<3", "2.4.0", False),
        Package("wandb", "wandb", ">=0.22", None, False),
        Package("optuna", "tune", ">=4.5", "5.0.0", True),
    ]
    problem, note = doctor._of_packages(wanted)

    assert (problem.level, problem.fix) == ("problem", "pip install 'torch>=2.10,<3'")
    assert "torch is 2.4.0" in problem.text
    assert (note.level, note.fix) == ("note", "pip install 'lora-cli[wandb]'")
    assert "train.trackers: [wandb]" in note.text


def test_every_extra_is_explained():
    """With what it is for, and no others are."""
    assert {package.extra for package in packages.all_wanted()} - {None} == set(doctor._EXTRAS)


def test_the_self_test_finds_a_merge_that_is_wrong(monkeypatch: pytest.MonkeyPatch):
    """An update added twice."""
    layer = self_test.lora.LoraLinear
    merged = layer.merged
    monkeypatch.setattr(layer, "merged", lambda self: 2 * merged(self) - self.base.weight)

    assert not self_test.self_test(CPU).passed
    assert model.build_random(CPU).layout.packed
