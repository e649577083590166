"""The merge: equal to base + adapter whatever the architecture, proven by reading it back, refused where it is not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from conftest import save_base, save_with_peft, shrink

from lora_cli import adapter, base_folder, manifest, model, streamed, tuned
from lora_cli.config import ModelConfig
from lora_cli.errors import AdapterError, UserError
from lora_cli.merge import Together, combine, merge
from lora_cli.merged_folder import Form, round_to
from lora_cli.tensor_file import read_infos, read_metadata, read_tensor, write_tensors
from lora_cli.update import Update
from lora_cli.weights import Weights

IDS = torch.arange(5, 45).reshape(2, 20)
WEIGHTS = "adapter_model.safetensors"


def logits(module: Any) -> torch.Tensor:
    """The logits of a model as transformers runs it."""
    with torch.no_grad():
        result: torch.Tensor = module(input_ids=IDS, use_cache=False).logits
    return result


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A folder as plain transformers loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model's folder."""
    return {
        name: tensor
        for file in folder.glob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(file).items()
    }


ARCHITECTURES = ["llama", "qwen2", "qwen3", "gpt2", "gemma", "mixtral"]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_merged_is_base_plus_adapter(kind: str, tied: bool, tmp_path: Path):
    """Float32 to 1e-5 after a reload by plain transformers, against PEFT; embedding and head stay tied, or apart."""
    base = save_base(kind, tmp_path / "base", tie_word_embeddings=tied)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if kind == "mixtral" else "all-linear"
    theirs = save_with_peft(str(base), tmp_path / "a", target_modules=targets)
    report = merge([tmp_path / "a"], tmp_path / "merged")
    merged = load(tmp_path / "merged")

    assert torch.allclose(logits(merged), logits(theirs), atol=1e-5)
    assert not torch.allclose(logits(merged), logits(load(base)), atol=0.1)
    assert report.agreement.largest_logit_difference < 1e-5 * report.agreement.largest_logit
    assert report.agreement.effect > 0.1
    assert all(layer.kept == pytest.approx(1, abs=1e-5) for layer in report.layers)
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied
    assert tensors_of(base).keys() == tensors_of(tmp_path / "merged").keys()


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_bfloat16_merge_is_one_rounding_away(kind: str, tmp_path: Path):
    """Of shards too: each weight is the float32 sum rounded once, the rest is as it was, byte for byte."""
    base = save_base(kind, tmp_path / "base", torch.bfloat16, shard="20KB")
    save_with_peft(str(base), tmp_path / "a", target_modules=["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"])
    (base / "consolidated.safetensors").write_bytes(b"another copy of the weights")
    report = merge([tmp_path / "a"], tmp_path / "merged")
    before, after = tensors_of_shards(base), tensors_of(tmp_path / "merged")
    read = adapter.read(tmp_path / "a")

    assert report.dtype == "bfloat16"
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 2
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        path = name.removesuffix(".weight")
        expected = tensor
        if path in read.lora_A:
            change = (read.lora_B[path].double() @ read.lora_A[path].double()) * read.scales[path]
            expected = (tensor.double() + (change.T if kind == "gpt2" else change)).to(torch.bfloat16)
        # Sums are made in float32, so one that lies between two bfloat16 numbers may go to the other one.
        assert (after[name].float() - expected.float()).abs().max() <= 2**-7 * expected.float().abs().max(), name
        assert float((after[name] != expected).float().mean()) < 1e-3, name
    assert (logits(load(tmp_path / "merged"))).isfinite().all()


def tensors_of_shards(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of the files that a model's index names."""
    return {n: t for file in base_folder.weight_files(folder) for n, t in safetensors.torch.load_file(file).items()}


def test_a_merge_keeps_everything_else(model_folder: Callable[[str], str], tmp_path: Path):
    """Names, order, dtypes and notes of the tensors, and every file without weights, stay byte for byte."""
    base = Path(model_folder("llama"))
    save_with_peft(str(base), tmp_path / "a", target_modules=["q_proj"])
    merge([tmp_path / "a"], tmp_path / "merged")
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    file = "model.safetensors"

    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
    }
    assert list(read_infos(base / file)) == list(read_infos(tmp_path / "merged" / file))
    assert read_metadata(base / file) == read_metadata(tmp_path / "merged" / file)
    names = {path.name for path in base.iterdir()}
    assert {path.name for path in (tmp_path / "merged").iterdir()} - names == {
        "merge.json",
        "README.md",
        "MANIFEST.json",
    }
    for other in names - {file}:
        assert (base / other).read_bytes() == (tmp_path / "merged" / other).read_bytes()
    assert manifest.problems_in(tmp_path / "merged") == []


def test_a_gpt2_base_whose_names_have_no_prefix(model_folder: Callable[[str], str], tmp_path: Path):
    """Old checkpoints store `h.0.attn...` without `transformer.`; the merge finds them and keeps their names."""
    shutil.copytree(model_folder("gpt2"), tmp_path / "base")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors_of(tmp_path / "base").items()}
    safetensors.torch.save_file(short, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    theirs = save_with_peft(str(tmp_path / "base"), tmp_path / "a")
    merge([tmp_path / "a"], tmp_path / "merged")

    assert tensors_of(tmp_path / "merged").keys() == short.keys()
    assert torch.allclose(logits(load(tmp_path / "merged")), logits(theirs), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_dtype_is_said_everywhere(dtype: Any, tmp_path: Path):
    """`--dtype`: in every floating tensor, in config.json and in the index; the logits stay within that dtype."""
    base = save_base("llama", tmp_path / "base", torch.bfloat16, shard="20KB")
    theirs = save_with_peft(str(base), tmp_path / "a").float()
    report = merge([tmp_path / "a"], tmp_path / "merged", form=Form(dtype))
    tensors = tensors_of(tmp_path / "merged")
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())

    assert {tensor.dtype for tensor in tensors.values()} == {getattr(torch, dtype)}
    assert transformers.AutoConfig.from_pretrained(tmp_path / "merged").dtype == getattr(torch, dtype)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    largest = logits(theirs).abs().max()
    assert (logits(load(tmp_path / "merged")) - logits(theirs)).abs().max() < report.bound + 1e-4 * largest


# --- rounding ---


def test_stochastic_rounding_is_right_on_the_mean():
    """Each number becomes one of its two neighbours, and the mean of many is the number itself; nearest loses it."""
    number = torch.full((100_000,), -1.0 - 2.0**-10)  # bfloat16 has steps of 2^-7 here
    near, by_chance = (round_to(number, torch.bfloat16, how, seed=1).double() for how in ("nearest", "stochastic"))

    assert near.unique().tolist() == [-1.0]
    assert by_chance.unique().tolist() == [-1.0 - 2.0**-7, -1.0]
    assert float(by_chance.mean()) == pytest.approx(float(number[0]), abs=5e-5)
    assert round_to(torch.tensor([1e6, -1e6]), torch.float16, "stochastic", seed=1).isinf().all()
    values = torch.randn(10_000) * torch.logspace(-6, 3, 10_000)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = round_to(values, dtype, "stochastic", seed=2).float()
        step = (values.abs() * torch.finfo(dtype).eps).clamp_min(torch.finfo(dtype).smallest_normal)
        assert ((rounded - values).abs() <= step).all()
        exact = values.to(dtype).float()
        assert torch.equal(round_to(exact, dtype, "stochastic", seed=3).float(), exact)


def test_a_small_update_is_kept_by_stochastic_rounding_and_reported(tmp_path: Path):
    """An update of 1e-3 of its weight: to nearest much of it is gone, and said; by chance it stays on balance."""
    base = save_base("llama", tmp_path / "base", torch.bfloat16, hidden_size=256, intermediate_size=256)
    save_with_peft(str(base), tmp_path / "a", target_modules=["gate_proj"])
    shrink(tmp_path / "a", 4e-3)
    kept = {}
    for how in ("nearest", "stochastic"):
        layers = merge([tmp_path / "a"], tmp_path / how, form=Form("keep", how), force=True).layers
        kept[how] = sum(layer.kept or 0 for layer in layers) / len(layers)
        assert all(2e-4 < layer.relative < 2e-3 for layer in layers), layers

    assert kept["nearest"] < 0.75
    assert kept["stochastic"] == pytest.approx(1, abs=0.05)


# --- what it is compared with ---


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "gemma", "gemma2", "granite", "cohere", "bloom"])
def test_a_model_run_from_the_disk_is_the_loaded_one(
    kind: str, model_folder: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Bit for bit, whatever the size of the pieces its matrices are read in; with an update too."""
    monkeypatch.setattr(streamed, "_PIECE", 1000)
    save_with_peft(model_folder(kind), tmp_path / "a", target_modules=["c_attn"] if kind == "gpt2" else "all-linear")
    result = tuned.find(tmp_path / "a")
    weights = Weights(result.header.folder, model.build_skeleton(result.header), Update.of(result.adapter))
    module = streamed.open_model(result.header, weights)

    assert torch.allclose(logits(module), logits(load(result.header.folder)), atol=1e-6)
    with streamed.adding(module, weights):
        loaded = tuned.load(result, torch.device("cpu"))
        loaded.module.set_attn_implementation(loaded.own_attention)
        assert torch.allclose(logits(module), logits(loaded.module), atol=1e-5)
    with torch.inference_mode():
        without, with_update = streamed.with_and_without(module, weights, IDS)
    assert torch.allclose(without, logits(load(result.header.folder)).flatten(0, 1), atol=1e-5)
    assert torch.allclose(with_update, logits(loaded.module).flatten(0, 1), atol=1e-5)


def test_a_model_that_cannot_run_from_the_disk_is_loaded(tmp_path: Path):
    """Experts are stored one by one and run together: there is no streamed model, and the merge is compared whole."""
    base = save_base("mixtral", tmp_path / "base")
    header = model.read_header(ModelConfig(path=str(base)))

    with pytest.raises(streamed.CannotStream):
        streamed.open_model(header, Weights(base, model.build_skeleton(header)))


def test_our_file_format_is_theirs(tmp_path: Path):
    """What is written here is read by safetensors, and the other way round: any dtype, empty, scalars."""
    tensors = {
        "a": torch.randn(3, 5),
        "b.c": torch.arange(6).reshape(2, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "half": torch.randn(7).half(),
        "bits": torch.tensor([True, False]),
        "brain": torch.randn(2, 2).bfloat16(),
    }
    safetensors.torch.save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    infos = read_infos(tmp_path / "theirs.safetensors")
    assert all(torch.equal(read_tensor(infos[name]), tensor) for name, tensor in tensors.items())

    written = (info if n % 2 else read_tensor(info) for n, info in enumerate(infos.values()))
    write_tensors(tmp_path / "ours.safetensors", infos, {"format": "pt"}, written)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


# --- several adapters ---


def two_adapters(tmp_path: Path, kind: str = "llama") -> tuple[Path, list[Path]]:
    """A base and two adapters of different ranks, scales and layers."""
    base = save_base(kind, tmp_path / "base")
    save_with_peft(str(base), tmp_path / "a", r=4, lora_alpha=8)
    save_with_peft(str(base), tmp_path / "b", r=2, lora_alpha=16, use_rslora=True, target_modules=["q_proj", "up_proj"])
    shrink(tmp_path / "b", -0.5)
    return base, [tmp_path / "a", tmp_path / "b"]


def changes(base: Path, merged: Path) -> dict[str, torch.Tensor]:
    """What a merge added to each tensor, where it did."""
    before, after = tensors_of(base), tensors_of(merged)
    return {name: after[name] - before[name] for name in before if not torch.equal(before[name], after[name])}


def updates(folder: Path) -> dict[str, torch.Tensor]:
    """The update of each layer of an adapter, by the name of its tensor."""
    read = adapter.read(folder)
    return {f"{path}.weight": read.lora_B[path] @ read.lora_A[path] * read.scales[path] for path in read.lora_A}


def test_a_weighted_sum_of_adapters_is_exact(tmp_path: Path):
    """As a merged model, and as one adapter that PEFT loads, of ranks added up."""
    base, both = two_adapters(tmp_path)
    merge(both, tmp_path / "merged", together=Together([0.7, 0.3]))
    report = combine(both, tmp_path / "one", None, Together([0.7, 0.3]))
    first, second = map(updates, both)
    found = changes(base, tmp_path / "merged")

    assert found.keys() == first.keys()
    for name, change in found.items():
        assert torch.allclose(change, 0.7 * first[name] + 0.3 * second.get(name, torch.zeros(())), atol=1e-6)
    assert (report.rank, report.kept) == (6, 1.0)
    one = peft.PeftModel.from_pretrained(load(base), tmp_path / "one")
    assert torch.allclose(logits(one), logits(load(tmp_path / "merged")), atol=1e-5)
    assert torch.allclose(logits(load(tmp_path / "merged")), logits(load(merged_again(tmp_path))), atol=1e-5)


def merged_again(tmp_path: Path) -> Path:
    """The combined adapter, merged by our own command."""
    merge([tmp_path / "one"], tmp_path / "again")
    return tmp_path / "again"


def test_ties_trims_elects_and_averages(tmp_path: Path):
    """The three steps of the paper, checked against their definition entry by entry."""
    base, both = two_adapters(tmp_path)
    merge(both, tmp_path / "merged", together=Together(None, "ties", 0.3))
    first, second = map(updates, both)
    found = changes(base, tmp_path / "merged")
    name = "model.layers.0.self_attn.q_proj.weight"
    trimmed = []
    for update in (first[name], second[name]):
        order = update.abs().flatten().sort(descending=True).values
        trimmed.append(torch.where(update.abs() >= order[round(0.3 * update.numel()) - 1], update, 0.0))
    expected = torch.zeros_like(trimmed[0])
    for place in torch.cartesian_prod(*map(torch.arange, expected.shape)).tolist():
        values = [float(update[tuple(place)]) for update in trimmed]
        agreeing = [value for value in values if value * sum(values) > 0]
        expected[tuple(place)] = sum(agreeing) / len(agreeing) if agreeing else 0.0

    assert 0.2 < float((expected != 0).float().mean()) < 0.6
    assert torch.allclose(found[name], expected, atol=1e-6)


def test_dare_drops_most_and_keeps_the_mean(tmp_path: Path):
    """A tenth of the entries is left, ten times as large; the same every time."""
    base, (first, _) = two_adapters(tmp_path)
    merge([first], tmp_path / "merged", together=Together(None, "dare"))
    merge([first], tmp_path / "again", together=Together(None, "dare"))
    whole, found = updates(first), changes(base, tmp_path / "merged")
    name = "model.layers.0.mlp.gate_proj.weight"
    there = found[name].abs() > 1e-6

    assert float(there.float().mean()) == pytest.approx(0.1, abs=0.03)
    assert torch.allclose(found[name][there], 10 * whole[name][there], rtol=1e-4, atol=1e-5)
    assert tensors_of(tmp_path / "merged").keys() == tensors_of(tmp_path / "again").keys()
    assert all(torch.equal(t, tensors_of(tmp_path / "again")[n]) for n, t in tensors_of(tmp_path / "merged").items())


def test_ties_as_an_adapter_says_what_it_holds(tmp_path: Path):
    """What is not of low rank is cut to its largest singular values, and the share that is left is said."""
    _, both = two_adapters(tmp_path)
    report = combine(both, tmp_path / "one", None, Together(None, "ties", 0.3))
    update = Update([adapter.read(folder) for folder in both], [1.0, 1.0], "ties", 0.3)
    path = "model.layers.0.self_attn.q_proj"
    one = adapter.read(tmp_path / "one")
    left = update.matrix(path) - one.lora_B[path] @ one.lora_A[path] * one.scales[path]
    share = 1 - float(left.norm() / update.matrix(path).norm()) ** 2

    assert len(one.lora_A[path]) == 6
    assert 0 < report.kept <= share + 1e-5 < 1


@pytest.mark.parametrize(
    ("together", "expected"),
    [
        (Together([0.7]), "--weights: 2 adapters need as many, found 1"),
        (Together([1.0, -1.0], "ties"), "must be above 0"),
        (Together(None, "dare", 0.0), "--density: must be above 0"),
    ],
)
def test_adapters_that_cannot_be_added(together: Together, expected: str, tmp_path: Path):
    """A weight each, of a sign the method knows; adapters of one base only."""
    _, both = two_adapters(tmp_path)
    with pytest.raises(UserError, match=expected):
        merge(both, tmp_path / "merged", together=together)
    save_with_peft(str(save_base("qwen3", tmp_path / "other")), tmp_path / "c")
    with pytest.raises(AdapterError, match="belong to different bases"):
        merge([*both, tmp_path / "c"], tmp_path / "merged")
