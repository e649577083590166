"""Forwards side by side: the same step as one after the other, however the threads fall."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_examples, facts
from torch import Tensor

from lora_cli import config_file, lanes, lora, tuning
from lora_cli import step as step_module
from lora_cli.blocks import change_blocks
from lora_cli.config import RunConfig
from lora_cli.distributed import ALONE
from lora_cli.evaluate import measure
from lora_cli.examples import Example
from lora_cli.forward import share_inputs, target_scores
from lora_cli.interrupt import StopRequest
from lora_cli.lanes import Lanes, count_for, divide, lanes_to_ask, twins
from lora_cli.model import LanguageModel, load_model, read_header
from lora_cli.records import Event, Notice, StepDone
from lora_cli.step import Summed, add_gradients
from lora_cli.train import train

CPU = torch.device("cpu")
NARROW = ("mixtral", "mamba")  # whose operators have no float64


def run(config: Path) -> list[Event]:
    """All events of a run."""
    return list(train(config_file.load(config), StopRequest()))


def in_lanes(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Have a run take so many lanes, whatever threads there are."""
    monkeypatch.setattr("lora_cli.lanes.count_for", lambda *_: count)


def config_of(model: str, **values: Any) -> RunConfig:
    """A config with what a step reads."""
    return RunConfig.model_validate({"model": model, "data": {"train": "x"}, "output_dir": "x", **values})


def models_of(config: RunConfig, count: int) -> list[LanguageModel]:
    """A model with something to train that is not zero, and as many twins as are wanted; in float64 where it can be."""
    first = load_model(read_header(config.model), config.model, CPU)
    tuning.apply(first.module, config.lora, 1)
    first.module.to(torch.float32 if first.module.config.model_type in NARROW else torch.float64)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in tuning.trainable(first.module).items():
            if name.endswith("lora_B"):
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.05)
    share_inputs(first)
    models = twins(first, count)
    for each in models:
        change_blocks(each.module, config.train)
    return models


def step(config: RunConfig, count: int, examples: list[Example], tokens: int) -> tuple[float, Tensor]:
    """(loss, gradients) of a step."""
    together = Lanes(models_of(config, count))
    summed = add_gradients(together, config, 3, examples, tokens, ALONE)
    assert isinstance(summed, Summed)
    return summed.loss.mean, together.gradients


@pytest.mark.parametrize(
    ("kind", "adapter", "settings"),
    [
        ("llama", {"dropout": 0.2}, {}),
        ("llama", {"dropout": 0.2}, {"activation_checkpointing": True}),
        ("llama", {"method": "dora"}, {}),
        ("llama", {"init": "pissa"}, {}),
        ("qwen3", {}, {}),
        ("gpt2", {"dropout": 0.2}, {}),
        ("gemma2", {}, {}),
        ("mixtral", {"dropout": 0.2}, {}),
        ("mamba", {"dropout": 0.2}, {}),
    ],
)
def test_lanes_take_the_step_that_one_takes(
    kind: str,
    adapter: dict[str, Any],
    settings: dict[str, Any],
    model_folder: Callable[[str], str],
    make_rows: Callable[[int], str],
):
    """Loss and gradients, dropout among them, of as many forwards or more; twice the same to the bit."""
    config = config_of(model_folder(kind), lora={"rank": 4, **adapter}, train=settings)
    examples = build_examples(make_rows(12))[0][:]
    tolerance = 1e-5 if kind in NARROW else 1e-9
    alone = step(config, 1, examples, 150)
    for count in (2, 3):
        loss, gradients = step(config, count, examples, 150)
        assert loss == pytest.approx(alone[0], rel=tolerance)
        assert (gradients - alone[1]).norm() <= tolerance * alone[1].norm()
    assert torch.equal(step(config, 2, examples, 150)[1], step(config, 2, examples, 150)[1])


def test_the_pull_to_the_base_has_a_strength_of_each_lane(
    model_folder: Callable[[str], str], make_rows: Callable[[int], str]
):
    """A lane that runs the base for its pull does not switch off the adapter of the other."""
    config = config_of(model_folder("llama"), lora={"rank": 4}, train={"kl_to_base": 0.5})
    examples = build_examples(make_rows(12))[0][:]
    alone, together = (step(config, count, examples, 150) for count in (1, 2))

    assert together[0] == pytest.approx(alone[0], rel=1e-6)
    assert (together[1] - alone[1]).norm() <= 1e-6 * alone[1].norm()


def test_a_twin_has_the_weights_and_nothing_else(model_folder: Callable[[str], str]):
    """What one is given the other has: base, adapter, and the norms of rows that DoRA remembers."""
    first, second = models_of(config_of(model_folder("llama"), lora={"method": "dora", "rank": 2}), 2)
    names = [name for name, _ in first.module.named_parameters()]
    assert names == [name for name, _ in second.module.named_parameters()]
    pairs = list(zip(first.module.parameters(), second.module.parameters(), strict=True))
    assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)
    trained = [(one, other) for one, other in pairs if one.requires_grad]
    assert trained
    assert all(one is not other for one, other in trained)

    layers = [next(layer for _, layer in lora.lora_layers(each.module)) for each in (first, second)]
    before = [layer.norm().clone() for layer in layers]
    with torch.no_grad():
        layers[0].lora_B.add_(1.0)
    after = [layer.norm() for layer in layers]
    assert torch.equal(*before)
    assert torch.equal(*after)
    assert not torch.equal(before[0], after[0])
    lora.set_keys(first.module, torch.arange(7))
    assert [len(layer.tokens.keys[0]) for layer in layers] == [7, 3]


def test_examples_are_divided_evenly_or_not_at_all():
    """Of two lanes none has much more than half; where one example is longer than all others, there is one lane."""
    even = [Example((length,) * length, (0,) * length, "") for length in (90, 80, 70, 60, 50, 40, 30, 20, 10)]
    loads = divide(even, 100, "packed", True, 2)
    lengths = [[sum(len(even[n]) for group in one for n in group.members) for one in load] for load in loads]
    members = sorted(n for load in loads for one in load for group in one for n in group.members)

    assert members == list(range(9))
    assert abs(sum(lengths[0]) - sum(lengths[1])) <= 10
    assert all(max(load) <= 100 and load == sorted(load, reverse=True) for load in lengths)
    for few in (even[:1], [Example((1,) * 300, (0,) * 300, ""), *even[-3:]]):
        assert len(divide(few, 100, "packed", True, 2)) == 1
    assert sorted(map(len, divide(even[:4], 100, "padded", False, 2))) == [2, 2]


def test_bins_are_about_equally_full():
    """Three forwards of 60 tokens, not two full ones and a rest, where as many are needed."""
    examples = [Example(tuple(range(20)), (0,) * 20, "") for _ in range(9)]
    (load,) = divide(examples, 80, "packed", False, 1)

    assert [len(one) for one in load] == [3, 3, 3]


def test_which_runs_have_lanes(model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch):
    """Two threads and two examples, and nothing that draws, compiles or has gradients as large as the model."""
    path = model_folder("llama")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert count_for(config_of(path), CPU) == 2
    assert count_for(config_of(path), torch.device("cuda")) == 1
    assert count_for(config_of(path), CPU, processes=2) == 1
    for settings in ({"neftune_alpha": 5.0}, {"compile": True}, {"batch_size": 1}):
        assert count_for(config_of(path, train=settings), CPU) == 1
    assert count_for(config_of(path, lora={"method": "full"}), CPU) == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert count_for(config_of(path), CPU) == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mixtral", "mamba"])
def test_a_model_is_asked_in_lanes_as_alone(
    kind: str, model_folder: Callable[[str], str], make_rows: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
):
    """Whole or with an odd forward left over, while it is trained; its own strength is as it was."""
    (model,) = models_of(config_of(model_folder(kind), lora={"rank": 4}), 1)
    examples = build_examples(make_rows(12))[0][:]
    asked = list[Any]()

    def seen(lane: LanguageModel, *others: Any) -> Tensor:
        if not any(lane.module is module for module in asked):
            asked.append(lane.module)
        return target_scores(lane, *others)

    monkeypatch.setattr("lora_cli.evaluate.target_scores", seen)
    found = []
    for count in (1, 2, 3):
        monkeypatch.setattr("lora_cli.lanes._most", lambda *_, count=count: count)
        found.append(measure(model, examples, 64, (0.0, 1.0)))
    assert len(asked) == 1 + 1 + 2  # the model itself each time
    assert not np.allclose(found[0][0].loss, found[0][1].loss, rtol=1e-5)
    for others in found[1:]:
        for alone, beside in zip(found[0], others, strict=True):
            for name in ("targets", "loss", "correct", "kl"):
                assert getattr(beside, name) == pytest.approx(getattr(alone, name), rel=1e-4, abs=1e-6)
    assert all(layer.gain == 1.0 for _, layer in lora.lora_layers(model.module))


def test_which_models_are_asked_in_lanes(model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch):
    """By one process with two threads; not one compiled or tuned in full: its copy would be another, or large."""
    (model,) = models_of(config_of(model_folder("llama")), 1)
    (whole,) = models_of(config_of(model_folder("llama"), lora={"method": "full"}), 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert len(lanes_to_ask(model)) == 2
    assert len(lanes_to_ask(model, processes=2)) == 1
    assert len(lanes_to_ask(whole)) == 1
    model.module.compile()
    assert len(lanes_to_ask(model)) == 1


def test_a_model_that_cannot_be_copied_runs_by_itself(model_folder: Callable[[str], str]):
    """As where its own code keeps a lock or an open file."""
    (model,) = models_of(config_of(model_folder("llama")), 1)
    assert len(twins(model, 2)) == 2
    model.module.lock = threading.Lock()
    assert twins(model, 2) == [model]


def test_an_error_in_a_lane_is_raised_when_all_have_ended(model_folder: Callable[[str], str]):
    """The others are not left behind; threads are as many as before."""
    together = Lanes(models_of(config_of(model_folder("llama"), lora={"rank": 2}), 2))
    threads, ended = torch.get_num_threads(), []

    def work(lane: lanes.Lane, load: int) -> int:
        if load == 0:
            raise ZeroDivisionError("of the first")
        torch.ones(1 << 20).sum()
        ended.append(load)
        return load

    with pytest.raises(ZeroDivisionError, match="of the first"):
        together.run(work, [0, 1])
    assert ended == [1]
    assert torch.get_num_threads() == threads
    assert together.run(work, [2, 1]) == [2, 1]


def test_a_run_in_lanes_is_the_run_without(
    make_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The same losses to rounding; itself again to the bit, stopped and continued as well."""
    settings = {"train.max_steps": 6, "data.validation": 8, "lora.dropout": 0.1, "save.per_epoch": 8}
    losses, places = [], []
    for name, count in (("one", 1), ("two", 2), ("again", 2)):
        in_lanes(monkeypatch, count)
        places.append(tmp_path / name)
        events = run(make_config(**settings, output_dir=str(places[-1])))
        losses.append([event.loss for event in events if isinstance(event, StepDone)])

    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1] == losses[2]
    assert facts(places[1])[0] == facts(places[2])[0]


def test_memory_that_runs_out_leaves_one_lane(
    make_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One forward at a time first, then smaller ones; the numbers stay."""
    settings: dict[str, Any] = {"train.max_steps": 2, "train.batch_size": 8, "train.micro_batch_tokens": 200}
    in_lanes(monkeypatch, 2)
    plain = [event.loss for event in run(make_config(**settings)) if isinstance(event, StepDone)]
    whole = step_module.target_loss

    def limited(loaded: LanguageModel, batch: Any, pull: Any) -> Any:
        if len(batch.segments.lengths) > 1:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return whole(loaded, batch, pull)

    monkeypatch.setattr(step_module, "target_loss", limited)
    events = run(make_config(**settings, output_dir=str(tmp_path / "less")))
    said = [event.text for event in events if isinstance(event, Notice) and "Memory ran out" in event.text]

    assert [event.loss for event in events if isinstance(event, StepDone)] == pytest.approx(plain, rel=1e-5)
    assert said[0] == "Memory ran out; step 1 is taken again with one forward at a time."
    assert said[1] == "Memory ran out; step 1 is taken again with 100 tokens a forward."
