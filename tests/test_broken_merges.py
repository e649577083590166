"""Merges that cannot be right: each ends with its reason and exit code, and leaves nothing behind."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import save_base, save_with_peft, shrink

from lora_cli import base_folder, model, storage
from lora_cli.adapter import WEIGHTS
from lora_cli.config import ModelConfig
from lora_cli.errors import AdapterError, ModelError, UserError
from lora_cli.lora_linear import MAGNITUDE
from lora_cli.merge import merge
from lora_cli.merged_folder import Form
from lora_cli.tensor_file import read_infos
from lora_cli.weights import Weights


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change a file's tensors in place."""
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, {"format": "pt"})


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
BROKEN: dict[str, tuple[Callable[[Path], Any], str, int]] = {
    "another base of the same shapes": (
        lambda at: edit_tensors(
            shard_with(at, "model.norm.weight"), lambda t: t.update({"model.norm.weight": t["model.norm.weight"] + 1})
        ),
        "was trained on another base",
        2,
    ),
    "a base of other shapes": (
        lambda at: [drop_fingerprint(at), save_base("llama", at / "base", hidden_size=64, shard="30KB")],
        "q_proj is 32 -> 32, in the base 64 -> 64",
        2,
    ),
    "a missing shard": (lambda at: shards(at)[1].unlink(), "which is not in this folder", 2),
    "a shard cut short": (
        lambda at: [drop_fingerprint(at), cut(shards(at)[1])],
        "it is cut or damaged",
        2,
    ),
    "a shard that is no safetensors": (
        lambda at: [drop_fingerprint(at), shards(at)[1].write_bytes(b"\xff" * 500)],
        "is no whole safetensors file",
        2,
    ),
    "an index that names a file elsewhere": (
        lambda at: edit_json(at / "base" / "model.safetensors.index.json", weight_map={"a": "../../x.safetensors"}),
        "which is not in this folder",
        2,
    ),
    "a base without the adapted tensor": (
        lambda at: [
            drop_fingerprint(at),
            edit_tensors(shard_with(at, "q_proj"), lambda t: t.pop(LAYER[17:] + ".weight")),
        ],
        "the base's files have no model.layers.0.self_attn.q_proj.weight",
        2,
    ),
    "an adapter of zeros": (
        lambda at: edit_tensors(at / "a" / WEIGHTS, lambda t: [v.zero_() for n, v in t.items() if "lora_B" in n]),
        "this adapter is untrained",
        2,
    ),
    "an adapter with a number that is not finite": (
        lambda at: edit_tensors(at / "a" / WEIGHTS, lambda t: t[f"{LAYER}.lora_B.weight"].fill_(float("nan"))),
        "is not a matrix of finite numbers",
        2,
    ),
    "an adapter tensor that matches nothing": (
        lambda at: edit_tensors(
            at / "a" / WEIGHTS,
            lambda t: t.update({n.replace("layers.0", "layers.9"): t.pop(n) for n in [*t] if LAYER in n}),
        ),
        "adapts model.layers.9.self_attn.q_proj, but the base has no such linear layer",
        2,
    ),
    "half of a pair": (
        lambda at: edit_tensors(at / "a" / WEIGHTS, lambda t: t.pop(f"{LAYER}.lora_A.weight")),
        "has only one of lora_A and lora_B",
        2,
    ),
    "an adapter of the tied output head": (
        lambda at: edit_tensors(
            at / "a" / WEIGHTS,
            lambda t: t.update(
                {
                    n.replace(LAYER[17:], "lm_head"): torch.ones(4, 32) if "_A" in n else torch.ones(400, 4)
                    for n in [*t]
                    if LAYER in n
                }
            ),
        ),
        "the output head, which cannot be adapted here",
        2,
    ),
    "an adapter file cut short": (lambda at: cut(at / "a" / WEIGHTS), "cannot be read", 2),
    "DoRA without a magnitude": (
        lambda at: edit_json(at / "a" / "adapter_config.json", use_dora=True),
        "has no lora_magnitude_vector, and adapter_config.json says use_dora: true",
        2,
    ),
    "a magnitude without DoRA": (
        lambda at: edit_tensors(at / "a" / WEIGHTS, lambda t: t.update({f"{LAYER}.{MAGNITUDE}": torch.ones(8)})),
        "has a lora_magnitude_vector, and adapter_config.json says use_dora: false",
        2,
    ),
    "a quantised base": (
        lambda at: [
            drop_fingerprint(at),
            edit_json(at / "base" / "config.json", quantization_config={"quant_method": "fp8"}),
        ],
        "stored quantised",
        2,
    ),
    "an output that is there": (lambda at: (at / "merged").mkdir(), "already exists", 2),
    "an output whose folder is a file": (lambda at: (at / "merged").touch(), "already exists", 2),
    "an update that bfloat16 cannot hold": (lambda at: shrink(at / "a", 1e-6), "The adapter itself moves them", 2),
}


def drop_fingerprint(at: Path) -> None:
    """Make of the adapter one from elsewhere, which does not know its base."""
    (at / "a" / "base.json").unlink()


def shards(at: Path) -> list[Path]:
    return sorted((at / "base").glob("*.safetensors"))


def shard_with(at: Path, name: str) -> Path:
    return next(file for file in shards(at) if any(name in tensor for tensor in read_infos(file)))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


@pytest.fixture
def mergeable(tmp_path: Path) -> Path:
    """A folder with base/ (sharded, bfloat16, tied) and a/, an adapter of ours for it."""
    base = save_base("llama", tmp_path / "base", torch.bfloat16, shard="20KB")
    save_with_peft(str(base), tmp_path / "a")
    (tmp_path / "a" / "base.json").write_text(json.dumps({"fingerprint": base_folder.fingerprint(base)}))
    (tmp_path / "a" / "README.md").unlink(missing_ok=True)
    return tmp_path


def below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_merge(name: str, mergeable: Path):
    """Ends with the reason and its exit code, and leaves nothing behind; the same merge unbroken is done."""
    damage, expected, code = BROKEN[name]
    damage(mergeable)
    before = below(mergeable)
    with pytest.raises(UserError, match=expected) as raised:
        merge([mergeable / "a"], mergeable / "merged")

    assert raised.value.exit_code == code
    assert below(mergeable) == before


def test_the_unbroken_merge_of_these(mergeable: Path):
    """What the broken ones are broken from."""
    assert merge([mergeable / "a"], mergeable / "merged").agreement.top1_agreement > 0.9


def test_a_base_with_this_adapter_in_it(mergeable: Path):
    """An adapter is not added twice."""
    merge([mergeable / "a"], mergeable / "merged")
    drop_fingerprint(mergeable)
    with pytest.raises(AdapterError, match="is merged into it already"):
        merge([mergeable / "a"], mergeable / "twice", base=str(mergeable / "merged"))
    assert not (mergeable / "twice").exists()


def test_wrong_weights_are_found_by_reading_them_back(mergeable: Path, monkeypatch: pytest.MonkeyPatch):
    """When what is written is not base + adapter the command fails and the folder is gone; `force` keeps it."""
    before = below(mergeable)
    right = Weights.change
    monkeypatch.setattr(Weights, "change", lambda self, name, *rows: right(self, name, *rows) * 0.2)
    with pytest.raises(AdapterError, match="differ from base"):
        merge([mergeable / "a"], mergeable / "merged")
    assert below(mergeable) == before
    assert merge([mergeable / "a"], mergeable / "merged", force=True).forced


def test_a_merged_model_that_changed_is_refused(mergeable: Path):
    """One flipped bit in its weights: found before a command runs on them, and the file named."""
    os.chdir(mergeable)
    merge([Path("a")], Path("merged"))
    (file, *_) = sorted(Path("merged").glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-2] ^= 4
    file.write_bytes(raw)
    config = ModelConfig(path="merged")

    with pytest.raises(ModelError, match=f"{file}: its content is not what was written"):
        model.load_model(model.read_header(config), config, torch.device("cpu"))


def test_numbers_beyond_float16(mergeable: Path):
    """A weight that float16 has no number for is refused, not written as infinity."""
    edit_tensors(shard_with(mergeable, "model.norm.weight"), lambda t: t["model.norm.weight"].fill_(1e6))
    drop_fingerprint(mergeable)
    with pytest.raises(AdapterError, match=r"model\.norm\.weight: has numbers that are not finite in float16"):
        merge([mergeable / "a"], mergeable / "merged", form=Form("float16"))
    assert not (mergeable / "merged").exists()


MERGE = [sys.executable, "-m", "lora_cli", "merge", "a", "--output", "merged"]


def test_a_write_that_fails_in_the_middle(mergeable: Path):
    """The system refuses to let a file grow: exit 3, the reason, nothing left."""
    before = below(mergeable)
    largest = max(file.stat().st_size for file in shards(mergeable))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest - 1000, largest - 1000))

    done = subprocess.run(MERGE, cwd=mergeable, preexec_fn=limit, capture_output=True, text=True, check=False)

    assert (done.returncode, below(mergeable)) == (3, before)
    assert "cannot be written" in done.stderr


def test_too_little_room_is_known_before(mergeable: Path, monkeypatch: pytest.MonkeyPatch):
    """No byte is written to a disk that has not the room."""
    usage = shutil.disk_usage(mergeable)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    monkeypatch.setattr(storage, "new_directory", None)
    with pytest.raises(UserError, match=r"needs 0\.\d MB, and 0\.\d MB are free") as raised:
        merge([mergeable / "a"], mergeable / "merged")
    assert raised.value.exit_code == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_in_the_middle(number: signal.Signals, mergeable: Path):
    """Nothing under the output's name; what a SIGKILL leaves is swept by the next merge, which is whole."""
    before = below(mergeable)
    process = subprocess.Popen(MERGE, cwd=mergeable, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not list(mergeable.glob(".lora-tmp-*/*.safetensors")):
        time.sleep(0.001)
    process.send_signal(number)
    process.communicate()

    assert process.returncode in (-number, 128 + number)
    assert not (mergeable / "merged").exists()
    left = below(mergeable) - before
    assert bool(left) == (number == signal.SIGKILL)
    assert all(name.startswith(".lora-tmp-") for name in left)
    for folder in mergeable.glob(".lora-tmp-*"):  # as old as one that nobody is about to hold
        os.utime(folder, (0, 0))
    merge([mergeable / "a"], mergeable / "merged")
    assert not list(mergeable.glob(".lora-tmp-*"))
