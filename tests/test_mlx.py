"""Adapters for MLX, with mlx-lm's CPU build as the judge: it loads what we wrote, and its logits are ours."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TOKENS, build_model, build_tokenizer, our_logits, write_adapter

from lora_cli import adapter, export, mlx_adapter, tuned
from lora_cli.config import LoraConfig
from lora_cli.errors import AdapterError
from lora_cli.runtimes import MLX

mx = pytest.importorskip("mlx.core", reason="mlx is not here")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not here")


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function from an architecture to a folder of it as the hub has them: config.json of before 5.0."""

    def folder(kind: str) -> str:
        path = tmp_path_factory.mktemp(kind)
        module = build_model(kind)
        module.save_pretrained(path)
        build_tokenizer().save_pretrained(path)
        values = json.loads((path / "config.json").read_text())
        values["rope_theta"] = (values.get("rope_parameters") or {}).get("rope_theta")
        values["n_ctx"] = values.get("n_positions")
        (path / "config.json").write_text(json.dumps(values))
        if kind == "gpt2":  # mlx-lm knows the names of the first release only
            tensors = {name.removeprefix("transformer."): tensor for name, tensor in module.state_dict().items()}
            del tensors["lm_head.weight"]
            (path / "model.safetensors").write_bytes(adapter.safetensors.torch.save(tensors, {"format": "pt"}))
        return str(path)

    return folder


def mlx_logits(base: str, folder: Path) -> torch.Tensor:
    """The logits of the exported adapter as mlx-lm runs it, [10, V]."""
    module, _ = mlx_lm.load(base, adapter_path=str(folder))
    return torch.tensor(module(mx.array([TOKENS]))[0].astype(mx.float32).tolist())


CONFIGS = {
    "plain": LoraConfig(rank=4, alpha=8),
    "rslora": LoraConfig(method="rslora", rank=6, alpha=5),
    "some modules": LoraConfig(rank=3, alpha=7, target_modules=("q_proj", "down_proj")),
    "some layers": LoraConfig(rank=3, alpha=7, target_modules=("layers.1.self_attn.v_proj", "layers.1.mlp.up_proj")),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_mlx_gives_our_logits(name: str, base_folder: Callable[[str], str], tmp_path: Path):
    """A plain adapter, rsLoRA's scale, and adapters on some modules or layers: the others stay as the base has them."""
    base = base_folder("llama")
    write_adapter(base, tmp_path / "adapter", CONFIGS[name])
    export.export(tmp_path / "adapter", "mlx", tmp_path / "mlx")

    assert torch.allclose(mlx_logits(base, tmp_path / "mlx"), our_logits(tmp_path / "adapter"), atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gemma2", "gpt2", "cohere"])
def test_other_architectures(kind: str, base_folder: Callable[[str], str], tmp_path: Path):
    """Names are those of mlx-lm's models, GPT-2's transposed layers among them."""
    base = base_folder(kind)
    write_adapter(base, tmp_path / "adapter", LoraConfig(rank=4, alpha=8))
    export.export(tmp_path / "adapter", "mlx", tmp_path / "mlx")

    assert torch.allclose(mlx_logits(base, tmp_path / "mlx"), our_logits(tmp_path / "adapter"), atol=1e-4)


def test_ranks_and_alphas_by_layer(base_folder: Callable[[str], str], tmp_path: Path):
    """PEFT's rank_pattern and alpha_pattern: padded to one rank, every scale in its B."""
    base = base_folder("llama")
    values = write_adapter(base, tmp_path / "adapter", LoraConfig(rank=4, alpha=8))
    values |= {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 5, "layers.1.mlp.up_proj": 3}}
    (tmp_path / "adapter" / adapter.CONFIG).write_text(json.dumps(values))
    weights = tmp_path / "adapter" / adapter.WEIGHTS
    tensors = adapter.safetensors.torch.load_file(weights)
    for name, tensor in tensors.items():
        if "q_proj" in name:
            tensors[name] = (tensor[:2] if "lora_A" in name else tensor[:, :2]).contiguous()
    weights.write_bytes(adapter.safetensors.torch.save(tensors, {"format": "pt"}))
    export.export(tmp_path / "adapter", "mlx", tmp_path / "mlx")

    assert torch.allclose(mlx_logits(base, tmp_path / "mlx"), our_logits(tmp_path / "adapter"), atol=1e-4)
    written = json.loads((tmp_path / "mlx" / mlx_adapter.CONFIG).read_text())
    assert written["lora_parameters"]["rank"] == 4
    assert tuned.find(tmp_path / "adapter").adapter.lora_A["model.layers.0.self_attn.q_proj"].shape[0] == 2


def test_only_the_last_blocks_are_wrapped(base_folder: Callable[[str], str], tmp_path: Path):
    """num_layers counts from the first adapted block to the last."""
    base = base_folder("tall")
    write_adapter(base, tmp_path / "adapter", LoraConfig(rank=2, target_modules=("layers.2.self_attn.v_proj",)))
    export.export(tmp_path / "adapter", "mlx", tmp_path / "mlx")
    written = json.loads((tmp_path / "mlx" / mlx_adapter.CONFIG).read_text())

    assert (written["num_layers"], written["lora_parameters"]["keys"]) == (2, ["self_attn.v_proj"])
    assert torch.allclose(mlx_logits(base, tmp_path / "mlx"), our_logits(tmp_path / "adapter"), atol=1e-4)


def test_what_was_not_tried_is_refused(model_folder: Callable[[str], str], tmp_path: Path):
    """A type that mlx-lm lacks or was not tried with is refused by its name, and nothing is written."""
    write_adapter(model_folder("bloom"), tmp_path / "adapter", LoraConfig(rank=2))
    with pytest.raises(AdapterError, match=r"type bloom .* tried with it; these were: cohere, .*llama") as caught:
        export.export(tmp_path / "adapter", "mlx", tmp_path / "mlx")

    assert caught.value.exit_code == 2
    assert not (tmp_path / "mlx").exists()
    assert "bloom" not in MLX


def test_a_wrong_read_back_is_refused(
    base_folder: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What lies on the disk is compared with the adapter before the folder appears."""
    write_adapter(base_folder("llama"), tmp_path / "adapter", LoraConfig(rank=2))
    right = mlx_adapter.safetensors.torch.save
    monkeypatch.setattr(
        mlx_adapter.safetensors.torch,
        "save",
        lambda tensors: right(
            {name: tensor * (1.001 if "down_proj" in name else 1) for name, tensor in tensors.items()}
        ),
    )
    with pytest.raises(AdapterError, match=r"down_proj was read back from adapters.safetensors as another update"):
        export.export(tmp_path / "adapter", "mlx", tmp_path / "mlx")

    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_config_that_mlx_misreads_is_told(model_folder: Callable[[str], str], tmp_path: Path):
    """mlx-lm takes its own rope_theta where config.json has it inside rope_parameters, as transformers 5 writes it."""
    write_adapter(model_folder("llama"), tmp_path / "adapter", LoraConfig(rank=2))
    notes = export.export(tmp_path / "adapter", "mlx", tmp_path / "mlx")

    assert re.search(r'rope_parameters, .* llama model: add "rope_theta": 10000', notes[0])
