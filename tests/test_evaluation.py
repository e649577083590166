"""`lora eval` and `lora scale`: figures with their intervals, metrics, options, the gain scan, the harness."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import sacrebleu
import torch
import transformers
from conftest import build_examples, conversation, write_rows

from lora_cli import adapter, config_file, lora, model, questions, scoring
from lora_cli.compare import Asked, compare
from lora_cli.config import ModelConfig
from lora_cli.errors import AdapterError, DataError, InputError, SurroundingsError
from lora_cli.generate import Sampling, generate
from lora_cli.interrupt import StopRequest
from lora_cli.intervals import compare as compared
from lora_cli.intervals import difference, estimate, independent_difference
from lora_cli.records import Estimate
from lora_cli.scale import scale
from lora_cli.scan import GAINS
from lora_cli.train import train

CPU = torch.device("cpu")


@pytest.fixture
def finished(make_config: Callable[..., Path], tmp_path: Path) -> Path:
    """A run that learned something, and measured forgetting on a text of our own."""
    config = make_config(**{"eval.general": None, "eval.general_tokens": 1024, "train.epochs": 4})
    list(train(config_file.load(config), StopRequest()))
    return tmp_path / "run"


@pytest.fixture
def held_out(tmp_path: Path) -> str:
    """Rows the run has not seen."""
    return write_rows(tmp_path / "held.jsonl", [conversation(number) for number in range(100, 124)])


# --- intervals ---


def test_an_interval_of_means_is_students():
    """For the mean of normal numbers the bootstrap gives nearly the t-interval."""
    generator = np.random.default_rng(1)
    values = generator.normal(3.0, 2.0, 20)
    found = estimate(np.stack([values, np.ones(20)], 1))
    half = 2.093 * values.std(ddof=1) / math.sqrt(20)  # t of 19 degrees of freedom

    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.12 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.12 * half)


def test_intervals_cover_what_they_claim():
    """Of 300 samples of skewed losses with uneven numbers of targets, 92 to 98 % of the intervals hold the truth."""
    generator = np.random.default_rng(2)
    for size in (15, 60):
        hits = 0
        for _ in range(300):
            targets = generator.integers(1, 9, size).astype(float)
            losses = generator.gamma(2.0, 0.5, size) * targets
            found = estimate(np.stack([losses, targets], 1))
            assert found.low is not None
            assert found.high is not None
            hits += found.low <= 1.0 <= found.high
        assert 0.9 <= hits / 300 <= 0.985


def test_shares_have_intervals_though_all_rows_are_alike():
    """0 of 20 is not surely 0 (Wilson 1927: at most 16.1 %), and 20 hits of both models are no proof of equality."""
    none, all_right = (np.stack([np.full(20, float(hit)), np.ones(20)], 1) for hit in (0, 1))
    found = estimate(none)
    gap = difference(all_right, all_right)

    assert (found.value, found.low) == (0.0, 0.0)
    assert found.high == pytest.approx(0.1611, abs=1e-4)
    assert gap.value == 0.0
    assert gap.low == pytest.approx(-gap.high)  # type: ignore[operator]
    assert compared(none, all_right).verdict == "better"


def test_paired_differences_are_drawn_together():
    """A small gain on every row is found, though rows differ far more than the models do."""
    generator = np.random.default_rng(3)
    base = np.stack([generator.normal(5, 3, 50), np.ones(50)], 1)
    tuned = base - np.array([0.05, 0.0]) * generator.uniform(0.5, 1.5, (50, 1))
    found = compared(base, tuned, lower_is_better=True)

    assert found.verdict == "better"
    assert found.difference.value == pytest.approx(-0.05, abs=0.01)
    assert found.base.low is not None
    assert found.base.low < found.tuned.value < found.base.high  # type: ignore[operator]
    assert compared(tuned, base, lower_is_better=True).verdict == "worse"
    assert compared(base, base, lower_is_better=True).verdict == "no difference shown"


def test_nothing_measured_is_null():
    """No rows give null and no verdict; one row gives a value without an interval."""
    assert estimate(np.empty((0, 2))) == Estimate(None, None, None, 0)
    assert compared(np.empty((0, 2)), np.empty((0, 2))).verdict is None
    one = np.array([[3.0, 2.0]])

    assert estimate(one) == Estimate(1.5, None, None, 1)
    assert compared(one, one).verdict is None


def test_independent_errors_add_up():
    """Halves of 3 and 4 make 5."""
    first, second = Estimate(1.0, -2.0, 4.0, 9), Estimate(7.0, 3.0, 11.0, 5)

    assert independent_difference(first, second) == Estimate(6.0, 1.0, 11.0, 5)
    assert independent_difference(first, Estimate(7.0, None, None, 1)).value is None


def test_rows_that_share_a_prompt_are_one_unit(make_config: Callable[..., Path], tmp_path: Path):
    """Copies of a row make no figure surer."""
    rows = [{"prompt": f"Question {number}? ", "completion": f"Answer {number}."} for number in range(6)]
    copies = [row | {"completion": row["completion"] + " Yes."} for row in rows for _ in range(3)]
    list(train(config_file.load(make_config(**{"train.max_steps": 2})), StopRequest()))
    path = write_rows(tmp_path / "held.jsonl", copies)
    report = compare(tmp_path / "run", Asked(data=path))

    assert report.rows == 18
    assert {figure.tuned.n for figure in report.figures.values()} == {6}


# --- metrics ---


def test_exact_match_compares_what_is_asked_for():
    """The whole text, its last number by value, or a pattern's last match."""
    assert scoring.find("So 3 + 4 = 1,007.50 dollars", "last-number") == "1007.5"
    assert scoring.find("none", "last-number") is None
    assert scoring.find("#### 5\nbut #### 1,000", r"#### (.*)") == "1000"
    assert scoring.find("the answer is: B", r"[A-D]$") == "B"
    assert scoring.find("x", r"#### (.*)") is None
    (found,) = scoring.score("exact-match", ["#### 18", "#### 7"], ["I think #### 18.0", "7"], "#### (.*)")

    assert found.sums.tolist() == [[1, 1], [0, 1]]


def test_json_is_scored_by_its_fields():
    """Validity, and the share of expected fields with the same value, nested ones and lists by their place."""
    expected = ['{"a": 1, "b": {"c": [1, 2]}}', '{"a": "x"}', '{"a": "x"}']
    answers = ['{"b": {"c": [1, 3]}, "a": 1.0}', "{'a': 'x'}", '{"a": "x", "more": 1}']
    valid, fields = scoring.score("json", expected, answers)

    assert valid.sums[:, 0].tolist() == [1, 0, 1]
    assert fields.sums.tolist() == [[1, 3], [0, 1], [1, 1]]
    with pytest.raises(InputError, match="none of the expected answers is JSON"):
        scoring.score("json", ["plain"], ["{}"])


def test_text_metrics_are_those_of_their_libraries():
    """BLEU is the corpus's, not the mean of sentences; ROUGE-L and chrF are means over rows."""
    expected = ["the cat sat on the mat today", "a dog runs in the big park", "hello there my good old friend"]
    answers = ["the cat sat on a mat today", "dog runs in the big park now", "hello my good friend of old"]
    (bleu,) = scoring.score("bleu", expected, answers)
    (chrf,) = scoring.score("chrf", expected, answers)
    (rouge,) = scoring.score("rouge-l", expected, answers)

    assert estimate(bleu.sums, bleu.figure).value == pytest.approx(
        sacrebleu.corpus_bleu(answers, [expected]).score / 100
    )
    assert estimate(chrf.sums).value == pytest.approx(
        np.mean([sacrebleu.sentence_chrf(a, [e]).score for a, e in zip(answers, expected, strict=True)]) / 100
    )
    assert rouge.sums[0, 0] == pytest.approx(6 / 7)  # six of seven words in order, on both sides
    assert all(scoring.score(metric, [], [])[0].sums.shape[0] == 0 for metric in scoring.METRICS)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch):
    """With what to install."""
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
    with pytest.raises(SurroundingsError, match=r"sacrebleu, which is not installed: pip install 'lora-cli\[eval\]'"):
        scoring.score("bleu", ["a"], ["a"])


# --- the command ---


def test_metrics_of_a_run(finished: Path, held_out: str):
    """Every metric is there with base, adapter, difference and verdict; the answers are kept beside the run."""
    asked = Asked(data=held_out, metrics=("exact-match", "rouge-l", "bleu", "chrf"), extract=r"(\w+)\.$")
    report = compare(finished, asked)
    names = ["loss", "perplexity", "token_accuracy", "exact_match", "rouge_l", "bleu", "chrf"]
    assert list(report.figures) == names
    for both in report.figures.values():
        assert both.tuned.value is not None
        assert both.base.value is not None
        assert both.difference.value == pytest.approx(both.tuned.value - both.base.value)
    assert report.figures["loss"].verdict == "better"
    assert report.forgetting is not None
    assert report.forgetting.kl.value is not None
    assert report.forgetting.kl.value > 0
    assert report.saved is not None
    lines = report.saved.with_suffix(".samples.jsonl").read_text(encoding="utf-8").splitlines()
    kept = [json.loads(line) for line in lines]
    right = [scoring.find(row["tuned"], asked.extract) == scoring.find(row["expected"], asked.extract) for row in kept]

    assert len(kept) == report.answers == 24
    assert report.figures["exact_match"].tuned.value == pytest.approx(np.mean(right))
    assert json.loads(report.saved.read_text())["figures"]["bleu"]["verdict"] == report.figures["bleu"].verdict


def test_a_pattern_that_finds_nothing_is_an_error(finished: Path, held_out: str):
    """Else every answer would be wrong in silence; so would one that is no pattern."""
    with pytest.raises(DataError, match="finds nothing in the expected answers of 24 of 24 rows"):
        compare(finished, Asked(data=held_out, extract="####(.*)"))
    with pytest.raises(InputError, match="is no regular expression"):
        compare(finished, Asked(data=held_out, extract="(("))


def test_labels_are_chosen_by_likelihood(finished: Path, held_out: str):
    """The option with the highest likelihood, as the model's own logits give it one sequence at a time."""
    section = ModelConfig(path=str(config_file.load(finished / "config.yaml").model.path))
    loaded = model.load_model(model.read_header(section), section, CPU)
    adapter.attach(loaded.module, adapter.read(finished / "adapter"))
    found, _ = build_examples(held_out)
    options, asked = questions.options_of(found), questions.questions_of(found, 10)
    hits = questions.choose(loaded, asked, options, 64, (0.0, 1.0))
    loaded.module.set_attn_implementation(loaded.own_attention)
    for place, gain in enumerate((0.0, 1.0)):
        for number, question in enumerate(asked):
            scores = []
            for option in options:
                ids = torch.tensor([[*question.prompt, *option]])
                with lora.gain(loaded.module, gain), torch.no_grad():
                    log = loaded.module(input_ids=ids).logits[0].log_softmax(-1)
                at = torch.arange(len(question.prompt), ids.shape[1])
                scores.append(float(log[at - 1].gather(1, ids[0, at, None]).sum()))
            assert hits[place, number] == (options[int(np.argmax(scores))] == question.answer)

    report = compare(finished, Asked(data=held_out, metrics=("label",)))
    assert report.figures["label_accuracy"].tuned.n == 24
    assert "exact_match" not in report.figures
    assert len(options) == 6


def test_too_many_options_are_an_error(finished: Path, tmp_path: Path):
    """Where every row has an answer of its own there is nothing to choose among."""
    rows = [{"prompt": f"What is number {n}? ", "completion": f"It is {n}."} for n in range(201)]
    with pytest.raises(DataError, match="201 different answers"):
        compare(finished, Asked(data=write_rows(tmp_path / "many.jsonl", rows), metrics=("label",), answers=1))


def test_drawn_answers_repeat_with_their_seed(model_folder: Callable[[str], str]):
    """The same seed draws the same, another one another text; the global generator is left as it was."""
    section = ModelConfig(path=model_folder("llama"))
    header = model.read_header(section)
    loaded = model.load_model(header, section, CPU)
    prompts = [[5, 6, 7, 8 + n] for n in range(4)]
    torch.manual_seed(9)
    state = torch.get_rng_state()
    drawn = [generate(loaded, header.tokenizer, prompts, 12, None, Sampling(1.0, seed)) for seed in (1, 1, 2)]

    assert torch.equal(torch.get_rng_state(), state)
    assert drawn[0] == drawn[1] != drawn[2]
    assert generate(loaded, header.tokenizer, prompts, 12) != drawn[0]


def test_a_prompt_that_comes_again_is_asked_once(model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch):
    """And its answer stands at every row."""
    section = ModelConfig(path=model_folder("llama"))
    header = model.read_header(section)
    loaded = model.load_model(header, section, CPU)
    asked = [questions.Question(f"row {n}", (5, 6, 7 + n % 2), (9, 2)) for n in range(6)]
    seen: list[int] = []
    own = loaded.module.generate
    monkeypatch.setattr(loaded.module, "generate", lambda **o: seen.append(len(o["input_ids"])) or own(**o))
    said = questions.answer(loaded, header.tokenizer, asked, None, Sampling(), 4)

    assert seen == [2]
    assert said == [said[0], said[1]] * 3


# --- scan and scale ---


def test_the_scan_goes_from_the_base_to_beyond(finished: Path, held_out: str):
    """Gain 0 is the base exactly, gain 1 the adapter; best, knee and the budget's choice follow from the points."""
    report = compare(finished, Asked(data=held_out, answers=0, scan=True))
    found = report.scan
    assert found is not None
    assert [point.gain for point in found.points] == list(GAINS)
    first, whole = found.points[0], found.points[GAINS.index(1.0)]
    losses = [point.loss.value or math.inf for point in found.points]

    assert (first.change.value, first.forgetting.rise.value, first.forgetting.kl.value) == (0.0, 0.0, 0.0)
    assert first.loss.value == report.figures["loss"].base.value
    assert whole.loss.value == pytest.approx(report.figures["loss"].tuned.value)
    assert found.best == GAINS[int(np.argmin(losses))]
    assert 0 < found.knee <= found.best
    assert (found.budget, found.best_within) == (None, None)
    rises = [point.forgetting.kl.value or 0.0 for point in found.points]
    assert rises == sorted(rises)


def test_a_scan_without_general_text_is_an_error(finished: Path, held_out: str):
    """It would leave out what it is for; so would a budget with nothing to hold it against."""
    with pytest.raises(InputError, match="--scan: needs general text"):
        compare(finished, Asked(data=held_out, answers=0, scan=True, general="false"))
    with pytest.raises(InputError, match="--budget: the run measures no forgetting"):
        scale(finished, finished / "x", None, 0.1, data=held_out, general="false")


def test_a_scaled_adapter_is_the_same_in_peft(finished: Path, tmp_path: Path):
    """Gain 0.7 in `lora_alpha`: PEFT's logits are ours at gain 0.7."""
    report = scale(finished, tmp_path / "scaled", 0.7, None)
    section = ModelConfig(path=str(config_file.load(finished / "config.yaml").model.path))
    ours = model.load_model(model.read_header(section), section, CPU)
    adapter.attach(ours.module, adapter.read(finished / "adapter"))
    ours.module.set_attn_implementation(ours.own_attention)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(section.path), tmp_path / "scaled"
    )
    ids = torch.arange(5, 30)[None]
    with torch.no_grad(), lora.gain(ours.module, 0.7):
        gap = ours.module(input_ids=ids).logits - theirs(input_ids=ids).logits

    assert report.alpha == pytest.approx(8 * 0.7)
    assert float(gap.abs().max()) < 1e-5
    before, after = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (finished / "adapter", report.output)
    )
    assert {key for key in before if before[key] != after[key]} == {"lora_alpha"}
    assert adapter.read(report.output).base_fingerprint == adapter.read(finished / "adapter").base_fingerprint


def test_alpha_patterns_are_scaled_too(finished: Path, tmp_path: Path):
    """Every layer's strength, also those that have their own."""
    config = finished / "adapter" / "adapter_config.json"
    values = json.loads(config.read_text()) | {"alpha_pattern": {"q_proj": 32}}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "adapter_config.json").write_text(json.dumps(values))
    (foreign / "adapter_model.safetensors").write_bytes(
        (finished / "adapter" / "adapter_model.safetensors").read_bytes()
    )
    scale(foreign, tmp_path / "scaled", 0.5, None)
    before, after = adapter.read(foreign), adapter.read(tmp_path / "scaled")

    assert len(set(before.scales.values())) == 2
    assert {path: factor * 0.5 for path, factor in before.scales.items()} == after.scales


def test_scale_keeps_within_a_budget(finished: Path, tmp_path: Path, held_out: str):
    """The best gain whose rise is within it; none within it, or neither or both settings, are errors."""
    report = compare(finished, Asked(data=held_out, answers=0, scan=True))
    assert report.scan is not None
    rises = {point.gain: point.forgetting.rise.value for point in report.scan.points}
    budget = rises[0.5]
    assert budget is not None
    within = [point for point in report.scan.points if (point.forgetting.rise.value or 0.0) <= budget]
    wanted = min(within, key=lambda point: point.loss.value or 0.0)
    found = scale(finished, tmp_path / "scaled", None, budget, data=held_out)

    assert found.gain == wanted.gain > 0
    assert found.point == wanted
    for gain, limit in ((None, None), (1.0, 0.1)):
        with pytest.raises(InputError, match="--gain, --budget: give one of them"):
            scale(finished, tmp_path / "other", gain, limit)
    with pytest.raises(InputError, match="above 0"):
        scale(finished, tmp_path / "other", 0.0, None)
    assert not (tmp_path / "other").exists()


# --- the harness ---

TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
doc_to_target: completion
target_delimiter: ""
num_fewshot: 0
{more}
"""


def write_task(folder: Path, kind: str, more: str) -> str:
    colours = ("red", "blue", "green")
    rows = [{"prompt": f"Name colour {n}:", "completion": f" {colours[n % 3]}"} for n in range(12)]
    data = write_rows(folder / "task.jsonl", rows)
    path = folder / f"{kind}.yaml"
    path.write_text(TASK.format(name=kind, rows=data, cache=folder / "cache", kind=kind, more=more), encoding="utf-8")
    return str(path)


def test_harness_tasks_run_on_base_and_adapter(finished: Path, held_out: str, tmp_path: Path, capsys: Any):
    """A local task gives what choosing by our own likelihoods gives, for both models, and prints nothing."""
    choice = write_task(
        tmp_path, "multiple_choice",
        'doc_to_choice: [" red", " blue", " green"]\n'
        "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}",
    )  # fmt: skip
    answers = write_task(
        tmp_path, "generate_until",
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}\n'
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}",
    )  # fmt: skip
    report = compare(finished, Asked(data=held_out, answers=0, tasks=(choice, answers), limit=10))
    found = report.tasks["multiple_choice/acc"]
    header = model.read_header(ModelConfig(path=str(config_file.load(finished / "config.yaml").model.path)))
    loaded = model.load_model(header, ModelConfig(path=str(header.folder)), CPU)
    adapter.attach(loaded.module, adapter.read(finished / "adapter"))
    ids = [tuple(header.tokenizer([f" {colour}"])["input_ids"][0]) for colour in ("red", "blue", "green")]
    asked = [
        questions.Question("", tuple(header.tokenizer([f"Name colour {n}:"])["input_ids"][0]), ids[n % 3])
        for n in range(10)
    ]
    hits = questions.choose(loaded, asked, ids, 64, (0.0, 1.0))

    assert (found.base.value, found.tuned.value) == pytest.approx((hits[0].mean(), hits[1].mean()))
    assert found.tuned.n == 10
    assert report.tasks["generate_until/exact_match"].base.n == 10
    assert capsys.readouterr() == ("", "")


def test_an_unknown_task_is_an_error(finished: Path, held_out: str, tmp_path: Path):
    """A name the harness does not know, or a file that is not there."""
    for task in ("no_such_task_at_all", str(tmp_path / "none.yaml")):
        with pytest.raises(InputError, match="--tasks"):
            compare(finished, Asked(data=held_out, answers=0, tasks=(task,)))


def test_eval_writes_nothing_beside_foreign_adapters(finished: Path, held_out: str, tmp_path: Path):
    """An adapter from elsewhere is measured and left as it is."""
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(finished / "adapter" / name, foreign)
    before = sorted(path.name for path in foreign.iterdir())
    report = compare(foreign, Asked(data=held_out, answers=2))

    assert report.saved is None
    assert sorted(path.name for path in foreign.iterdir()) == before
    with pytest.raises(AdapterError):
        scale(foreign / "none", tmp_path / "x", 1.0, None)
