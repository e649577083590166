"""Configs of other programs become ours: nothing is dropped silently, and what is written means the same."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Invoke, conversation, write_rows

from lora_cli import config_file, convert
from lora_cli.conversion import ConversionReport, Peer
from lora_cli.errors import ConfigError
from lora_cli.other_names import OTHER_NAMES
from lora_cli.peers import axolotl_data, axolotl_keys
from lora_cli.schema import value_of

EXAMPLES = sorted((Path(__file__).parent / "peers").glob("*.yaml"))
AXOLOTL = {
    "base_model": "m",
    "datasets": [{"path": "a.jsonl", "type": "completion"}],
    "adapter": "lora",
    "output_dir": "o",
}
LLAMA_FACTORY = {"model_name_or_path": "m", "stage": "sft", "dataset": "mine", "output_dir": "o"}


def sharegpt(number: int) -> dict[str, Any]:
    """A conversation as ShareGPT writes it."""
    names = {"user": "human", "assistant": "gpt"}
    turns = conversation(number)["messages"]
    return {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]}


def alpaca(number: int) -> dict[str, Any]:
    """An instruction with its answer."""
    question, answer = (turn["content"] for turn in conversation(number)["messages"])
    return {"instruction": question, "input": "", "output": answer}


# Rows of the shape that the data sets of the examples have.
ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "axolotl-lora-1b": alpaca,
    "axolotl-gemma-3-1b-qlora": sharegpt,
    "axolotl-instruct-dpo-lora-8b": lambda number: {"conversation": conversation(number)["messages"]},
    "llamafactory-qwen3-lora-sft": alpaca,
    "llamafactory-llama3-loraplus": alpaca,
    "llamafactory-qwen3-lora-dpo": sharegpt,
}


def converted(values: dict[str, Any], folder: Path, processes: int = 1) -> ConversionReport:
    """What becomes of a config; the one that is written must load."""
    source, written = folder / "theirs.yaml", folder / "ours.yaml"
    source.write_text(yaml.safe_dump(values, sort_keys=False))
    report = convert.convert(source, written, processes)
    config_file.load(written)
    return report


def ours(values: dict[str, Any], folder: Path, key: str) -> Any:
    """The value of one of our keys in the config that becomes of another program's."""
    converted(values, folder)
    return value_of(config_file.load(folder / "ours.yaml"), key)


def leaves(values: dict[str, Any]) -> set[str]:
    """Every key of a file; of the data sets, which are lists or several names, every one."""
    found = set()
    for key, value in values.items():
        if key == "datasets":
            found |= {f"datasets[{index}].{name}" for index, entry in enumerate(value) for name in entry}
        elif key == "dataset":
            found |= {f"dataset[{name.strip()}]" for name in value.split(",")}
        else:
            found.add(key)
    return found


def listed(report: ConversionReport) -> Counter[str]:
    """In how many lists each of their keys is."""
    return Counter(one.key for kept in (report.taken, report.not_needed, report.not_possible) for one in kept)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_key_of_a_public_example_is_in_exactly_one_list(example: Path, tmp_path: Path):
    """Taken over, not needed, or not possible: nothing is dropped, nothing is said twice."""
    values = yaml.safe_load(example.read_text())

    assert listed(converted(values, tmp_path)) == dict.fromkeys(leaves(values), 1)


@pytest.mark.parametrize("peer", convert.PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("value", [None, False, True, 0, 1, -1, 3.5, "inf", "nan", "text", ["a"], {"a": 1}], ids=str)
def test_every_key_that_is_known_is_in_exactly_one_list_whatever_its_value(peer: Peer, value: Any, tmp_path: Path):
    """All keys of a program's tables, each with a value that may not be meant; what is written loads all the same."""
    tables = (peer.same, peer.fixed, peer.not_needed, peer.not_possible, peer.other_training)
    keys = {key.replace("*", "x") for table in tables for key in table} | {k for rule in peer.rules for k in rule.keys}
    values = {**dict.fromkeys(sorted(keys - {"dataset", "datasets"}), value), "nonsense": value, peer.must_have: "m"}
    report = converted(values, tmp_path)

    assert {key for key, count in listed(report).items() if count != 1} == set()
    assert listed(report).keys() == values.keys()


ROW_KEYS = {
    "path",
    "type",
    "data_files",
    "split",
    "name",
    "field",
    "chat_template",
    "roles",
    *axolotl_data.MESSAGE_KEYS,
}
ROW_KEYS |= {*axolotl_keys.ROW_FIXED, *axolotl_keys.ROW_NOT_NEEDED, *axolotl_keys.ROW_OTHER_TRAINING, "field_tools"}


@pytest.mark.parametrize(
    "kind", ["alpaca", "completion", "chat_template", "sharegpt", "oasst", {"format": "{x}"}], ids=str
)
@pytest.mark.parametrize("value", [None, False, 7, "text", ["a"], {"a": "b"}], ids=str)
def test_every_key_of_a_data_set_is_in_exactly_one_list_whatever_its_value(kind: Any, value: Any, tmp_path: Path):
    """All keys that a data set of Axolotl's may have, each with a value that may not be meant."""
    report = converted(AXOLOTL | {"datasets": [{**dict.fromkeys(sorted(ROW_KEYS), value), "type": kind}]}, tmp_path)
    counts = {key: count for key, count in listed(report).items() if key.startswith("datasets")}

    assert counts == dict.fromkeys((f"datasets[0].{key}" for key in ROW_KEYS), 1)


@pytest.mark.parametrize("value", [None, "text", 3, ["a"], [{}], {"a": 1}], ids=str)
@pytest.mark.parametrize("config", [AXOLOTL, LLAMA_FACTORY], ids=["axolotl", "llama-factory"])
def test_data_sets_that_are_none_are_said(config: dict[str, Any], value: Any, tmp_path: Path):
    """A config without data sets that can be read still becomes one; whose data.train is to be filled in is said."""
    key = "datasets" if config is AXOLOTL else "dataset"
    report = converted(config | {key: value}, tmp_path)

    assert any(one.ours.startswith("data.train") for one in [*report.unsaid, *report.taken])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_check_accepts_what_becomes_of_a_public_example(
    example: Path, invoke: Invoke, model_folder: Callable[[str], str], tmp_path: Path
):
    """On a tiny model, with rows of the shape that its data set has."""
    rows = write_rows(tmp_path / "rows.jsonl", [ROWS[example.stem](number) for number in range(40)])
    code, out, err = invoke("init", tmp_path / "ours.yaml", "--from", example)
    assert (code, "\n\nNext:\n" in out, "\n\n\n" in out) == (0, True, False)
    code, out, err = invoke(
        "check", tmp_path / "ours.yaml", f"model={model_folder('llama')}", f"data.train={rows}", "--json"
    )

    assert code == 0, err
    assert json.loads(out)["train"]["examples"] > 0


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        ("axolotl-lora-1b", set()),
        ("axolotl-gemma-3-1b-qlora", {"unfrozen_parameters"}),
        ("axolotl-instruct-dpo-lora-8b", {"rl", "datasets[0].field_chosen", "datasets[0].field_rejected"}),
        ("llamafactory-qwen3-lora-sft", {"dataset[identity]", "max_samples"}),
        ("llamafactory-llama3-loraplus", {"dataset[identity]", "dataset[alpaca_en_demo]", "max_samples"}),
        ("llamafactory-qwen3-lora-dpo", {"stage", "pref_beta", "pref_loss", "dataset[dpo_en_demo]", "max_samples"}),
    ],
)
def test_what_changes_training_stands_at_the_head_of_the_file(example: str, expected: set[str], tmp_path: Path):
    """What cannot be honoured and changes what is trained is named before any key, and first in the list."""
    written = tmp_path / "ours.yaml"
    report = convert.convert(Path(__file__).parent / "peers" / f"{example}.yaml", written)
    head = written.read_text().split("\nmodel:")[0]

    assert {one.key for one in report.other_training} == expected
    assert all(f"#   {key}: " in head for key in expected)


# their keys -> ours
AXOLOTL_MEANS = [
    ({"micro_batch_size": 2, "gradient_accumulation_steps": 8}, "train.batch_size", 16),
    ({"micro_batch_size": 2, "batch_size": 12}, "train.batch_size", 12),
    ({"lora_r": 16, "lora_alpha": 32}, "lora.alpha", 32),
    ({"lora_r": 16}, "lora.alpha", 8),  # PEFT's default
    ({"lora_r": 16, "lora_alpha": 32, "peft_use_rslora": True}, "lora.method", "rslora"),
    ({"lora_r": 16, "lora_alpha": 32, "peft_use_dora": True}, "lora.method", "dora"),
    ({"lora_r": 16, "lora_alpha": 32, "peft_use_dora": True, "peft_use_rslora": True}, "lora.alpha", 128),
    ({"peft_init_lora_weights": "pissa_niter_16"}, "lora.init", "pissa"),
    ({"lora_target_linear": True, "lora_target_modules": ["q_proj"]}, "lora.target_modules", "all-linear"),
    ({"lora_target_modules": ["q_proj", "v_proj"]}, "lora.target_modules", ("q_proj", "v_proj")),
    ({"adapter": None}, "lora.method", "full"),
    ({"adapter": None, "lora_r": 8, "load_in_4bit": False}, "lora.rank", 32),  # without effect: the default
    ({"adapter": "qlora", "load_in_4bit": True}, "model.quantization", "nf4"),
    ({"load_in_8bit": True}, "model.quantization", "int8"),
    ({"bf16": True}, "model.dtype", "bfloat16"),
    ({"fp16": True, "bf16": False}, "model.dtype", "float16"),
    ({"bf16": False, "fp16": False}, "model.dtype", "float32"),
    ({"bf16": "auto"}, "model.dtype", "auto"),
    ({}, "train.epochs", 1),
    ({"num_epochs": 2.5}, "train.epochs", 3),
    ({"num_epochs": 2, "max_steps": 70}, "train.max_steps", 70),
    ({"num_epochs": 2, "max_steps": 70}, "train.epochs", 70),  # there max_steps alone decides
    ({"warmup_steps": 10, "max_steps": 200}, "train.warmup_ratio", 0.05),
    ({"warmup_ratio": 0.2}, "train.warmup_ratio", 0.2),
    ({"lr_scheduler": "constant", "warmup_ratio": 0.2}, "train.warmup_ratio", 0.0),
    ({"lr_scheduler": "constant_with_warmup", "warmup_ratio": 0.2}, "train.warmup_ratio", 0.2),
    ({}, "data.validation", 0),
    ({"val_set_size": 0.05}, "data.validation", 0.05),
    ({"val_set_size": 200.0}, "data.validation", 200),
    ({"val_set_size": 0.1}, "train.early_stopping.patience", None),
    ({"val_set_size": 0.1, "early_stopping_patience": 2}, "train.early_stopping.patience", 2),
    ({"val_set_size": 0.1, "num_epochs": 2, "eval_steps": 0.05}, "eval.per_epoch", 10),
    ({"val_set_size": 0.1, "eval_strategy": "epoch"}, "eval.per_epoch", 1),
    ({"saves_per_epoch": 2, "save_total_limit": 5}, "save.keep", 5),
    ({}, "data.max_length", 512),
    ({}, "data.too_long", "drop"),
    ({"excess_length_strategy": "raise"}, "data.too_long", "error"),
    ({"gradient_checkpointing": "offload"}, "train.activation_checkpointing", True),
    ({"deepspeed": "deepspeed_configs/zero3_bf16.json"}, "train.shard", True),
    ({"deepspeed": "deepspeed_configs/zero1.json"}, "train.shard", False),
    ({"fsdp": ["full_shard"], "fsdp_config": {"fsdp_offload_params": True}}, "train.shard", True),
    ({"fsdp": ["full_shard"], "peft_use_dora": True}, "train.shard", False),  # our own checks refuse that
    ({"loraplus_lr_ratio": 16}, "train.loraplus_ratio", 16.0),
    ({"wandb_project": "mine", "use_tensorboard": True}, "train.trackers", ("wandb", "tensorboard")),
    ({"wandb_project": "mine", "wandb_mode": "disabled"}, "train.trackers", ()),
    ({"neftune_noise_alpha": 5}, "train.neftune_alpha", 5),
    ({"chat_template": "chatml"}, "data.chat_template", "chatml"),
    ({"chat_template": "llama3"}, "data.chat_template", None),
    ({"datasets": [{"path": "a.jsonl", "type": "alpaca"}]}, "data.chat_template", "alpaca"),
    (
        {"datasets": [{"path": "json", "data_files": "b.jsonl", "ds_type": "json", "type": "alpaca"}]},
        "data.train",
        "b.jsonl",
    ),
    ({"datasets": [{"path": "a.jsonl", "type": "completion", "field": "body"}]}, "data.fields", {"text": "body"}),
    (
        {"datasets": [{"path": "a.jsonl", "type": "chat_template", "field_messages": "turns", "field_tools": "calls"}]},
        "data.fields",
        {"messages": "turns", "tools": "calls"},
    ),
    (
        {"datasets": [{"path": "a.jsonl", "type": {"format": "Q: {instruction}\nA:", "field_instruction": "ask"}}]},
        "data.prompt_template",
        "Q: {ask}\nA:",
    ),
]


@pytest.mark.parametrize(("keys", "key", "value"), AXOLOTL_MEANS, ids=str)
def test_what_axolotl_means(keys: dict[str, Any], key: str, value: Any, tmp_path: Path):
    """Meaning and defaults, not names."""
    assert ours(AXOLOTL | keys, tmp_path, key) == value


LLAMA_FACTORY_MEANS = [
    ({}, "lora.alpha", 16),  # twice the rank, which is 8
    ({"lora_rank": 4}, "lora.alpha", 8),
    ({"lora_target": "q_proj, v_proj"}, "lora.target_modules", ("q_proj", "v_proj")),
    ({}, "train.batch_size", 8),
    ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, "train.batch_size", 8),
    ({}, "train.learning_rate", 5e-5),
    ({}, "train.schedule", "linear"),
    ({}, "train.warmup_ratio", 0.0),
    ({}, "data.too_long", "truncate"),
    (
        {"val_size": 0.1, "early_stopping_steps": 5},
        "train.early_stopping.patience",
        5,
    ),  # evaluations, whatever its name
    ({"quantization_bit": 4}, "model.quantization", "nf4"),
    ({"quantization_bit": 3, "quantization_method": "hqq"}, "model.quantization", None),
    ({"finetuning_type": "full", "bf16": True, "deepspeed": "ds_z3_config.json"}, "train.shard", False),
    ({"finetuning_type": "full", "bf16": True}, "model.dtype", "float32"),
    ({"pissa_init": True, "pissa_iter": 16}, "lora.init", "pissa"),
    ({"use_dora": True, "use_rslora": True, "lora_rank": 16, "lora_alpha": 4}, "lora.alpha", 16.0),
    ({"report_to": "wandb, mlflow"}, "train.trackers", ("wandb", "mlflow")),
    ({"report_to": "none"}, "train.trackers", ()),
    ({"template": "zephyr"}, "data.chat_template", "zephyr"),
    ({"max_steps": -1, "num_train_epochs": 2.0}, "train.epochs", 2),
]


@pytest.mark.parametrize(("keys", "key", "value"), LLAMA_FACTORY_MEANS, ids=str)
def test_what_llama_factory_means(keys: dict[str, Any], key: str, value: Any, tmp_path: Path):
    """Meaning and defaults, not names."""
    assert ours(LLAMA_FACTORY | keys, tmp_path, key) == value


def test_a_step_counts_the_examples_of_all_processes(tmp_path: Path):
    """Micro-batch times accumulation times processes."""
    report = converted(AXOLOTL | {"micro_batch_size": 2, "gradient_accumulation_steps": 3}, tmp_path, processes=4)

    assert {one.our_value for one in report.taken if one.ours == "train.batch_size"} == {24}


def test_data_sets_are_found_in_dataset_info(tmp_path: Path):
    """Each by its own description: a file, a hub data set, columns, roles; what cannot be read is said."""
    (tmp_path / "data").mkdir()
    openai = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    described = {
        "plain": {"file_name": "plain.json", "columns": {"prompt": "ask", "response": "say", "history": "before"}},
        "chats": {"file_name": "c.jsonl", "formatting": "sharegpt", "columns": {"messages": "turns"}, "tags": openai},
        "hub": {"hf_hub_url": "some/thing", "subset": "en", "formatting": "sharegpt"},
        "pairs": {
            "file_name": "p.json",
            "ranking": True,
            "columns": {"prompt": "ask", "chosen": "good", "rejected": "bad"},
        },
        "elsewhere": {"ms_hub_url": "some/thing"},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(described))
    report = converted(LLAMA_FACTORY | {"dataset": ", ".join([*described, "unknown"])}, tmp_path)
    sources = config_file.load(tmp_path / "ours.yaml").data.sources

    assert [(one.path, one.format, one.fields, one.subset) for one in sources[:4]] == [
        (str(tmp_path / "data" / "plain.json"), "alpaca", {"instruction": "ask", "output": "say"}, None),
        (str(tmp_path / "data" / "c.jsonl"), "messages", {"messages": "turns"}, None),
        ("some/thing", "sharegpt", None, "en"),
        (str(tmp_path / "data" / "p.json"), "alpaca", {"instruction": "ask", "output": "good"}, None),
    ]
    assert {one.key for one in report.other_training} == {
        "dataset_info.json[plain].columns.history",
        "dataset_info.json[pairs].columns.rejected",
        "dataset_info.json[elsewhere].file_name",
        "dataset[unknown]",
    }


@pytest.mark.parametrize(
    ("described", "lost"),
    [
        ("file.json", "dataset[mine]"),
        ([], "dataset[mine]"),
        ({"file_name": "a.json", "columns": ["instruction"]}, "dataset_info.json[mine].columns"),
        ({"file_name": "a.json", "formatting": "sharegpt", "tags": "role"}, "dataset_info.json[mine].tags"),
    ],
    ids=str,
)
def test_a_damaged_description_of_a_data_set_is_said(described: Any, lost: str, tmp_path: Path):
    """dataset_info.json is a file of the user's, and may hold anything."""
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": described}))
    assert {one.key for one in converted(LLAMA_FACTORY, tmp_path).other_training} == {lost}


def test_no_key_or_value_writes_a_line_of_its_own(tmp_path: Path):
    """What of theirs stands in a comment ends with it, so that no key of ours can hide in a key of theirs."""
    hidden = "x\nseed: 7\n#"
    values = AXOLOTL | {hidden: 1, "chat_template": hidden, "datasets": [{"path": "a.jsonl", "type": "x", hidden: 1}]}
    assert ours(values, tmp_path, "seed") == 0


def test_a_value_that_is_refused_here_is_listed_with_our_reason(tmp_path: Path):
    """It does not stand in the file that is written."""
    report = converted(AXOLOTL | {"learning_rate": "fast", "lora_dropout": 1.5, "max_grad_norm": -1}, tmp_path)
    refused = {one.key: one.why for one in report.not_possible}

    assert refused.keys() == {"learning_rate", "lora_dropout", "max_grad_norm"}
    assert "expected" in refused["lora_dropout"]


def test_secrets_are_not_repeated(invoke: Invoke, tmp_path: Path):
    """Not in the lists, not in the file."""
    token = "hf_" + "a1b2" * 8
    (tmp_path / "theirs.yaml").write_text(
        yaml.safe_dump(
            LLAMA_FACTORY | {"hf_hub_token": token, "swanlab_api_key": "very-secret", "run_name": f"x {token}"}
        )
    )
    _, out, err = invoke("init", tmp_path / "ours.yaml", "--from", tmp_path / "theirs.yaml", "--json")
    said = out + err + (tmp_path / "ours.yaml").read_text()

    assert "swanlab_api_key" in said
    assert token not in said
    assert "very-secret" not in said


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"base_model": "m", "model_name_or_path": "m", "adapter": "lora", "stage": "sft"},
            "keys of Axolotl and of LLaMA-F",
        ),
        ({"model_name_or_path": "m", "dataset_name": "d", "use_peft": True}, "looks like TRL's.*docs/from-trl.md"),
        ({"model": "m", "iters": 600, "train": True}, "looks like mlx-lm's.*docs/from-mlx-lm.md"),
        ({"model": "m", "data": {"train": "t"}, "output_dir": "o"}, "is a config of this program already"),
        ({"base_model": "m"}, "of no program that is known by its keys .base_model"),
        ({"learning_rate": 1}, "Converted are those of Axolotl .base_model, and .*LLaMA-Factory .model_name_or_path"),
    ],
)
def test_whose_config_it_is_is_never_guessed(values: dict[str, Any], expected: str, tmp_path: Path):
    """Both, others and none are refused, with what is known; nothing is written."""
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as error:
        convert.convert(tmp_path / "theirs.yaml", tmp_path / "ours.yaml")

    assert re.search(expected, str(error.value))
    assert not (tmp_path / "ours.yaml").exists()


def test_options_that_the_file_answers_are_refused(invoke: Invoke, tmp_path: Path):
    """--model has no effect beside --from, and --from-processes none without it."""
    assert invoke("init", tmp_path / "a.yaml", "--from", EXAMPLES[0], "--model", "other")[0] == 2
    assert invoke("init", tmp_path / "a.yaml", "--from-processes", "2")[0] == 2
    assert not (tmp_path / "a.yaml").exists()


def test_every_key_that_is_written_says_where_it_comes_from(tmp_path: Path):
    """Behind each value stands their key, or the default it comes from."""
    converted(yaml.safe_load(EXAMPLES[0].read_text()), tmp_path)
    lines = (tmp_path / "ours.yaml").read_text().splitlines()

    assert all(" # " in line for line in lines if not line.startswith("#") and not line.rstrip().endswith(":"))


def test_what_our_keys_are_called_in_tables_is_in_the_schema():
    """A key of ours that a table or a rule names exists."""
    known = {key for key, _ in convert.rules(convert.RunConfig)}

    assert {our for peer in convert.PEERS for ours in peer.keys().values() for our in ours} - known <= {
        "train.trackers"
    }


@pytest.mark.parametrize("peer", convert.PEERS, ids=lambda peer: peer.name)
def test_a_key_of_theirs_in_a_config_of_ours_says_what_it_is_here(peer: Peer):
    """What an unknown key is answered with is what the converter makes of it."""
    for their, ours in peer.keys().items():
        if ours and their not in {key.split(".")[-1] for key in ours}:
            assert OTHER_NAMES[their] in ours


DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = sorted(DOCS.glob("from-*.md"))


def rows_of(page: str) -> list[tuple[set[str], set[str]]]:
    """Their keys and ours, of each row of the first table of a page."""
    lines = re.findall(r"^\| (`.*?) \| (.*?) \| .*\|$", page, re.MULTILINE)
    return [(set(re.findall("`([^`]+)`", theirs)), set(re.findall("`([^`]+)`", here))) for theirs, here in lines]


@pytest.mark.parametrize("peer", convert.PEERS, ids=lambda peer: peer.name)
def test_the_pages_of_programs_that_are_converted_say_what_the_converter_does(peer: Peer):
    """A row for each key that is taken over alone, one for each group that is read together; no others."""
    said = rows_of((DOCS.parent / peer.page).read_text(encoding="utf-8"))
    done = [({their}, {our}) for their, our in peer.same.items()]
    done += [(set(rule.keys), set(rule.ours)) for rule in peer.rules]

    assert sorted(map(str, map(sorted, (row[0] for row in said)))) == sorted(
        map(str, map(sorted, (row[0] for row in done)))
    )
    assert all(row in done for row in said)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_every_config_of_a_page_loads(page: Path, tmp_path: Path):
    """What stands there as a whole config is one, and every key of ours in the table exists."""
    blocks = re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for block in blocks:
        (tmp_path / "after.yaml").write_text(block)
        config_file.load(tmp_path / "after.yaml")
    known = {key for key, _ in convert.rules(convert.RunConfig)}
    named = {key for _, here in rows_of(page.read_text(encoding="utf-8")) for key in here}

    assert blocks
    assert {key for key in named if re.fullmatch(r"(model|lora|data|train|eval|save)\.[a-z_.]+", key)} <= known


@pytest.mark.parametrize("peer", convert.PEERS, ids=lambda peer: peer.name)
def test_before_becomes_after(peer: Peer, tmp_path: Path):
    """The example of a page, converted, is the config that stands behind it."""
    page = (DOCS.parent / peer.page).read_text(encoding="utf-8")
    (before, after) = (re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("text", "yaml"))
    assert before is not None
    assert after is not None
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text('{"identity": {"file_name": "identity.json"}}')
    (tmp_path / "theirs.yaml").write_text(before[1])
    (tmp_path / "after.yaml").write_text(after[1])
    convert.convert(tmp_path / "theirs.yaml", tmp_path / "ours.yaml")
    written = (tmp_path / "ours.yaml").read_text().replace(f"{tmp_path}/", "")
    (tmp_path / "ours.yaml").write_text(written)

    assert config_file.load(tmp_path / "ours.yaml") == config_file.load(tmp_path / "after.yaml")
