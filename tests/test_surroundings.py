"""What the machine refuses is found early, named, and leaves things as they were."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Invoke
from torture import faults

from lora_cli import cli as program
from lora_cli import config_file, corpus, ending, interrupt, manifest, room, run_dir, storage
from lora_cli.errors import SurroundingsError
from lora_cli.interrupt import StopRequest
from lora_cli.records import Saved, StepDone
from lora_cli.train import train


def cli(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lora_cli", *map(str, arguments)]


# --- before a weight is read ---


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("file", "is a file, not a folder"),
        ("file/run", "is a file, not a folder"),
        ("link", "it is a link to nowhere, which is not there"),
        ("n" * 300, "File name too long"),
        ("deep/" + "n" * 300, "File name too long"),
    ],
)
def test_an_output_dir_that_cannot_be(
    name: str, words: str, invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path
):
    """Exit 3 with the path and the reason, before torch has anything to do, and nothing written."""
    config = make_config()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    code, _, err = invoke("train", config, f"output_dir={tmp_path}/{name}")

    assert (code, words in err) == (3, True)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_dir_that_is_no_text(invoke: Invoke, make_config: Callable[..., Path]):
    """Half of a character, and the home of nobody, are wrong input."""
    for name, words in (
        ("a\ud800", "half of a character"),
        ("~no-such-user/run", "output_dir: ~no-such-user/run is no path"),
    ):
        code, _, err = invoke("train", make_config(output_dir=name))
        assert (code, words in err) == (2, True), err


@pytest.mark.parametrize("verb", [["merge"], ["merge", "--adapter"], ["export"], ["scale", "--budget", "1"]])
def test_an_output_that_cannot_be_is_found_before_the_work(verb: list[str], invoke: Invoke, tmp_path: Path):
    """By the verbs that write a folder: before the adapter is even looked for."""
    (tmp_path / "file").write_text("precious")
    for name, code in (("file", 2), ("file/new", 3), ("n" * 300, 3)):
        found, _, err = invoke(verb[0], tmp_path / "nothing", *verb[1:], "--output", tmp_path / name)
        assert (found, str(tmp_path / name)[:200] in err) == (code, True)
    (tmp_path / "there").mkdir()
    found, _, err = invoke(verb[0], tmp_path / "nothing", *verb[1:], "--output", tmp_path / "there")
    assert (found, "already exists; it is never overwritten" in err) == (2, True)


def in_child(function: Callable[[], object]) -> str:
    """Return what a function says that ends with a SurroundingsError, in a process of its own."""
    reading, writing = os.pipe()

    def report() -> int:
        try:
            function()
        except SurroundingsError as error:
            os.write(writing, error.paragraph().encode())
        os.close(writing)
        return 0

    assert faults.forked(report) == 0
    os.close(writing)
    with os.fdopen(reading) as file:
        return file.read()


def test_a_folder_without_permission(tmp_path: Path):
    """Tried, not guessed from its mode."""
    tmp_path.chmod(0o500)

    def probe() -> None:
        if os.getuid() == 0:
            os.setresuid(65534, 65534, 65534)
        room.require_writable(tmp_path / "run")

    assert f"{tmp_path / 'run'}: cannot be written: Permission denied." in in_child(probe)
    tmp_path.chmod(0o700)


def test_a_folder_that_is_read_only(tmp_path: Path):
    """Its mode allows everything; the mount does not."""

    def probe() -> None:
        if not faults.small_disk(tmp_path, 4096, faults.READ_ONLY):
            raise SurroundingsError("skipped")
        room.require_writable(tmp_path / "run")

    if (said := in_child(probe)).startswith("skipped"):
        pytest.skip("this machine allows no mount of one's own")
    assert f"{tmp_path / 'run'}: cannot be written: Read-only file system." in said


def test_a_disk_without_room_is_refused_before_the_model_loads(make_config: Callable[..., Path], tmp_path: Path):
    """What the checkpoints and the adapter will take is counted from the shapes, and compared with what is free."""
    config, disk = make_config(), tmp_path / "disk"
    disk.mkdir()

    def on_small_disk() -> None:
        if not faults.small_disk(disk, 128 << 10):
            raise SurroundingsError("skipped")
        for event in train(config_file.load(config, [f"output_dir={disk}/run"]), StopRequest()):
            assert not isinstance(event, StepDone)

    if (said := in_child(on_small_disk)).startswith("skipped"):
        pytest.skip("this machine allows no mount of one's own")
    assert f"{disk}/run: needs 0." in said
    assert " MB are free" in said


def test_a_limit_on_file_sizes_is_named(tmp_path: Path):
    """It is no full disk."""

    def write() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))
        storage.write_file(tmp_path / "a", "b" * 100)

    assert "larger than this process may write (ulimit -f)" in in_child(write)


def test_no_home_and_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """LORA_CACHE is named as the way out; where it is set, no home is needed."""
    for name in ("HOME", "XDG_CACHE_HOME", "LORA_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def nowhere() -> None:
        if os.getuid() == 0:
            os.setuid(54321)  # nobody whom the system knows
        corpus.cache_folder()

    if os.getuid() == 0:
        assert "Set LORA_CACHE" in in_child(nowhere)
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    assert corpus.cache_folder() == tmp_path / "cache" / "tokens"


def test_kept_tokens_that_cannot_be_kept(
    invoke: Invoke, make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """The tokens of a large file: exit 3 with the way out, before they are made."""
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpus, "SMALL", 0)
    code, _, err = invoke("train", make_config())

    assert (code, f"{tmp_path / 'cache'} is a file" in err, "LORA_CACHE names another folder" in err) == (3, True, True)


def test_a_bug_is_shown_where_no_log_can_be_written(
    invoke: Invoke, make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """A full /tmp hides no traceback."""
    monkeypatch.setattr(config_file, "load", lambda *_: 1 / 0)
    monkeypatch.setattr(ending.tempfile, "tempdir", str(tmp_path / "not-there"))
    code, _, err = invoke("check", "config.yaml")

    assert (code, "ZeroDivisionError: division by zero" in err, "Please report it" in err) == (1, True, True)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE])
def test_what_the_machine_refuses_is_no_bug(number: int, invoke: Invoke, monkeypatch: pytest.MonkeyPatch):
    """Wherever it is raised, such an error is exit 3 with its file."""

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number), "/disk/file")

    monkeypatch.setattr(config_file, "load", refuse)
    code, _, err = invoke("check", "config.yaml")

    assert (code, f"/disk/file: the machine refused: {os.strerror(number)}." in err) == (3, True)


# --- output that nobody reads ---


def test_closed_outputs(make_config: Callable[..., Path]):
    """Closed, or a pipe whose reader is gone: the command does its work, and says nothing of Python's."""
    version = cli("version")
    closed = subprocess.run(["sh", "-c", f"{' '.join(version)} >&- 2>&-"], check=False)
    piped = subprocess.run(["sh", "-c", f"{' '.join(version)} | true"], capture_output=True, text=True, check=False)

    assert (closed.returncode, piped.stderr) == (0, "")


def test_training_goes_on_when_nobody_reads(make_config: Callable[..., Path], tmp_path: Path):
    """The reader of its messages leaves after the first one; the run is finished."""
    config = make_config(**{"train.max_steps": 3})
    reading, writing = os.pipe()

    def unread() -> int:
        os.dup2(writing, 2)
        os.close(writing)
        os.close(reading)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        sys.argv = ["lora", "train", str(config), "--json"]
        ending.run(program.app)
        return 0

    child = os.fork()
    if not child:
        os._exit(faults.forked(unread))
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    os.waitpid(child, 0)

    assert run_dir.read_status(run_dir.RunDir(tmp_path / "run"))["status"] == "finished"


# --- while it runs ---


def test_a_full_disk_while_saving(make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    """Path, what is needed and free, the last whole checkpoint: of the error that stopped the run, not a later one."""
    config = config_file.load(make_config(**{"train.max_steps": 8}))
    real, full = os.fsync, False

    def fsync(descriptor: int) -> None:
        if full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SurroundingsError) as caught:  # noqa: PT012 - the second save fails
        for event in train(config, StopRequest()):
            full = full or isinstance(event, Saved)
    run = run_dir.of(config)
    said = caught.value.paragraph()
    (_, last), *_ = run_dir.step_folders(run)

    assert f"{run.metrics}: cannot be written: the disk is full (" in said
    assert "MB free)" in said
    assert "A checkpoint needs 0.1 MB." in said
    assert f"Training stopped after step 4; the same command goes on from {last}." in said
    assert manifest.problems_in(last) == []
    assert [path for path in run.path.rglob("*") if storage.is_temporary(path)] == []


def test_a_closed_terminal_stops_the_run_after_saving(make_config: Callable[..., Path]):
    """SIGHUP is a request as SIGTERM is, unless who started it had it ignored, as nohup does."""
    with interrupt.listening("lora train"), interrupt.patience():
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(0)
        assert interrupt.requested().signal_number == signal.SIGHUP
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupt.listening("lora train"):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.requested().wanted
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("is_there", [True, False])
def test_stopped_while_getting_ready_nothing_is_left(is_there: bool, tmp_path: Path):
    """The process ends at once; the folders it made for the run are gone, and no other."""
    run = run_dir.RunDir(tmp_path / "runs" / "first")
    if is_there:
        run.path.mkdir(parents=True)

    def stopped() -> int:
        with interrupt.listening("lora train"), run_dir.held(run) as leave, interrupt.leaving(leave):
            assert run.holder.exists()
            os.kill(os.getpid(), signal.SIGTERM)
        return 0

    assert faults.forked(stopped) == 143
    assert (tmp_path / "runs").exists() == is_there
    assert not run.holder.exists()


def test_a_few_faults_of_the_disk(tmp_path: Path):
    """One call that fails, one size of file, one end of room each: exit 3 at most, nothing lost, the same end."""
    found = faults.run(seed=0, count=6, folder=tmp_path / "faults")

    assert (found["tried"], found["failures"]) == (6, [])
