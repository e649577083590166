"""Forgetting: measured at every validation, part of stopping and choosing, held down while training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import build_examples, conversation, write_rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_cli import config_file, lora, model
from lora_cli.batches import ALONE, Group
from lora_cli.checkpoint import Stopping
from lora_cli.config import EvalConfig, ModelConfig
from lora_cli.data_reader import DataReader, run_to_end
from lora_cli.errors import ConfigError, DataError, Interrupted
from lora_cli.evaluate import measure
from lora_cli.examples import IGNORED
from lora_cli.forgetting import Validation, without_surprising
from lora_cli.forward import base_states, lay_out, target_scores
from lora_cli.general import OURS, WINDOW, read_general
from lora_cli.interrupt import StopRequest
from lora_cli.likelihood import compare_logits, compare_states
from lora_cli.loss import HeadForm, Pull, head_logits, head_loss, logits_loss
from lora_cli.merge import merge
from lora_cli.model import LanguageModel
from lora_cli.records import Evaluated, Finished, StepDone
from lora_cli.train import ended, train

CPU = torch.device("cpu")


def adapted(folder: str, dtype: str = "float32") -> LanguageModel:
    """A model with an adapter that does something."""
    section = ModelConfig(path=folder, dtype=dtype)
    loaded = model.load_model(model.read_header(section), section, CPU)
    lora.wrap(loaded.module, dict.fromkeys(lora.find_targets(loaded.module, "all-linear"), (4, 2.0)))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in lora.trainable(loaded.module).values():
            parameter.normal_(0.0, 0.1)
    return loaded


def weights_of(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def run(config: Path, *overrides: str) -> list[Any]:
    return list(train(config_file.load(config, overrides), StopRequest()))


@pytest.fixture(scope="session")
def learned(model_folder: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A base that knows its general text well, so that there is something to forget; and that text."""
    folder = tmp_path_factory.mktemp("learned")
    lines = [
        f"The {colour} bird number {n} sings in tree {n * 7 % 11}." for n in range(20) for colour in ("red", "old")
    ]
    rows = write_rows(folder / "rows.jsonl", [{"text": line} for line in lines])
    (folder / "general.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    values = {
        "model": model_folder("llama"),
        "data": {"train": rows, "validation": 0},
        "train": {"learning_rate": 0.03, "epochs": 8, "batch_size": 8},
        "lora": {"rank": 16},
        "output_dir": str(folder / "run"),
    }
    (folder / "config.yaml").write_text(json.dumps(values), encoding="utf-8")
    run(folder / "config.yaml")
    merge([folder / "run"], folder / "base")
    return str(folder / "base"), str(folder / "general.txt")


def forgetful(learned: tuple[str, str]) -> dict[str, Any]:
    """Settings of a run that forgets."""
    return {
        "model.path": learned[0], "eval.general": learned[1], "eval.per_epoch": 8, "train.learning_rate": 0.03,
    }  # fmt: skip


# --- the pull towards the base ---


@pytest.mark.parametrize("without_target", [False, True])
def test_the_pull_equals_kl_on_full_logits(without_target: bool):
    """Chunked, with its gradient made by hand, it is what autograd gives for torch's own kl_div."""
    torch.manual_seed(0)
    weight, bias = torch.randn(50, 16, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    labels, base = torch.randint(0, 50, (600,)), torch.randn(600, 16, dtype=torch.float64)
    for use_bias, head in ((None, HeadForm()), (bias, HeadForm(0.7)), (bias, HeadForm(2.5, 3.0))):
        ours = torch.randn(600, 16, dtype=torch.float64, requires_grad=True)
        theirs = ours.detach().clone().requires_grad_()
        loss = head_loss(ours, weight, use_bias, labels, head, Pull(base, 0.7, without_target))
        loss.total.backward()

        logits, wanted = (head_logits(states, weight, use_bias, head) for states in (theirs, base))
        likelihood = F.cross_entropy(logits, labels, reduction="sum")
        if without_target:
            kept = torch.ones(600, 50, dtype=torch.bool).scatter(1, labels[:, None], False)
            logits, wanted = (each[kept].view(600, 49) for each in (logits, wanted))
        kl = F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum")
        (likelihood + 0.7 * kl).backward()

        assert float(loss.penalty) == pytest.approx(0.7 * float(kl.detach()), rel=1e-12)
        assert loss.mean == pytest.approx(float(likelihood.detach()) / 600, rel=1e-12)
        assert (ours.grad - theirs.grad).abs().max() < 1e-13  # type: ignore[operator]


@pytest.mark.parametrize("form", [HeadForm(), HeadForm(0.7), HeadForm(2.5, 3.0)])
def test_what_is_said_of_labels_needs_no_row_of_logits(form: HeadForm):
    """In pieces of the head it is what whole logits say, of the first of two that are equally likely as well."""
    torch.manual_seed(0)
    weight, bias = torch.randn(2500, 16, dtype=torch.float64), torch.randn(2500, dtype=torch.float64)
    weight[[7, 2400]], bias[[7, 2400]] = 3.0, 6.0
    first = torch.randn(700, 16, dtype=torch.float64)
    states = [first, first + 0.1 * torch.randn_like(first), first]
    logits = [head_logits(each, weight, bias, form) for each in states]
    labels = torch.cat([torch.randint(0, 2500, (350,)), logits[1][350:].argmax(1)])
    labels[:2] = torch.tensor([7, 2400])
    first[:2] = 1 / 16
    logits[0] = logits[2] = head_logits(first, weight, bias, form)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, given: Any = (), options: Any = None) -> Any:
            nonlocal largest
            made = operator(*given, **(options or {}))
            largest = max(largest, made.numel() if isinstance(made, Tensor) and not made._is_view() else 0)
            return made

    with Watch():
        found = compare_states(states, [(weight, bias)] * 3, labels, form)
    whole = compare_logits(logits, labels)

    assert largest == 350 * 1024
    assert (found - whole).abs().max() < 1e-12
    assert found[0, 1, :2].tolist() == [1, 0]
    assert found[2, 2].abs().max() == 0  # the first model again


def test_a_head_of_the_models_own_is_pulled_alike():
    """Through plain logits the pull has the same value and gradient as through the chunked head."""
    torch.manual_seed(0)
    weight, labels = torch.randn(50, 16, dtype=torch.float64), torch.randint(0, 50, (30,))
    hidden, base = (torch.randn(30, 16, dtype=torch.float64) for _ in range(2))
    gradients, sums = [], []
    for chunked in (True, False):
        ours = hidden.clone().requires_grad_()
        if chunked:
            loss = head_loss(ours, weight, None, labels, HeadForm(), Pull(base, 0.5, True))
        else:
            loss = logits_loss(ours @ weight.T, labels, Pull(base @ weight.T, 0.5, True))
        loss.total.backward()
        gradients.append(ours.grad)
        sums.append((float(loss.total.detach()), float(loss.penalty)))

    assert torch.allclose(*gradients, rtol=1e-10)  # type: ignore[arg-type]
    assert sums[0] == pytest.approx(sums[1], rel=1e-12)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mamba"])
def test_scores_equal_the_models_own_logits(
    kind: str, model_folder: Callable[[str], str], make_rows: Callable[[int], str]
):
    """Loss, hits and KL at every target, for the adapter at several gains, are those of full logits row by row."""
    loaded = adapted(model_folder(kind))
    found, _ = build_examples(make_rows(6))
    gains = (0.0, 0.5, 1.0)
    measured = measure(loaded, found[:], 64, gains)
    for place, gain in enumerate(gains):
        for number, example in enumerate(found):
            ids = torch.tensor([example.input_ids])
            logs = []
            for strength in (0.0, gain):
                with lora.gain(loaded.module, strength), torch.no_grad():
                    loaded.module.set_attn_implementation(loaded.own_attention)
                    logs.append(loaded.module(input_ids=ids).logits[0].log_softmax(-1))
            at = [i for i, label in enumerate(example.labels[1:]) if label != IGNORED]
            labels = torch.tensor(example.labels[1:])[at]
            base, ours = (log[at] for log in logs)

            assert measured[place].targets[number] == len(at)
            assert measured[place].loss[number] == pytest.approx(
                -float(ours.gather(1, labels[:, None]).sum()), rel=1e-4
            )
            assert measured[place].correct[number] == int((ours.argmax(-1) == labels).sum())
            assert measured[place].kl[number] == pytest.approx(
                float((base.exp() * (base - ours)).sum()), rel=1e-3, abs=1e-4
            )
        loaded = adapted(model_folder(kind))


def test_the_pull_is_zero_at_the_start_and_keeps_near(make_config: Callable[..., Path], tmp_path: Path):
    """KL is 0 while the adapter is; with a weight the model ends nearer to its base than without."""
    ends = {}
    for weight in (0.0, 5.0):
        config = make_config(
            **{"train.kl_to_base": weight, "eval.general": None, "output_dir": str(tmp_path / str(weight))}
        )
        events = run(config)
        steps = [event for event in events if isinstance(event, StepDone)]
        ends[weight] = [event for event in events if isinstance(event, Evaluated)][-1].forgetting
        if weight:
            assert steps[0].kl == pytest.approx(0.0, abs=1e-6)
            assert steps[-1].kl is not None
            assert steps[-1].kl > 0
        else:
            assert {step.kl for step in steps} == {None}

    assert ends[5.0].kl.value < ends[0.0].kl.value / 2


def test_the_base_is_asked_without_noise_and_adapter(model_folder: Callable[[str], str], rows_file: str):
    """`base_states` are those of the model with no adapter at all, bit for bit."""
    found, _ = build_examples(rows_file)
    loaded = adapted(model_folder("llama"))
    bare = model.load_model(
        model.read_header(ModelConfig(path=model_folder("llama"))), ModelConfig(path=model_folder("llama")), CPU
    )
    states = []
    for each in (loaded, bare):
        states.append(base_states(each, lay_out(each, (Group((0,)), Group((1,))), found[:2])))

    assert torch.equal(*states)


def test_a_run_with_a_pull_resumes_exactly(make_config: Callable[..., Path], tmp_path: Path):
    """Stopped after 6 steps and continued, the adapter has the same bytes as one that went through."""
    settings = {
        "train.kl_to_base": 0.5, "train.kl_without_target": True, "train.surprise_limit": 4.0, "eval.general": None,
    }  # fmt: skip
    whole = make_config(**settings, output_dir=str(tmp_path / "whole"))
    run(whole)
    config = config_file.load(make_config(**settings, output_dir=str(tmp_path / "cut")))
    stop = StopRequest()
    for event in (events := train(config, stop)):
        if isinstance(event, StepDone) and event.step == 6:
            stop.signal_number = 15
            break
    with pytest.raises(Interrupted):
        list(events)
    list(train(config, StopRequest()))
    ours, theirs = (weights_of(tmp_path / name) for name in ("cut", "whole"))

    assert ours == theirs


# --- surprising targets ---


def test_surprising_targets_are_left_out(model_folder: Callable[[str], str], rows_file: str):
    """Exactly those whose loss under the base is above the limit; a row keeps its least surprising one."""
    found, _ = build_examples(rows_file)
    loaded = adapted(model_folder("llama"))
    some = found[:5]
    losses = []
    for example in some:
        losses.append(target_scores(loaded, lay_out(loaded, ALONE, [example]), (0.0,))[0, 0].tolist())
    limit = float(np.median([loss for of_example in losses for loss in of_example]))
    kept = without_surprising(loaded, some, limit, 64)
    none = without_surprising(loaded, some, 1e-9, 64)
    for example, ours, least, of_example in zip(some, kept, none, losses, strict=True):
        at = [i for i, label in enumerate(example.labels) if label != IGNORED and i > 0]
        wanted = [i for i, loss in zip(at, of_example, strict=True) if loss <= max(limit, min(of_example))]
        assert [i for i, label in enumerate(ours.labels) if label != IGNORED and i > 0] == wanted
        assert least.targets == 1
        assert ours.input_ids == example.input_ids
        assert all(label in (IGNORED, token) for label, token in zip(ours.labels, ours.input_ids, strict=True))


# --- general text ---


def general(path: Any, folder: str, tokens: int = 8192) -> Any:
    header = model.read_header(ModelConfig(path=folder))
    settings = config_file.RunConfig.model_validate({"model": folder, "data": {"train": "x"}, "output_dir": "x"})
    return run_to_end(read_general(EvalConfig(general=path, general_tokens=tokens), DataReader(settings.data, header)))


def test_plain_text_becomes_windows(model_folder: Callable[[str], str], tmp_path: Path):
    """Windows lie one behind the other, every token is a target, and fewer are spread over the whole text."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {number} says something.\n" for number in range(300)), encoding="utf-8")
    folder = model_folder("llama")
    tokenizer = model.read_header(ModelConfig(path=folder)).tokenizer
    windows = general(str(text), folder, 10**6)
    joined = [token for window in windows for token in window.input_ids]

    assert text.read_text().startswith(tokenizer.decode(joined))
    assert {len(window) for window in windows} == {WINDOW}
    assert all(window.labels == window.input_ids for window in windows)
    assert [int(each.where.split()[-3]) for each in general(str(text), folder, 4 * WINDOW)] == [
        1 + number * len(windows) // 4 for number in range(4)
    ]


def test_rows_and_our_own_text_can_be_general_text(model_folder: Callable[[str], str], tmp_path: Path):
    """A file of rows is read as data is; without a file there is a text of our own; false is none."""
    rows = write_rows(tmp_path / "general.jsonl", [conversation(number) for number in range(50)])
    some = general(rows, model_folder("llama"), 256)

    assert 1 < len(some) < 50
    assert len({each.where for each in some}) == len(some)
    assert sum(map(len, general(None, model_folder("llama")))) <= 8192
    assert OURS.read_text(encoding="utf-8").count("\n\n") > 40
    assert general(False, model_folder("llama")) is None


def test_bad_general_text_is_an_early_error(make_config: Callable[..., Path], tmp_path: Path):
    """A file that is not there, empty, or no text stops a run before a weight is read."""
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01" * 10)
    for name, message in (("none.txt", "no such file"), ("empty.txt", "no text"), ("binary.txt", "not UTF-8")):
        with pytest.raises(DataError, match=message):
            run(make_config(**{"eval.general": str(tmp_path / name)}))
        assert not (tmp_path / "run").exists()


def test_the_rise_is_measured_against_the_base(
    learned: tuple[str, str], make_config: Callable[..., Path], tmp_path: Path
):
    """At step 0 it is exactly zero, later it has grown, with an interval around it, and is written down."""
    events = run(make_config(**forgetful(learned)))
    evaluations = [event for event in events if isinstance(event, Evaluated)]
    first, last = (event.forgetting for event in (evaluations[0], evaluations[-1]))
    assert first is not None
    assert last is not None

    assert (first.rise.value, first.kl.value) == (0.0, 0.0)
    assert last.rise.value is not None
    assert last.rise.value > 0.05
    assert last.rise.low is not None
    assert last.rise.low < last.rise.value < last.rise.high  # type: ignore[operator]
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["forgetting"]["rise"]["value"] == last.rise.value


def test_measuring_changes_no_figure_of_validation(model_folder: Callable[[str], str], rows_file: str):
    """Loss and accuracy are the same whether forgetting is measured beside them or not."""
    found, _ = build_examples(rows_file)
    loaded = adapted(model_folder("llama"))
    alone, _ = Validation(loaded, found, None).measure(64)
    beside, forgot = Validation(loaded, found, found[:3]).measure(64)

    assert forgot is not None
    assert alone.mean("loss") == pytest.approx(beside.mean("loss"), rel=1e-7)
    assert alone.mean("correct") == beside.mean("correct")
    assert alone.targets.sum() == beside.targets.sum()


# --- the budget ---


def test_the_best_is_the_lowest_loss_within_the_budget():
    """Among evaluations within it the lowest loss; while none is, the one that forgets least."""
    stopping = Stopping()
    seen = [(10, 3.0, 0.5), (20, 2.0, 0.4), (30, 2.5, 0.1), (40, 1.0, 0.3), (50, 2.4, 0.2)]
    best = [stopping.update(step, loss, 0.0, rise, 0.2) for step, loss, rise in seen]

    assert best == [True, True, True, False, True]
    assert (stopping.best_step, stopping.best_loss, stopping.best_forgetting) == (50, 2.4, 0.2)
    assert stopping.best_excess == 0.0


def test_over_the_budget_nothing_improves():
    """A loss that still falls does not keep a run alive that forgets more and more."""
    stopping = Stopping()
    for step, (loss, rise) in enumerate(((3.0, 0.1), (2.0, 0.3), (1.0, 0.5), (0.5, 0.9)), 1):
        stopping.update(step, loss, 0.0, rise, 0.2)

    assert stopping.without_improvement == 3
    assert stopping.best_step == 1


def test_a_run_stays_within_its_budget(learned: tuple[str, str], make_config: Callable[..., Path], tmp_path: Path):
    """With half of the plain run's forgetting as budget, another adapter is chosen, and it is within it."""
    settings = forgetful(learned)
    plain = run(make_config(**settings, output_dir=str(tmp_path / "plain")))[-1]
    assert isinstance(plain, Finished)
    assert plain.best_forgetting is not None
    assert plain.within_budget is None
    budget = plain.best_forgetting / 2
    held = make_config(**settings | {"eval.forgetting_budget": budget}, output_dir=str(tmp_path / "held"))
    chosen = run(held)[-1]
    assert isinstance(chosen, Finished)
    assert chosen.best_forgetting is not None

    assert 0 < chosen.best_forgetting <= budget
    assert chosen.within_budget is True
    assert chosen.best_step != plain.best_step
    assert ended(config_file.load(held)) == chosen


def test_a_budget_nothing_can_meet_is_said(learned: tuple[str, str], make_config: Callable[..., Path]):
    """The adapter that forgets least is kept, and the record says it is over the budget."""
    config = make_config(**forgetful(learned) | {"eval.forgetting_budget": 1e-9})
    events = run(config)
    evaluations = [event for event in events if isinstance(event, Evaluated) and event.step]
    rises = [event.forgetting.rise.value for event in evaluations if event.forgetting]
    end = events[-1]
    assert {event.within_budget for event in evaluations} == {False}
    assert end.reason in ("all steps taken", "no improvement within the forgetting budget in 3 evaluations")

    assert end.within_budget is False
    assert end.best_forgetting == min(rises)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("eval.forgetting_budget=0.1", "eval.general=false"), "eval.general is false"),
        (("eval.forgetting_budget=0.1", "data.validation=0"), "data.validation is 0"),
        (("train.kl_without_target=true",), "has no effect while train.kl_to_base is 0"),
        (("data.test=0.1", "data.validation=0"), "no use without validation rows"),
        (("data.test=1.5",), "a share must lie between 0 and 1"),
        (("eval.general=true",), "eval.general"),
    ],
)
def test_keys_that_do_not_go_together(overrides: tuple[str, ...], message: str, make_config: Callable[..., Path]):
    """A budget with nothing to hold it against, and keys without effect, are errors."""
    with pytest.raises(ConfigError, match=message):
        config_file.load(make_config(**{"eval.general": None}), overrides)


# --- test rows ---


def test_test_rows_choose_nothing(make_config: Callable[..., Path], tmp_path: Path):
    """They are held out beside the validation rows, and the chosen adapter's loss on them is the final report."""
    config = make_config(**{"data.test": 6, "data.validation": 8, "train.epochs": 6, "train.learning_rate": 0.1})
    end = run(config)[-1]
    assert isinstance(end, Finished)
    assert end.best_step != end.step  # so that it matters which adapter is measured
    assert end.test is not None
    assert end.test.loss < end.test.base_loss
    assert end.test.change.value == pytest.approx(end.test.loss - end.test.base_loss, rel=1e-9)
    assert end.test.flattery.value == pytest.approx(
        (end.test.loss - end.test.base_loss) - (end.best_loss - end.base_loss),
        abs=1e-6,  # type: ignore[operator]
    )
    assert end.test.flattery.low < end.test.flattery.value < end.test.flattery.high  # type: ignore[operator]
    assert ended(config_file.load(config)) == end
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["test_fingerprint"]


def test_the_adapter_is_the_best_though_test_was_measured(make_config: Callable[..., Path], tmp_path: Path):
    """Measuring test rows changes nothing of the run: the same adapter as when these rows are simply left out."""
    rows = tmp_path / "rows.jsonl"
    lines = rows.read_text().splitlines(keepends=True)
    (tmp_path / "test.jsonl").write_text("".join(lines[34:]))
    rows.write_text("".join(lines[:34]))
    adapters = []
    for name, test in (("with", str(tmp_path / "test.jsonl")), ("without", None)):
        run(make_config(**{"data.test": test}, output_dir=str(tmp_path / name)))
        adapters.append(weights_of(tmp_path / name))

    assert adapters[0] == adapters[1]


def test_test_rows_that_are_trained_on_are_an_error(make_config: Callable[..., Path], tmp_path: Path):
    """As for validation: they would measure memory."""
    same = write_rows(tmp_path / "test.jsonl", [conversation(number) for number in range(3)])
    with pytest.raises(DataError, match=r"data\.test: 3 of 3 test rows have a prompt that is also trained on"):
        run(make_config(**{"data.test": same}))
