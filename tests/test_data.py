"""Rows of every format become conversations, and every wrong row is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import build_examples, data_reader, read_rows, write_rows

from lora_cli import data
from lora_cli.data_config import DataConfig
from lora_cli.data_file import DataFile
from lora_cli.data_reader import run_to_end
from lora_cli.errors import DataError

ANSWERED = {
    "messages": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Hello"},
    "prompt-completion": {"prompt": "Hi", "completion": " Hello"},
    "text": {"text": "Hello"},
}


@pytest.mark.parametrize("name", ANSWERED)
def test_a_format_is_recognised_by_its_content(tmp_path: Path, name: str):
    """No format has to be named, and only the answer is trained."""
    (row,) = read_rows(write_rows(tmp_path / "r.jsonl", [ANSWERED[name]]))

    assert [message.content.strip() for message in row.messages if message.trained] == ["Hello"]
    assert row.number == 1


def test_several_sources(tmp_path: Path):
    """A list of sources is read one after the other, each in its format."""
    sources = [
        {"path": write_rows(tmp_path / f"{name}.jsonl", [ANSWERED[name]]), "format": name}
        for name in ("text", "alpaca")
    ]
    config = DataConfig.model_validate({"train": sources, "validation": 0})

    sets = run_to_end(data_reader(config).sets(0))

    assert [corpus.templated for corpus in sets.train.corpora] == [False, True]


def test_roles_and_extras_are_kept(tmp_path: Path):
    """Tool turns and tool calls reach the template; only the assistant is trained."""
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
        {"role": "tool", "content": "t"},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ]
    (row,) = read_rows(write_rows(tmp_path / "r.jsonl", [{"messages": messages, "tools": [{"name": "f"}]}]))

    assert [m.trained for m in row.messages] == [False, False, True, False, True]
    assert (row.tools[0], row.messages[4].content) == ({"name": "f"}, "a")
    assert "tool_calls" in row.messages[2].extra


def test_json_csv_and_parquet(tmp_path: Path):
    """The same two rows out of every kind of file."""
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c, d", "completion": 'e "f"\ng'}]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    (tmp_path / "r.csv").write_text('\ufeffprompt,completion\na,b\n"c, d","e ""f""\ng"\n', encoding="utf-8")
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "r.parquet"))
    for name in ("r.json", "r.csv", "r.parquet"):
        found = [tuple(m.content for m in row.messages) for row in read_rows(str(tmp_path / name))]
        assert found == [("a", "b"), ("c, d", 'e "f"\ng')], name


def test_the_files_of_a_hub_data_set(tmp_path: Path):
    """Arrow files, as a hub data set leaves them in its cache, give their rows with their numbers."""
    import datasets

    source = write_rows(tmp_path / "r.jsonl", [ANSWERED["messages"], ANSWERED["messages"]])
    stored = datasets.load_dataset("json", data_files=source, split="train", cache_dir=str(tmp_path / "cache"))
    paths = tuple(Path(file["filename"]) for file in stored.cache_files)
    file = DataFile("somebody/rows[train]", paths, "arrow")
    found = [file.place(number) for block in file.blocks() for number, _ in block.rows()]
    (block,) = file.blocks()
    conversations, problems = data.Reader(file, "messages", {}, None, None).read(block)

    assert found == ["somebody/rows[train]: row 1", "somebody/rows[train]: row 2"]
    assert not problems
    assert [message.content for message in conversations[1].messages] == ["Hi", "Hello"]


def test_a_folder_is_all_its_files(tmp_path: Path):
    """Files of a folder are read in the order of their names; others are passed over."""
    for name in ("b", "a"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name}])
    (tmp_path / "README.md").write_text("not data")

    assert [row.messages[0].content for row in read_rows(str(tmp_path))] == ["a", "b"]


def test_all_wrong_rows_at_once(tmp_path: Path):
    """Two wrong rows are two problems."""
    rows = [{"text": "a"}, {"text": ""}, {"text": "b"}, {"text": 1}]
    with pytest.raises(DataError) as caught:
        read_rows(write_rows(tmp_path / "r.jsonl", rows))

    assert [int(p.split(":")[1]) for p in caught.value.problems] == [2, 4]


def test_what_damaged_files_and_odd_names_are(tmp_path: Path):
    """Each is an error about the input, not a bug: a damaged archive, dates out of range, deep nesting, odd paths."""
    import gzip

    import pyarrow
    import pyarrow.parquet

    packed = bytearray(gzip.compress(b'{"text": "a"}\n' * 500))
    packed[30:40] = b"0123456789"
    (tmp_path / "damaged.jsonl.gz").write_bytes(packed)
    days = pyarrow.array([2**31 - 1], pyarrow.int32()).cast(pyarrow.date32())
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "day": days}), tmp_path / "late.parquet")
    for name in ("damaged.jsonl.gz", "late.parquet"):
        with pytest.raises(DataError, match=f"{name}: this is not"):
            read_rows(str(tmp_path / name))
    for name in ("x" * 300 + ".jsonl", "~nobody-of-this-name/x.jsonl"):
        with pytest.raises(DataError, match="is no path here"):
            read_rows(name)
    deep: Any = "<|im_end|>"
    for _ in range(900):
        deep = [deep]
    row = {"messages": [{"role": "user", "content": "a", "more": deep}, {"role": "assistant", "content": "b"}]}
    with pytest.raises(DataError, match="is nested too deeply"):
        build_examples(write_rows(tmp_path / "deep.jsonl", [row]))


def read_split(seed: int = 0, **settings: Any) -> tuple[list[int], list[int]]:
    """The numbers of the training and the validation rows."""
    sets = run_to_end(data_reader(DataConfig(**settings)).sets(seed))
    held_out = [] if sets.validation is None else sets.validation.column("numbers").tolist()
    return sets.train.column("numbers").tolist(), held_out


def test_the_split_is_deterministic_and_whole(rows_file: str):
    """Shares and counts hold out the rows they say, the same for one seed, others for another."""
    for held_out, count in ((0.25, 10), (3, 3), (0, 0), (0.0, 0)):
        train, validation = read_split(train=rows_file, validation=held_out)
        assert (40 - count, count) == (len(train), len(validation))
        assert len({*train, *validation}) == 40
    first, again, other = (read_split(seed, train=rows_file, validation=10) for seed in (0, 0, 1))

    assert first == again
    assert first != other


def test_a_validation_file(tmp_path: Path, rows_file: str):
    """A file of its own is held out whole."""
    held_out = write_rows(tmp_path / "v.jsonl", [ANSWERED["text"]])
    train, validation = read_split(train=rows_file, validation=held_out)

    assert (len(train), len(validation)) == (40, 1)
