"""Full fine-tuning in the same loop: the numbers of plain torch, the base beside it, a whole model as the result."""

import json
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import Invoke, build_examples, conversation, facts, one_batch, save_base, write_rows
from processes import run_ranks
from test_session import opened
from torture import agreement

from lora_cli import batches, check, config_file, merge, model, run_dir, tuned, tuning
from lora_cli.adapter import CONFIG
from lora_cli.compare import Asked, compare
from lora_cli.config import LoraConfig, ModelConfig, TrainConfig
from lora_cli.data_reader import run_to_end
from lora_cli.errors import AdapterError, ConfigError, Interrupted, ModelError
from lora_cli.examples import Example
from lora_cli.export import export
from lora_cli.forward import form, lay_out, pull_to_base, target_loss, target_scores
from lora_cli.fused import fuse
from lora_cli.interrupt import StopRequest
from lora_cli.lanes import flat_gradients
from lora_cli.model import LanguageModel
from lora_cli.optim import build_optimizer, set_rate, start_rate
from lora_cli.records import Event, Finished, Started, StepDone
from lora_cli.scale import scale
from lora_cli.train import train

CPU = torch.device("cpu")
Make = Callable[..., Any]
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
def test_gradients_are_those_of_plain_torch(kind: str, model_folder: Make, make_rows: Callable[[int], str]):
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
def test_steps_are_those_of_plain_torch(kind: str, model_folder: Make, make_rows: Callable[[int], str]):
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


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom"])
def test_the_base_is_there_to_the_bit_and_so_is_what_lies_between(kind: str, model_folder: Make, rows_file: str):
    """At gain 0 the base's own numbers, at 1 the tuned model's again, at a half those of the mean of both."""
    batch = one_batch(build_examples(rows_file)[0][:4]) if kind != "bloom" else None
    loaded, bare = (loaded_for_full(model_folder(kind)) for _ in range(2))
    batch = batch or lay_out(loaded, batches.ALONE, [Example((3, 4, 5, 6), (3, 4, 5, 6), "")])
    untouched = target_scores(bare, batch, (1.0,))[0]
    disturb(loaded)
    tuned_scores = target_scores(loaded, batch, (1.0,))[0]
    with torch.no_grad():
        for mine, theirs in zip(loaded.module.parameters(), bare.module.parameters(), strict=True):
            theirs.add_((mine - theirs) / 2)
    half = target_scores(bare, batch, (1.0,))[0]
    found = target_scores(loaded, batch, (0.0, 0.5, 1.0))

    assert torch.equal(found[0], untouched)
    assert torch.equal(found[2][:2], tuned_scores[:2])
    assert not torch.equal(untouched[0], tuned_scores[0])
    assert torch.allclose(found[1][0], half[0], rtol=1e-4, atol=1e-5)


def disturb(loaded: LanguageModel) -> None:
    """Change all weights a little."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in loaded.module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_pull_is_towards_the_base_and_its_own_head(kind: str, model_folder: Make, make_rows: Callable[[int], str]):
    """Loss and gradients of a model that has left its base, as plain torch has them from two models."""
    examples = some_rows(make_rows(3))
    ours = loaded_for_full(model_folder(kind))
    disturb(ours)
    base, theirs = (transformers.AutoModelForCausalLM.from_pretrained(model_folder(kind)).eval() for _ in range(2))
    theirs.load_state_dict(ours.module.state_dict())
    total = torch.zeros(())
    for example in examples:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels[1:])
        kept = labels != -100
        logits, before = (each(input_ids=ids).logits[0, :-1][kept].log_softmax(-1) for each in (theirs, base))
        total = total + F.nll_loss(logits, labels[kept], reduction="sum")
        total = total + 0.7 * F.kl_div(logits, before.detach(), reduction="sum", log_target=True)
    total.backward()
    batch = lay_out(ours, tuple(batches.Group((number,)) for number in range(len(examples))), examples)
    loss = target_loss(ours, batch, pull_to_base(ours, batch, 0.7, False))
    loss.total.backward()

    assert float(loss.penalty) > 1
    assert float(loss.total) == pytest.approx(float(total), rel=1e-5)
    trained = tuning.trainable(ours.module)
    for name, parameter in theirs.named_parameters():
        assert (trained[name].grad - parameter.grad).norm() <= 3e-5 * parameter.grad.norm(), name


def test_weights_are_trained_in_float32_only(model_folder: Make):
    """A base that other runs loaded otherwise is refused: steps as small as these would be lost in it."""
    config = ModelConfig(path=model_folder("llama"), dtype="bfloat16")
    loaded = model.load_model(model.read_header(config), config, CPU)
    with pytest.raises(ModelError, match="loaded in bfloat16"):
        tuning.apply(loaded.module, FULL, 0)


# --- a run ---

SMALL = {"lora": {"method": "full"}, "train.learning_rate": 1e-3, "train.max_steps": 8, "eval.general_tokens": 512}


def run(config: Path) -> list[Event]:
    """Train in this process and return every event."""
    return list(train(config_file.load(config), StopRequest()))


def test_a_run_stopped_and_continued_ends_the_same(make_config: Make, tmp_path: Path):
    """To the bit: metrics, checkpoint and model; with what asks the base at every step."""
    settings = SMALL | {"train.kl_to_base": 0.5, "train.surprise_limit": 6.0, "eval.general": None}
    run(make_config(**settings, output_dir=f"{tmp_path}/whole"))
    config, stop = make_config(**settings, output_dir=f"{tmp_path}/stopped"), StopRequest()
    events = train(config_file.load(config), stop)
    while getattr(next(events), "learning_rate", None) is None:  # to the first step
        pass
    stop.signal_number = signal.SIGTERM
    with pytest.raises(Interrupted):
        list(events)
    assert not (tmp_path / "stopped" / "model").exists()
    run(config)

    measured, files = facts(tmp_path / "stopped")
    assert (measured, files) == facts(tmp_path / "whole")
    assert "model/model.safetensors" in files
    assert [each["kl"] for each in measured if each["event"] == "step"][-1] > 0
    assert measured[0]["forgetting"]["kl"]["value"] == 0
    assert measured[-1]["forgetting"]["rise"]["value"] != 0


def test_runs_of_both_methods_on_one_base_are_what_they_would_be_alone(make_config: Make, tmp_path: Path):
    """An adapter, all weights, an adapter, all weights: each to the bit."""
    settings = {"train.max_steps": 4, "train.learning_rate": 1e-3}
    ways: dict[str, dict[str, Any]] = {"lora": {"lora.dropout": 0.1}, "full": {"lora": {"method": "full"}}}
    for name, way in ways.items():
        run(make_config(**settings | way, output_dir=f"{tmp_path}/{name}"))
    configs = [
        config_file.load(make_config(**settings | ways[name], output_dir=f"{tmp_path}/{name}-{turn}"))
        for turn in (1, 2)
        for name in ways
    ]
    session = opened(configs[0])
    for config in configs:
        assert list(session.run(config, run_dir.of(config)))

    for name in ways:
        assert facts(tmp_path / f"{name}-1") == facts(tmp_path / f"{name}-2") == facts(tmp_path / name)


def test_a_finished_run_is_taken_back_where_it_goes_on(make_config: Make, tmp_path: Path):
    """With other settings and --override: model/ is gone, and there again at the end, made of another step."""
    config, place = make_config(**SMALL | {"train.max_steps": 2}), tmp_path / "run"
    first = run(config)[-1]
    before = (place / "model" / "model.safetensors").read_bytes()
    (place / "run.json").unlink()  # as where a process was killed before its last word
    assert run(config)[-1] == first
    longer = train(config_file.load(config, ["train.max_steps=4"]), StopRequest(), override=True)
    while not isinstance(next(longer), Started):
        pass
    assert not (place / "model").exists()
    with pytest.raises(AdapterError, match="not finished, so it has no model/ yet"):
        tuned.find_any(place)
    assert list(longer)[-1].step == 4
    assert (place / "model" / "model.safetensors").read_bytes() != before


def test_two_processes_train_as_one(make_config: Make, tmp_path: Path):
    """Losses and gradient norms to 1e-5."""
    runs = []
    for size in (1, 2):
        config = make_config(**SMALL | {"output_dir": f"{tmp_path}/{size}"})
        codes, said = run_ranks(size, lambda rank, config=config: processes.lora("train", config), tmp_path)
        assert codes == [0] * size, said
        runs.append(agreement.measured(run_dir.RunDir(tmp_path / str(size))))

    assert len(runs[0]) > 8
    assert agreement.difference(*runs) < agreement.CLOSE


def test_what_else_changes_a_forward_works(make_config: Make, tmp_path: Path):
    """Recomputed activations give the same losses, noise on the embeddings others."""
    runs = []
    for key, value in (("seed", 0), ("train.activation_checkpointing", True), ("train.neftune_alpha", 5.0)):
        settings = {key: value, "train.max_steps": 3, "data.validation": 0, "output_dir": f"{tmp_path}/{key}"}
        runs.append([each.loss for each in run(make_config(**SMALL | settings)) if isinstance(each, StepDone)])

    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
    assert runs[2] != pytest.approx(runs[0], rel=1e-5)


# --- its result ---


@pytest.mark.parametrize(
    ("kind", "dtype"), [("llama", torch.bfloat16), ("tall", torch.float32), ("gpt2", torch.float32)]
)
def test_the_result_is_a_model_like_any_other(kind: str, dtype: torch.dtype, make_config: Make, tmp_path: Path):
    """In float32, in the files of its base: transformers loads it, and it says what the tuned model says."""
    base = save_base(kind, tmp_path / "base", dtype, shard="100KB")
    finished = run(make_config(**SMALL | {"model": str(base)}))[-1]
    assert isinstance(finished, Finished)
    place = finished.adapter
    ours = tuned.load(tuned.find_any(tmp_path / "run"), CPU)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(place, output_loading_info=True)
    ids = torch.tensor([range(5, 25)])
    with torch.no_grad():
        ours.module.set_attn_implementation("sdpa")
        wanted, found = ours.module(ids).logits, theirs(ids).logits
        with tuning.gain(ours.module, 0.0):
            before = ours.module(ids).logits

    assert place == tmp_path / "run" / "model"
    assert {file.name for file in place.glob("model*")} == {file.name for file in base.glob("model*")}
    assert theirs.dtype == torch.float32
    assert not any(info.values())
    assert torch.equal(wanted, found)
    assert (before - found).abs().max() > 0.05
    tokenizer = transformers.AutoTokenizer.from_pretrained(place)
    assert tokenizer.chat_template == transformers.AutoTokenizer.from_pretrained(base).chat_template
    assert "full fine-tuning of `base`" in (place / "README.md").read_text()


def test_eval_holds_it_beside_its_base(make_config: Make, tmp_path: Path, invoke: Invoke):
    """The run, and a checkpoint of it; the losses are those that transformers finds in base and model."""
    config = make_config(**SMALL | {"eval.general": None, "train.epochs": 2, "train.max_steps": 14})
    run(config)
    held_out = write_rows(tmp_path / "held.jsonl", [conversation(number) for number in range(100, 110)])
    report = compare(tmp_path / "run", Asked(data=held_out, answers=2, scan=True))
    examples, _ = build_examples(held_out)
    for part, folder in (("base", config_file.load(config).model.path), ("tuned", tmp_path / "run" / "model")):
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            sums = [
                float(plain(input_ids=torch.tensor([e.input_ids]), labels=torch.tensor([e.labels])).loss) * e.targets
                for e in examples
            ]
        assert getattr(report.figures["loss"], part).value == pytest.approx(sum(sums) / report.targets, rel=1e-5)
    points = {point.gain: point.loss.value for point in report.scan.points}
    assert points[0.0] > points[0.5] > points[1.0]
    best = run_dir.read_finished(run_dir.RunDir(tmp_path / "run")).best_step
    checkpoint = run_dir.checkpoint_path(run_dir.RunDir(tmp_path / "run"), best)
    code, said, _ = invoke("eval", checkpoint, "--data", held_out, "--answers", 0)
    kept = json.loads((tmp_path / "run" / "evaluations" / f"{checkpoint.name}-held.json").read_text())

    assert code == 0
    assert "the model is" in said
    assert kept["figures"]["loss"]["tuned"]["value"] == report.figures["loss"].tuned.value


def test_what_is_for_adapters_says_what_this_is(make_config: Make, tmp_path: Path):
    """Merging, combining, scaling and exporting a run or a checkpoint of it: one sentence, and what to do."""
    run(make_config(**SMALL | {"train.max_steps": 1}))
    place = tmp_path / "run"
    for path in (place, place / "model", place / "checkpoints" / "step-000001"):
        for command in (
            lambda path=path: merge.merge([path], tmp_path / "out"),
            lambda path=path: merge.combine([path, path], tmp_path / "out", None, merge.ONE_EACH),
            lambda path=path: scale(path, tmp_path / "out", 0.5, None),
            lambda path=path: export(path, "peft", tmp_path / "out"),
            lambda path=path: export(path, "gguf", tmp_path / "out"),
        ):
            with pytest.raises(AdapterError, match="a whole model and no adapter") as found:
                command()
            assert f"{place / 'model'} is an ordinary Hugging Face model" in str(found.value)
    assert not (tmp_path / "out").exists()
    assert not list(place.rglob(CONFIG))


# --- before it begins ---


def test_a_rate_and_a_dtype_that_nobody_gave_are_those_of_full(make_config: Make, tmp_path: Path):
    """3e-5 and float32, written down; what is given stays; `auto` begins at a tenth of an adapter's."""
    path = make_config(**SMALL | {"train.max_steps": 1})
    values = json.loads(path.read_text())
    del values["train"]["learning_rate"]
    path.write_text(json.dumps(values))
    run(path)
    written = (tmp_path / "run" / "config.yaml").read_text()

    assert "learning_rate: 3.0e-05\n" in written
    assert "dtype: float32\n" in written
    assert config_file.load(tmp_path / "run" / "config.yaml") == config_file.load(path)
    assert config_file.load(path, ["train.learning_rate=3e-4"]).train.learning_rate == 3e-4
    assert config_file.load(path, ["lora.method=lora"]).train.learning_rate == 3e-4
    both = (config_file.load(path, [f"lora.method={method}", "lora.alpha=32"]) for method in ("lora", "full"))
    assert [start_rate(2000, config) for config in both] == [5e-4, 5e-5]


def test_the_rate_of_an_adapter_is_remarked_on(make_config: Make):
    """One of ten times what is usual for full fine-tuning is, others are not."""
    notices = {}
    for rate in (3e-3, 1e-4, "auto"):
        report = run_to_end(check.check(config_file.load(make_config(**SMALL | {"train.learning_rate": rate}))))
        notices[rate] = [notice for notice in report.notices if "about a tenth" in notice]

    assert [len(found) for found in notices.values()] == [1, 0, 0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora.rank", 8),
        ("lora.alpha", 16),
        ("lora.dropout", 0.1),
        ("lora.target_modules", "[q_proj]"),
        ("train.loraplus_ratio", 4.0),
        ("model.dtype", "bfloat16"),
        ("model.quantization", "nf4"),
        ("train.shard", True),
    ],
)
def test_keys_without_effect_are_refused(key: str, value: Any, make_config: Make):
    """By name, with the reason; the same key is good with another method."""
    config = make_config(**SMALL)
    with pytest.raises(ConfigError, match=rf"{key}: .*lora.method: full") as found:
        config_file.load(config, [f"{key}={value}"])
    assert len(found.value.problems) == 1
    config_file.load(config, [f"{key}={value}", "lora.method=lora"])


def test_a_check_counts_all_weights(make_config: Make, model_folder: Make):
    """All parameters, tied ones once; five numbers for each in memory, and no runtime of adapters."""
    config = config_file.load(make_config(**SMALL))
    report = run_to_end(check.check(config))
    plain = transformers.AutoModelForCausalLM.from_pretrained(model_folder("llama"))
    (started,) = [event for event in train(config, StopRequest()) if isinstance(event, Started)]

    count = sum(parameter.numel() for parameter in plain.parameters())
    assert (report.trainable_parameters, report.total_parameters) == (count, count)
    assert (started.trainable_parameters, started.total_parameters) == (count, count)
    assert (report.memory.base, report.memory.adapter) == (4 * count, 16 * count)
    assert report.memory.in_flight == 2 * plain.get_input_embeddings().weight.nbytes
    assert (report.modules, report.runtimes) == ({}, [])


def test_a_model_that_could_not_be_written_back_is_refused(make_config: Make, tmp_path: Path):
    """Experts that are stored one by one and run together: before a weight is read or anything written."""
    with pytest.raises(ModelError, match="could not be written back"):
        run(make_config("mixtral", **SMALL))
    assert not (tmp_path / "run").exists()
