"""Nothing of a model's folder is run unless the config says so; what is run then is pinned, named and recorded."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Invoke

CODE = """
import pathlib
pathlib.Path({canary!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "brand-new"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def model_with_code(model_folder: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose every file that can name code names some, which would leave a canary."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "coded"
    shutil.copytree(model_folder("llama"), folder)
    (folder / "modeling_own.py").write_text(CODE.format(canary=str(tmp_path / "canary")))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(canary=str(tmp_path / "canary")))
    change(folder / "config.json", model_file="modeling_own.py", auto_map={
        "AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"})  # fmt: skip
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "modeling_own.OwnTokenizer"]})
    change(folder / "generation_config.json", custom_generate="custom_generate/generate.py")
    return folder


def change(file: Path, **values: Any) -> None:
    """Change some keys of a JSON file."""
    before = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(before | values))


def test_no_command_runs_a_models_code(
    invoke: Invoke, make_config: Callable[..., Path], model_with_code: Path, tmp_path: Path
):
    """With a known architecture the model works, its code unused; with a foreign one it is refused."""
    config, run = make_config(**{"model.path": str(model_with_code), "train.max_steps": 1}), tmp_path / "run"
    for command in ("check", "train"):
        assert invoke(command, config)[0] == 0
    assert invoke("eval", run, "--answers", "2")[0] == 0
    assert invoke("merge", run, "--output", tmp_path / "merged")[0] == 0
    for format in ("peft", "mlx"):
        assert invoke("export", run, "--format", format, "--output", tmp_path / format)[0] == 0
    assert not (tmp_path / "canary").exists()
    change(model_with_code / "config.json", model_type="brand-new")
    for arguments in (("check", config), ("train", config, f"output_dir={tmp_path}/other"), ("eval", run)):
        code, _, err = invoke(*arguments)
        assert (code, "trust_remote_code" in err) == (2, True)

    assert not (tmp_path / "canary").exists()


def test_trusted_code_is_named_and_recorded(
    invoke: Invoke, make_config: Callable[..., Path], model_with_code: Path, tmp_path: Path
):
    """It is run, said, and hashed into environment.json; a run does not go on with other code."""
    change(model_with_code / "config.json", model_type="brand-new")
    (model_with_code / "generation_config.json").unlink()
    shutil.rmtree(model_with_code / "custom_generate")
    trusting = {"model.path": str(model_with_code), "model.trust_remote_code": True, "train.max_steps": 2}
    code, _, err = invoke("train", make_config(**trusting))
    content = (model_with_code / "modeling_own.py").read_bytes()
    digest = hashlib.sha256(content).hexdigest()

    assert code == 0, err
    assert (tmp_path / "canary").exists()
    assert f"code of the model's own is run: modeling_own.py (SHA-256 {digest[:12]})" in err
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["remote_code"] == {"modeling_own.py": digest}
    (tmp_path / "canary").unlink()
    code, _, err = invoke("eval", tmp_path / "run", "--answers", "1")  # what a folder says is not the user's word
    assert (code, f"--base {model_with_code}" in err, (tmp_path / "canary").exists()) == (2, True, False)
    code, _, err = invoke("eval", tmp_path / "run", "--answers", "1", "--base", model_with_code)
    assert code == 0, err
    (tmp_path / "run" / "run.json").unlink()
    (model_with_code / "modeling_own.py").write_bytes(content + b"# changed\n")
    code, _, err = invoke("train", make_config(**trusting))
    assert (code, "the model's own code changed since this run began" in err) == (2, True)


@pytest.mark.parametrize("revision", [None, "main", "0" * 39])
def test_code_of_the_hub_is_pinned(invoke: Invoke, make_config: Callable[..., Path], revision: str | None):
    """Without a whole commit it is refused before anything is asked of the hub."""
    settings = {"model.path": "someone/model", "model.trust_remote_code": True, "model.revision": revision}
    code, _, err = invoke("check", make_config(**settings))

    assert code == 2
    assert "model.trust_remote_code: someone/model is no folder here" in err


def test_code_of_another_repository_is_refused(
    invoke: Invoke, make_config: Callable[..., Path], model_with_code: Path, tmp_path: Path
):
    """A model's revision does not pin it, trusted or not."""
    change(model_with_code / "config.json", auto_map={"AutoConfig": "someone/else--modeling.OwnConfig"}, model_type="x")
    settings = {"model.path": str(model_with_code), "model.trust_remote_code": True}
    code, _, err = invoke("check", make_config(**settings))

    assert (code, "auto_map names code of another repository" in err) == (2, True)
    assert not (tmp_path / "canary").exists()
