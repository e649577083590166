"""The loop: exact whatever the split into micro-batches, exact across a kill, and it stops when it should."""

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import build_examples, build_model, build_tokenizer, conversation, facts, one_batch, write_rows

from lora_cli import (
    base_folder,
    batches,
    checkpoint,
    config_file,
    lora,
    manifest,
    memory,
    metrics,
    model,
    resume,
    run_dir,
    storage,
)
from lora_cli.batches import Mixture, Part
from lora_cli.checkpoint import Stopping
from lora_cli.config import LoraConfig, ModelConfig, RunConfig, TrainConfig
from lora_cli.errors import AdapterError, ConfigError, DataError, Interrupted, SurroundingsError, TrainingStopped
from lora_cli.examples import Example
from lora_cli.forward import embedding_noise, form, lay_out, share_inputs, target_loss
from lora_cli.fused import fuse
from lora_cli.interrupt import StopRequest
from lora_cli.loss import HeadForm, LossSum, head_logits, head_loss, logits_loss
from lora_cli.optim import lr_at
from lora_cli.records import Evaluated, Event, Finished, Notice, StepDone
from lora_cli.run_dir import RunDir
from lora_cli.timetable import Timetable
from lora_cli.train import train

CPU = torch.device("cpu")


def run(config: Path) -> list[Event]:
    """Train in this process and return every event."""
    return list(train(config_file.load(config), StopRequest()))


def adapted(folder: str, dtype: torch.dtype = torch.float32) -> model.LanguageModel:
    """A model with an adapter that does something."""
    config = ModelConfig(path=folder)
    loaded = model.load_model(model.read_header(config), config, CPU)
    lora.apply_lora(loaded.module, LoraConfig(rank=4), seed=0)
    for _, layer in lora.lora_layers(loaded.module):
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    loaded.module.to(dtype)
    share_inputs(loaded)
    fuse(loaded.module)
    return loaded


def tall_model(folder: Path) -> str:
    """A model with a block that is neither the first nor the last."""
    path = folder / "tall"
    if not path.exists():
        build_model("tall").save_pretrained(path)
        build_tokenizer().save_pretrained(path)
    return str(path)


# --- the numbers ---


@pytest.mark.parametrize("piece", [7, 50, 1024])
def test_head_loss_equals_full_logits(piece: int, monkeypatch: pytest.MonkeyPatch):
    """In chunks and pieces, its gradient made in the forward pass, equal to cross-entropy on all logits (1e-6)."""
    monkeypatch.setattr("lora_cli.loss._PIECE", piece)
    torch.manual_seed(0)
    weight, bias = torch.randn(50, 16), torch.randn(50)
    labels = torch.randint(0, 50, (600,))
    for use_bias, head in ((None, HeadForm()), (bias, HeadForm()), (bias, HeadForm(0.7)), (bias, HeadForm(2.5, 3.0))):
        ours = torch.randn(600, 16, requires_grad=True)
        theirs = ours.detach().clone().requires_grad_()
        found = head_loss(ours, weight, use_bias, labels, head)
        (found.total / 7).backward()
        reference = logits_loss(head_logits(theirs, weight, use_bias, head), labels)
        (reference.total / 7).backward()

        assert abs(float(found.total.detach() / reference.total.detach()) - 1) < 1e-6
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=5e-7)


def test_a_head_in_pieces_is_exact_far_from_zero():
    """Logits of thousands, whose exponentials are no float32: the largest comes first, last, or somewhere between."""
    weight = torch.eye(3000)
    logits = torch.linspace(-4000, 4000, 3000)
    hidden = torch.stack([logits, logits.flip(0), logits.roll(1500)]).requires_grad_()
    labels = torch.tensor([2998, 0, 77])

    found = head_loss(hidden, weight, None, labels, HeadForm())
    found.total.backward()

    wide = hidden.detach().double().requires_grad_()
    exact = F.cross_entropy(wide, labels, reduction="sum")
    exact.backward()
    assert torch.allclose(found.total, exact, rtol=1e-7)
    assert torch.allclose(hidden.grad.double(), wide.grad, atol=1e-6)


def test_sums_add_and_divide_once():
    """Two unequal parts give the mean over all tokens, not the mean of means."""
    whole = LossSum(torch.tensor(3.0), 1) + LossSum(torch.tensor(1.5), 3, penalty=torch.tensor(0.5))

    assert whole.mean == 1.0


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gemma2", "granite", "cohere", "mamba", "bloom"])
def test_any_split_into_micro_batches_gives_the_same_step(
    kind: str, model_folder: Callable[[str], str], make_rows: Callable[[int], str]
):
    """Loss and gradients of a step agree whether it is one forward, several, or one a sequence.

    In float64, where the same sum shows as such: float32 rounds gradients by 1e-6. Mamba's scan and Bloom's position
    biases are float32 whatever the model's dtype.
    """
    tolerance = 1e-6 if kind in ("mamba", "bloom") else 1e-12
    loaded = adapted(model_folder(kind), torch.float64)
    found, _ = build_examples(make_rows(16))
    results = []
    for order in (found[:], found[::-1]):
        for tokens in (100_000, 150, 64, 0):
            split = batches.micro_batches(order, tokens, form(loaded))
            targets = sum(example.targets for example in found)
            loaded.module.zero_grad()
            total = 0.0
            for groups in split:
                part = target_loss(loaded, lay_out(loaded, groups, order))
                (part.total / targets).backward()
                total += float(part.total.detach())
            gradients = torch.cat([p.grad.flatten() for p in lora.trainable(loaded.module).values()])
            results.append((total / targets, gradients.clone(), len(split)))

    assert len({count for _, _, count in results}) == 4
    for loss, gradients, _ in results[1:]:
        assert abs(loss / results[0][0] - 1) < tolerance
        assert (gradients - results[0][1]).norm() < tolerance * results[0][1].norm()


def step_gradients(loaded: model.LanguageModel, examples: list[Example], tokens: int, share: bool) -> Any:
    """(loss, gradients, tokens run) of one step."""
    loaded.module.zero_grad()
    total = tokens_run = 0.0
    for groups in batches.micro_batches(examples, tokens, form(loaded), share):
        batch = lay_out(loaded, groups, examples)
        part = target_loss(loaded, batch)
        part.total.backward()
        total += float(part.total.detach())
        tokens_run += batch.input_ids.numel()
    return total, torch.cat([p.grad.flatten() for p in lora.trainable(loaded.module).values()]), tokens_run


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_shared_prefixes_run_once_and_change_nothing(kind: str, model_folder: Callable[[str], str]):
    """Rows that begin alike, in part with trained tokens, some equal: fewer tokens, the same loss and gradients."""
    loaded = adapted(model_folder(kind), torch.float64)
    prompts = [tuple(range(3, 33)), tuple(range(3, 23)) + tuple(range(60, 90))]
    answers = [(100, 101, 102), (100, 101, 103, 104), (110,), (100, 101, 102)]
    ids = [prompt + answer for prompt in prompts for answer in answers]
    trained = [Example(one, (-100,) * (len(one) - 5) + one[-5:], "") for one in ids]
    alone, shared = (step_gradients(loaded, trained, 150, share) for share in (False, True))

    assert shared[2] < 0.4 * alone[2]
    assert abs(shared[0] / alone[0] - 1) < 1e-6
    assert (shared[1] - alone[1]).norm() <= 1e-6 * alone[1].norm()


def test_nothing_is_shared_where_nothing_is_alike():
    """Rows of unequal beginnings, or of too short an equal one, are laid out as without sharing."""
    examples = [Example((7,) * 10 + (20 + n,) * (9 + n), (1,) * (19 + n), "") for n in range(6)]

    assert batches.micro_batches(examples, 60, "packed", True) == batches.micro_batches(examples, 60, "packed", False)


def test_the_best_prefixes_are_shared():
    """A long prefix of two rows counts for more than a short one of three; no group runs more than the budget."""
    short, long = (1,) * 20, (1,) * 20 + (2,) * 60
    ids = [(*short, 5, 6), (*long, 7), (*long, 8), (3, 3)]
    examples = [Example(one, one, "") for one in ids]
    groups = batches.shared_prefixes(examples, 1000)

    assert sorted(sorted(group.members) for group in groups) == [[0], [1, 2], [3]]
    assert {group.prefix for group in groups} == {0, 80}
    assert all(group.prefix == 0 for group in batches.shared_prefixes(examples, 81))


@pytest.mark.parametrize("what", ["activation_checkpointing", "compile"])
def test_recomputed_and_compiled_blocks_give_the_same_numbers(
    what: str, make_config: Callable[..., Path], tmp_path: Path
):
    """The same losses and gradient norms, with dropout too."""
    if what == "compile" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs g++ on a CPU")
    runs = []
    for value in (False, True):
        settings = {f"train.{what}": value, "lora.dropout": 0.1, "train.max_steps": 3, "data.validation": 0}
        settings |= {"output_dir": str(tmp_path / f"run-{value}"), "model": tall_model(tmp_path)}
        events = run(make_config(**settings))
        runs.append([(event.loss, event.grad_norm) for event in events if isinstance(event, StepDone)])

    for plain, changed in zip(*runs, strict=True):
        assert changed == pytest.approx(plain, rel=1e-5)


def test_how_a_step_is_divided_changes_no_number(make_config: Callable[..., Path], tmp_path: Path):
    """One sequence a forward, some, all; beginnings that run once or each time: the same losses, with dropout too."""
    runs = []
    rows = write_rows(
        tmp_path / "alike.jsonl", [conversation(number // 2) for number in range(24)]
    )  # pairs begin alike
    for tokens, share in ((1, True), (60, True), (4096, True), (4096, False)):
        settings = {"train.micro_batch_tokens": tokens, "train.share_prefixes": share, "lora.dropout": 0.3}
        settings |= {"train.max_steps": 6, "data.validation": 0, "output_dir": f"{tmp_path}/{tokens}-{share}"}
        events = run(make_config(**settings | {"data.train": rows}))
        runs.append([(event.loss, event.grad_norm) for event in events if isinstance(event, StepDone)])

    assert len({number for steps in runs for number in steps}) > 6, "sums are rounded in another order"
    for other in runs[1:]:
        assert [number for pair in other for number in pair] == pytest.approx(
            [number for pair in runs[0] for number in pair], rel=1e-5
        )


def test_rows_of_a_prompt_stay_together():
    """With keys, each epoch holds every example once, those of a key neighbours, in another order of keys."""
    keys = [0, 1, 2, 0, 1, 2, 0, 3]
    orders = [
        [i for step in batches.plan_epoch(Mixture((Part(0, 8),)), 3, 0, epoch, keys) for i in step] for epoch in (0, 1)
    ]
    for order in orders:
        assert sorted(order) == list(range(8))
        assert len([0 for one, other in itertools.pairwise(order) if keys[one] != keys[other]]) == 3
    assert orders[0] != orders[1]


def test_micro_batches_hold_everything_once_within_the_budget():
    """Every index once; no micro-batch over the budget unless one example alone is."""
    examples = [Example((0,) * length, (0,) * length, "") for length in (5, 90, 30, 30, 40, 10, 200, 1)]
    for way, count in (("packed", 4), ("padded", 5), ("single", 8)):
        split = batches.micro_batches(examples, 100, way)
        sizes = [[len(examples[i]) for group in one for i in group.members] for one in split]

        assert sorted(i for one in split for group in one for i in group.members) == list(range(8))
        assert all((len(one) * max(one) if way == "padded" else sum(one)) <= 100 or len(one) == 1 for one in sizes)
        assert len(split) == count


def test_the_plan_is_a_function_of_seed_and_epoch():
    """Each epoch sees every example once, in an order of its own that another seed changes."""
    plans = {
        key: batches.plan_epoch(Mixture((Part(0, 13),)), 4, *key) for key in [(0, 0), (0, 1), (1, 0)]
    }  # fmt: skip
    for plan in plans.values():
        assert sorted(i for step in plan for i in step) == list(range(13))
        assert [len(step) for step in plan] == [4, 4, 4, 1]

    assert plans[0, 0] == batches.plan_epoch(Mixture((Part(0, 13),)), 4, 0, 0)
    assert len({str(plan) for plan in plans.values()}) == 3


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate(schedule: Any):
    """Warm-up rises to the peak; then it falls, or stays, and no step has rate zero."""
    config = TrainConfig(learning_rate=1.0, warmup_ratio=0.1, schedule=schedule)
    rates = [lr_at(step, 100, config) for step in range(1, 101)]

    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[10] == 1.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[10:]))
    assert rates[-1] == 1.0 if schedule == "constant" else 0 < rates[-1] < 0.02


def test_the_timetable():
    """Something due n times an epoch happens n times an epoch, evenly, and at the very end."""
    table = Timetable(10, 25)

    assert [step for step in range(1, 26) if table.is_due(step, 4)] == [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]
    assert [step for step in range(1, 26) if table.is_due(step, 1)] == [10, 20, 25]
    assert all(table.is_due(step, 50) for step in range(1, 26))


def test_early_stopping_counts():
    """The best is the lowest; patience is spent by evaluations that gain no more than min_delta."""
    stopping = Stopping()
    seen = [stopping.update(step, loss, 0.1) for step, loss in enumerate([1.0, 0.95, 0.8, 0.75, 0.72], start=1)]

    assert seen == [True, True, True, True, True]
    assert (stopping.best_step, stopping.best_loss, stopping.without_improvement) == (5, 0.72, 2)
    assert not stopping.update(6, 0.9, 0.1)
    assert stopping.without_improvement == 3


# --- whole runs ---


def test_a_run_learns_and_leaves_what_it_says(make_config: Callable[..., Path]):
    """Loss falls, the best adapter is kept, and every file of the run directory is there."""
    config = make_config()
    events = run(config)
    end = events[-1]
    place = RunDir(Path(config_file.load(config).output_dir))
    steps = [event for event in events if isinstance(event, StepDone)]
    evaluations = [event for event in events if isinstance(event, Evaluated)]

    assert isinstance(end, Finished)
    assert [step.step for step in steps] == list(range(1, 17))
    assert [e.step for e in evaluations] == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert end.best_loss == min(e.loss for e in evaluations[1:])
    assert end.best_loss < 0.8 * end.base_loss
    assert {p.name for p in place.path.iterdir()} == {
        "config.yaml", "environment.json", "start.json", "metrics.jsonl", "run.json", "checkpoints", "adapter",
    }  # fmt: skip
    records = metrics.read(place)
    assert [r["step"] for r in records if r["event"] == "step"] == list(range(1, 17))
    assert [r["loss"] for r in records if r["event"] == "evaluated"] == [e.loss for e in evaluations]
    assert run_dir.read_status(place)["status"] == "finished"
    assert config_file.load(place.config) == config_file.load(config)
    best = run_dir.checkpoint_path(place, end.best_step)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (place.adapter / name).read_bytes() == (best / name).read_bytes()
    assert not any(manifest.problems_in(folder) for folder in [place.adapter, *place.checkpoints.iterdir()])
    assert len(list(place.checkpoints.iterdir())) <= 3


def test_early_stopping_ends_the_run_with_the_best(make_config: Callable[..., Path]):
    """When validation stops improving, the run stops, and the adapter is the best one, not the last."""
    config = make_config(
        **{"train.learning_rate": 0.3, "train.epochs": 20, "train.early_stopping": {"patience": 2}, "eval.per_epoch": 2}
    )
    end = run(config)[-1]

    assert isinstance(end, Finished)
    assert end.reason == "no improvement in 2 evaluations"
    assert end.step < 160
    assert end.best_step < end.step


def test_without_validation_the_last_adapter_is_kept(make_config: Callable[..., Path]):
    """No validation, no early stopping."""
    end = run(make_config(**{"data.validation": 0, "train.max_steps": 3}))[-1]

    assert isinstance(end, Finished)
    assert (end.step, end.best_step, end.base_loss) == (3, None, None)
    assert end.adapter.is_dir()


def test_embedding_noise_is_scaled_drawn_from_the_seed_and_gone_after(
    model_folder: Callable[[str], str], make_rows: Callable[[int], str]
):
    """NEFTune: within alpha / sqrt(L d) in each packed sequence, the same for a seed; without it nothing is added."""
    header = model.read_header(ModelConfig(path=model_folder("llama")))
    loaded = model.load_model(header, ModelConfig(path=model_folder("llama")), CPU)
    found, _ = build_examples(make_rows(4), header.tokenizer)
    batch = one_batch(found)
    embed = loaded.module.get_input_embeddings()
    plain = embed(batch.input_ids)
    noisy = []
    for _ in range(2):
        torch.manual_seed(3)
        with embedding_noise(loaded, 5.0, batch):
            noisy.append(embed(batch.input_ids) - plain)

    assert torch.equal(*noisy)
    assert torch.equal(embed(batch.input_ids), plain)
    lengths = batch.segments.lengths
    for length, part in zip(lengths, noisy[0][0].split(lengths), strict=True):
        bound = 5.0 / (length * 32) ** 0.5
        assert 0.8 * bound < float(part.abs().max()) <= bound * (1 + 1e-5)


def test_neftune_changes_training_and_not_evaluation(make_config: Callable[..., Path], tmp_path: Path):
    """The base's validation loss is the same to the bit; the trained adapter is another."""
    plain = run(make_config(**{"train.max_steps": 4}))
    noisy = run(
        make_config(**{"train.max_steps": 4, "train.neftune_alpha": 5.0, "output_dir": str(tmp_path / "noisy")})
    )
    first, second = (next(e for e in events if isinstance(e, Evaluated)) for events in (plain, noisy))

    assert first.loss == second.loss
    assert [e.loss for e in plain if isinstance(e, StepDone)] != [e.loss for e in noisy if isinstance(e, StepDone)]


def test_the_base_is_not_changed(make_config: Callable[..., Path], model_folder: Callable[[str], str]):
    """Training leaves the base's files as they were."""
    before = base_folder.fingerprint(Path(model_folder("llama")))
    run(make_config())

    assert base_folder.fingerprint(Path(model_folder("llama"))) == before


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_finite_stops_before_it_is_applied(
    where: str, make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    """A loss or gradient that is not finite ends the run at that step with its rows; nothing of it is saved."""
    calls = 0

    def poisoned(model: Any, *batch: Any) -> LossSum:
        nonlocal calls
        result = target_loss(model, *batch)
        if torch.is_grad_enabled():
            calls += 1
            if calls > 8:
                factor = torch.nan if where == "loss" else torch.inf
                total = result.total * factor if where == "loss" else result.total + _infinite_gradient(result.total)
                return LossSum(total, result.targets)
        return result

    monkeypatch.setattr("lora_cli.step.target_loss", poisoned)
    config = make_config(**{"train.micro_batch_tokens": 10_000})
    with pytest.raises(TrainingStopped) as caught:
        run(config)
    place = RunDir(Path(config_file.load(config).output_dir))

    assert "step 9: the" in caught.value.paragraph()
    assert "rows.jsonl:" in caught.value.paragraph()
    assert run_dir.read_status(place)["status"] == "failed"
    assert max(step for step, _ in run_dir.step_folders(place)) == 8
    assert not place.adapter.exists()


def _infinite_gradient(total: torch.Tensor) -> torch.Tensor:
    """Zero, with an infinite gradient."""
    zero = total - total.detach()
    return torch.sqrt(zero * zero.detach() + zero)


# --- stopping and going on ---


def cli(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "lora_cli", *map(str, arguments)]


def test_a_mixture_goes_on_where_it_stopped(make_config: Callable[..., Path], tmp_path: Path):
    """With weights, replay and noise, a run stopped in its second epoch ends with the bytes of one that was not."""
    half = write_rows(tmp_path / "half.jsonl", [conversation(n) for n in range(100, 111)])
    general = write_rows(
        tmp_path / "general.jsonl", [{"text": f"The sky is {word}."} for word in ("blue", "grey", "red")]
    )
    settings = {
        "data.train": [{"path": half, "weight": 0.5}, {"path": str(tmp_path / "rows.jsonl"), "weight": 1.0}],
        "data.validation": 0,
        "data.replay": {"path": general, "ratio": 0.2},
        "train.neftune_alpha": 5.0,
    }
    straight = run(make_config(**settings))[-1]
    config = make_config(**settings, output_dir=str(tmp_path / "stopped"))
    steps = list[StepDone]()

    def stop_in_the_second_epoch() -> None:
        stop = StopRequest()
        for event in train(config_file.load(config), stop):
            steps.extend([event] if isinstance(event, StepDone) else [])
            if steps and steps[-1].epoch > 1.3:
                stop.signal_number = signal.SIGINT

    with pytest.raises(Interrupted):
        stop_in_the_second_epoch()
    resumed = run(config)
    assert isinstance(straight, Finished)
    assert isinstance(resumed[-1], Finished)

    assert steps[-1].step < resumed[-1].step == straight.step
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (straight.adapter / name).read_bytes() == (resumed[-1].adapter / name).read_bytes()


def test_a_damaged_checkpoint_is_passed_over(whole: tuple[Path, Path]):
    """A flipped bit is found by its hash; the older checkpoint is used, and the end is the same."""
    config, undisturbed = whole
    stop = StopRequest()
    events = train(config_file.load(config), stop)
    for event in events:
        if isinstance(event, StepDone) and event.step == 6:
            break
    events.close()
    place = RunDir(Path(config_file.load(config).output_dir))
    newest = run_dir.step_folders(place)[0][1] / "optimizer.safetensors"
    raw = bytearray(newest.read_bytes())
    raw[-5] ^= 1
    newest.write_bytes(raw)
    said = [event.text for event in run(config) if hasattr(event, "text")]

    assert any("its content is not what was written" in text for text in said)
    assert facts(place.path) == facts(undisturbed)


def test_a_damaged_best_checkpoint_does_not_become_the_adapter(make_config: Callable[..., Path]):
    """What is sealed as the result was whole when it was copied."""
    config = make_config(**{"train.max_steps": 4})
    run(config)
    place = RunDir(Path(config_file.load(config).output_dir))
    storage.remove_directory(place.adapter)
    place.status.unlink()
    best = run_dir.checkpoint_path(place, checkpoint.read_numbers(run_dir.step_folders(place)[0][1])[1].best_step)
    older = [path for _, path in run_dir.step_folders(place)]
    assert best in older
    raw = bytearray((best / "adapter_model.safetensors").read_bytes())
    raw[-3] ^= 4
    (best / "adapter_model.safetensors").write_bytes(raw)
    if best == older[0]:  # then an older checkpoint is gone back to, and the run is made whole again
        assert isinstance(run(config)[-1], Finished)
    else:
        with pytest.raises(AdapterError, match="not what was written"):
            run(config)


def test_a_run_killed_before_its_last_word_ends_the_same(whole: tuple[Path, Path]):
    """Killed between `adapter/` and run.json: the same command finishes, with the same bytes."""
    config, undisturbed = whole
    run(config)
    place = RunDir(Path(config_file.load(config).output_dir))
    run_dir.write_status(place, "running", step=0)
    end = run(config)[-1]

    assert isinstance(end, Finished)
    assert run_dir.read_status(place)["status"] == "finished"
    assert facts(place.path) == facts(undisturbed)


def test_running_out_of_memory_is_explained(make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    """It is the surroundings' fault, with the key to change."""

    def greedy(*_: Any) -> LossSum:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("lora_cli.step.target_loss", greedy)
    with pytest.raises(SurroundingsError, match="micro_batch_tokens"):
        run(make_config())


def test_a_step_is_taken_again_with_less(
    make_config: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where smaller micro-batches need less memory, the run goes on with the same numbers and says so."""
    settings = {"train.micro_batch_tokens": 10_000, "train.max_steps": 3, "data.validation": 0}
    plain = [event.loss for event in run(make_config(**settings)) if isinstance(event, StepDone)]

    def limited(loaded: model.LanguageModel, batch: batches.Batch, pull: None) -> LossSum:
        if batch.input_ids.numel() > 60:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return target_loss(loaded, batch, pull)

    monkeypatch.setattr("lora_cli.step.target_loss", limited)
    events = run(make_config(**settings, output_dir=str(tmp_path / "again")))
    less = [event.loss for event in events if isinstance(event, StepDone)]
    said = [event.text for event in events if isinstance(event, Notice) and "Memory ran out" in event.text]

    assert less == pytest.approx(plain, rel=1e-5)
    assert len(said) == len(set(said)) > 1


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "bloom"])
def test_memory_is_estimated_from_what_a_forward_keeps(kind: str, model_folder: Callable[[str], str]):
    """Counted on the meta device, it is what the real model keeps, to a tenth."""
    config = RunConfig.model_validate({"model": model_folder(kind), "data": {"train": "x"}, "output_dir": "x"})
    header = model.read_header(config.model)
    header.config.pad_token_id = None
    skeleton = model.build_skeleton(header)
    targets = lora.find_targets(skeleton, "all-linear")
    lora.wrap(skeleton, dict.fromkeys(targets, (4, 1.0)))
    counted = memory.kept_by_a_token(skeleton, config, length=128)
    real = memory.kept_by_a_token(adapted(model_folder(kind)).module, config, length=128)

    assert counted > 32 * 4 * 10
    assert counted == pytest.approx(real, rel=0.1)


def test_less_memory_means_fewer_tokens(model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch):
    """`auto` takes what is worth it, and halves it until it fits into what is free; a number stays as it is."""
    values = {"model": model_folder("llama"), "data": {"train": "x"}, "output_dir": "x"}
    header = model.read_header(RunConfig.model_validate(values).model)

    def tokens(free: int | None, **train: Any) -> memory.MemoryEstimate:
        monkeypatch.setattr(memory, "free_memory", lambda *_: free)
        return memory.estimate_memory(header, RunConfig.model_validate(values | {"train": train}), 10, CPU)

    enough = tokens(None)
    assert enough.tokens == memory.tokens_worth_it(CPU)
    assert tokens(enough.total).tokens == enough.tokens
    assert tokens(enough.total - 1).tokens == enough.tokens // 2
    assert tokens(1, micro_batch_tokens=5000).tokens == 5000
    assert tokens(None, activation_checkpointing=True).activations < enough.activations


def test_a_finished_run_says_so(make_config: Callable[..., Path]):
    """The same command again is done at once."""
    config = make_config(**{"train.max_steps": 2})
    run(config)
    again = subprocess.run(cli("train", config), capture_output=True, text=True, check=False)

    assert again.returncode == 0
    assert "already finished" in again.stdout


def test_another_config_in_the_same_folder_is_refused(make_config: Callable[..., Path]):
    """The difference is shown, and the run is as it was."""
    run(make_config(**{"train.max_steps": 2}))
    changed = config_file.load(make_config(**{"train.max_steps": 2, "lora.rank": 2}))
    with pytest.raises(ConfigError, match=r"lora\.rank: 4 there, 2 now"):
        resume.plan(RunDir(Path(changed.output_dir)), changed, override=True)


def test_a_folder_with_other_files_is_refused(make_config: Callable[..., Path], tmp_path: Path):
    """What is not ours is not touched."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("precious")
    config = config_file.load(make_config())
    with pytest.raises(ConfigError, match=r"holds other files \(thesis.tex\)"):
        resume.plan(RunDir(tmp_path / "run"), config, override=False)


def test_changed_data_is_refused_on_resume(make_config: Callable[..., Path], tmp_path: Path):
    """A run goes on only with the tokens it began with."""
    config = make_config()
    events = train(config_file.load(config), StopRequest())
    next(event for event in events if isinstance(event, StepDone) and event.step == 3)
    events.close()
    rows = tmp_path / "rows.jsonl"
    rows.write_text(rows.read_text().replace("It is red.", "It is violet.", 1))
    with pytest.raises(DataError, match=r"the data \(the rows of its files\) changed"):
        run(config)


def test_two_processes_cannot_share_a_run(make_config: Callable[..., Path], tmp_path: Path):
    """The second one is refused while the first one holds the folder."""
    config = make_config()
    with run_dir.held(RunDir(tmp_path / "run")):
        second = subprocess.run(cli("train", config), capture_output=True, text=True, check=False)

    assert second.returncode == 2
    assert "another process is using this run directory" in second.stderr


def test_threads_are_recorded(make_config: Callable[..., Path], tmp_path: Path):
    """environment.json holds what the numbers depend on, and nothing of the process's environment."""
    os.environ["HF_TOKEN"] = "hf_canary"
    try:
        run(make_config(**{"train.max_steps": 1}))
    finally:
        del os.environ["HF_TOKEN"]
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())

    assert environment["threads"] == torch.get_num_threads()
    written = b"".join(p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert b"hf_canary" not in written
    assert conversation(0)["messages"][0]["content"].encode() not in written
