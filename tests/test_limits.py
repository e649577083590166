"""What is read from elsewhere keeps to limits of time, memory and size, whatever it asks for."""

import datetime
import json
import os
import resource
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import Invoke, build_examples, build_tokenizer, conversation, write_rows
from torture.bombs import CONFIGS, TEMPLATES

from lora_cli import adapter, chat_template, config_file, limits
from lora_cli.chat_template import ChatTemplate, Rendered
from lora_cli.conversation import Conversation, Message, RowError
from lora_cli.errors import AdapterError, ConfigError, DataError, ModelError, SurroundingsError
from lora_cli.limits import TemplateLimit
from lora_cli.parallel import Overdue, run_apart

ASKED = Conversation((Message("user", "a", False),), templated=True)


def render(source: str) -> Rendered:
    """A short conversation by a template, in a process of its own."""
    template = ChatTemplate(source, source, {}, datetime.date(2026, 1, 1), False)
    return template.render_apart(ASKED, 1, prompt=True)


@pytest.mark.parametrize("name", ["power", "loops"])
def test_a_template_that_hangs_is_ended(name: str, monkeypatch: pytest.MonkeyPatch):
    """In Python or in one operation in C, where no handler runs; called from a thread that may set no handler."""
    monkeypatch.setattr(limits, "SECONDS", 0.3)
    caught: list[BaseException] = []

    def call() -> None:
        try:
            render(TEMPLATES[name])
        except TemplateLimit as error:
            caught.append(error)

    thread = threading.Thread(target=call)
    began = time.monotonic()
    thread.start()
    thread.join()

    assert [str(error)[:30] for error in caught] == ["The chat template takes more t"]
    assert time.monotonic() - began < 20


def test_a_template_that_asks_for_memory_is_ended_and_this_process_is_not_limited():
    """What its process may take was never taken from this one."""
    before, largest = resource.getrlimit(resource.RLIMIT_AS), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(TemplateLimit, match="more than 1024 MiB of memory"):
        render(TEMPLATES["repeat"])

    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - largest < 64 << 10


def test_a_template_may_not_blow_up_a_row():
    """What a row becomes is bounded by its own size; so is the template's text."""
    assert len(render("{{ 'a' * 60000 }}").text) == 60_000
    with pytest.raises(TemplateLimit, match="makes 70,000 characters of this"):
        render("{{ 'a' * 70000 }}")
    tokenizer: Any = build_tokenizer()
    tokenizer.chat_template = "a" * (chat_template.SOURCE + 1)
    with pytest.raises(ModelError, match="The chat template has 1,048,577 characters"):
        chat_template.choose(None, tokenizer, "2026-01-01", False)


def test_one_operation_in_c_is_ended_by_the_kernel(monkeypatch: pytest.MonkeyPatch):
    """Where no handler runs, the process is killed by its timer, and that is told from other ends."""
    monkeypatch.setattr(limits, "SECONDS", 0.25)

    def go() -> str:
        with limits.limited():
            limits.begin_rendering()
            return ("é" * 3 * 10**8).translate({})

    with pytest.raises(Overdue):
        run_apart(go)


def test_the_row_at_which_a_template_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """When the kernel had to end its process: the place of the row, not of its block."""
    monkeypatch.setattr(limits, "SECONDS", 0.25)
    source = tmp_path / "bomb.jinja"
    hangs = (
        "{% if 'number 7' in messages[0].content %}"
        + "{{ (messages[0].role * 7 * 10**7 ~ 'é').translate({}) }}"
        + "{% endif %}"
    )
    source.write_text(hangs + chat_template.NAMED["chatml"])
    rows = write_rows(tmp_path / "rows.jsonl", [conversation(number) for number in range(12)])
    with pytest.raises(DataError, match=r"rows\.jsonl:8: The chat template takes more than"):
        build_examples(rows, chat_template=str(source))


def test_what_runs_apart_gives_back_what_it_would_here():
    """Its result, its error with its text, or that it was killed."""
    assert run_apart(lambda: render("{{ messages[0].content }}")) == Rendered("a", ())
    with pytest.raises(RowError, match="is refused by the chat template: no"):
        render("{{ raise_exception('no') }}")
    with pytest.raises(SurroundingsError, match="was killed"):
        run_apart(lambda: os.kill(os.getpid(), 9))


# --- configs ---


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_asks_for_more_is_refused(name: str, tmp_path: Path):
    """Bombs of aliases, merges, depth, nodes, digits and size, and tags that would make objects: in no time."""
    path = tmp_path / "config.yaml"
    path.write_text(CONFIGS[name].replace("CANARY", str(tmp_path / "canary")))
    began = time.process_time()
    with pytest.raises(ConfigError):
        config_file.load(path)

    assert time.process_time() - began < 10
    assert not (tmp_path / "canary").exists()


def test_a_config_names_no_variable(make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch):
    """What other tools would fill in from the environment stays the text it is."""
    monkeypatch.setenv("PLACE", "elsewhere")
    for text in ("{{ env.PLACE }}", "%PLACE%"):
        assert config_file.load(make_config(output_dir=text)).output_dir == text
    for text in ("${PLACE}", "$PLACE", "${oc.env:PLACE}"):
        with pytest.raises(ConfigError, match="a config reads no variables of the environment"):
            config_file.load(make_config(output_dir=text))


def test_digits_in_an_override_are_refused(make_config: Callable[..., Path]):
    """As in the file: a sentence, not a bug."""
    with pytest.raises(ConfigError, match="a number of 5000 digits, at most 1000 are read"):
        config_file.load(make_config(), [f"seed={'9' * 5000}"])


# --- adapters ---


def write_header(folder: Path, header: bytes, body: bytes = b"", length: int | None = None) -> None:
    """An adapter's folder whose tensors' file begins with a header of any kind."""
    (folder / adapter.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    raw = (len(header) if length is None else length).to_bytes(8, "little") + header + body
    (folder / adapter.WEIGHTS).write_bytes(raw)


def entry(dtype: str, shape: list[int], begin: int, end: int) -> bytes:
    """A header of one tensor."""
    named = {"base_model.model.a.lora_A.weight": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}
    return json.dumps(named).encode()


@pytest.mark.parametrize(
    ("header", "body", "length"),
    [
        (b"{}", b"", 1 << 62), (b"{}", b"", (32 << 20) + 1), (b"", b"", None), (b"{", b"", None), (b"[1]", b"", None),
        (b'{"a": 3}', b"", None), (b"[" * 100_000, b"", None), (b"\x80\x04", b"", None),
        (entry("F32", [1 << 40, 1 << 20], 0, 1 << 62), b"\0" * 8, None), (entry("F32", [2], 0, 8), b"\0" * 4, None),
        (entry("F32", [2], 0, 8), b"\0" * 16, None), (entry("F32", [2], 8, 16), b"\0" * 16, None),
        (entry("F32", [4], 0, 8), b"\0" * 8, None), (entry("I64", [1], 0, 8), b"\0" * 8, None),
        (entry("F8_E4M3", [8], 0, 8), b"\0" * 8, None), (entry("OBJECT", [1], 0, 8), b"\0" * 8, None),
    ],
)  # fmt: skip
def test_an_adapters_file_is_checked_before_it_is_read(header: bytes, body: bytes, length: int | None, tmp_path: Path):
    """Lengths that are none, holes, tensors beyond the end, dtypes of no adapter: an error, and no memory taken."""
    write_header(tmp_path, header, body, length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AdapterError):
        adapter.read(tmp_path)

    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def test_too_many_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By their number, before one of them is read."""
    monkeypatch.setattr(adapter, "_MOST_TENSORS", 3)
    write_header(tmp_path, b"{}")
    safetensors.torch.save_file({str(n): torch.zeros(1) for n in range(4)}, tmp_path / adapter.WEIGHTS)
    with pytest.raises(AdapterError, match="holds 4 tensors; an adapter has at most 3 tensors"):
        adapter.read(tmp_path)


# --- other users of the machine ---


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_modes_that_the_user_asks_for(
    invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path, mask: int, mode: int
):
    """Those of the umask, in a run and an export: neither the private ones of temporary files, nor wider ones."""
    before = os.umask(mask)
    try:
        assert invoke("train", make_config(**{"train.max_steps": 1}))[0] == 0
        assert invoke("export", tmp_path / "run", "--output", tmp_path / "exported")[0] == 0
    finally:
        os.umask(before)
    files = [path for name in ("run", "exported") for path in (tmp_path / name).rglob("*") if path.is_file()]

    assert len(files) > 10
    assert {oct(stat.S_IMODE(path.stat().st_mode)) for path in files} == {oct(mode)}


def test_a_run_that_all_may_write_to_is_warned_of(invoke: Invoke, make_config: Callable[..., Path], tmp_path: Path):
    """Another user could change it; said once, and nothing is said of others."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run").chmod(0o777)
    _, _, err = invoke("train", make_config(**{"train.max_steps": 1}))
    (tmp_path / "other").mkdir(mode=0o755)
    _, _, other = invoke("train", make_config(**{"train.max_steps": 1, "output_dir": str(tmp_path / "other")}))

    assert (err.count("every user of this machine may write here"), "every user" in other) == (1, False)
