"""The commands that talk: chat, serve. What is slow to import is imported inside."""

import math
import os
import stat
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from lora_cli import arguments, console
from lora_cli.arguments import Base, Json, Run
from lora_cli.errors import InputError, one_line
from lora_cli.records import as_json

_Device = Literal["auto", "cpu", "cuda", "mps"]
_Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Device = Annotated[
    str | None, typer.Option(help="auto | cpu | cuda | mps; else as the run's config has it.", show_default=False)
]
Dtype = Annotated[
    str | None,
    typer.Option(help="auto | float32 | bfloat16 | float16: of the base; else the run's.", show_default=False),
]


def chat(
    run: Run,
    system: Annotated[
        str | None, typer.Option(help='The system message, "" for none; else that of the rows.', show_default=False)
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Ask this once and leave; - or a pipe: what stdin says.", show_default=False)
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0: the most likely token each time.")] = 0.7,
    top_p: Annotated[
        float, typer.Option(min=0, max=1, help="Draw among the fewest tokens that have this share.")
    ] = 0.95,
    top_k: Annotated[int, typer.Option(min=0, help="Draw among so many of the most likely tokens; 0: all.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The longest answer; else 512, or half the model.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same gives the same answers.")] = 0,
    gain: Annotated[float, typer.Option(help="How strong what was trained is: 1 as it is, 0 the base.")] = 1.0,
    think: Annotated[bool, typer.Option("--think", help="Ask for its reasoning first, as such rows train it.")] = False,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Talk to what was trained, and to its base."""
    question = _question(prompt)
    if question is None and json:
        raise InputError("--json: answers one question; give --prompt, or a question on stdin.")
    if not 0 < top_p <= 1:
        raise InputError("--top-p: must be above 0; --temperature 0 takes the most likely token.")
    for option, value in (("--temperature", temperature), ("--gain", gain)):
        if not math.isfinite(value):
            raise InputError(f"{option}: expected a finite number, found {value}.")
    require_known(device, dtype)
    from lora_cli import chat as chatting
    from lora_cli import conversation_view, tuned
    from lora_cli.distributed import current_world
    from lora_cli.generate import Sampling
    from lora_cli.speaker import Manner, Speaker

    result = tuned.find_any(run, base)
    speaker = Speaker([result], current_world(device or result.base.device).device, dtype)
    manner = Manner(Sampling(temperature, seed, top_p, top_k), max_new_tokens, gain, think=think)
    if system is None and (system := tuned.system_of(result)):
        console.message(f"The system message of the rows: {one_line(system)}")
    conversation = chatting.Chat(speaker, manner, system or "")
    if question is None:
        try:
            conversation_view.View(conversation, tuned.name_of(result)).run()
        except KeyboardInterrupt:
            raise typer.Exit(130) from None
        return
    if (ended_by := conversation_view.answer_once(conversation, question, result.folder, json)) is not None:
        raise typer.Exit(128 + ended_by)  # the one object says it already


def _question(prompt: str | None) -> str | None:
    """Return the question that is asked once: of the option, of stdin, or of both; None where a user sits there."""
    piped = _is_piped() or (prompt == "-")
    if prompt is None and not piped:
        if sys.stdin is None or not sys.stdin.isatty():
            raise InputError("There is no terminal to type at; give --prompt, or a question on stdin.")
        return None
    try:
        said = sys.stdin.buffer.read().decode() if piped else ""
    except UnicodeDecodeError as error:
        raise InputError(f"stdin: is not UTF-8 text (byte {error.start}).") from None
    parts = [part for part in (prompt if prompt != "-" else None, said.removesuffix("\n")) if part]
    if not parts:
        raise InputError("The question is empty; give --prompt TEXT, or a question on stdin.")
    return "\n".join(parts)


def _is_piped() -> bool:
    """Return whether stdin is a pipe or a file, which ends."""
    try:
        mode = os.fstat(0).st_mode
    except OSError:
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def require_known(device: str | None, dtype: str | None) -> None:
    """Raise InputError where a device or a dtype is none of those there are."""
    if device is not None:
        arguments.one_of("--device", device, _Device)
    if dtype is not None:
        arguments.one_of("--dtype", dtype, _Dtype)


def serve(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Runs, checkpoints or adapters of one base.", show_default=False),
    ],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = 8000,
    api_key_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The environment variable with the key to ask for.", show_default=False),
    ] = None,
    base: Base = None,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Answer clients of OpenAI's API, to try what was trained."""
    key = _key(api_key_env)
    require_known(device, dtype)
    from lora_cli import server, tuned
    from lora_cli.chat_reports import ServeReport
    from lora_cli.distributed import current_world
    from lora_cli.speaker import Speaker

    with server.listen(host, port) as listening:
        results = [tuned.find_any(run, base) for run in runs]
        names = _names([tuned.name_of(result) for result in results], runs, server.BASE)
        speaker = Speaker(results, current_world(device or results[0].base.device).device, dtype)
        local = host in ("127.0.0.1", "localhost", "::1")
        app = server.Server(speaker, names, key, local).app()
        shown_host = f"[{host}]" if ":" in host else host
        report = ServeReport(f"http://{shown_host}:{listening.getsockname()[1]}/v1", [*names, server.BASE])
        if not local and key is None:
            console.message(f"warning: whoever reaches {host} can use it; --api-key-env NAME asks for a key.")
        if json:
            console.print_json(as_json(report))
        else:
            console.print_text(f"{report.url} answers as {', '.join(report.models)}; Ctrl-C ends it.")
        for name, result in zip(names, results, strict=True):
            if system := tuned.system_of(result):
                console.message(f"{name} was trained with this system message, to be sent along: {one_line(system)}")
        server.serve(app, listening)


def _key(variable: str | None) -> str | None:
    """Return the key that an environment variable holds. Raises InputError where it holds none."""
    if variable is None:
        return None
    if not (key := os.environ.get(variable, "").strip()):
        raise InputError(f"--api-key-env {variable[:40]}: this environment variable is not set.")
    return key


def _names(names: list[str], runs: list[Path], taken: str) -> list[str]:
    """Return the name of each run: its short one, or its path where another has that too. Raises InputError."""
    several = {name for name in names if names.count(name) > 1} | {taken}
    found = [str(run) if name in several else name for name, run in zip(names, runs, strict=True)]
    if len(set(found)) < len(found) or taken in found:
        raise InputError(f"RUN: each needs a name of its own, and not {taken}; found {', '.join(found)[:200]}.")
    return found
