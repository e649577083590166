"""Full fine-tuning in the same loop: the numbers of plain torch, the base beside it, a whole model as the result."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from conftest import build_examples

from lora_cli import batches, model, tuning
from lora_cli.config import LoraConfig, ModelConfig, TrainConfig
from lora_cli.examples import Example
from lora_cli.forward import form, lay_out, target_loss
from lora_cli.fused import fuse
from lora_cli.model import LanguageModel
from lora_cli.optim import build_optimizer, set_rate
from lora_cli.step import flat_gradients

CPU = torch.device("cpu")
FULL = LoraConfig(method="full")
# Tied and untied heads, biases, soft caps, logits that are scaled, a head of the model's own, no attention.
KINDS = ["llama", "tall", "qwen3", "gpt2", "gemma2", "granite", "cohere", "mamba", "bloom"]


def loaded_for_full(folder: str) -> LanguageModel:
    """A base as the loop prepares it."""
    config = ModelConfig(path=folder)
    loaded = model.load_model(model.read_header(config), config, CPU)
    tuning.apply(loaded.module, FULL, 0)
    fuse(loaded.module)
    return loaded


def add_ours(loaded: LanguageModel, examples: Sequence[Example], tokens: int, share: bool) -> int:
    """Add the gradients of a step; return in how many forwards."""
    targets = sum(example.targets for example in examples)
    split = batches.micro_batches(examples, tokens, form(loaded), share)
    for groups in split:
        (target_loss(loaded, lay_out(loaded, groups, examples)).total / targets).backward()
    return len(split)


def add_plain(module: Any, examples: Sequence[Example]) -> None:
    """Add the gradients of a step as transformers has them: row by row, its own loss."""
    targets = sum(example.targets for example in examples)
    for example in examples:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        (module(input_ids=ids, labels=labels).loss * (example.targets / targets)).backward()


def some_rows(rows: str) -> list[Example]:
    """Rows of several lengths, and some that begin alike."""
    found, _ = build_examples(rows)
    alike = tuple(range(3, 33))
    more = [Example(alike + tail, (-100,) * 28 + alike[28:] + tail, "") for tail in ((50, 51), (52, 53, 54), (50, 55))]
    return [*found[:], *more]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_plain_torch(
    kind: str, model_folder: Callable[[str], str], make_rows: Callable[[int], str]
):
    """Of every parameter, to float32's rounding: in one forward, in several, with beginnings run once."""
    examples = some_rows(make_rows(6))
    plain = transformers.AutoModelForCausalLM.from_pretrained(model_folder(kind)).eval()
    add_plain(plain, examples)
    ours = loaded_for_full(model_folder(kind))
    trained = tuning.trainable(ours.module)
    forwards = set()
    for tokens, share in ((100_000, False), (100, False), (100, True)):
        ours.module.zero_grad()
        forwards.add(add_ours(ours, examples, tokens, share))
        assert trained.keys() == dict(plain.named_parameters()).keys()
        for name, parameter in plain.named_parameters():
            assert (trained[name].grad - parameter.grad).norm() <= 3e-5 * parameter.grad.norm(), name

    assert len(forwards) > 1 or not ours.layout.packed


@pytest.mark.parametrize("kind", ["llama", "tall"])
def test_steps_are_those_of_plain_torch(kind: str, model_folder: Callable[[str], str], make_rows: Callable[[int], str]):
    """Five steps of AdamW, the head tied or not: the same change of the weights, to 1e-3 of it."""
    examples = some_rows(make_rows(6))
    plain = transformers.AutoModelForCausalLM.from_pretrained(model_folder(kind)).eval()
    theirs = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.1)
    ours = loaded_for_full(model_folder(kind))
    trained = tuning.trainable(ours.module)
    gradients = flat_gradients(list(trained.values()))
    optimizer = build_optimizer(trained, TrainConfig(weight_decay=0.1))
    set_rate(optimizer, 1e-3)
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for _ in range(5):
        theirs.zero_grad()
        add_plain(plain, examples)
        theirs.step()
        add_ours(ours, examples, 100, True)
        optimizer.step()
        gradients.zero_()

    for name, parameter in plain.named_parameters():
        change = (parameter - before[name]).norm()
        assert change > 0, name
        assert (trained[name] - parameter).norm() <= 1e-3 * change, name
