"""The layer and the adapter file, against PEFT and Hugging Face as references."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import build_examples, conversation, one_batch, save_with_peft, write_rows

from lora_cli import adapter, adapter_folder, lora, model, tuned
from lora_cli.adapter_folder import Origin
from lora_cli.batches import Group
from lora_cli.config import LoraConfig, ModelConfig
from lora_cli.dropout import Dropout, token_keys
from lora_cli.errors import AdapterError, ModelError
from lora_cli.forward import lay_out, share_inputs, target_logits, target_loss
from lora_cli.fused import fuse
from lora_cli.projection import Projection, project

KINDS = ["llama", "qwen3", "gpt2"]
CPU = torch.device("cpu")
IDS = torch.arange(5, 25)[None]


def load(folder: str) -> tuple[model.LanguageModel, model.ModelHeader]:
    config = ModelConfig(path=folder)
    header = model.read_header(config)
    return model.load_model(header, config, CPU), header


def logits(module: Any) -> torch.Tensor:
    """The logits of a model as transformers runs it."""
    attention = module.config._attn_implementation
    module.set_attn_implementation("eager")
    with torch.no_grad():
        result: torch.Tensor = module(input_ids=IDS, use_cache=False).logits[0]
    module.set_attn_implementation(attention)
    return result


def randomise(module: Any) -> None:
    """Give lora_B values, as training would."""
    torch.manual_seed(3)
    for _, layer in lora.lora_layers(module):
        torch.nn.init.normal_(layer.lora_B, std=0.3)


@pytest.mark.parametrize("kind", [*KINDS, "gemma2"])
def test_a_fresh_adapter_and_gain_0_leave_the_logits_bit_identical(kind: str, model_folder: Callable[[str], str]):
    """B is zero at the start, and gain 0 is the base itself."""
    loaded, _ = load(model_folder(kind))
    base = logits(loaded.module)
    lora.apply_lora(loaded.module, LoraConfig(rank=4), seed=0)

    assert torch.equal(logits(loaded.module), base)
    randomise(loaded.module)
    assert not torch.allclose(logits(loaded.module), base)
    with lora.gain(loaded.module, 0.0):
        assert torch.equal(logits(loaded.module), base)


def test_gain_scales_the_update(model_folder: Callable[[str], str]):
    """Half the gain is half the alpha."""
    loaded, _ = load(model_folder("llama"))
    lora.apply_lora(loaded.module, LoraConfig(rank=4, alpha=8), seed=0)
    randomise(loaded.module)
    with lora.gain(loaded.module, 0.5):
        half = logits(loaded.module)
    for _, layer in lora.lora_layers(loaded.module):
        layer.scale /= 2

    assert torch.allclose(logits(loaded.module), half, atol=1e-6)


def test_all_linear_is_every_block_linear_and_not_the_head(model_folder: Callable[[str], str]):
    """Found by inspection, GPT-2's Conv1D included; as many as PEFT finds."""
    for kind in [*KINDS, "gemma2"]:
        loaded, _ = load(model_folder(kind))
        found = lora.find_targets(loaded.module, "all-linear")
        other = peft.get_peft_model(
            transformers.AutoModelForCausalLM.from_pretrained(model_folder(kind)),
            peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        theirs = {n.removeprefix("base_model.model.") for n, m in other.named_modules() if hasattr(m, "lora_A")}
        assert set(found) == theirs


def test_names_must_match_something(model_folder: Callable[[str], str]):
    """Every name that matches nothing is told, with the names there are."""
    loaded, _ = load(model_folder("llama"))
    with pytest.raises(ModelError) as caught:
        lora.find_targets(loaded.module, ["q_porj", "down_proj", "lm_head", "embed_tokens"])

    text = caught.value.paragraph()
    assert 'no linear layer is named "q_porj"; did you mean "q_proj"?' in text
    assert "lm_head is not a linear layer inside a block" in text
    assert "embed_tokens is not a linear layer inside a block" in text
    assert "q_proj (x2)" in text
    assert len(lora.find_targets(loaded.module, ["layers.0.self_attn.q_proj", "down_proj"])) == 3


def test_the_start_depends_on_the_seed_and_the_layer_only(model_folder: Callable[[str], str]):
    """The same layer starts the same whatever else is adapted or random; its variance is 1/(3 in)."""
    starts = []
    for targets in ("all-linear", ("v_proj",)):
        torch.manual_seed(len(starts))
        loaded, _ = load(model_folder("llama"))
        lora.apply_lora(loaded.module, LoraConfig(rank=32, target_modules=targets), seed=5)
        starts.append(lora.trainable(loaded.module)["model.layers.1.self_attn.v_proj.lora_A"].detach())

    assert torch.equal(*starts)
    assert abs(float(starts[0].var()) * 3 * 32 - 1) < 0.2


@pytest.mark.parametrize("kind", [*KINDS, "gemma2", "granite", "cohere", "mamba", "bloom"])
def test_loss_and_gradients_equal_pefts(kind: str, model_folder: Callable[[str], str], tmp_path: Path):
    """The summed loss and every gradient, packed and with the head at targets only, equal PEFT's one by one."""
    loaded, header = load(model_folder(kind))
    assert loaded.layout.packed == (kind not in ("mamba", "bloom"))
    assert loaded.layout.padded
    assert loaded.layout.head is not None
    targets: Any = ("in_proj",) if kind == "mamba" else "all-linear"  # PEFT refuses Mamba's out_proj
    config = LoraConfig(rank=4, alpha=8, target_modules=targets)
    lora.apply_lora(loaded.module, config, seed=0)
    randomise(loaded.module)
    adapter_folder.save(tmp_path, loaded.module, config, Origin(model_folder(kind), None, "f", {}))
    source = write_rows(tmp_path / "r.jsonl", [conversation(n) for n in range(6)])
    found, _ = build_examples(source, header.tokenizer)
    share_inputs(loaded)
    fuse(loaded.module)
    everything = tuple(Group((number,)) for number in range(len(found)))
    loss = target_loss(loaded, lay_out(loaded, everything, found))
    loss.total.backward()
    total = float(loss.total.detach())

    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder(kind), attn_implementation="eager")
    reference = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True)
    reference.eval()
    expected = 0.0
    for example in found:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        mean = reference(input_ids=ids, labels=labels).loss
        (mean * example.targets).backward()
        expected += float(mean.detach()) * example.targets
    theirs = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter.grad
        for name, parameter in reference.named_parameters()
        if parameter.requires_grad
    }
    ours = {name: parameter.grad for name, parameter in lora.trainable(loaded.module).items()}

    assert abs(total - expected) < 1e-5 * abs(expected)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= 1e-5 * theirs[name].norm(), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "rslora"])
@pytest.mark.parametrize("targets", ["all-linear", "one layer"])
def test_peft_loads_our_adapter(
    kind: str, method: Any, targets: str, model_folder: Callable[[str], str], tmp_path: Path
):
    """`adapter/` gives the same logits in PEFT as here, whichever layers are adapted."""
    loaded, _ = load(model_folder(kind))
    chosen = "all-linear" if targets == "all-linear" else (lora.find_targets(loaded.module, "all-linear")[1],)
    config = LoraConfig(rank=4, alpha=8, method=method, target_modules=chosen)
    lora.apply_lora(loaded.module, config, seed=0)
    randomise(loaded.module)
    adapter_folder.save(tmp_path, loaded.module, config, Origin(model_folder(kind), None, "f", {}))
    base = transformers.AutoModelForCausalLM.from_pretrained(model_folder(kind))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path)
    adapted = {n for n, m in theirs.named_modules() if hasattr(m, "lora_A")}

    assert len(adapted) == len(list(lora.lora_layers(loaded.module)))
    assert torch.allclose(logits(loaded.module), logits(theirs), atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"0": 2}, "alpha_pattern": {"1.*": 3}}])
def test_an_adapter_of_peft_works_here(
    kind: str, options: dict[str, Any], model_folder: Callable[[str], str], tmp_path: Path
):
    """It attaches with the same logits."""
    if "rank_pattern" in options:
        linear = lora.find_targets(load(model_folder(kind))[0].module, "all-linear")
        options = {
            "rank_pattern": {linear[0].rsplit(".", 1)[-1]: 2},
            "alpha_pattern": {r".*\.1\..*": 3, linear[1].rsplit(".", 1)[-1]: 16},
        }
    theirs = save_with_peft(model_folder(kind), tmp_path / "theirs", **options)
    result = tuned.find(tmp_path / "theirs")
    loaded = tuned.load(result, CPU)

    assert torch.allclose(logits(loaded.module), logits(theirs), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"bias": "all"}, "biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.lora_embedding_A"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    options: dict[str, Any], expected: str, model_folder: Callable[[str], str], tmp_path: Path
):
    """An adapter with anything beside plain LoRA is an error, never read in part."""
    save_with_peft(model_folder("llama"), tmp_path / "a", **options)
    with pytest.raises(AdapterError, match=expected):
        tuned.find(tmp_path / "a")


def test_an_adapter_of_another_base_is_refused(model_folder: Callable[[str], str], tmp_path: Path):
    """By its shapes where it came from elsewhere, by the base's fingerprint where it is ours."""
    save_with_peft(model_folder("llama"), tmp_path / "a")
    with pytest.raises(AdapterError, match="does not fit this base"):
        tuned.load(tuned.find(tmp_path / "a", base=model_folder("gpt2")), CPU)
    loaded, _ = load(model_folder("llama"))
    lora.apply_lora(loaded.module, LoraConfig(rank=4), seed=0)
    (tmp_path / "b").mkdir()
    adapter_folder.save(
        tmp_path / "b", loaded.module, LoraConfig(rank=4), Origin(model_folder("llama"), None, "another", {})
    )
    with pytest.raises(AdapterError, match="was trained on another base"):
        tuned.find(tmp_path / "b")


def test_a_broken_adapter_is_refused(model_folder: Callable[[str], str], tmp_path: Path):
    """A half, an infinite number, a cut file, a foreign config: each is named."""
    import safetensors.torch

    save_with_peft(model_folder("llama"), tmp_path / "a")
    weights, config = tmp_path / "a" / "adapter_model.safetensors", tmp_path / "a" / "adapter_config.json"
    tensors, settings = safetensors.torch.load_file(weights), config.read_text()
    first, second = sorted(tensors)[:2]
    half = {name: tensor for name, tensor in tensors.items() if name != first}
    infinite = tensors | {second: tensors[second] * torch.inf}
    for broken, expected in ((half, "only one of lora_A and lora_B"), (infinite, "finite")):
        safetensors.torch.save_file(broken, weights)
        with pytest.raises(AdapterError, match=expected):
            adapter.read(tmp_path / "a")
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(AdapterError, match="cannot be read"):
        adapter.read(tmp_path / "a")
    config.write_text(json.dumps(json.loads(settings) | {"peft_type": "IA3"}))
    with pytest.raises(AdapterError, match="no LoRA adapter"):
        adapter.read(tmp_path / "a")


@pytest.mark.parametrize("kind", KINDS)
def test_packed_sequences_do_not_see_each_other(kind: str, model_folder: Callable[[str], str], tmp_path: Path):
    """The logits of packed sequences are those of each alone."""
    loaded, header = load(model_folder(kind))
    source = write_rows(tmp_path / "r.jsonl", [conversation(n) for n in range(5)])
    found, _ = build_examples(source, header.tokenizer)
    with torch.no_grad():
        together = target_logits(loaded, one_batch(found))
        alone = torch.cat([target_logits(loaded, one_batch([example])) for example in found])

    assert torch.allclose(together, alone, atol=1e-5)


def test_dropout_is_drawn_once_for_an_input_and_is_right():
    """A share of the elements is left out of the update, the rest counts for more; the base sees all of them."""
    torch.manual_seed(0)
    x = torch.ones(400, 50, dtype=torch.float64, requires_grad=True)
    eye = torch.eye(50, dtype=torch.float64)
    layers = [Projection(lambda: eye, None, eye.clone(), eye.clone(), 2.0)] * 2
    first, second = project(x, layers, Dropout(0.3, 0, token_keys(range(400))))
    left_out = first == 1

    assert torch.equal(first, second)
    assert abs(float(left_out.double().mean()) - 0.3) < 0.01
    assert torch.allclose(first[~left_out], torch.tensor(1 + 2 / 0.7, dtype=torch.float64))
    first.sum().backward()
    assert torch.allclose(x.grad, first.detach())


@pytest.mark.parametrize(("features", "chance"), [(2, 0.1), (8, 0.05), (8, 0.5), (100, 0.9), (576, 0.05)])
def test_elements_are_dropped_with_the_chance_and_by_themselves(features: int, chance: float):
    """As often in every column; rows, layers and steps have nothing to do with each other, columns next to nothing."""
    keys = token_keys(range(20000))

    def mask(seed: int) -> torch.Tensor:
        return torch.zeros(len(keys) * features).index_fill_(0, Dropout(chance, seed, keys).draw(features), 1.0)

    first, second = (mask(seed).view(-1, features) for seed in (1, 2))
    sure = 5 * (chance * (1 - chance) / len(keys)) ** 0.5
    assert (first.mean(0) - chance).abs().max() < sure
    assert abs(float(first.mean()) - chance) < sure / features**0.5

    def together(one: torch.Tensor, other: torch.Tensor) -> float:
        return abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1]))

    assert together(first[1:, 0], first[:-1, 0]) < 0.04
    assert together(first[:, 0], second[:, 0]) < 0.04
    assert together(first[:, 0], first[:, 1]) < 0.04 + 1 / features  # so many are dropped in every row


def test_what_is_dropped_follows_from_the_tokens_read_so_far():
    """Sequences that begin alike have the same keys there, and no other token has one of them."""
    keys, other = token_keys([5, 6, 7, 8, 5]), token_keys([5, 6, 9, 8, 5])

    assert torch.equal(keys[:2], other[:2])
    assert len({*keys.tolist(), *other.tolist()}) == 8


def test_gradients_of_the_function_are_those_of_autograd():
    """Every gradient, of layers with and without bias and of unequal ranks, equals that of the plain formula."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    weights = [(torch.randn(5, out).double(), torch.randn(out).double() if out == 4 else None) for out in (3, 4)]
    pairs = [
        tuple(torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((rank, 5), (out, rank)))
        for rank, out in ((2, 3), (1, 4))
    ]
    layers = [Projection(partial(torch.clone, W), b, A, B, 0.5) for (W, b), (A, B) in zip(weights, pairs, strict=True)]
    inputs = (x, *(tensor for pair in pairs for tensor in pair))
    plain = [x @ W() + (0 if b is None else b) + 0.5 * (x @ A.T) @ B.T for W, b, A, B, _ in layers]
    ours = project(x, layers)
    for mine, theirs in zip(ours, plain, strict=True):
        assert torch.allclose(mine, theirs)
    for mine, theirs in zip(
        torch.autograd.grad(sum(y.sin().sum() for y in ours), inputs),
        torch.autograd.grad(sum(y.sin().sum() for y in plain), inputs),
        strict=True,
    ):
        assert torch.allclose(mine, theirs)


def test_layers_of_one_input_are_computed_together(model_folder: Callable[[str], str]):
    """q, k and v share theirs, gate and up theirs; o and down have one of their own."""
    loaded, _ = load(model_folder("llama"))
    lora.apply_lora(loaded.module, LoraConfig(rank=4), seed=0)
    share_inputs(loaded)
    names = {layer: path.rsplit(".", 1)[1] for path, layer in lora.lora_layers(loaded.module)}
    groups = {tuple(names[each] for each in layer.shared.layers) for layer in names}

    assert groups == {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}
