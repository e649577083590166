"""What is written appears whole or not at all, and a changed byte is found."""

import os
import resource
import signal
import stat
from pathlib import Path

import pytest

from lora_cli import checkpoint, manifest, run_dir, storage
from lora_cli.errors import AdapterError, SurroundingsError
from lora_cli.run_dir import RunDir


def sealed(path: Path) -> Path:
    with storage.new_directory(path) as folder:
        storage.add_file(folder / "a.bin", bytes(range(256)))
        storage.add_file(folder / "b.txt", "b")
    return path


def test_of_two_that_write_a_folder_at_once_one_is_kept(tmp_path: Path):
    """The second finds it there when it is done, says so, and leaves nothing of its own."""

    def write_twice() -> None:
        with storage.new_directory(tmp_path / "a") as second:
            (second / "x").write_text("second")
            with storage.new_directory(tmp_path / "a") as first:
                (first / "x").write_text("first")

    with pytest.raises(AdapterError, match="was written by another process in the meantime"):
        write_twice()

    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "first"


def test_a_sealed_directory_is_whole(tmp_path: Path):
    """The manifest names every file, modes follow the umask, and nothing temporary stays."""
    before = os.umask(0o027)
    try:
        folder = sealed(tmp_path / "x")
        storage.write_file(tmp_path / "y", "y")
    finally:
        os.umask(before)

    assert manifest.problems_in(folder) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y"]
    paths = (folder, folder / "a.bin", folder / manifest.MANIFEST, tmp_path / "y")
    assert [oct(stat.S_IMODE(path.stat().st_mode)) for path in paths] == ["0o750", "0o640", "0o640", "0o640"]


def test_an_error_inside_leaves_nothing(tmp_path: Path):
    """Neither the directory nor its temporary folder is there after a failure."""

    def fail() -> None:
        with storage.new_directory(tmp_path / "x") as folder:
            (folder / "a").write_text("a")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()

    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_never_overwritten(tmp_path: Path):
    """An existing one is an error."""
    sealed(tmp_path / "x")
    with pytest.raises(AdapterError, match="already exists"):
        sealed(tmp_path / "x")


@pytest.mark.parametrize("position", [0, 100, 255])
def test_every_flipped_bit_is_found(tmp_path: Path, position: int):
    """A hash for every file."""
    folder = sealed(tmp_path / "x")
    raw = bytearray((folder / "a.bin").read_bytes())
    raw[position] ^= 0x10
    (folder / "a.bin").write_bytes(raw)

    assert ["its content is not what was written" in problem for problem in manifest.problems_in(folder)] == [True]


def test_cut_missing_and_hostile(tmp_path: Path):
    """A cut file, a missing file, no manifest, and a manifest that points out of its folder are each named."""
    folder = sealed(tmp_path / "x")
    (folder / "a.bin").write_bytes(b"short")
    (folder / "b.txt").unlink()
    cut, missing = manifest.problems_in(folder)
    assert ("has 5 bytes, was written with 256" in cut, "is missing" in missing) == (True, True)

    (folder / manifest.MANIFEST).write_text('{"files": {"../secret": {"size": 1, "sha256": "0"}}}')
    assert "leads out of its folder" in manifest.problems_in(folder)[0]
    (folder / manifest.MANIFEST).write_text("[]")
    assert "cannot be read" in manifest.problems_in(folder)[0]
    (folder / manifest.MANIFEST).unlink()
    assert "cannot be read" in manifest.problems_in(folder)[0]


def test_a_name_that_stands_twice_hides_nothing(tmp_path: Path):
    """JSON keeps the last of two entries; a manifest in which one is hidden is not as it was written."""
    folder = sealed(tmp_path / "x")
    listed = folder / manifest.MANIFEST
    listed.write_text(listed.read_text().replace('"a.bin"', '"b.txt"'))
    (folder / "a.bin").write_bytes(b"changed")

    assert manifest.problems_in(folder) == [f"{listed}: is not as it was written"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path):
    """When the system refuses to write, the old content stays, and the error has the path."""
    path = tmp_path / "config.yaml"
    storage.write_file(path, "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
    try:
        with pytest.raises(SurroundingsError, match=r"config\.yaml: cannot be written"):
            storage.write_file(path, "new" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)

    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_left_overs_of_ours_are_swept_and_only_they(tmp_path: Path):
    """What a killed process left half-written goes at the next start."""
    (tmp_path / ".lora-tmp-abc").mkdir()
    (tmp_path / ".lora-tmp-file").write_text("x")
    (tmp_path / ".mine").write_text("x")
    storage.sweep(tmp_path)

    assert [p.name for p in tmp_path.iterdir()] == [".mine"]


def test_latest_and_prune(tmp_path: Path):
    """The newest whole checkpoint is used; the best one that a kept one refers to is not deleted."""
    run = RunDir(tmp_path)
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        with storage.new_directory(run_dir.checkpoint_path(run, step)) as folder:
            (folder / checkpoint.STATE).write_text(f'{{"step": {step}, "stopping": {{"best_step": {best}}}}}')
    checkpoint.prune(run, keep=2)
    assert [step for step, _ in run_dir.step_folders(run)] == [5, 4, 2]

    (run_dir.checkpoint_path(run, 5) / checkpoint.STATE).write_text("{}")
    path, problems = checkpoint.latest(run)
    assert (path, len(problems)) == (run_dir.checkpoint_path(run, 4), 1)
