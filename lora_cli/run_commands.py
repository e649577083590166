"""The commands that read a result: eval, scale, merge, export, report. What is slow to import is imported inside."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from lora_cli import arguments, console, figures, launch, results
from lora_cli.arguments import Base, General, HeldOutRows, Json, Processes, Push, Quiet, Run
from lora_cli.completion import runs as runs_begun
from lora_cli.completion import words
from lora_cli.errors import InputError
from lora_cli.records import as_json
from lora_cli.redact import redacted

# The command of the program that loads each export, as its own documentation has it; the base's place is the user's.
_LOADED_BY: dict[str, list[str]] = {
    "peft": ["vllm", "serve", "BASE", "--enable-lora", "--lora-modules", "tuned={}"],
    "gguf": ["llama-server", "-m", "{}"],
    "gguf-lora": ["llama-server", "-m", "BASE.gguf", "--lora", "{}"],
    "ollama": ["ollama", "create", "tuned", "-f", "{}/Modelfile"],
    "mlx": ["mlx_lm.generate", "--model", "BASE", "--adapter-path", "{}", "--prompt", "..."],
}


def _begin(text: str, quiet: bool) -> None:
    """Say on stderr what is about to take a while."""
    if launch.is_main() and not quiet:
        console.message(text)


def evaluate(
    run: Run,
    data: HeldOutRows = None,
    base: Base = None,
    answers: Annotated[int, typer.Option(min=0, help="At most so many rows are answered by generation.")] = 200,
    metric: Annotated[
        list[str],
        typer.Option(
            help="exact-match | json | rouge-l | bleu | chrf | label; may be given several times.",
            autocompletion=words("exact-match", "json", "rouge-l", "bleu", "chrf", "label"),
        ),
    ] = ["exact-match"],  # noqa: B006 - typer copies it
    extract: Annotated[
        str | None,
        typer.Option(help="Exact match compares only this: last-number, or a regular expression.", show_default=False),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0, help="0 answers greedily; else drawn with --seed.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of drawn answers.")] = 0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Of an answer; else as long as those expected.", show_default=False)
    ] = None,
    general: General = None,
    scan: Annotated[bool, typer.Option("--scan", help="Also at other strengths of the adapter.")] = False,
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval tasks: names or YAML files, with commas.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Documents of each task.", show_default=False)] = None,
    nproc: Processes = 1,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure base and adapter side by side on held-out data."""
    if launch.is_to_start(nproc):
        from lora_cli import launcher

        launcher.launch(nproc)
    from lora_cli.compare import Asked, compare
    from lora_cli.generate import Sampling

    asked = Asked(
        data=data,
        base=base,
        answers=answers,
        metrics=metric,
        extract=extract,
        sampling=Sampling(temperature, seed),
        max_new_tokens=max_new_tokens,
        general=general,
        tasks=[name for name in (tasks or "").split(",") if name],
        limit=limit,
        scan=scan,
    )
    _begin(f"Measuring base and adapter of {run}.", quiet)
    report = compare(run, asked)
    if not launch.is_main():
        return
    if json:
        console.print_json(as_json(replace(report, samples=report.samples[:20])))
    else:
        figures.show_eval(report)
        merge = (["lora", "merge", run, "--output", f"{run}-merged"], "an ordinary Hugging Face model")
        whole = results.is_whole_model(report.adapter)
        console.show_next((["lora", "chat", run], "talk to it"), *([] if whole else [merge]))


def scale(
    run: Run,
    output: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    gain: Annotated[float | None, typer.Option(help="How strong: 1 as it is, 0.5 half.", show_default=False)] = None,
    budget: Annotated[
        float | None,
        typer.Option(min=0, help="As strong as forgets at most this: nats on general text.", show_default=False),
    ] = None,
    data: HeldOutRows = None,
    general: General = None,
    base: Base = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Write the adapter at another strength.

    It stands in lora_alpha, which any reader of PEFT adapters honours.
    """
    from lora_cli import scale as scaling

    _begin(f"Writing {run} at another strength.", quiet)
    report = scaling.scale(run, output, gain, budget, data, general, base)
    if json:
        console.print_json(as_json(report))
    else:
        figures.show_scale(report)
        console.show_next(
            (["lora", "eval", output, "--data", "FILE"], "beside the base, on held-out rows"),
            (["lora", "merge", output, "--output", f"{output}-merged"], "an ordinary Hugging Face model"),
        )


def merge(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...", help="Runs, checkpoints or PEFT adapters.", show_default=False, autocompletion=runs_begun
        ),
    ],
    output: Annotated[Path, typer.Option(help="The folder to write.", show_default=False)],
    dtype: Annotated[
        str,
        typer.Option(
            help="keep, float32, bfloat16 or float16: what is written.",
            autocompletion=words("keep", "float32", "bfloat16", "float16"),
        ),
    ] = "keep",
    rounding: Annotated[
        str,
        typer.Option(
            help="nearest, or stochastic: small updates are not lost.", autocompletion=words("nearest", "stochastic")
        ),
    ] = "nearest",
    onto: Annotated[
        str,
        typer.Option(
            help="stored, or dequantised: of a base that was trained quantised, which weights.",
            autocompletion=words("stored", "dequantised"),
        ),
    ] = "stored",
    weights: Annotated[
        str | None, typer.Option(metavar="W...", help="Of several adapters: 0.7 0.3; else 1 each.", show_default=False)
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="linear (the exact sum), ties or dare: how several are added.",
            autocompletion=words("linear", "ties", "dare"),
        ),
    ] = "linear",
    density: Annotated[
        float | None, typer.Option(help="Share of entries that ties (0.2) or dare (0.1) keeps.", show_default=False)
    ] = None,
    adapter: Annotated[bool, typer.Option("--adapter", help="Write one adapter, not a merged model.")] = False,
    speed: Annotated[bool, typer.Option("--speed", help="Time base, base + adapter and merged model.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write even what differs more than is allowed.")] = False,
    base: Base = None,
    push: Push = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Write base + adapter as an ordinary Hugging Face model, verified.

    Several adapters are added by weight, as one model or as one adapter.
    """
    from lora_cli import hub, merged_folder, update
    from lora_cli import merge as merging

    paths, numbers = arguments.paths_and_weights(runs, weights)
    form = merged_folder.Form(
        arguments.one_of("--dtype", dtype, merged_folder.Dtype),
        arguments.one_of("--rounding", rounding, merged_folder.Rounding),
        arguments.one_of("--onto", onto, merged_folder.Onto),
    )
    together = merging.Together(numbers, arguments.one_of("--method", method, update.Method), density)
    if push is not None:
        hub.require_pushable(push)
    _begin(f"Merging {', '.join(map(str, paths))}.", quiet)
    report = (
        merging.combine(paths, output, base, together)
        if adapter
        else merging.merge(paths, output, base, together, form, force, speed)
    )
    if push is not None:
        report = replace(report, pushed=hub.push(output, push))
    if json:
        console.print_json(as_json(report))
        return
    figures.show_merge(report)
    if report.pushed is not None:
        console.say(f"Pushed to {report.pushed}.")
    console.show_next(
        (["lora", "eval", output, "--data", "FILE"], "beside the base, on held-out rows")
        if adapter
        else (["vllm", "serve", output], "one of many that load it; README.md beside it has more")
    )


def export(
    run: Run,
    output: Annotated[
        Path, typer.Option(help="The folder to write; of gguf and gguf-lora the file.", show_default=False)
    ],
    format: Annotated[
        str,
        typer.Option(
            help="The adapter: peft (PEFT, vLLM, transformers), mlx (mlx-lm), gguf-lora (llama.cpp). Base + adapter: "
            "gguf (llama.cpp), ollama (with a Modelfile), onnx (a graph).",
            autocompletion=words("peft", "gguf", "gguf-lora", "ollama", "mlx", "onnx"),
        ),
    ] = "peft",
    gguf_type: Annotated[
        str,
        typer.Option(
            help="f32, f16, bf16 or q8_0: how a GGUF file stores matrices.",
            autocompletion=words("f32", "f16", "bf16", "q8_0"),
        ),
    ] = "f16",
    base: Base = None,
    push: Push = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Write what other runtimes load."""
    from lora_cli import export as exporting
    from lora_cli import hub
    from lora_cli.formats import gguf_file

    chosen: exporting.Format = arguments.one_of("--format", format, exporting.Format)
    kind: gguf_file.Kind = arguments.one_of("--gguf-type", gguf_type, gguf_file.Kind)
    if push is not None:
        if chosen in exporting.FILES:
            raise InputError(f"--push: sends folders, and {chosen} is one file: hf upload {push} {output}")
        hub.require_pushable(push)
    _begin(f"Exporting {run} as {chosen}.", quiet)
    report = exporting.export(run, chosen, output, kind, base)
    if push is not None:
        report = replace(report, pushed=hub.push(output, push))
    if json:
        console.print_json(as_json(report))
        return
    console.show_export(report)
    if report.pushed is not None:
        console.say(f"Pushed to {report.pushed}.")
    if chosen in _LOADED_BY:
        console.show_next(([word.format(output) for word in _LOADED_BY[chosen]], "runs it"))


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Run directories, or those of searches.", show_default=False),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="The HTML file; else RUN/report.html, of several ./report.html.", show_default=False),
    ] = None,
    metrics: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also all measurements as one table: .csv or .parquet.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Show runs and searches on one HTML page.

    What they gained and forgot, curves, config with origins, data, answers side by side, trials; several runs over
    each other.
    """
    from lora_cli import report as reporting

    made = reporting.report(runs, output, metrics)
    if json:
        console.print_json(redacted(as_json(made)))
        return
    console.say(f"Wrote {made.output}.")
    if made.metrics is not None:
        console.say(f"Wrote {made.metrics}.")
