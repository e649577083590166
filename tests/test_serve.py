"""An endpoint for clients of OpenAI's API, asked by the real client and by hostile ones."""

import http.client
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from conftest import Invoke, write_adapter
from processes import disturb, end, fork, lora
from safetensors.torch import load_file, save_file
from shapes import require_shape

from lora_cli import adapter, tuned
from lora_cli.chat import Chat
from lora_cli.chat_reports import ServeReport
from lora_cli.config import LoraConfig
from lora_cli.conversation import Message
from lora_cli.errors import AdapterError, SurroundingsError
from lora_cli.generate import GREEDY
from lora_cli.speaker import Manner, Speaker

ASKED: list[Any] = [{"role": "user", "content": "Name a colour."}]
KEY = "a-key-of-this-test"


def start(said: Path, *arguments: object) -> tuple[int, str]:
    """Start a server in a process of its own; return its number and its address."""
    process = fork(lambda: lora("serve", *arguments, "--port", 0, "--json"), said, LORA_TEST_KEY=KEY)
    limit = time.monotonic() + 30
    while time.monotonic() < limit:
        for line in said.read_text().splitlines() if said.exists() else ():
            if line.startswith("{"):
                return process, require_shape(ServeReport, line).url
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    raise TimeoutError(said.read_text())


@pytest.fixture(scope="module")
def adapters(undisturbed: Path, model_folder: Callable[[str], str], tmp_path_factory) -> tuple[Path, Path]:
    """A run, and another adapter of its base."""
    other = tmp_path_factory.mktemp("adapters") / "other"
    write_adapter(model_folder("llama"), other, LoraConfig(rank=4))
    return undisturbed, other


@pytest.fixture(scope="module")
def url(adapters: tuple[Path, Path], tmp_path_factory) -> Iterator[str]:
    """The address of a server of two adapters; at its end SIGTERM ends it."""
    process, address = start(tmp_path_factory.mktemp("serve") / "said", *adapters)
    yield address
    os.kill(process, signal.SIGTERM)
    assert end(process) == 128 + signal.SIGTERM


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as made:
        yield made


def ask(client: openai.OpenAI, model: str = "run", **more: Any) -> Any:
    return client.chat.completions.create(
        **{"model": model, "messages": ASKED, "max_tokens": 8, "temperature": 0, **more}
    )


def post(url: str, body: bytes, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, Any]:
    """Send a body as it is; return the status and what came back."""
    connection = http.client.HTTPConnection(url.removeprefix("http://").removesuffix("/v1"), timeout=30)
    connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
    reply = connection.getresponse()
    return reply.status, json.loads(reply.read())


def test_each_model_answers_by_its_name(client: openai.OpenAI, adapters: tuple[Path, Path]):
    """Two adapters and their base, on one base in memory, in turns: each says what chat says for it alone."""
    expected = {}
    for name, path in zip(("run", "other"), adapters, strict=True):
        chat = Chat(Speaker([tuned.find(path)], torch.device("cpu")), Manner(GREEDY, 8))
        expected[name] = "".join(chat.ask("Name a colour."))
        expected["base"] = "".join(chat.by_base())
    names = [model.id for model in client.models.list()]
    found = {name: [ask(client, name).choices[0].message.content for _ in range(2)] for name in [*names, *names[::-1]]}

    assert names == ["run", "other", "base"]
    assert found == {name: [text, text] for name, text in expected.items()}
    assert len(set(expected.values())) == 3


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI):
    """With its reason and, where it is asked for, its counts at the end."""
    whole = ask(client, max_tokens=20)
    chunks = list(ask(client, max_tokens=20, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 20
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_text_is_continued_up_to_a_stop(client: openai.OpenAI):
    """/v1/completions goes on from a text; a stop ends it and is left out."""
    settings: dict[str, Any] = {"model": "base", "prompt": "The sky is", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**settings).choices[0]
    stop = whole.text[len(whole.text) // 2 :][:2]
    cut = client.completions.create(**settings, stop=[stop]).choices[0]
    streamed = list(client.completions.create(**settings, stop=[stop], stream=True))

    assert cut.text == whole.text.split(stop)[0] == "".join(chunk.choices[0].text for chunk in streamed)
    assert (whole.finish_reason, cut.finish_reason) == ("length", "stop")


def test_the_same_seed_draws_the_same(client: openai.OpenAI):
    """Without a seed another answer is drawn."""
    same = {ask(client, temperature=1.5, seed=5, max_tokens=16).choices[0].message.content for _ in range(3)}
    others = {ask(client, temperature=1.5, max_tokens=16).choices[0].message.content for _ in range(4)}

    assert len(same) == 1
    assert len(others) > 1


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"model": "nope"}, "there is no nope; known: run, other, base"),
        ({"n": 2}, "n: is not supported here; leave it out, or give 1"),
        ({"n": True}, "n: is not supported"),
        ({"logprobs": True}, "logprobs: is not supported"),
        ({"presence_penalty": 0.5}, "presence_penalty: is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format: is not supported"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: is not supported"),
        ({"extra_body": {"temprature": 1}}, 'did you mean "temperature"'),
        ({"temperature": 3}, "temperature: must be from 0 to 2, found 3"),
        ({"top_p": 0}, "top_p: must be above 0"),
        ({"max_tokens": 0}, "max_tokens: must be 1 or more"),
        ({"max_tokens": 9000}, "2,048 positions"),
        ({"max_completion_tokens": 4}, "give one of them"),
        ({"stop": ["a", 1]}, "stop: must be text"),
        ({"stop": list("abcde")}, "at most 4"),
        ({"seed": "x"}, "seed: must be a whole number"),
        ({"stream_options": {"include_usage": True}}, "only where stream is true"),
        ({"messages": []}, "has no messages"),
        ({"messages": [{"role": "user"}]}, "must be text, found NoneType"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the last one must be of the role user"),
        ({"messages": [{"role": "usr", "content": "x"}]}, 'did you mean "user"'),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "must be text",
        ),
    ],
)
def test_what_is_not_supported_is_refused(client: openai.OpenAI, more: dict[str, Any], expected: str):
    """With an error as the API has it, and never left out silently."""
    with pytest.raises(openai.APIStatusError, match=expected) as caught:
        ask(client, **more)
    assert caught.value.status_code in (400, 404)
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        (b"", 400, "no JSON"),
        (b"{", 400, "no JSON"),
        (b"\xff\xfe", 400, "no JSON"),
        (b"[1]", 400, "must be a JSON object"),
        (b'{"model": 1, "messages": "x"}', 400, "model: must be text"),
        (b"[" * 100_000, 400, "no JSON"),
        (b'{"model": "run", "messages": [{"role": "user", "content": "\\ud800"}]}', 400, "half of a character"),
        (b'{"model": "run", "temperature": NaN, "messages": []}', 400, "no JSON"),
        (b" " * (5 << 20), 413, "more than 4 MiB"),
    ],
)
def test_hostile_bodies_are_answered(url: str, body: bytes, status: int, expected: str):
    """Each is an error, and the server goes on."""
    found, reply = post(url, body)

    assert (found, expected in reply["error"]["message"]) == (status, True)
    assert openai.OpenAI(base_url=url, api_key="x").models.list().data


def test_only_this_machine_and_json_come_in(url: str):
    """A web page reaches it neither by another name nor by a form, and other paths say what there is."""
    assert post(url, b"{}", Host="evil.example")[0] == 403
    assert post(url, b"{}", **{"Content-Type": "text/plain"})[0] == 415
    status, reply = post(url, b"{}", "/v1/embeddings")

    assert (status, "/v1/chat/completions" in reply["error"]["message"]) == (404, True)


def test_who_goes_away_stops_the_answer(client: openai.OpenAI):
    """A stream that is closed frees the model, and several clients at once are answered one after the other."""
    stream = ask(client, max_tokens=400, stream=True)
    next(iter(stream))
    began = time.monotonic()
    stream.close()
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(ask(client).choices[0].message.content or "")) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - began
    began = time.monotonic()
    ask(client, max_tokens=400)

    assert len(found) == 4
    assert len(set(found)) == 1
    assert seconds < 0.7 * (time.monotonic() - began)


def test_a_key_is_asked_for_and_ctrl_c_ends_an_answer(undisturbed: Path, tmp_path: Path):
    """Without the key nobody is answered; Ctrl-C in the middle of an answer ends the server, in seconds."""
    process, address = start(tmp_path / "said", undisturbed, "--api-key-env", "LORA_TEST_KEY")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=address, api_key="wrong", max_retries=0).models.list()
    client = openai.OpenAI(base_url=address, api_key=KEY, max_retries=0)
    next(iter(ask(client, max_tokens=400, stream=True)))
    os.kill(process, signal.SIGINT)

    assert end(process, 15) == 128 + signal.SIGINT
    assert "Traceback" not in (tmp_path / "said").read_text()
    assert KEY not in (tmp_path / "said").read_text()


def test_an_adapter_that_does_not_fit_is_refused_before_serving(adapters: tuple[Path, Path], tmp_path: Path):
    """It names the same base, and its layers are of other sizes."""
    run, other = adapters
    misfit = shutil.copytree(other, tmp_path / "misfit")
    tensors = load_file(misfit / adapter.WEIGHTS)
    wider = {name: torch.nn.functional.pad(t, (0, 1)) if "lora_A" in name else t for name, t in tensors.items()}
    save_file(wider, misfit / adapter.WEIGHTS)

    with pytest.raises(AdapterError, match="does not fit this base model"):
        Speaker([tuned.find(run), tuned.find(misfit)], torch.device("cpu"))


def test_what_fails_while_adapters_are_changed_is_not_answered_by_the_base(
    adapters: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
):
    """Memory that runs out takes the adapter away; the next answer of the same name is the one it was."""
    speaker = Speaker([tuned.find(path) for path in adapters], torch.device("cpu"))
    asked = [Message("user", "Name a colour.", False)]

    def said(voice: int, gain: float = 1.0) -> str:
        return "".join(speaker.answer(asked, Manner(GREEDY, 8, gain), voice).pieces())

    def run_out(_: object) -> None:
        raise MemoryError

    before = said(0)
    monkeypatch.setattr(adapter, "attach", adapter.attach)  # as it is again afterwards
    disturb(adapter, "attach", 1, run_out)
    with pytest.raises(SurroundingsError, match="memory ran out"):
        said(1)

    assert said(0) == before != said(0, 0.0)


def test_what_cannot_be_served_is_said_before_weights_are_read(
    invoke: Invoke, adapters: tuple[Path, Path], model_folder: Callable[[str], str], tmp_path: Path, url: str
):
    """A key that is not set, adapters of two bases, one name for two, a port that is taken."""
    write_adapter(model_folder("qwen2"), tmp_path / "foreign", LoraConfig(rank=2))
    run, _ = adapters
    taken = url.removesuffix("/v1").rpartition(":")[2]
    expected = {
        ("--api-key-env", "LORA_NO_KEY"): (2, "not set"),
        (tmp_path / "foreign", "--port", "0"): (2, "is for another base"),
        (run, "--port", "0"): (2, "needs a name of its own"),
        ("--port", taken): (3, "cannot be listened on"),
    }
    for more, (code, text) in expected.items():
        found, out, err = invoke("serve", run, *more)
        assert (found, out, text in err) == (code, "", True), err
