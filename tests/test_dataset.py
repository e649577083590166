"""Sets are split honestly, mixed as the config says, and made the same way however they are made."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import build_examples, build_tokenizer, conversation, data_reader, write_rows

from lora_cli import corpus, data, dataset, parallel
from lora_cli.batches import Mixture, Part
from lora_cli.data_config import DataConfig
from lora_cli.data_reader import run_to_end


def rows(count: int, name: str) -> list[Any]:
    """Plain rows whose texts say where they come from."""
    return [
        {"prompt": f"{name} {number}", "completion": f" is {number}." + " again" * (number % 5)}
        for number in range(count)
    ]


# --- mixing ---


def test_a_weight_is_how_often_an_epoch_sees_a_row():
    """2 sees each twice; 0.5 sees half of them, and the other half in the next epoch; the count never changes."""
    mixture = Mixture((Part(0, 10, 2.0), Part(10, 8, 0.5), Part(18, 3)))
    epochs = [Counter(mixture.draw(seed=0, epoch=epoch)) for epoch in range(4)]

    assert {sum(epoch.values()) for epoch in epochs} == {mixture.drawn} == {27}
    for epoch in epochs:
        assert [epoch[index] for index in range(10)] == [2] * 10
        assert sum(epoch[index] for index in range(10, 18)) == 4
        assert [epoch[index] for index in range(18, 21)] == [1] * 3
    assert {i for i in range(10, 18) if epochs[0][i]} | {i for i in range(10, 18) if epochs[1][i]} == set(range(10, 18))
    assert epochs[0] == epochs[2]
    assert mixture.draw(0, 1) == mixture.draw(0, 1)


def test_weights_come_from_the_config(tmp_path: Path):
    """Each file has the weight of its source; a source may be a bare path in the list."""
    sources = [
        {"path": write_rows(tmp_path / "a.jsonl", rows(10, "a")), "weight": 3},
        write_rows(tmp_path / "b.jsonl", rows(7, "b")),
    ]
    config = DataConfig.model_validate({"train": sources, "validation": 0})
    sets = run_to_end(data_reader(config).sets(0))

    assert [(part.count, part.times) for part in dataset.mix(sets.train, sets.weights, None, 0).mixture.parts] == [
        (10, 3),
        (7, 1),
    ]


@pytest.mark.parametrize("ratio", [0.05, 0.3])
def test_replay_is_its_share_of_all_tokens(tmp_path: Path, ratio: float):
    """General data makes up the asked share of an epoch's tokens, to a row's length."""
    train, _ = build_examples(write_rows(tmp_path / "a.jsonl", rows(200, "task")))
    replay, _ = build_examples(write_rows(tmp_path / "b.jsonl", [{"text": "The sky is blue. " * 3}] * 20))
    mixed = dataset.mix(train, [(1.0, 1)], replay, ratio)
    drawn = mixed.mixture.draw(seed=0, epoch=0)
    lengths = mixed.examples.lengths
    general = sum(int(lengths[index]) for index in drawn if index >= len(train))
    total = sum(int(lengths[index]) for index in drawn)

    assert abs(general - ratio * total) <= lengths.max()
    assert mixed.examples[len(train)] == replay[0]


# --- making ---


def made(path: str, config: DataConfig) -> tuple[dataset.Dataset, str]:
    """The data of a file, and the hash of it."""
    found, _ = run_to_end(data_reader(config).held_out(config.source(config.sources[0])))
    return found, found.fingerprint()


@pytest.fixture
def keep_everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the tokens of small files too, in a folder of this test."""
    monkeypatch.setattr(corpus, "SMALL", 0)
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))


def test_processes_and_keeping_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In memory, in two processes, and read back from the disk: the same sequences in the same order."""
    monkeypatch.setattr("lora_cli.data_file.BLOCK_BYTES", 2000)
    monkeypatch.setenv("LORA_CACHE", str(tmp_path / "cache"))
    path = write_rows(tmp_path / "r.jsonl", [conversation(number) for number in range(300)])
    config = DataConfig(train=path)
    alone, first = made(path, config)
    monkeypatch.setattr(corpus, "SMALL", 0)
    monkeypatch.setattr(corpus, "usable_processors", lambda: 2)
    together, second = made(path, config)
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1
    kept, third = made(path, config)

    assert first == second == third
    assert list(alone) == list(together) == list(kept)
    assert [example.where.rsplit(":", 1)[1] for example in kept] == [str(number) for number in range(1, 301)]


@pytest.mark.usefixtures("keep_everything")
def test_kept_tokens_are_found_by_content(tmp_path: Path):
    """A moved file finds its tokens; another length or split does too; other content or settings make new ones."""
    content = [conversation(number) for number in range(20)]
    path = write_rows(tmp_path / "r.jsonl", content)
    folder = corpus.cache_folder()
    made(path, DataConfig(train=path))
    moved = write_rows(tmp_path / "moved.jsonl", content)
    found, _ = made(moved, DataConfig(train=moved, max_length=512))
    assert len(list(folder.iterdir())) == 1
    assert found.place(0) == f"{moved}:1"

    for number, change in enumerate(
        [{"chat_template": "zephyr"}, {"merge_system": True}, {"allow_control_tokens": True}], start=2
    ):
        made(path, DataConfig(train=path, **change))
        assert len(list(folder.iterdir())) == number
    made(path, DataConfig(train=write_rows(tmp_path / "r.jsonl", content[:-1])))
    assert len(list(folder.iterdir())) == 5


@pytest.mark.usefixtures("keep_everything")
def test_nothing_is_kept_of_a_wrong_file(tmp_path: Path):
    """A wrong row in the last line leaves no tokens behind."""
    path = write_rows(tmp_path / "r.jsonl", [*(conversation(number) for number in range(20)), {"messages": []}])
    with pytest.raises(data.DataError, match=r"r\.jsonl:21: this row has no messages"):
        made(path, DataConfig(train=path))

    assert list(corpus.cache_folder().iterdir()) == []


def test_results_come_in_order_and_errors_come_through():
    """Whatever finishes first, results come in the order of the items; an exception of a worker is raised here."""
    assert list(parallel.ordered_map(_slow_first, range(7), processes=2)) == [0, 1, 4, 9, 16, 25, 36]
    with pytest.raises(ZeroDivisionError):
        list(parallel.ordered_map(_invert, [1, 0], processes=2))


def _slow_first(number: int) -> int:
    if number == 0:
        import time

        time.sleep(0.2)
    return number * number


def _invert(number: int) -> float:
    return 1 / number


# --- sources and columns ---


def test_compressed_files_and_globs(tmp_path: Path):
    """gz and zst are read as they are; a glob takes all that match, in the order of their names."""
    import gzip

    import pyarrow

    lines = "".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(3)).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    with pyarrow.CompressedOutputStream(str(tmp_path / "b.jsonl.zst"), "zstd") as file:
        file.write(lines)
    found, counts = build_examples(str(tmp_path / "*.jsonl.*"))

    assert [source.name.rsplit("/", 1)[1] for source in counts.sources] == ["a.jsonl.gz", "b.jsonl.zst"]
    assert [example.where.rsplit("/", 1)[1] for example in found] == [
        f"{name}:{number}" for name in ("a.jsonl.gz", "b.jsonl.zst") for number in (1, 2, 3)
    ]


def test_other_columns(tmp_path: Path):
    """`fields` finds a format's keys in other columns, `prompt_template` makes the prompt out of several."""
    path = write_rows(tmp_path / "r.jsonl", [{"question": "Why?", "hint": "sky", "answer": " Because {blue}."}])
    renamed, _ = build_examples(path, fields={"prompt": "question", "completion": "answer"})
    made_up, _ = build_examples(path, fields={"completion": "answer"}, prompt_template="Q: {question} {{{hint}}}\nA:")
    tokenizer = build_tokenizer()

    assert tokenizer.decode(renamed[0].input_ids) == "Why? Because {blue}.<|im_end|>"
    assert tokenizer.decode(made_up[0].input_ids) == "Q: Why? {sky}\nA: Because {blue}.<|im_end|>"


# --- the split ---


def test_variants_of_a_row_stay_together(tmp_path: Path, split_rows: Callable[..., tuple[list[Any], list[Any]]]):
    """With `split_by` a field, no value of it stands on both sides."""
    content = [{**row, "topic": f"t{number % 9}"} for number, row in enumerate(rows(60, "x"))]
    path = write_rows(tmp_path / "r.jsonl", content)
    train, validation = split_rows(train=path, validation=0.2, split_by="topic")
    sides = [{(int(number) - 1) % 9 for number in side} for side in (train, validation)]

    assert len(train) + len(validation) == 60
    assert validation
    assert not sides[0] & sides[1]


def test_rows_with_the_same_prompt_stay_together(
    tmp_path: Path, split_rows: Callable[..., tuple[list[Any], list[Any]]]
):
    """Several answers to a prompt are all trained or all held out, without being told so."""
    content = [{"prompt": f"Name {number // 3}", "completion": f" {number}"} for number in range(60)]
    train, validation = split_rows(train=write_rows(tmp_path / "r.jsonl", content), validation=12)

    assert len(validation) == 12
    assert not {(number - 1) // 3 for number in train} & {(number - 1) // 3 for number in validation}


@pytest.fixture
def split_rows() -> Callable[..., tuple[list[Any], list[Any]]]:
    """Return a function that gives the numbers of the training and the validation rows of a config."""

    def split(**settings: Any) -> tuple[list[Any], list[Any]]:
        sets = run_to_end(data_reader(DataConfig(**settings)).sets(0))
        assert sets.validation is not None
        return tuple(np.unique(each.column("numbers")).tolist() for each in (sets.train, sets.validation))

    return split
