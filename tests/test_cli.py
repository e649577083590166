"""The commands as a user types them: what they print, what they write, how they exit."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import CHATML, SHARED, Invoke, build_tokenizer, conversation, write_rows
from shapes import require_shape

from lora_cli import config_file
from lora_cli.reports import MergeReport


def test_from_config_to_merged_model(invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path):
    """train, eval, merge and export, each with one JSON object on stdout."""
    config, run = make_config(), tmp_path / "run"
    code, out, err = invoke("train", config, "train.epochs=3", "--json")
    finished = json.loads(out)
    assert (code, finished["step"], finished["adapter"]) == (0, 24, str(run / "adapter"))
    assert "base model: validation loss" in err

    code, out, _ = invoke("eval", run, "--json")
    report = json.loads(out)
    assert (code, report["rows"], report["answers"]) == (0, 8, 8)
    figures = report["figures"]
    assert figures["loss"]["base"]["value"] == pytest.approx(finished["base_loss"], rel=1e-6)
    assert figures["loss"]["tuned"]["value"] == pytest.approx(finished["best_loss"], rel=1e-6)
    assert figures["perplexity"]["tuned"]["value"] == pytest.approx(math.exp(finished["best_loss"]), rel=1e-5)
    assert figures["loss"]["verdict"] == "better"
    assert json.loads((run / "evaluations" / "adapter-the-run's-validation-rows.json").read_text()) == {
        key: value for key, value in report.items() if key != "samples"
    }

    code, out, _ = invoke("merge", run, "--output", tmp_path / "merged", "--json")
    merged = json.loads(out)
    assert (code, merged["adapted_tensors"], merged["agreement"]["top1_agreement"]) == (0, 14, 1.0)
    assert merged["agreement"]["largest_logit_difference"] <= merged["bound"]

    code, _, _ = invoke("export", run, "--format", "peft", "--output", tmp_path / "exported")
    base = transformers.AutoModelForCausalLM.from_pretrained(config_file.load(config).model.path)
    exported = peft.PeftModel.from_pretrained(base, tmp_path / "exported")
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        difference = (
            exported(input_ids=ids).logits
            - transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(input_ids=ids).logits
        )
    assert code == 0
    assert difference.abs().max() < 1e-4

    checkpoint = sorted((run / "checkpoints").iterdir())[0]
    assert invoke("eval", checkpoint, "--answers", "0", "--json")[0] == 0


def test_eval_equals_transformers(invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path):
    """Loss and answers are those of transformers, row by row without batches or packing."""
    config = make_config(**{"train.max_steps": 4})
    invoke("train", config)
    held_out = write_rows(tmp_path / "held.jsonl", [conversation(n) for n in range(100, 107)])
    _, out, _ = invoke("eval", tmp_path / "run", "--data", held_out, "--json")
    report = json.loads(out)
    folder = config_file.load(config).model.path
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter")
    longest = max(len(tokenizer(conversation(n)["messages"][1]["content"])["input_ids"]) + 1 for n in range(100, 107))
    total, targets = 0.0, 0
    for number, sample in zip(range(100, 107), report["samples"], strict=True):
        turns = conversation(number)["messages"]
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
        answer = tokenizer(turns[1]["content"] + "<|im_end|>")["input_ids"]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            total += float(tuned(input_ids=torch.tensor([prompt + answer]), labels=labels).loss) * len(answer)
            ids = tuned.generate(
                input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=longest + 8, do_sample=False, pad_token_id=2,
            )  # fmt: skip
        targets += len(answer)
        said = tokenizer.decode(ids[0, len(prompt) :]).split("<|im_end|>")[0]
        assert sample["tuned"] == said.strip()
        assert sample["expected"] == turns[1]["content"]

    assert report["targets"] == targets
    assert report["figures"]["loss"]["tuned"]["value"] == pytest.approx(total / targets, rel=1e-5)


def test_eval_of_plain_text_has_no_answers(invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path):
    """Nothing was asked: exact match is null, not zero."""
    invoke("train", make_config(**{"train.max_steps": 1}))
    held_out = write_rows(tmp_path / "held.jsonl", [{"text": "The sky is blue."}])
    _, out, _ = invoke("eval", tmp_path / "run", "--data", held_out, "--json")

    found = json.loads(out)["figures"]["exact_match"]

    assert found["tuned"] == {"value": None, "low": None, "high": None, "n": 0}
    assert (found["verdict"], json.loads(out)["answers"]) == (None, 0)


def test_check_shows_and_writes_nothing(invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path):
    """The preview marks the trained part; counts agree with training; no file appears."""
    config = make_config()
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = invoke("check", config)
    assert code == 0
    assert "[[It is" in out
    assert "q_proj x2" in out
    report = json.loads(invoke("check", config, "--json")[1])

    assert report["total_steps"] == 16
    assert [[piece["trained"] for piece in shown["pieces"]] for shown in report["previews"]] == [[False, True]] * 5
    assert report["trainable_parameters"] == sum(
        4 * (i + o) * 2 for i, o in [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_check_shows_the_row_that_is_asked_for(invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path):
    """A row by its number or its place, wherever the split put it."""
    config = make_config()
    for row in ("7", f"{tmp_path / 'rows.jsonl'}:7"):
        (shown,) = json.loads(invoke("check", config, "--row", row, "--json")[1])["previews"]
        assert shown["row"].endswith("rows.jsonl:7")
        assert "number 6" in "".join(piece["text"] for piece in shown["pieces"])


def test_an_end_at_which_generation_does_not_stop_is_said(invoke: Invoke, make_config: Callable[..., Path]):
    """zephyr's answers end with the tokenizer's end token: nothing to say; another end token is named."""
    config = make_config(**{"data.chat_template": "zephyr"})
    assert "does not stop" not in invoke("check", config)[1]
    template = config.parent / "other.jinja"
    template.write_text(CHATML.replace("<|im_end|>", "<|endoftext|>"))
    out = invoke("check", make_config(**{"data.chat_template": str(template)}))[1]

    assert "Answers end with <|endoftext|>, at which this model's generation does not stop" in out


def test_the_chat_template_goes_with_the_adapter(invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path):
    """Saved with the adapter and the merged model, used by eval when its file has gone; the base keeps its own."""
    template = tmp_path / "mine.jinja"
    template.write_text(CHATML.replace("<|im_start|>", "<|im_start|>the "))
    config = make_config(**{"data.chat_template": str(template), "train.max_steps": 4})
    assert invoke("train", config)[0] == 0
    source = template.read_text()
    template.unlink()
    code, out, _ = invoke("eval", tmp_path / "run", "--json")
    evaluated = json.loads(out)
    assert invoke("merge", tmp_path / "run", "--output", tmp_path / "merged")[0] == 0
    merged = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")

    assert code == 0
    assert evaluated["figures"]["loss"]["base"]["value"] == pytest.approx(
        json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["loss"], rel=1e-6
    )
    assert (tmp_path / "run" / "adapter" / "chat_template.jinja").read_text() == source
    assert merged.chat_template == source
    assert transformers.AutoTokenizer.from_pretrained(config_file.load(config).model.path).chat_template == CHATML


def test_init_writes_a_config_that_loads(invoke: Invoke, tmp_path: Path):
    """Every key, commented; an existing file is never replaced; the schema goes to stdout."""
    path = tmp_path / "train.yaml"
    code, _, _ = invoke("init", path, "--model", "a/b", "--data", "x.jsonl")
    config = config_file.load(path)
    assert (code, config.model.path, config.data.train) == (0, "a/b", "x.jsonl")
    assert invoke("init", path)[0] == 2
    assert json.loads(invoke("init", "--schema")[1])["properties"].keys() == type(config).model_fields.keys()


def test_the_version_is_also_an_option(invoke: Invoke):
    """`lora --version` prints what `lora version` does; without anything there is help."""
    code, out, err = invoke("--version")
    assert (code, out, err) == invoke("version")
    assert (code, out[:5], err) == (0, "lora ", "")
    assert invoke()[0] == 2


def test_a_bug_is_exit_1_with_a_log(invoke: Invoke, make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    """What is no fault of the user is a short note and a traceback in a file."""
    monkeypatch.setattr(config_file, "load", lambda *_: 1 / 0)
    code, _, err = invoke("check", make_config())
    log = Path(err.split("traceback is in ")[1].split(";")[0])

    assert code == 1
    assert "ZeroDivisionError" in log.read_text()
    log.unlink()


def test_a_model_that_sees_what_comes_after_is_refused(
    invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path
):
    """BERT can be loaded as a causal model, and is none."""
    folder = tmp_path / "bert"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=400, **sizes)).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    code, _, err = invoke("train", make_config(**{"model.path": str(folder)}))

    assert (code, "lets tokens see those after them" in err) == (2, True)
    assert not (tmp_path / "run").exists()


def test_real_data_on_a_real_tiny_model(invoke: Invoke, shared_model: str, tmp_path: Path):
    """Five lines of config train a pretrained model on a real task, and its loss falls."""
    config = tmp_path / "config.yaml"
    config.write_text(
        f"model: {shared_model}\ndata:\n  train: {SHARED}/data/e2e/train.jsonl\noutput_dir: {tmp_path}/run\n"
        "train: {max_steps: 20}\n"
    )
    code, out, _ = invoke("train", config, "data.validation=64", "--json")
    finished = json.loads(out)

    assert code == 0
    assert finished["best_loss"] < 0.8 * finished["base_loss"]


def test_eval_and_scale_are_readable(invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path):
    """Figures with intervals and verdicts, forgetting, the scan as table and curve, and what scale wrote."""
    invoke("train", make_config(**{"eval.general": None, "eval.general_tokens": 512, "train.epochs": 3}))
    code, out, _ = invoke("eval", tmp_path / "run", "--scan", "--metric", "label", "--metric", "exact-match")
    lines = out.splitlines()
    row = next(line for line in lines if line.strip().startswith("loss"))

    assert code == 0
    assert row.count("[") == 3
    assert "better" in row
    assert any(line.startswith("forgetting: loss on general text") for line in lines)
    assert any(line.strip().startswith("0.25 ") for line in lines)
    assert any("lowest loss" in line for line in lines)
    assert "None" not in out
    assert "a = 0  b = 0.25" in out
    assert "label accuracy" in out
    assert max(map(len, lines)) < 300

    code, out, _ = invoke("scale", tmp_path / "run", "--gain", "0.5", "--output", tmp_path / "half")
    assert (code, "gain 0.5, lora_alpha 4." in out) == (0, True)
    code, out, _ = invoke("scale", tmp_path / "run", "--budget", "9", "--output", tmp_path / "within", "--json")
    assert (code, json.loads(out)["point"]["gain"]) == (0, json.loads(out)["gain"])
    assert invoke("eval", tmp_path / "half", "--data", tmp_path / "rows.jsonl", "--answers", "2")[0] == 0


def test_the_end_of_a_run_tells_of_test_rows_and_budget(
    invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path
):
    """What was forgotten, whether it is within the budget, the test loss, and how choosing flattered validation."""
    settings = {"eval.general": None, "eval.general_tokens": 512, "data.test": 6}
    code, out, err = invoke("train", make_config(**settings, **{"eval.forgetting_budget": 9.0}))
    assert code == 0
    assert "Forgetting: the loss on general text fell by" in out
    assert "nats a token, which is within eval.forgetting_budget." in out
    assert "chose nothing; validation was flattered by" in out
    assert "No evaluation was within" not in out
    assert "forgetting: loss on general text" in err
    assert invoke("train", tmp_path / "config.yaml")[1].splitlines()[1:] == out.splitlines()[1:]


def test_several_adapters_by_weight(invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path):
    """`A B --weights 0.7 0.3` is what it says, and `--speed` times all three; numbers, not words, are weights."""
    config = make_config()
    for seed in (0, 1):
        assert invoke("train", config, "train.max_steps=4", f"seed={seed}", f"output_dir={tmp_path}/{seed}")[0] == 0
    both = (tmp_path / "0", tmp_path / "1")
    code, out, _ = invoke("merge", *both, "--weights", "0.7", "0.3", "--output", tmp_path / "m", "--speed", "--json")
    report = json.loads(out)
    record = json.loads((tmp_path / "m" / "merge.json").read_text())

    assert (code, [each["weight"] for each in record["adapters"]]) == (0, [0.7, 0.3])
    assert require_shape(MergeReport, out).speeds.keys() == {"base", "base + first adapter", "merged"}
    assert not (tmp_path / "m" / "README.md").exists()
    assert all(speed["answer"]["value"] > 0 for speed in report["speeds"].values())
    code, out, _ = invoke("merge", *both, "--weights", "0.7,0.3", "--adapter", "--output", tmp_path / "one")
    assert (code, "one adapter of 14 layers" in out) == (0, True)
    code, out, _ = invoke("merge", tmp_path / "one", "--output", tmp_path / "again", "--speed")
    assert (code, "same first choice 100.00%" in out, "base + adapter" in out) == (0, True, True)
