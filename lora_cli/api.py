"""The commands as functions: `from lora_cli import api as lora`. What is slow to import is imported inside.

They return the records that the commands print with --json, raise the errors that the commands explain, print nothing,
and leave signals alone. docs/python.md shows each.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from lora_cli import config_file, run_dir, tracking
from lora_cli import metrics as measured
from lora_cli.arguments import one_of
from lora_cli.config import RunConfig
from lora_cli.errors import (
    AdapterError,
    ConfigError,
    DataError,
    InputError,
    Interrupted,
    ModelError,
    SurroundingsError,
    TrainingStopped,
    UserError,
)
from lora_cli.interrupt import StopRequest
from lora_cli.records import (
    Estimate,
    Evaluated,
    Event,
    Finished,
    Forgetting,
    Notice,
    Preparing,
    Probed,
    Saved,
    Started,
    StepDone,
    TrialEnded,
    as_json,
    plain,
)
from lora_cli.reports import (
    CheckReport,
    CombineReport,
    Comparison,
    EvalReport,
    ExportReport,
    GgufReport,
    MergeReport,
    ScaleReport,
)
from lora_cli.run_dir import RunDir
from lora_cli.search_reports import AgainstFullReport, SensitivityReport, TuneReport
from lora_cli.strict_yaml import dump_inline

if TYPE_CHECKING:  # torch is imported only by what needs it
    from lora_cli.export import Format
    from lora_cli.formats.gguf_file import Kind
    from lora_cli.merged_folder import Dtype, Onto, Rounding
    from lora_cli.update import Method

__all__ = [  # noqa: RUF022 - functions first, in the order of docs/python.md
    "load_config", "check", "train", "iter_train", "tune", "one_at_a_time", "against_full", "metrics", "load",
    "evaluate", "scale", "merge", "combine", "export", "push", "as_json", "RunConfig", "StopRequest", "Event",
    "Preparing", "Probed", "TrialEnded", "Started", "StepDone", "Evaluated", "Saved", "Finished", "Notice",
    "CheckReport", "EvalReport", "Comparison", "Estimate", "Forgetting", "ScaleReport", "MergeReport",
    "CombineReport", "ExportReport", "GgufReport", "TuneReport", "SensitivityReport", "AgainstFullReport",
    "UserError", "InputError", "ConfigError", "DataError", "ModelError", "AdapterError", "SurroundingsError",
    "TrainingStopped", "Interrupted",
]  # fmt: skip

Place = str | PathLike[str]
OnEvent = Callable[[Event], object]
Result = TypeVar("Result")


# --- a config, and what is done with it ---


def load_config(config: Place | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Load a YAML file, or take its keys as a mapping; `overrides` are dotted keys and their values.

    Raises ConfigError with every problem and its place.
    """
    texts = [f"{key}={dump_inline(plain(value))}" for key, value in (overrides or {}).items()]
    if isinstance(config, Mapping):
        return config_file.from_values(config, texts)
    return config_file.load(Path(config), texts)


def check(config: RunConfig, row: str | None = None, nproc: int = 1, on_event: OnEvent | None = None) -> CheckReport:
    """Return what a run would do, without weights, device, or a file written."""
    from lora_cli import data

    data.require_readable(config.data, config.eval.general_source)
    from lora_cli import check as checking

    return _result_of(checking.check(config, row, nproc), on_event)


def iter_train(config: RunConfig, override: bool = False, stop: StopRequest | None = None) -> Iterator[Event]:
    """Train, or continue the interrupted run of the same config; iterate over what happens, `Finished` the last.

    Of a finished run that is all. Leaving the loop stops the run, which goes on from its last checkpoint; asking `stop`
    saves one first, and raises Interrupted.
    """
    from lora_cli import train as training

    ended = training.ended(config, override)
    if ended is not None:
        yield ended
        return
    tracking.require(config)
    yield from tracking.tracked(training.train(config, stop or StopRequest(), override), config)


def train(
    config: RunConfig, on_event: OnEvent | None = None, override: bool = False, stop: StopRequest | None = None
) -> Finished:
    """Train as `iter_train` does; hand every event to `on_event` and return the last."""
    last: Event | None = None
    for last in iter_train(config, override, stop):
        if on_event is not None:
            on_event(last)
    assert isinstance(last, Finished), "the loop ends with Finished or raises"
    return last


def tune(config: RunConfig, on_event: OnEvent | None = None, stop: StopRequest | None = None) -> TuneReport:
    """Search hyperparameters, or go on with a search."""
    from lora_cli import tune as tuning

    return _result_of(tuning.tune(config, stop or StopRequest()), on_event)


def one_at_a_time(
    config: RunConfig, seeds: int = 4, on_event: OnEvent | None = None, stop: StopRequest | None = None
) -> SensitivityReport:
    """Halve and double each knob around a config."""
    from lora_cli import sensitivity

    return _result_of(sensitivity.one_at_a_time(config, stop or StopRequest(), seeds), on_event)


def against_full(config: RunConfig, stop: StopRequest | None = None) -> AgainstFullReport:
    """Train a config and full fine-tuning beside it, each in a process of its own, and compare them."""
    from lora_cli import against_full as comparing

    return comparing.against_full(config, stop or StopRequest())


def _result_of(events: "Generator[Any, None, Result]", on_event: OnEvent | None) -> Result:
    """Run to the end, handing events on; return what came of them."""
    while True:
        try:
            event = next(events)
        except StopIteration as end:
            return cast(Result, end.value)
        if on_event is not None:
            on_event(event)


# --- a result: a run directory, a checkpoint, or any PEFT adapter ---


def metrics(run: Place) -> list[dict[str, Any]]:
    """Return what a run measured as flat rows, which `pandas.DataFrame` takes as they are."""
    if not run_dir.is_run_dir(Path(run)):
        raise AdapterError(f"{run}: is no run directory, which alone has metrics.jsonl.", state="Nothing was read.")
    return measured.table(RunDir(Path(run)))


def load(run: Place, base: str | None = None, device: str = "auto", dtype: str | None = None) -> tuple[Any, Any]:
    """Return (model, tokenizer) of transformers: the base with what was trained on top, ready to generate."""
    from lora_cli import lora, tuned
    from lora_cli.distributed import current_world

    result = tuned.find_any(Path(run), base)
    loaded = tuned.load(result, current_world(device).device, dtype)
    loaded.module.set_attn_implementation(loaded.own_attention)  # the packed one knows no cache
    lora.set_dropout(loaded.module, None)
    return loaded.module, result.header.tokenizer


def evaluate(
    run: Place,
    data: str | None = None,
    *,
    metrics: Sequence[str] = ("exact-match",),
    answers: int = 200,
    extract: str | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    max_new_tokens: int | None = None,
    general: str | None = None,
    scan: bool = False,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    base: str | None = None,
) -> EvalReport:
    """Measure base and adapter side by side on held-out rows; without `data` on the run's own."""
    from lora_cli.compare import Asked, compare
    from lora_cli.generate import Sampling

    sampling = Sampling(temperature, seed)
    return compare(
        Path(run),
        Asked(data, base, answers, metrics, extract, sampling, max_new_tokens, general, tasks, limit, scan),
    )


def scale(
    run: Place,
    output: Place,
    gain: float | None = None,
    budget: float | None = None,
    data: str | None = None,
    general: str | None = None,
    base: str | None = None,
) -> ScaleReport:
    """Write the adapter at another strength: a gain, or the one that learns most within a forgetting budget."""
    from lora_cli import scale as scaling

    return scaling.scale(Path(run), Path(output), gain, budget, data, general, base)


def merge(
    runs: Place | Sequence[Place],
    output: Place,
    *,
    dtype: "Dtype" = "keep",
    rounding: "Rounding" = "nearest",
    onto: "Onto" = "stored",
    weights: Sequence[float] | None = None,
    method: "Method" = "linear",
    density: float | None = None,
    base: str | None = None,
    force: bool = False,
    speed: bool = False,
) -> MergeReport:
    """Write base + one adapter or several as a Hugging Face model; read it back and compare, or refuse."""
    from lora_cli import merge as merging
    from lora_cli import merged_folder, update

    form = merged_folder.Form(
        one_of("dtype", dtype, merged_folder.Dtype),
        one_of("rounding", rounding, merged_folder.Rounding),
        one_of("onto", onto, merged_folder.Onto),
    )
    together = merging.Together(weights, one_of("method", method, update.Method), density)
    return merging.merge(_paths(runs), Path(output), base, together, form, force, speed)


def combine(
    runs: Sequence[Place],
    output: Place,
    *,
    weights: Sequence[float] | None = None,
    method: "Method" = "linear",
    density: float | None = None,
    base: str | None = None,
) -> CombineReport:
    """Write one adapter that does what several do together: `lora merge --adapter`."""
    from lora_cli import merge as merging
    from lora_cli import update

    together = merging.Together(weights, one_of("method", method, update.Method), density)
    return merging.combine(_paths(runs), Path(output), base, together)


def export(
    run: Place, output: Place, format: "Format" = "peft", gguf_type: "Kind" = "f16", base: str | None = None
) -> ExportReport | GgufReport:
    """Write what another runtime loads."""
    from lora_cli import export as exporting
    from lora_cli.formats import gguf_file

    chosen, kind = one_of("format", format, exporting.Format), one_of("gguf_type", gguf_type, gguf_file.Kind)
    return exporting.export(Path(run), chosen, Path(output), kind, base)


def push(folder: Place, repository: str) -> str:
    """Upload a folder to a new private repository on the hub; return its address."""
    from lora_cli import hub

    return hub.push(Path(folder), repository)


def _paths(runs: Place | Sequence[Place]) -> list[Path]:
    return [Path(runs)] if isinstance(runs, str | PathLike) else list(map(Path, runs))
