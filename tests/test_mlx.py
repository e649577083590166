"""Adapters for MLX, with mlx-lm's CPU build as the judge: it loads what we wrote, and its logits are ours."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TOKENS, build_tokenizer, our_logits, write_adapter

from lora_cli import adapter, export, tuned
from lora_cli.config import LoraConfig
from lora_cli.errors import AdapterError
from lora_cli.formats import mlx_adapter
from lora_cli.runtimes import MLX

mx = pytest.importorskip("mlx.core", reason="mlx is not here")
mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not here")


COMMON = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
BLOCKS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BLOCKS |= {"num_key_value_heads": 2, "max_position_embeddings": 512}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
MORE: dict[str, dict[str, Any]] = {  # what a small model of a type needs beside
    "cohere2": {"num_hidden_layers": 4},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
    "gemma3_text": {"num_hidden_layers": 6},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "granitemoe": {"num_local_experts": 4},
    "mixtral": {"num_local_experts": 4},
    "olmoe": EXPERTS,
    "qwen2_moe": EXPERTS | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
}
HEADS = (
    "ernie4_5",
    "falcon_h1",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4",
    "helium",
    "hunyuan_v1_dense",
    "qwen3",
    "seed_oss",
)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Return a function from a model type to a folder of it as the hub has them: config.json of before 5.0."""

    def folder(model_type: str, **more: Any) -> str:
        path = tmp_path_factory.mktemp(model_type)
        blocks = {} if model_type == "gpt2" else BLOCKS | ({"head_dim": 8} if model_type in HEADS else {})
        settings = COMMON | blocks | MORE.get(model_type, {}) | more
        torch.manual_seed(7)
        config = transformers.AutoConfig.for_model(model_type, **settings)
        module = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.15)
        module.save_pretrained(path)
        build_tokenizer().save_pretrained(path)
        values = json.loads((path / "config.json").read_text())
        rope = values.get("rope_parameters") or {}
        values |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        if "full_attention" in rope:
            values |= {"rope_theta": rope["full_attention"]["rope_theta"], "sliding_window_pattern": 6}
        values |= {"n_ctx": values.get("n_positions")}
        values |= {"sliding_window_pattern": 4} if model_type == "cohere2" else {}
        (path / "config.json").write_text(json.dumps(values))
        if model_type == "gpt2":  # mlx-lm knows the names of the first release only
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
    "dora": LoraConfig(method="dora", rank=4, alpha=8),
    "dora on some layers": LoraConfig(method="dora", rank=4, target_modules=("layers.1.self_attn.v_proj",)),
    "some modules": LoraConfig(rank=3, alpha=7, target_modules=("q_proj", "down_proj")),
    "some layers": LoraConfig(rank=3, alpha=7, target_modules=("layers.1.self_attn.v_proj", "layers.1.mlp.up_proj")),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_mlx_gives_our_logits(name: str, base_folder: Callable[[str], str], tmp_path: Path):
    """A plain adapter, rsLoRA's scale, DoRA's magnitude, and some modules or layers: others stay as they are."""
    base = base_folder("llama")
    write_adapter(base, tmp_path / "adapter", CONFIGS[name])
    export.export(tmp_path / "adapter", "mlx", tmp_path / "mlx")

    assert torch.allclose(mlx_logits(base, tmp_path / "mlx"), our_logits(tmp_path / "adapter"), atol=1e-4)


@pytest.mark.parametrize("model_type", sorted(MLX))
def test_every_type_that_is_written(model_type: str, base_folder: Callable[[str], str], tmp_path: Path):
    """Of each type that is not refused every linear layer is found by mlx-lm, GPT-2's transposed ones too."""
    base = base_folder(model_type)
    write_adapter(base, tmp_path / "adapter", LoraConfig(rank=4, alpha=8))
    export.export(tmp_path / "adapter", "mlx", tmp_path / "mlx")
    own_activation = model_type in ("gemma", "gemma3_text", "starcoder2")  # mlx-lm's GELU is another approximation
    difference = mlx_logits(base, tmp_path / "mlx") - our_logits(tmp_path / "adapter")

    assert difference.abs().max() < (5e-3 if own_activation else 1e-4)


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


def test_only_the_last_blocks_are_wrapped(base_folder: Callable[..., str], tmp_path: Path):
    """num_layers counts from the first adapted block to the last."""
    base = base_folder("llama", num_hidden_layers=4)
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
    notes = export.export(tmp_path / "adapter", "mlx", tmp_path / "mlx").notes

    assert re.search(r'rope_parameters, .* llama model: add "rope_theta": 10000', notes[0])
