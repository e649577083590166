"""DoRA: the magnitude of each output beside A and B, with its formula and PEFT as references."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import Invoke, build_examples, build_model, build_tokenizer, facts, save_with_peft, write_adapter
from test_loop import step_gradients
from test_lora import CPU, load, logits
from test_merge import tensors_of
from test_resume import going, stop_after
from torch import nn

from lora_cli import adapter, adapter_folder, lora, memory, model, scale, tuned
from lora_cli.adapter_folder import Origin
from lora_cli.config import LoraConfig, RunConfig, TrainConfig
from lora_cli.errors import AdapterError
from lora_cli.examples import Example
from lora_cli.export import export
from lora_cli.forward import share_inputs
from lora_cli.fused import fuse
from lora_cli.lora_linear import LoraLinear, SharedInput
from lora_cli.merge import Together, combine, merge
from lora_cli.optim import build_optimizer, set_rate
from lora_cli.update import Update
from lora_cli.weights import Weights

KINDS = ["llama", "qwen2", "gpt2"]  # without biases, with some, with weights that lie the other way
DORA = LoraConfig(method="dora", rank=4, alpha=8)


@pytest.fixture(scope="module")
def biased_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function from an architecture to a folder of it in which no bias is zero."""

    @functools.cache
    def folder(kind: str) -> str:
        path, module = tmp_path_factory.mktemp(kind), build_model(kind)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0.0, 0.5)
        module.save_pretrained(path)
        build_tokenizer().save_pretrained(path)
        return str(path)

    return folder


def randomise(module: Any) -> None:
    """Move every trained tensor away from its start."""
    torch.manual_seed(3)
    with torch.no_grad():
        for _, layer in lora.lora_layers(module):
            nn.init.normal_(layer.lora_B, std=0.3)
            layer.magnitude.mul_(torch.rand_like(layer.magnitude) + 0.5)


def adapted(folder: str, dtype: torch.dtype = torch.float32, config: LoraConfig = DORA) -> model.LanguageModel:
    """A base with a DoRA adapter, as training runs it."""
    loaded, _ = load(folder)
    loaded.module.to(dtype)
    lora.apply_lora(loaded.module, config, seed=0)
    loaded.module.to(dtype)
    randomise(loaded.module)
    share_inputs(loaded)
    fuse(loaded.module)
    return loaded


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def formula(layer: LoraLinear, x: torch.Tensor) -> torch.Tensor:
    """m (W + s B A) / ||W + s B A|| x + b, the norm a constant."""
    weight = layer.base.weight + layer.scale * layer.lora_B @ layer.lora_A
    norm = weight.detach().norm(dim=1)
    return F.linear(x, (layer.magnitude / norm)[:, None] * weight, layer.base.bias)


# --- the layer ---


@pytest.mark.parametrize("gain", [1.0, 0.4])
def test_outputs_and_gradients_are_those_of_the_formula(gain: float):
    """Of x, A, B and m, of two layers that read one input, with and without a bias."""
    torch.manual_seed(0)
    layers = [LoraLinear(nn.Linear(5, out, bias=out == 4), 2, 0.5, has_magnitude=True).double() for out in (3, 4)]
    shared = SharedInput(layers)
    for layer in layers:
        layer.shared, layer.gain = shared, gain
        nn.init.normal_(layer.lora_A)
        nn.init.normal_(layer.lora_B)
        nn.init.uniform_(layer.magnitude, 0.5, 2)
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    inputs = [x, *(parameter for layer in layers for parameter in layer.trained().values())]
    ours = [layer(x) for layer in layers]
    plain = [layer.base(x) + gain * (formula(layer, x) - layer.base(x)) for layer in layers]
    found, expected = (torch.autograd.grad(sum(y.sin().sum() for y in each), inputs) for each in (ours, plain))

    assert len(inputs) == 7
    for mine, theirs in zip([*ours, *found], [*plain, *expected], strict=True):
        assert torch.allclose(mine, theirs)
    with torch.no_grad():
        assert all(torch.allclose(layer(x), y) for layer, y in zip(layers, plain, strict=True))
        for layer, y in zip(layers, plain, strict=True):
            assert torch.allclose(F.linear(x, layer.merged(), layer.base.bias), y)


def test_dropout_is_of_the_low_rank_branch_only():
    """What is dropped is missing from A x; W x is whole."""
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(40, 30, bias=False), 2, 0.5, dropout=0.5, has_magnitude=True)
    layer.reset(0)
    x = torch.randn(6, 40)
    layer.training = True
    assert torch.allclose(layer(x), layer.base(x), atol=1e-6)

    nn.init.normal_(layer.lora_B)
    layer.tokens.keys = (torch.arange(6),)
    dropped = x.clone()
    dropped.view(-1)[layer.active_dropout(6).draw(40)] = 0
    weight = layer.base.weight + layer.scale * layer.lora_B @ layer.lora_A
    expected = layer.base(x) + F.linear(F.linear(dropped / 0.5, layer.lora_A), layer.lora_B) * layer.scale
    assert torch.allclose(layer(x), expected * layer.magnitude / weight.norm(dim=1), atol=1e-5)


def test_half_precision_rounds_outputs_and_not_magnitudes():
    """On average over many outputs each is what its magnitude says, to less than bfloat16 can; gradients too."""
    torch.manual_seed(0)
    layer = LoraLinear(nn.Linear(64, 64, bias=False).bfloat16(), 2, 0.5, has_magnitude=True)
    layer.reset(0)
    x = torch.randn(4000, 64).bfloat16()
    before = layer.base(x).double()
    factor = torch.rand(64) + 1
    with torch.no_grad():
        layer.magnitude.mul_(factor)
    after = layer(x)
    (after * after.detach()).sum().backward()
    mean = (after.detach().double() * before).sum(0) / before.square().sum(0)

    assert after.dtype == torch.bfloat16
    assert (mean / factor - 1).abs().mean() < 2**-11
    assert relative(layer.magnitude.grad, after.detach().float().square().sum(0) / layer.magnitude.detach()) < 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_and_gain_0_are_the_base(kind: str, biased_folder: Callable[[str], str]):
    """Gain 0 bit for bit; the start too, but for how a bias is added; the norm of a row of zeros divides nothing."""
    loaded, _ = load(biased_folder(kind))
    first = next(iter(lora.linear_modules(loaded.module).values())).weight.data
    (first.T if kind == "gpt2" else first)[1] = 0
    base = logits(loaded.module)
    lora.apply_lora(loaded.module, DORA, seed=0)

    assert torch.allclose(logits(loaded.module), base, atol=1e-5)
    assert kind != "llama" or torch.equal(logits(loaded.module), base)
    randomise(loaded.module)
    assert not torch.allclose(logits(loaded.module), base, atol=0.1)
    with lora.gain(loaded.module, 0.0):
        assert torch.equal(logits(loaded.module), base)


def test_the_norm_is_computed_once_a_step(model_folder: Callable[[str], str]):
    """It is kept while A and B stay, used in training after a pass without gradients, and new after an update."""
    loaded = adapted(model_folder("llama"))
    _, layer = next(lora.lora_layers(loaded.module))
    optimizer = build_optimizer(lora.trainable(loaded.module), TrainConfig())
    set_rate(optimizer, 0.1)
    with torch.inference_mode():
        kept = layer.norm()
    example = Example(tuple(range(3, 30)), tuple(range(3, 30)), "")
    step_gradients(loaded, [example], 0, False)

    assert layer.norm() is kept
    optimizer.step()
    weight = layer.base.weight + layer.scale * layer.lora_B @ layer.lora_A
    assert torch.allclose(layer.norm(), weight.norm(dim=1))
    assert not torch.allclose(layer.norm(), kept)


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_into_micro_batches_gives_the_same_step(
    kind: str, biased_folder: Callable[[str], str], make_rows: Callable[[int], str]
):
    """All in one forward, in some, or one row in each: loss and gradients in float64."""
    loaded = adapted(biased_folder(kind), torch.float64)
    found, _ = build_examples(make_rows(8))
    together, *others = (step_gradients(loaded, found[:], tokens, True) for tokens in (100_000, 150, 0))

    for loss, gradients, _ in others:
        assert abs(loss / together[0] - 1) < 1e-12
        assert relative(gradients, together[1]) < 1e-12


@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_a_quantised_base_gives_what_its_dense_weights_give(base: str, model_folder: Callable[[str], str]):
    """Magnitudes start at their norms, and every gradient is the same."""
    config = RunConfig.model_validate({"model": model_folder(base), "data": {"train": "x"}, "output_dir": "x"}).model
    header = model.read_header(config)
    quantised = model.load_model(header, config.model_copy(update={"quantization": "int8"}), CPU)
    dense, _ = load(model_folder(base))
    for path, layer in lora.linear_modules(quantised.module).items():
        there = dense.module.get_submodule(path)
        with torch.no_grad():
            there.weight.copy_(layer.weight.T if base == "gpt2" else layer.weight)
    example = Example(tuple(range(3, 30)), tuple(range(3, 30)), "")
    results = []
    for loaded in (quantised, dense):
        lora.apply_lora(loaded.module, DORA, seed=0)
        randomise(loaded.module)
        share_inputs(loaded)
        fuse(loaded.module)
        results.append(step_gradients(loaded, [example], 0, False))

    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    assert relative(results[0][1], results[1][1]) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_memory_and_parameters_are_counted(
    kind: str, model_folder: Callable[[str], str], invoke: Invoke, make_config: Any
):
    """What a forward keeps, to a tenth and more than without; the numbers that are trained, exactly."""
    values = {"model": model_folder(kind), "data": {"train": "x"}, "output_dir": "x"}
    config = RunConfig.model_validate(values)
    kept = []
    for has_magnitude in (False, True):
        skeleton = model.build_skeleton(model.read_header(config.model))
        skeleton.config.pad_token_id = None
        shapes = dict.fromkeys(lora.find_targets(skeleton, "all-linear"), (4, 1.0))
        lora.wrap(skeleton, shapes, has_magnitude=has_magnitude)
        kept.append(memory.kept_by_a_token(skeleton, config, length=128))
    loaded = adapted(model_folder(kind))
    loaded.module.config.pad_token_id = None
    real = memory.kept_by_a_token(loaded.module, config, length=128)
    _, out, _ = invoke("check", make_config(kind, **{"lora.method": "dora"}), "--json")

    assert kept[1] > 1.05 * kept[0]
    assert kept[1] == pytest.approx(real, rel=0.1)
    trained = sum(parameter.numel() for parameter in lora.trainable(loaded.module).values())
    assert json.loads(out)["trainable_parameters"] == trained
    assert json.loads(out)["memory"]["adapter"] == 16 * trained


# --- its files ---


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_ours_with_the_same_logits_and_gradients(
    kind: str, biased_folder: Callable[[str], str], tmp_path: Path
):
    """To 1e-5, with all three tensors away from their start; packed, shared and fused here, plain there."""
    loaded = adapted(biased_folder(kind))
    adapter_folder.save(tmp_path, loaded.module, DORA, Origin(biased_folder(kind), None, "f", {}))
    base = transformers.AutoModelForCausalLM.from_pretrained(biased_folder(kind), attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    example = Example(tuple(range(3, 30)), tuple(range(3, 30)), "")
    loss, gradients, _ = step_gradients(loaded, [example], 0, False)
    expected = theirs(input_ids=torch.tensor([example.input_ids]), labels=torch.tensor([example.labels])).loss * 26
    expected.backward()
    named = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter.grad
        for name, parameter in theirs.named_parameters()
    }
    there = torch.cat([named[name].flatten() for name in lora.trainable(loaded.module)])

    assert relative(logits(loaded.module), logits(theirs)) < 1e-5
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert relative(gradients, there) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_trained_gives_its_logits_here_and_merged(
    kind: str, biased_folder: Callable[[str], str], tmp_path: Path
):
    """After steps of its own, of unequal ranks and alphas: attached, merged in place, and merged into files."""
    theirs = save_with_peft(
        biased_folder(kind),
        tmp_path / "a",
        use_dora=True,
        rank_pattern={"c_proj" if kind == "gpt2" else "q_proj": 2},
        alpha_pattern={r".*\.1\..*": 3},
    )
    start = {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=0.02)
    for _ in range(3):
        theirs(input_ids=torch.arange(5, 25)[None], labels=torch.arange(5, 25)[None]).loss.backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path / "a")
    moved = [name for name, parameter in theirs.named_parameters() if not torch.equal(parameter, start[name])]
    loaded = tuned.load(tuned.find(tmp_path / "a"), CPU)

    assert len(moved) == 3 * len(list(lora.lora_layers(loaded.module)))
    assert relative(logits(loaded.module), logits(theirs)) < 1e-5
    expected = logits(theirs)
    lora.merge_in_place(loaded.module)
    assert relative(logits(loaded.module), expected) < 1e-5
    report = merge([tmp_path / "a"], tmp_path / "merged")
    merged = {name: tensor for name, tensor in theirs.merge_and_unload().state_dict().items() if tensor.ndim == 2}
    found = tensors_of(tmp_path / "merged")

    assert report.agreement.largest_logit_difference < 1e-5 * report.agreement.largest_logit
    assert report.adapted_tensors == len(moved) / 3
    assert all(relative(tensor, merged[name]) < 1e-6 for name, tensor in found.items() if name in merged)
    result = tuned.find(tmp_path / "a")  # as a GGUF file has them
    weights = Weights(result.header.folder, model.build_skeleton(result.header), Update.of(result.adapter))
    assert len(weights.adapted) == report.adapted_tensors
    assert all(relative(weights.read(name), found[name]) < 1e-6 for name in weights.adapted)


def test_a_stopped_run_goes_on_to_the_bit(make_config: Callable[..., Path], tmp_path: Path):
    """Metrics, adapter, moments and all, with dropout and decay; all three tensors have moved."""
    settings = {"lora.method": "dora", "lora.dropout": 0.1, "train.max_steps": 6, "train.weight_decay": 0.1}
    going(make_config(**settings, output_dir=str(tmp_path / "whole")))
    config = make_config(**settings, output_dir=str(tmp_path / "stopped"))
    stop_after(config, 3)
    going(config)
    found, header = adapter.read(tmp_path / "whole" / "adapter"), json.loads((config).read_text())["model"]["path"]
    base = {path: layer.weight for path, layer in lora.linear_modules(load(header)[0].module).items()}

    assert facts(tmp_path / "stopped") == facts(tmp_path / "whole")
    assert found.magnitudes.keys() == found.lora_A.keys()
    assert all(relative(magnitude, base[path].norm(dim=1)) > 1e-4 for path, magnitude in found.magnitudes.items())


def test_a_run_is_measured_scanned_merged_and_exported(
    make_config: Callable[..., Path], invoke: Invoke, tmp_path: Path
):
    """What other commands say of it is what they say of its merge; the scan's ends are base and adapter."""
    settings = {"lora.method": "dora", "train.max_steps": 6, "train.learning_rate": 0.05, "eval.general": None}
    config = make_config(**settings, **{"eval.general_tokens": 256})
    assert invoke("train", config)[0] == 0
    run = tmp_path / "run"
    scanned = json.loads(invoke("eval", run, "--scan", "--json")[1])
    points = {point["gain"]: point["loss"]["value"] for point in scanned["scan"]["points"]}
    assert invoke("merge", run, "--output", tmp_path / "merged")[0] == 0
    assert invoke("export", run, "--format", "gguf", "--gguf-type", "f32", "--output", tmp_path / "a.gguf")[0] == 0
    assert invoke("export", run, "--format", "peft", "--output", tmp_path / "peft")[0] == 0

    assert points[1.0] < 0.95 * points[0.5] < 0.95 * points[0.0]
    assert "vLLM serves no DoRA adapters" in (tmp_path / "peft" / "README.md").read_text()


def test_a_magnitude_of_another_length_does_not_fit(model_folder: Callable[[str], str], tmp_path: Path):
    """As with A and B it is named with its layer."""
    write_adapter(model_folder("llama"), tmp_path / "a", DORA)
    weights = tmp_path / "a" / adapter.WEIGHTS
    tensors = adapter.safetensors.torch.load_file(weights)
    name = next(name for name in tensors if name.endswith("0.mlp.up_proj.lora_magnitude_vector"))
    weights.write_bytes(adapter.safetensors.torch.save(tensors | {name: tensors[name][1:].clone()}))
    with pytest.raises(AdapterError, match=r"layers.0.mlp.up_proj"):
        tuned.load(tuned.find(tmp_path / "a"), CPU)


def test_what_only_a_product_can_do_is_refused(model_folder: Callable[[str], str], tmp_path: Path):
    """Adding to others, weighting, scaling, and files that hold A and B only: each says what to do instead."""
    write_adapter(model_folder("llama"), tmp_path / "a", DORA)
    write_adapter(model_folder("llama"), tmp_path / "b", LoraConfig(rank=4))
    a, b, new = tmp_path / "a", tmp_path / "b", tmp_path / "new"
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: merge([b, a], new), "takes it alone"),
        (lambda: merge([a], new, together=Together([0.5])), "with a weight of 1"),
        (lambda: merge([a], new, together=Together(None, "ties")), "takes it alone"),
        (lambda: combine([a], new, None, Together()), "writes base and adapter as one"),
        (lambda: scale.scale(a, new, 0.5, None), "lora eval --scan"),
        (lambda: export(a, "gguf-lora", tmp_path / "new.gguf"), "--format gguf writes"),
    ]
    for call, instead in refused:
        with pytest.raises(AdapterError, match=instead) as caught:
            call()
        assert "is a DoRA adapter" in caught.value.paragraph()
        assert not list(tmp_path.glob("new*"))
