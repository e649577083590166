"""RMSNorm, gated MLP and rotary positions: found by trying, equal to what they replace, and keeping less."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from lora_cli import lora, memory
from lora_cli.config import LoraConfig, ModelConfig, RunConfig
from lora_cli.forward import share_inputs
from lora_cli.fused import fuse
from lora_cli.model import load_model, read_header


def build(folder: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return an adapted model with an update that is not zero, and with its own attention."""
    config = ModelConfig(path=folder)
    loaded = load_model(read_header(config), config, torch.device("cpu"))
    lora.apply_lora(loaded.module, LoraConfig(rank=4, alpha=8), seed=0)
    share_inputs(loaded)
    for _, layer in lora.lora_layers(loaded.module):
        nn.init.normal_(layer.lora_B, std=0.1)
    loaded.module.set_attn_implementation(loaded.own_attention)
    return loaded.module.to(dtype)


def replaced(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize(
    ("kind", "norms", "gated", "turned"),
    [
        ("llama", 5, 2, 2),
        ("qwen3", 9, 2, 2),
        ("gemma2", 9, 2, 2),
        ("granite", 5, 2, 2),
        ("gpt2", 0, 0, 0),
        ("cohere", 0, 2, 0),
    ],
)
def test_what_is_replaced(kind: str, norms: int, gated: int, turned: int, model_folder: Callable[[str], str]):
    """Every RMSNorm (Gemma's too, which scales by 1 + weight), every gated MLP, and rotary positions in halves.

    No LayerNorm, no plain MLP, and not Cohere's rotation of neighbours.
    """
    module = build(model_folder(kind))
    fuse(module)
    found = replaced(module)

    assert len([path for path in found if "norm" in path]) == norms
    assert len([path for path in found if path.endswith("mlp")]) == gated
    assert len([path for path in found if path.endswith("attn")]) == turned
    assert len(found) == norms + gated + turned


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_the_parts_they_replace(kind: str, dropout: float, model_folder: Callable[[str], str]):
    """The logits and every gradient are the same to 1e-6 (the parts' own forward computes in float32)."""
    module = build(model_folder(kind))
    for _, layer in lora.lora_layers(module):
        layer.training, layer.dropout = True, dropout
    ids = torch.arange(3, 24)[None]

    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        logits = module(input_ids=ids, use_cache=False).logits
        parameters = list(lora.trainable(module).values())
        return [logits.detach(), *torch.autograd.grad(logits.sin().sum(), parameters)]

    before = gradients()
    fuse(module)
    for ours, theirs in zip(gradients(), before, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_an_mlp_that_does_more_stays_as_it_is(model_folder: Callable[[str], str]):
    """A forward that is not down(act(gate) * up) gives other numbers in the trial, so it is kept."""
    module = build(model_folder("llama"))
    mlp = module.get_submodule("model.layers.0.mlp")
    own = type(mlp).forward
    mlp.__class__ = type("Louder", (type(mlp),), {"forward": lambda self, x: 2 * own(self, x)})
    norm = module.get_submodule("model.layers.0.input_layernorm")
    norm.__class__ = type("Shifted", (type(norm),), {"forward": lambda self, x: x - x.mean(-1, keepdim=True)})
    fuse(module)

    assert not {"model.layers.0.mlp", "model.layers.0.input_layernorm"} & set(replaced(module))
    assert "model.layers.1.mlp" in replaced(module)


def test_no_other_model_gets_our_rotation(model_folder: Callable[[str], str]):
    """The function in transformers' file stays, and so does the forward of a model that is not fused."""
    modules = [build(model_folder("llama")) for _ in range(2)]
    attention, other = (module.get_submodule("model.layers.0.self_attn") for module in modules)
    theirs = modeling_llama.apply_rotary_pos_emb
    fuse(modules[0])

    assert attention.forward.__globals__["apply_rotary_pos_emb"] is not theirs
    assert modeling_llama.apply_rotary_pos_emb is theirs
    assert "forward" not in vars(other)


def test_the_base_and_evaluation_run_as_before(model_folder: Callable[[str], str]):
    """Without gradients every part runs its own forward; with the gain at zero the gradients' way gives the base."""
    module = build(model_folder("llama"))
    ids = torch.arange(3, 24)[None]
    with torch.no_grad():
        tuned = module(input_ids=ids).logits
        with lora.gain(module, 0.0):
            base = module(input_ids=ids).logits
        fuse(module)
        assert torch.equal(module(input_ids=ids).logits, tuned)
    with lora.gain(module, 0.0):
        assert torch.allclose(module(input_ids=ids).logits, base, atol=1e-6)


def test_less_is_kept(model_folder: Callable[[str], str]):
    """The product of the gated MLP and the activation in it are not kept: 48 numbers each, in two blocks."""
    values = {"model": model_folder("llama"), "data": {"train": "x"}, "output_dir": "x"}
    kept = {}
    for compiled in (False, True):  # the compiler fuses by itself, so nothing is replaced
        config = RunConfig.model_validate(values | {"train": {"compile": compiled}})
        kept[compiled] = memory.kept_by_a_token(build(model_folder("llama"), torch.float32), config)

    assert kept[True] - kept[False] >= 2 * 2 * 48 * 4


def test_a_norms_output_that_was_changed_is_kept_as_it_is(model_folder: Callable[[str], str]):
    """It is made again for the backward pass only where nobody wrote into it."""
    config = ModelConfig(path=model_folder("llama"))
    loaded = load_model(read_header(config), config, torch.device("cpu"))
    lora.apply_lora(loaded.module, LoraConfig(rank=4), seed=0)
    block = loaded.module.to(torch.float64).get_submodule("model.layers.0")
    fuse(loaded.module)
    layer = block.self_attn.q_proj
    nn.init.normal_(layer.lora_B, std=0.1)
    x = torch.randn(2, 3, layer.lora_A.shape[1], dtype=torch.float64)
    gradients = []
    for in_place in (True, False):
        normed = block.input_layernorm(x.clone().requires_grad_())
        layer(normed.mul_(3.0) if in_place else normed * 3.0).square().sum().backward()
        gradients.append(layer.lora_A.grad.clone())
        layer.lora_A.grad = None

    assert torch.allclose(*gradients, rtol=1e-12)
    assert gradients[0].norm() > 0
