"""PiSSA: an adapter that starts from the base's largest singular vectors, and is written as a plain one."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import Invoke, facts
from test_loop import step_gradients
from test_lora import CPU, load, logits
from test_resume import going, stop_after
from torch import nn

from lora_cli import adapter, adapter_folder, checkpoint, lora, model, tuned
from lora_cli.adapter_folder import Origin
from lora_cli.config import LoraConfig, ModelConfig
from lora_cli.dropout import token_keys
from lora_cli.examples import Example
from lora_cli.forward import share_inputs
from lora_cli.fused import fuse
from lora_cli.lora_linear import LoraLinear
from lora_cli.merge import merge
from lora_cli.pissa import principal_factors
from lora_cli.records import Notice

PISSA = LoraConfig(init="pissa", rank=4, alpha=8)
SETTINGS = {"lora.init": "pissa", "train.max_steps": 6, "train.learning_rate": 0.002}


@pytest.mark.parametrize("shape", [(90, 60), (60, 90), (8, 100)])
def test_the_start_is_what_the_largest_singular_values_make(shape: tuple[int, int]):
    """As by all singular values, where they fall by a tenth each; of a random matrix nearly as much of it."""
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    falling = left * 0.9 ** torch.arange(min(shape)) @ right
    for weight, bound in ((falling, 1e-5), (torch.randn(shape), 0.05)):
        down, up = principal_factors(weight, 6, 0.5, seed=1)
        left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
        best = left[:, :6] * sizes[:6] @ right[:6]

        assert (down.shape, up.shape) == ((6, shape[1]), (shape[0], 6))
        assert (0.5 * up @ down - best).norm() < bound * best.norm()
        assert torch.allclose(down.norm(dim=1), up.norm(dim=0), rtol=1e-4), "half of each value is in either"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_training_starts_at_the_base_bit_for_bit(kind: str, dtype: torch.dtype, model_folder: Callable[[str], str]):
    """In half precision too; both A and B have a gradient at once, and gain 0 is the base wherever they are."""
    loaded, _ = load(model_folder(kind))
    loaded.module.to(dtype)
    base = logits(loaded.module)
    lora.apply_lora(loaded.module, PISSA, seed=0)
    share_inputs(loaded)
    fuse(loaded.module)
    assert torch.equal(logits(loaded.module), base)

    step_gradients(loaded, [Example(tuple(range(3, 30)), tuple(range(3, 30)), "")], 0, False)
    assert all(parameter.grad.any() for parameter in lora.trainable(loaded.module).values())
    with torch.no_grad():
        for parameter in lora.trainable(loaded.module).values():
            parameter.add_(0.1)
    assert not torch.allclose(logits(loaded.module), base, atol=0.1)
    with lora.gain(loaded.module, 0.0):
        assert torch.equal(logits(loaded.module), base)


def test_outputs_and_gradients_are_those_of_the_formula():
    """W x + s (B A - B0 A0) x, for x, A and B; what is dropped is missing from both products."""
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(9, 7), 2, 0.5, dropout=0.5, has_start=True)
    layer.reset(0)
    layer = layer.double()
    before = layer.written()
    with torch.no_grad():
        layer.lora_A.add_(torch.randn(2, 9))
        layer.lora_B.add_(torch.randn(7, 2))
    layer.training, layer.tokens.keys = True, (token_keys(range(40)),)
    x = torch.randn(40, 9, dtype=torch.float64, requires_grad=True)
    kept = torch.ones(40 * 9).index_fill_(0, layer.active_dropout(40).draw(9), 0).view(40, 9)
    start = before["lora_B"][:, :2] @ before["lora_A"][:2]
    plain = layer.base(x) + (x * kept / 0.5) @ (layer.lora_B @ layer.lora_A - start.detach()).T * 0.5
    inputs = (x, layer.lora_A, layer.lora_B)
    ours = layer(x)

    assert torch.allclose(ours, plain)
    for mine, theirs in zip(*(torch.autograd.grad(y.sin().sum(), inputs) for y in (ours, plain)), strict=True):
        assert torch.allclose(mine, theirs)
    layer.training = False
    with torch.no_grad():
        assert torch.allclose(layer(x), nn.functional.linear(x, layer.merged(), layer.base.bias))


@pytest.mark.parametrize("method", ["lora", "rslora"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_peft_gives_the_logits_of_what_is_trained(
    kind: str, method: Any, model_folder: Callable[[str], str], tmp_path: Path
):
    """On the base as it was: its own logits at the start, ours after A and B have moved."""
    loaded, _ = load(model_folder(kind))
    base = logits(loaded.module)
    config = PISSA.model_copy(update={"method": method})
    lora.apply_lora(loaded.module, config, seed=0)
    for moved in (0.0, 0.1):
        with torch.no_grad():
            for parameter in lora.trainable(loaded.module).values():
                parameter.add_(moved * torch.randn_like(parameter))
        folder = tmp_path / str(moved)
        folder.mkdir()
        adapter_folder.save(folder, loaded.module, config, Origin(model_folder(kind), None, "f", {}))
        theirs = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(model_folder(kind)), folder
        )
        ours = logits(loaded.module)
        assert (logits(theirs) - ours).norm() < 1e-5 * ours.norm()
        assert torch.equal(ours, base) == (moved == 0.0)


@pytest.mark.parametrize(("kind", "method"), [("llama", "lora"), ("gpt2", "rslora")])
def test_a_run_is_written_as_a_plain_adapter_of_twice_the_rank(
    kind: str, method: str, make_config: Callable[..., Path], model_folder: Callable[[str], str], tmp_path: Path
):
    """Loaded on the base as it was, and merged, it gives the logits of the run."""
    going(make_config(kind, **SETTINGS | {"lora.method": method, "train.learning_rate": 0.02}))
    run = tmp_path / "run"
    found, values = adapter.read(run / "adapter"), json.loads((run / "adapter" / adapter.CONFIG).read_text())
    loaded, _ = load(model_folder(kind))
    base = logits(loaded.module)
    lora.apply_lora(loaded.module, PISSA.model_copy(update={"method": method}), seed=0)
    adapter.load_weights(loaded.module, found)
    scale = 8 / math.sqrt(4) if method == "rslora" else 8 / 4
    ours = logits(loaded.module)

    assert (values["r"], values["init_lora_weights"], values["use_rslora"]) == (8, True, method == "rslora")
    assert found.scales == pytest.approx(dict.fromkeys(found.lora_A, scale))
    assert not torch.allclose(ours, base, atol=0.05)
    assert (logits(tuned.load(tuned.find(run), CPU).module) - ours).norm() < 1e-5 * ours.norm()
    assert merge([run], tmp_path / "merged").agreement.largest_logit_difference < 1e-4
    assert (logits(load(str(tmp_path / "merged"))[0].module) - ours).norm() < 1e-5 * ours.norm()


def test_a_stopped_run_goes_on_to_the_bit(make_config: Callable[..., Path], tmp_path: Path):
    """Where it started is read from the checkpoint, not computed again."""
    settings = SETTINGS | {"lora.dropout": 0.1, "train.weight_decay": 0.1}
    going(make_config(**settings, output_dir=str(tmp_path / "whole")))
    config = make_config(**settings, output_dir=str(tmp_path / "stopped"))
    run = stop_after(config, 3)
    newest, _ = checkpoint.latest(run)
    assert newest is not None
    half, _ = load(json.loads(config.read_text())["model"]["path"])
    lora.apply_lora(half.module, PISSA, seed=5)
    adapter.load_weights(half.module, adapter.read(newest))
    written, read = lora.written(half.module), adapter.read(newest)
    going(config)
    last = adapter.read(run.adapter).lora_A

    assert all(torch.equal(written[f"{path}.lora_A"], tensor) for path, tensor in read.lora_A.items())
    assert all(torch.equal(written[f"{path}.lora_B"], tensor) for path, tensor in read.lora_B.items())
    assert facts(tmp_path / "stopped") == facts(tmp_path / "whole")
    assert all(torch.equal(tensor[4:], last[path][4:]) for path, tensor in read.lora_A.items()), "the start stays"
    assert not any(torch.equal(tensor[:4], last[path][:4]) for path, tensor in read.lora_A.items())


def test_a_quantised_base_is_started_from_as_it_is_left(model_folder: Callable[[str], str]):
    """The singular vectors are those of the dense weights, the base itself keeps its bytes."""
    section = ModelConfig(path=model_folder("llama"), quantization="int8")
    loaded = model.load_model(model.read_header(section), section, CPU)
    base = logits(loaded.module)
    lora.apply_lora(loaded.module, PISSA, seed=0)
    _, layer = next(lora.lora_layers(loaded.module))
    down, up = principal_factors(layer.base.weight, 4, 2.0, seed=7)

    assert torch.equal(logits(loaded.module), base)
    assert (layer.lora_B @ layer.lora_A - up @ down).norm() < 0.05 * (up @ down).norm()


def test_the_rate_and_the_rank_of_what_is_written_follow(make_config: Callable[..., Path], invoke: Invoke):
    """Trials begin at a tenth of the usual rate; `check` tells runtimes of twice the rank, and counts the start."""
    settings: dict[str, Any] = SETTINGS | {"train.learning_rate": "auto", "lora.rank": 8}
    out = json.loads(invoke("check", make_config(**settings), "--json")[1])
    said = [event.text for event in going(make_config(**settings)) if isinstance(event, Notice)]

    assert any("too few to try rates on; 0.0006 is taken" in text for text in said)
    assert out["memory"]["adapter"] == 2 * 16 * out["trainable_parameters"]
    assert [each["note"] for each in out["runtimes"] if each["name"] == "vLLM"] == ["as it is, with --max-lora-rank 16"]
