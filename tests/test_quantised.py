"""A frozen base in four or eight bits: the gradients of its dense equal, whole runs, and its size."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import DROPOUT, Invoke, conversation, facts, one_batch, save_base, write_config, write_rows
from test_loading import read_in_pieces
from torch import nn

from lora_cli import adapter, config_file, forward, fused, lora, metrics, model, quantised, run_dir, tuned
from lora_cli.config import LoraConfig, ModelConfig
from lora_cli.examples import Example
from lora_cli.interrupt import StopRequest
from lora_cli.lora_linear import is_conv1d
from lora_cli.merge import merge
from lora_cli.merged_folder import Form
from lora_cli.model import LanguageModel
from lora_cli.quantised import Kind, QuantisedLinear
from lora_cli.records import Evaluated
from lora_cli.run_dir import RunDir
from lora_cli.train import train

CPU = torch.device("cpu")
KINDS: tuple[Kind, ...] = ("nf4", "int8")


def load(folder: str, kind: Kind | None, dtype: Any = "float32") -> LanguageModel:
    """A base, quantised or not."""
    config = ModelConfig(path=folder, quantization=kind, dtype=dtype)
    return model.load_model(model.read_header(config), config, CPU)


def layers(module: nn.Module) -> dict[str, QuantisedLinear]:
    """Its layers that are quantised."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, QuantisedLinear)}


def quantised_of(kind: Kind, weight: torch.Tensor, dtype: torch.dtype) -> QuantisedLinear:
    """A layer that was given a weight in pieces."""
    layer = QuantisedLinear(kind, (len(weight), weight.shape[1]), None, dtype)
    layer.make_room(CPU)
    return layer.quantise(weight.split(64))


# --- numbers ---


@pytest.mark.parametrize("shape", [(64, 32), (48, 96), (10, 48), (100, 30), (65, 128), (3, 7), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_four_bits_leave(shape: tuple[int, int], dtype: torch.dtype):
    """Of rows of any length: each number is one of 16 times the largest of its 64, itself in eight bits."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    layer = quantised_of("nf4", weight, dtype)
    levels = quantised.bitsandbytes().functional.get_4bit_type("nf4", device="cpu")
    blocks = nn.functional.pad(weight.flatten(), (0, -weight.numel() % 64)).view(-1, 64)
    largest = blocks.abs().amax(1, keepdim=True)
    spread = (largest - largest.mean()).abs().max()
    nearest = levels[(blocks[..., None] / largest[..., None] - levels).abs().argmin(-1)]
    expected = (nearest * largest).flatten()[: weight.numel()].view(shape)
    rounding = 0 if dtype == torch.float32 else 2**-8

    assert layer.weight.dtype == dtype
    error = (layer.weight.float() - expected).abs()
    assert error.max() <= spread / 100 + rounding * expected.abs().max() + 1e-6


def test_what_eight_bits_leave():
    """Every number is the nearest of the 255 of its row; a row of zeros stays one."""
    weight = torch.randn(70, 24, generator=torch.Generator().manual_seed(1)) * torch.logspace(-3, 3, 70)[:, None]
    weight[5] = 0.0
    layer = quantised_of("int8", weight, torch.float32)

    assert ((layer.weight - weight).abs() <= 0.5001 * weight.abs().amax(1, keepdim=True) / 127).all()
    assert (layer.weight[5] == 0).all()
    assert layer.packed.dtype == torch.int8


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["llama", "gpt2", "mixtral"])
def test_every_linear_layer_of_the_blocks_is_quantised(
    base: str, kind: Kind, stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """While it is read, in whatever pieces: embedding, head, norms and biases are as they were."""
    folder = str(save_base(base, tmp_path / "base", stored))
    dense = load(folder, None).module
    names = read_in_pieces(monkeypatch)
    module = load(folder, kind).module
    found = layers(module)

    assert bool(names) == (base != "mixtral")
    assert list(found) == lora.find_targets(dense, "all-linear") == lora.find_targets(module, "all-linear")
    for path, layer in found.items():
        before = dense.get_submodule(path)
        weight = before.weight.T if is_conv1d(before) else before.weight
        assert torch.equal(layer.weight, quantised.round_trip(kind, weight.detach())), path
        assert 0 < (layer.weight - weight).norm() / weight.norm() < {"nf4": 0.12, "int8": 0.01}[kind]
        assert before.bias is None or torch.equal(before.bias, layer.bias)
    rest = {name: tensor for name, tensor in dense.named_parameters() if name.removesuffix(".weight") not in found}
    assert all(torch.equal(tensor, module.get_parameter(name)) for name, tensor in rest.items())
    assert not any(each.requires_grad for each in module.parameters())


@pytest.mark.parametrize(("kind", "a_number"), [("nf4", 0.5 + 1 / 64 + 4 / (64 * 256)), ("int8", 1 + 4 / 128)])
def test_the_bytes_of_a_quantised_base(kind: Kind, a_number: float, tmp_path: Path):
    """They are those of its numbers in four or eight bits and of their scales; a float for each layer more (nf4)."""
    base = save_base("llama", tmp_path / "base", hidden_size=128, intermediate_size=128)
    found = layers(load(str(base), kind).module)
    numbers = sum(layer.in_features * layer.out_features for layer in found.values())
    taken = sum(t.nbytes for layer in found.values() for t in (*layer.parameters(), *layer.buffers()))

    assert 0 <= taken - numbers * a_number <= 8 * len(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["llama", "gpt2"])
def test_gradients_are_those_of_the_dense_weights_that_are_left(
    base: str, kind: Kind, model_folder: Callable[[str], str]
):
    """In training's own way, with shared inputs and fused parts: to 1e-6."""
    quantised_model, dense = load(model_folder(base), kind), load(model_folder(base), None)
    for path, layer in layers(quantised_model.module).items():
        there = dense.module.get_submodule(path)
        with torch.no_grad():
            there.weight.copy_(layer.weight.T if is_conv1d(there) else layer.weight)
    rows = [Example(tuple(range(3, 30)), tuple(range(3, 30)), "a"), Example((5, 9, 7), (-100, 9, 7), "b")]
    gradients = []
    for loaded in (quantised_model, dense):
        lora.apply_lora(loaded.module, LoraConfig(rank=4, alpha=8), seed=1)
        for number, (_, layer) in enumerate(lora.lora_layers(loaded.module)):
            nn.init.normal_(layer.lora_B, std=0.1, generator=torch.Generator().manual_seed(number))
        forward.share_inputs(loaded)
        fused.fuse(loaded.module)
        forward.target_loss(loaded, one_batch(rows)).total.backward()
        gradients.append({name: p.grad for name, p in lora.trainable(loaded.module).items()})
    ours, theirs = gradients

    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert gradient.abs().max() > 0, name
        assert torch.allclose(ours[name], gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max())), name


# --- runs ---


def run_of(folder: Path, base: str, rows: str, **overrides: Any) -> RunDir:
    """A run that is over."""
    path = write_config(folder, base, rows, overrides)
    list(train(config_file.load(path), StopRequest()))
    return RunDir(folder / "run")


@pytest.fixture(scope="session", params=KINDS)
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], str]
) -> tuple[Kind, Path, RunDir]:
    """A quantisation, and a run of twelve steps with it, with dropout and a pull to the base."""
    folder = tmp_path_factory.mktemp(request.param)
    rows = write_rows(folder / "rows.jsonl", [conversation(number) for number in range(40)])
    overrides = DROPOUT | {"model.quantization": request.param, "train.kl_to_base": 0.1}
    return request.param, folder, run_of(folder, model_folder("llama"), rows, **overrides)


def test_a_quantised_run_learns_and_says_on_what(trained: tuple[Kind, Path, RunDir]):
    """The loss goes down from that of the quantised base; environment.json has what its numbers depend on."""
    kind, _, run = trained
    evaluated = metrics.read_evaluated(run)
    environment = run_dir.read_environment(run)

    assert evaluated[max(evaluated)].loss < 0.85 * evaluated[0].loss
    assert ("bitsandbytes" in environment) == (kind == "nf4")


def test_a_quantised_run_goes_on_bit_for_bit(
    trained: tuple[Kind, Path, RunDir], tmp_path: Path, model_folder: Callable[[str], str]
):
    """Stopped and continued it has the bytes of the run that nothing disturbed."""
    kind, folder, whole = trained
    overrides = DROPOUT | {"model.quantization": kind, "train.kl_to_base": 0.1}
    path = write_config(tmp_path, model_folder("llama"), str(folder / "rows.jsonl"), overrides)
    events = train(config_file.load(path), StopRequest())
    seen = 0
    for event in events:
        seen += isinstance(event, Evaluated)
        if seen == 4:
            break
    events.close()
    list(train(config_file.load(path), StopRequest()))

    assert facts(tmp_path / "run") == facts(whole.path)


def test_what_is_evaluated_is_what_was_trained(trained: tuple[Kind, Path, RunDir]):
    """A result of the run is loaded quantised, and at gain 0 is the quantised base."""
    kind, _, run = trained
    loaded = tuned.load(tuned.find(run.path), CPU)
    base = load(str(tuned.find(run.path).header.folder), kind)
    for each in (loaded, base):
        each.module.set_attn_implementation(each.own_attention)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        expected = base.module(input_ids=ids).logits
        tuned_logits = loaded.module(input_ids=ids).logits
        with lora.gain(loaded.module, 0.0):
            assert torch.equal(loaded.module(input_ids=ids).logits, expected)

    assert len(layers(loaded.module)) == len(adapter.read(run.adapter).lora_A)
    assert not torch.allclose(tuned_logits, expected, atol=0.1)


# --- what cannot be ---


def test_four_bits_without_their_package(
    model_folder: Callable[[str], str], rows_file: str, tmp_path: Path, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
):
    """It is said before data or weights are read, with the line that installs it; eight bits need none."""
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    path = write_config(tmp_path, model_folder("llama"), rows_file, {"model.quantization": "nf4"})
    code, _, errors = invoke("train", path)

    assert code == 3
    assert "pip install 'lora-cli[quantization]'" in errors
    assert not (tmp_path / "run").exists()
    assert layers(load(model_folder("llama"), "int8").module)


def test_a_base_that_is_quantised_already(tmp_path: Path, rows_file: str, invoke: Invoke):
    """Its weights are no numbers that could be quantised again: refused before they are read."""
    base = save_base("llama", tmp_path / "base")
    values = json.loads((base / "config.json").read_text())
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(values | {"quantization_config": settings}))
    code, _, errors = invoke("check", write_config(tmp_path, str(base), rows_file, {"model.quantization": "int8"}))

    assert code == 2
    assert "stored quantised already" in errors


def test_experts_are_said_to_stay_as_they_are(make_config: Callable[..., Path], invoke: Invoke):
    """Stacked experts are no linear layers: `lora check` says that they are not quantised."""
    code, out, errors = invoke("check", make_config("mixtral", **{"model.quantization": "int8"}))

    assert code == 0
    assert "model.quantization int8: the experts of this model (4 stacked weights) stay as they are" in out + errors


# --- what comes of it ---


def shifted(run: RunDir, folder: Path) -> Any:
    """A merged folder's logits on held-out tokens, and what was trained has there."""
    ids = torch.arange(5, 45)[None]
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    loaded = tuned.load(tuned.find(run.path), CPU)
    loaded.module.set_attn_implementation(loaded.own_attention)
    with torch.no_grad():
        return merged(input_ids=ids).logits, loaded.module(input_ids=ids).logits


@pytest.mark.parametrize("onto", ["stored", "dequantised"])
def test_a_quantised_run_is_merged_onto_either_base(trained: tuple[Kind, Path, RunDir], onto: Any, tmp_path: Path):
    """What is written is the stored or the dequantised base + update; how far both are from the trained is said."""
    kind, _, run = trained
    report = merge([run.path], tmp_path / "merged", form=Form(onto=onto))
    record = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert report.from_trained is not None
    stored, dequantised = report.from_trained["stored"], report.from_trained["dequantised"]
    written, wanted = shifted(run, tmp_path / "merged")

    assert report.agreement.largest_logit_difference < 1e-4 * report.agreement.largest_logit
    assert torch.allclose(written, wanted, atol=1e-4) == (onto == "dequantised")
    assert dequantised.largest_logit_difference < 1e-4
    assert stored.largest_logit_difference > (0.1 if kind == "nf4" else 1e-2)
    assert dequantised.loss == pytest.approx(dequantised.trained_loss, abs=1e-4)
    assert stored.targets > 20
    assert stored.trained_loss == dequantised.trained_loss != stored.loss
    assert (record["onto"], record["quantization"]) == (onto, kind)
    assert record["from_trained"]["stored"]["mean_kl"] == stored.mean_kl > dequantised.mean_kl


def test_a_conv1d_base_is_merged_dequantised(model_folder: Callable[[str], str], rows_file: str, tmp_path: Path):
    """GPT-2 stores its weights the other way round; layers that are not adapted are dequantised too."""
    overrides = {"model.quantization": "nf4", "lora.target_modules": ["c_attn"], "train.max_steps": 4}
    run = run_of(tmp_path, model_folder("gpt2"), rows_file, **overrides)
    report = merge([run.path], tmp_path / "merged", form=Form(onto="dequantised"))
    written, wanted = shifted(run, tmp_path / "merged")

    assert report.adapted_tensors == 2
    assert torch.allclose(written, wanted, atol=1e-4)


def test_a_merge_says_how_far_it_is_from_what_was_trained(
    trained: tuple[Kind, Path, RunDir], tmp_path: Path, invoke: Invoke
):
    """Both ways are shown beside each other, with their losses; an export says what it is made with."""
    kind, _, run = trained
    code, out, _ = invoke("merge", run.path, "--output", tmp_path / "merged", "--onto", "dequantised")
    exported = invoke("export", run.path, "--format", "gguf-lora", "--output", tmp_path / "adapter.gguf")

    assert code == 0
    assert f"In training the base was quantised ({kind}); merged are its dequantised weights." in out
    assert out.count("from what was trained") == 2
    assert out.count("(trained ") == 2
    assert exported[0] == 0
    assert f"the base was quantised ({kind}); this is with its weights as they are stored" in exported[2]


def test_a_run_that_is_not_quantised_has_nothing_to_dequantise(undisturbed: Path, tmp_path: Path, invoke: Invoke):
    """It is refused, with the way out, and nothing is written."""
    code, _, errors = invoke("merge", undisturbed, "--output", tmp_path / "merged", "--onto", "dequantised")

    assert code == 2
    assert "not quantised" in errors
    assert "--onto stored takes any" in errors
    assert not (tmp_path / "merged").exists()
