"""What README and docs/ show is what happens: configs load, Python runs, commands run or at least are understood.

Every fenced block has a language that says what is done with it here: `yaml` is loaded, `python` run, of `bash` the
`lora` lines run in a folder with a tiny model, other lines are read as the program they start would; `text` is what a
program prints or a folder looks like. Commands inside sentences are read too. What is none of these fails.
"""

import ast
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from command_lines import lines_of, read, words_of
from conftest import Invoke, conversation, write_rows

from lora_cli import config_file, strict_yaml
from lora_cli.interrupt import StopRequest
from lora_cli.train import train

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

TRAINS_FIRST = {"docs/tutorial.md"}  # documents that train runs/first themselves

# Commands that are only read, by a pattern in them, and why.
ONLY_READ = {
    "--one-at-a-time": "many runs; tests/test_sensitivity.py does it",
    "--against-full": "two processes; tests/test_against_full.py does it",
    "--nproc": "other processes; tests/test_launcher.py and tests/test_distributed.py do it",
    "configs/": "a config of the repository, whose model is not here; tests/test_recipes.py loads them",
    r"lora chat (?!.*--prompt)": "asks whoever sits there",
    "lora serve": "serves until it is stopped",
}
# Lines that are not ours to run, by how they begin, and why.
OF_OTHERS = {
    "pip install": "the package index",
    "head=$(scontrol": "SLURM's",
}
NOT_INSTALLED = {"ray"}  # what Python blocks may import that is not here: they are compiled, not run


class Block(NamedTuple):
    """A fenced block, and where it begins."""

    place: str
    language: str
    text: str


def blocks_of(path: Path) -> list[Block]:
    """The fenced blocks of a document."""
    text = path.read_text(encoding="utf-8")
    return [
        Block(f"{path.relative_to(ROOT)}:{text[: match.start()].count(chr(10)) + 1}", match[1], match[2])
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    ]


def prose_of(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors_of(path: Path) -> set[str]:
    """What links to a document's headings end with, as GitHub makes it: "What `eval` does" -> what-eval-does."""
    heads = re.findall(r"^#+ (.*)$", prose_of(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def wrong_links(path: Path, text: str) -> Iterator[str]:
    """The relative links in a text of a document that lead to no file, or to no heading of it."""
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", link):
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            if not target.exists() or (anchor and anchor not in anchors_of(target)):
                yield target.relative_to(ROOT).as_posix() + ("#" + anchor if anchor else "")


def commands_in_sentences(path: Path) -> Iterator[str]:
    """The commands that stand in backquotes outside of blocks."""
    for match in re.finditer(r"`([^`]{1,300})`", prose_of(path)):
        line = " ".join(match[1].split())
        if re.match(r"(lora [a-z]|torchrun |python scripts/|scripts/)", line):
            yield line


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], str]) -> Path:
    """A folder with what documents speak of: rows, a config, a finished run, two adapters."""
    folder = tmp_path_factory.mktemp("documents")
    for name, first, count in (("train", 0, 24), ("heldout", 100, 6)):
        write_rows(folder / f"{name}.jsonl", [conversation(number) for number in range(first, first + count)])
    config = {
        "model": model_folder("llama"),
        "data": {"train": "train.jsonl", "validation": 8},
        "train": {"batch_size": 4, "max_steps": 6, "learning_rate": 0.01},
        "eval": {"general_tokens": 256, "per_epoch": 1},
        "output_dir": "runs/first",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        loaded = config_file.from_values(config)
        (folder / "config.yaml").write_text(config_file.dump(loaded))
        list(train(loaded, StopRequest()))
    for name in "ab":
        shutil.copytree(folder / "runs" / "first" / "adapter", folder / name)
    return folder


@pytest.fixture
def folder(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, to work in."""
    shutil.copytree(prepared, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def run_line(words: list[str], invoke: Invoke, folder: Path) -> None:
    """Run a lora command in the folder; what it is to write is not there yet."""
    if "--output" in words:
        shutil.rmtree(folder / words[words.index("--output") + 1], ignore_errors=True)
    code, _, err = invoke(*words[1:])
    assert code == 0, err


def do_bash(block: Block, invoke: Invoke, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Run or read each line of a block; count which."""
    done: Counter[str] = Counter()
    for line in lines_of(block.text):
        if line.startswith(tuple(OF_OTHERS)):
            done["of others"] += 1
            continue
        words = words_of(line)
        read(words, monkeypatch, whole=True)
        if words[0] == "lora" and not any(re.search(rf"(^| ){part}", " ".join(words)) for part in ONLY_READ):
            run_line(words, invoke, folder)
            done["run"] += 1
        else:
            require_config(words)
            done["read"] += 1
    return done


def require_config(words: list[str]) -> None:
    """Where a command that is only read names a config of the repository: it loads, with the overrides behind it."""
    for word in words:
        if word.startswith("configs/"):
            overrides = [other for other in words if re.match(r"[a-z_.]+=", other)]
            config_file.load(ROOT / word, overrides)


def do_yaml(block: Block, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Load a config, alone where it is whole, else on the shortest one; of other programs' read our command in it."""
    if "torchrun" not in block.text:
        values = strict_yaml.parse(block.text, block.place).values
        shortest = {"model": HUB_MODEL, "data": {"train": "train.jsonl"}, "output_dir": "runs/first"}
        data = {"data": shortest["data"] | values["data"]} if "data" in values else {}  # type: ignore[operator]
        whole = values.keys() >= shortest.keys()
        config_file.from_values(values if whole else shortest | values | data)
        return Counter(["whole config" if whole else "part of a config"])
    (line,) = re.findall(r"torchrun .*", " ".join(block.text.replace("\\\n", " ").split()))
    read(words_of(line), monkeypatch, whole=True)
    return Counter(["read"])


def do_python(block: Block, names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Run a block with what those before it defined."""
    tree = ast.parse(block.text)
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    if imported & NOT_INSTALLED:
        for node in ast.walk(tree):
            text = "".join(str(getattr(part, "value", 1)) for part in getattr(node, "values", []))
            if text.startswith("torchrun"):
                read(words_of(re.sub(r"<[^>]*>", "1", text)), monkeypatch, whole=True)
        return Counter(["read"])
    exec(compile(block.text, block.place, "exec"), names)
    return Counter(["run"])


def do(
    block: Block, names: dict[str, Any], folder: Path, model: str, invoke: Invoke, monkeypatch: pytest.MonkeyPatch
) -> Counter[str]:
    """Do with a block what its language says, a model in the place of the hub's; count what was done."""
    block = block._replace(text=block.text.replace(HUB_MODEL, model))
    match block.language:
        case "yaml":
            return do_yaml(block, monkeypatch)
        case "python":
            return do_python(block, names, monkeypatch)
        case "bash" | "sh":
            return do_bash(block, invoke, folder, monkeypatch)
        case "text":
            return Counter(["shown"])
    raise ValueError(f"a block of the language {block.language or '(none)'}; say which it is")


@pytest.mark.parametrize("document", IDS)
def test_what_a_document_shows_works(
    document: str, folder: Path, invoke: Invoke, model_folder: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
):
    """Its blocks in their order, in one folder."""
    names: dict[str, Any] = {"__name__": "document"}
    if document in TRAINS_FIRST:
        shutil.rmtree(folder / "runs")
    for block in blocks_of(ROOT / document):
        try:
            assert do(block, names, folder, model_folder("llama"), invoke, monkeypatch).total()
        except BaseException as error:
            error.add_note(f"in the block at {block.place}")
            raise


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("bash", "lora trian config.yaml"),
        ("bash", "lora train config.yaml --fast"),
        ("bash", "lora train config.yaml lora.rnak=4"),
        ("bash", "lora chat runs/second --prompt Hello"),
        ("bash", "lora tune configs/quickstart.yaml --one-at-a-time tune.bugdet=0.1"),
        ("bash", "torchrun --nproc-per-mode 2 -m lora_cli train CONFIG"),
        ("bash", "python scripts/bench_tune.py OUT CONFIG --sedes 5"),
        ("bash", "scripts/quickstarts"),
        ("bash", "# nothing is typed here"),
        ("yaml", "lora:\n  rnak: 4\n"),
        ("python", "from lora_cli import api\napi.trian()"),
        ("", "lora train config.yaml"),
    ],
)
def test_what_does_not_work_is_found(
    language: str,
    text: str,
    folder: Path,
    invoke: Invoke,
    model_folder: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
):
    """A slip of the pen in each kind of block, and a block of no kind."""

    def works() -> bool:
        done = do(Block("here:1", language, text), {}, folder, model_folder("llama"), invoke, monkeypatch)
        return bool(done.total())

    with pytest.raises((Exception, SystemExit)):
        assert works()


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_commands_in_sentences_are_understood(path: Path, monkeypatch: pytest.MonkeyPatch):
    """Commands and options that a sentence names are there."""
    monkeypatch.chdir(ROOT)
    for line in commands_in_sentences(path):
        try:
            read(words_of(line), monkeypatch, whole=False)
        except BaseException as error:
            error.add_note(f"{path.relative_to(ROOT)}: {line}")
            raise


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_links_lead_somewhere(path: Path):
    """Each relative link is to a file that is here, and to a heading in it."""
    assert list(wrong_links(path, prose_of(path))) == []


def test_a_wrong_link_is_found():
    """A file that is not there, a heading that is not in it, one that is not in the document itself."""
    text = "[a](nothing.md) [b](data.md#nothing) [c](#nothing) [d](data.md) [e](json.md#lora-init) [f](https://a.b/c)"
    expected = ["docs/nothing.md", "docs/data.md#nothing", "docs/python.md#nothing"]
    assert list(wrong_links(ROOT / "docs" / "python.md", text)) == expected


def test_no_block_is_missed():
    """Every line that opens or closes a block belongs to one that was found, and all kinds are there."""
    found = Counter(block.language for path in DOCUMENTS for block in blocks_of(path))
    fences = sum(
        len(re.findall(r"^\s*(```|~~~)", path.read_text(encoding="utf-8"), re.MULTILINE)) for path in DOCUMENTS
    )

    assert fences == 2 * found.total()
    assert min(found[kind] for kind in ("yaml", "python", "text")) >= 5
    assert found["bash"] + found["sh"] >= 5
