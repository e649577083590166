"""A part of what scripts/torture tries in full: kills at operations, power cuts, rot. Each in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent


def figures_of(expression: str, folder: Path) -> dict[str, Any]:
    """Evaluate an expression over `folder` and the modules of torture in a fresh process, from which others fork."""
    program = (
        "import json, sys\nfrom pathlib import Path\nfrom torture import crash, power, rot\n"
        f"folder = Path(sys.argv[1])\nfigures = {expression}\n"
        "Path(sys.argv[2]).write_text(json.dumps(figures))\n"
    )
    out = folder.with_suffix(".json")
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(out)],
        env={**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    figures: dict[str, Any] = json.loads(out.read_text())
    return figures


def test_a_kill_at_any_operation_changes_nothing(tmp_path: Path):
    """Killed at points all over a run, a merge and a data cache, the same command ends with the same bytes."""
    scenes = ["short run", "merge", "data cache"]
    figures = figures_of(f"crash.try_points(3, 9, folder, None, {scenes})", tmp_path / "x")

    assert figures["failures"] == []
    assert figures["points"] > 200
    assert figures["tried"] >= 9


def test_planted_faults_are_noticed_by_kills(tmp_path: Path):
    """A folder written under its final name, and a patience that is not restored, do not pass."""
    program = "{name: crash.try_points(0, 4, folder / name, name, [crash.PLANTED_SCENE]) for name in crash.PLANTS}"
    found = figures_of(program, tmp_path / "x")

    assert set(found) == {"renamed first", "patience forgotten"}
    assert all(figures["failures"] for figures in found.values())


def test_a_power_cut_leaves_nothing_half_made_and_every_fsync_is_needed(tmp_path: Path):
    """In every state of the disk that a cut may leave what was said to be kept is whole; not so without any fsync."""
    figures = figures_of('power.run(0, 0, folder, ["short run", "export gguf"])', tmp_path / "x")

    assert figures["failures"] == []
    assert figures["tried"] > 400
    assert len(figures["fsyncs_proven"]) == 11


def test_flipped_bits_and_cut_files_are_found_and_named(tmp_path: Path):
    """In every file of a checkpoint, an adapter and a merged model."""
    figures = figures_of("rot.run(1, 150, folder)", tmp_path / "x")

    assert figures["failures"] == []
    assert (figures["tried"], figures["files"] > 20) == (165, True)
