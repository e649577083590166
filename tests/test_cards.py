"""Where an adapter loads, the model card that says so, and what is pushed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Invoke

from lora_cli import adapter, card, hub, manifest, metrics, run_dir, runtimes, tuned
from lora_cli.errors import SurroundingsError
from lora_cli.run_dir import RunDir
from lora_cli.runtimes import Produced


@pytest.fixture
def run(invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path) -> RunDir:
    """A finished run with test rows, of a base and data that are folders and files here."""
    invoke("train", make_config(**{"data.test": 6, "eval.general": None, "train.epochs": 1}))
    return RunDir(tmp_path / "run")


def parts_of(text: str) -> tuple[dict[str, Any], str]:
    """A card's YAML head and its text."""
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_training_writes_a_card_that_is_sealed(run: RunDir):
    """Base, data, results with intervals, config and how to load it stand in the adapter's README.md."""
    head, body = parts_of((run.adapter / card.FILE).read_text())
    status, environment = run_dir.read_status(run), run_dir.read_environment(run)

    assert manifest.problems_in(run.adapter) == []
    assert card.FILE in json.loads((run.adapter / manifest.MANIFEST).read_text())["files"]
    assert head == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "text-generation"]}
    for known in (environment["base_fingerprint"], environment["data_fingerprint"], "train: 26 rows"):
        assert known in body
    test = status["test"]
    change = f"{test['change']['value']:+.4f} [{test['change']['low']:+.4f}, {test['change']['high']:+.4f}]"
    assert f"| {test['base_loss']:.4f} | {test['loss']:.4f} | {change} |" in body
    assert f"| {status['base_loss']:.4f} | {status['best_loss']:.4f} |" in body
    assert "loss on general text (forgetting)" in body
    assert "PeftModel.from_pretrained" in body
    assert "--max-lora-rank 8 " in body
    fenced = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert (fenced["lora"]["rank"], fenced["data"]["train"], fenced["seed"]) == (4, "rows.jsonl", 0)


def test_a_card_names_no_place_on_this_machine(run: RunDir, tmp_path: Path):
    """Of a base, data or run folder only the last part is told, in every kind of card."""
    result = tuned.find(run.path)
    cards = [(run.adapter / card.FILE).read_text(), card.mlx_card(result), card.merged_card(result)]
    cards.append(card.peft_card(result.adapter, None))

    for text in cards:
        assert str(tmp_path) not in text
        assert str(Path(result.adapter.base).parent) not in text
        assert f"`{Path(result.adapter.base).name}`" in text


def test_hub_names_go_into_the_head(run: RunDir):
    """A base and data sets of the hub are named where the hub looks for them; files and folders are not."""
    config = json.loads(json.dumps(yaml.safe_load(run.config.read_text())))
    config["data"]["train"] = [{"path": "org/rows"}, {"path": "other.jsonl"}]
    run.config.write_text(json.dumps(config))
    values = json.loads((run.adapter / adapter.CONFIG).read_text())
    (run.adapter / adapter.CONFIG).write_text(json.dumps(values | {"base_model_name_or_path": "org/small"}))
    head, body = parts_of(card.peft_card(adapter.read(run.adapter), run))

    assert (head["base_model"], head["datasets"]) == ("org/small", ["org/rows"])
    assert "vllm serve org/small" in body


def test_evaluations_stand_in_an_exported_card(invoke: Invoke, run: RunDir, tmp_path: Path):
    """What `lora eval` measured is in the cards written afterwards; a checkpoint's card has only its own figures."""
    invoke("eval", run.path)
    invoke("export", run.path, "--output", tmp_path / "exported")
    first = min(run.checkpoints.iterdir())
    invoke("export", first, "--output", tmp_path / "first")
    whole, checkpoint = ((tmp_path / name / card.FILE).read_text() for name in ("exported", "first"))
    losses = {step: f"| {found.loss:.4f} |" for step, found in metrics.read_evaluated(run).items()}

    assert "the run's test rows: token_accuracy | 6 rows" in whole
    assert "the run's test rows" not in checkpoint
    assert "test loss" not in checkpoint
    assert losses[int(first.name[5:])] in checkpoint
    assert manifest.problems_in(tmp_path / "exported") == []


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, {"PEFT": True, "vLLM": True, "llama.cpp": True, "MLX": True, "Ollama": True}),
        ({"rank": 1024}, {"PEFT": True, "vLLM": False, "llama.cpp": True}),
        ({"method": "dora"}, {"PEFT": True, "vLLM": False, "llama.cpp": False, "MLX": True, "Ollama": False}),
        ({"model_type": "gpt2"}, {"PEFT": True, "vLLM": False, "llama.cpp": True, "MLX": True, "Ollama": None}),
        ({"model_type": "qwen3"}, {"vLLM": True, "llama.cpp": True, "MLX": True, "Ollama": False}),
        ({"model_type": "mamba2", "modules": frozenset(("in_proj", "out_proj"))}, {"PEFT": False, "vLLM": False}),
        ({"model_type": "made_up"}, {"PEFT": True, "vLLM": None, "llama.cpp": None, "MLX": None, "Ollama": None}),
    ],
)
def test_where_an_adapter_loads(changed: dict[str, Any], expected: dict[str, bool | None]):
    """Rank, method, architecture and layers decide; what is not known is said to be so."""
    produced = Produced(
        **{"model_type": "llama", "method": "lora", "rank": 33, "modules": frozenset(("q_proj",))} | changed
    )
    found = {each.name: each.loads for each in runtimes.verdicts(produced)}

    assert {name: found[name] for name in expected} == expected


def test_vllm_takes_certain_ranks_only():
    """The rank that is asked of vLLM is the next one it knows."""
    assert [runtimes.vllm_rank(rank) for rank in (1, 8, 9, 33, 321, 512)] == [8, 8, 16, 64, 512, 512]


def test_check_says_where_the_adapter_will_load(invoke: Invoke, make_config: Callable[..., Path]):
    """One short line a runtime, and the same as JSON."""
    _, out, _ = invoke("check", make_config("qwen3"))
    _, as_json, _ = invoke("check", make_config("qwen3"), "--json")

    assert "  vLLM       yes: as it is, with --max-lora-rank 8\n" in out
    assert "  Ollama     no: Ollama's own engine, which runs this architecture, takes no adapters\n" in out
    assert [each["name"] for each in json.loads(as_json)["runtimes"]] == list(runtimes.RULES)


def test_a_push_without_network_leaves_the_export_whole(
    invoke: Invoke,
    run: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """Exit 3 with the command that sends it later; without a token or a good name nothing is written."""
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_token")
    code, out, err = invoke("export", run.path, "--output", tmp_path / "exported", "--push", "someone/tuned")

    assert (code, out) == (3, "")
    assert "the hub cannot be reached" in err
    assert f"hf upload someone/tuned {tmp_path / 'exported'}" in err
    assert manifest.problems_in(tmp_path / "exported") == []
    code, _, err = invoke("export", run.path, "--output", tmp_path / "other", "--push", "no/such/name")
    assert (code, "no name of a hub repository" in err) == (2, True)
    assert not (tmp_path / "other").exists()


def test_a_push_needs_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """How to get one is said."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(hub.huggingface_hub, "get_token", lambda: None)
    with pytest.raises(SurroundingsError, match="no token for the hub here: run `hf auth login`"):
        hub.push(tmp_path, "someone/tuned")
