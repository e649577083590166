"""Names read from files are plain relative ones, on every system; links out of a run are not followed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Invoke

from lora_cli import base_folder, config_file, names
from lora_cli.errors import ModelError

HOSTILE = (
    "../secret", "a/../../secret", "..", ".", "", "/etc/passwd", "//server/share", "~/x", "~root/x", "C:\\x", "C:x",
    "a\\..\\..\\x", "\\\\server\\share", "x\0.safetensors", "a\nb", "x\u202egnp.exe", "a" * 300, "a/" * 600 + "a",
    "nul", "COM1.txt", "x.safetensors.", "x ", "file:stream", "a//b", "\uff0e\uff0e\uff0fx", "\udcff", 3, None,
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_hostile_name_is_refused(name: object):
    """Whatever system would read it as another place, it is refused on this one."""
    assert names.problem_with(name)


@pytest.mark.parametrize(
    "name", ["model-00001-of-00002.safetensors", "additional_chat_templates/tool_use.jinja", "數.x"]
)
def test_a_plain_name_is_taken(name: str):
    """Names as models have them, inner folders and other scripts too."""
    assert names.problem_with(name) is None


def test_an_index_names_only_files_of_its_folder(tmp_path: Path):
    """A name that leads elsewhere is refused, even where a file is there; the message shows it cut and escaped."""
    inner = tmp_path / "model"
    inner.mkdir()
    (tmp_path / "secret").touch()
    for name in (each for each in HOSTILE if each is not None):
        (inner / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(ModelError, match=r"not in this folder|must be names of tensors"):
            base_folder.weight_files(inner)


def test_links_out_of_a_run_are_not_followed(invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path):
    """A checkpoint, an adapter or a file of a run that is a link to elsewhere is an error, for all that read it."""
    run = tmp_path / "run"
    assert invoke("train", make_config(**{"train.max_steps": 1}))[0] == 0
    (run / "adapter").rename(tmp_path / "elsewhere")
    (run / "adapter").symlink_to(tmp_path / "elsewhere")
    for command in ("eval", "export", "merge"):
        code, _, err = invoke(command, run, *(() if command == "eval" else ("--output", tmp_path / "new")))
        assert (code, "a link that leads out of the run directory" in err) == (2, True)
    (run / "adapter").unlink()
    (tmp_path / "elsewhere").rename(run / "adapter")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(tmp_path / "rows.jsonl")
    before = (tmp_path / "rows.jsonl").read_bytes()
    code, _, err = invoke("train", make_config(**{"train.max_steps": 1}))

    assert (code, "metrics.jsonl: is a link that leads out" in err) == (2, True)
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_a_linked_run_and_linked_files_of_a_model_are_read(
    invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path
):
    """A link to a whole run is as the run; a hub cache's links to its blobs are as its files."""
    config = make_config(**{"train.max_steps": 1})
    cached = tmp_path / "cached"
    cached.mkdir()
    for file in Path(config_file.load(config).model.path).iterdir():
        (cached / file.name).symlink_to(file)
    assert invoke("train", make_config(**{"train.max_steps": 1, "model.path": str(cached)}))[0] == 0
    (tmp_path / "latest").symlink_to(tmp_path / "run")

    assert invoke("export", tmp_path / "latest", "--output", tmp_path / "exported")[0] == 0
