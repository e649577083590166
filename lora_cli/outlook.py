"""Draws what a run would do: data, steps, memory, where its adapter will load, rows with the trained part marked."""

from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.text import Text

from lora_cli import tables
from lora_cli.console import out, say
from lora_cli.errors import in_lines
from lora_cli.records import DataCounts, duration, gigabytes
from lora_cli.reports import CheckReport, Marked, MemoryEstimate, RuntimeReport

_SHOWN_CHARACTERS = 2000  # of a row in a preview


def show_check(report: CheckReport, whole: bool) -> None:
    """Show what a run would do; rows are cut in the middle where they are long, unless `whole`."""
    sets = {"train": report.train, "validation": report.validation, "test": report.test, "replay": report.replay}
    present = {name: counts for name, counts in sets.items() if counts is not None}
    _show_data(present)
    lines = [f"lengths: {_bars(report.train)}", *(line for n, c in present.items() for line in _source_lines(n, c))]
    if report.overlap is not None:
        shared, of = report.overlap.prompts, report.overlap.of
        lines.append(f"overlap: {shared} of {of} validation rows have a prompt that is trained on")
    taken = "the time is not known" if report.seconds is None else f"about {duration(report.seconds)} here"
    lines.append(
        f"steps: {report.steps_per_epoch:,} an epoch of {report.examples_per_epoch:,} examples, "
        f"{report.total_steps:,} in all, {taken}"
    )
    for line in lines:
        say(line, indent=2)
    adapted = ", ".join(f"{name} x{count}" for name, count in report.modules.items()) or "nothing; all is trained"
    share = report.trainable_parameters / report.total_parameters
    say(f"adapted: {adapted}", indent=2)
    say(f"trained: {report.trainable_parameters:,} of {report.total_parameters:,} parameters ({share:.2%})")
    _show_memory(report.memory, "adapter" if report.modules else "weights")
    for runtime in _runtime_lines(report.runtimes):
        say(runtime, indent=13 if isinstance(runtime, Text) else 2)
    for notice in report.notices:
        say(f"note: {notice}", indent=2)
    for shown in report.previews:
        say("")
        say(Text(f"{shown.row}, the trained part marked:", "bold"))
        say(_marked(shown.pieces, None if whole else _SHOWN_CHARACTERS))


def _show_memory(memory: MemoryEstimate, trained: str) -> None:
    """Show what lies in memory, and whether it fits."""
    each = "" if memory.processes == 1 else f" each of {memory.processes} processes takes"
    place = "a GPU" if memory.device == "cuda" else "the CPU"
    at_a_time = f", {memory.forwards} at a time" if memory.forwards > 1 else ""
    say(f"memory{each} on {place}, about, at {memory.tokens:,} tokens a forward{at_a_time}:")
    parts = {
        "base": memory.base,
        f"{trained} + optimizer": memory.adapter,
        "activations": memory.activations,
        "in flight": memory.in_flight,
        "the process itself": memory.process,
        "total": memory.total,
        "free": memory.free,
    }
    rows = [[f" {name}", "not known" if count is None else gigabytes(count)] for name, count in parts.items()]
    tables.show(["", ""], rows, numbers=(1,))
    if memory.fits is False:
        ways = "train.activation_checkpointing, fewer train.micro_batch_tokens or data.max_length, model.quantization"
        text = f"does not fit: less is taken with {ways}; or, on several devices, with train.shard."
        say(Text("memory: ", style="bold red") + Text(text))


def _show_data(sets: Mapping[str, DataCounts]) -> None:
    figures: list[tuple[str, Callable[[DataCounts], str]]] = [
        ("rows", lambda c: f"{c.rows:,}"),
        ("examples", lambda c: f"{c.examples:,}"),
        ("tokens", lambda c: f"{c.tokens:,}"),
        ("trained tokens", lambda c: f"{c.targets:,} ({c.targets / c.tokens:.0%})"),
        ("length at 50 %", lambda c: f"{c.length_percentiles[0]:,}"),
        ("  90 / 99 / 100 %", lambda c: " / ".join(f"{p:,}" for p in c.length_percentiles[1:])),
        ("trained at 50 %", lambda c: f"{c.target_percentiles[0]:,}"),
        ("  90 / 99 / 100 %", lambda c: " / ".join(f"{p:,}" for p in c.target_percentiles[1:])),
        ("dropped / cut", lambda c: f"{c.dropped:,} / {c.truncated:,}"),
        ("duplicates", lambda c: f"{c.duplicates:,}"),
    ]
    tables.show(["", *sets], [[name, *map(figure, sets.values())] for name, figure in figures], by_column=True)


def _source_lines(name: str, counts: DataCounts) -> Iterator[str]:
    for source in counts.sources:
        form = f" ({source.format})" if source.format else ""
        unread = f"; columns not read: {', '.join(source.unread)}" if source.unread else ""
        yield f"{name}: {source.name}{form}: {source.rows:,} rows, {source.examples:,} examples{unread}"
    if counts.too_long:
        more = " ..." if counts.dropped + counts.truncated > len(counts.too_long) else ""
        yield (
            f"{name}: {counts.dropped:,} sequences dropped, {counts.truncated:,} cut, {counts.lost_targets:,} answer "
            f"tokens lost: {' '.join(counts.too_long)}{more}"
        )


def _runtime_lines(runtimes: Sequence[RuntimeReport]) -> Iterator[str | Text]:
    """Say where the adapter will load, one line a runtime."""
    words = {True: "yes", False: "no", None: "not known"}
    if not runtimes:
        return
    yield "where the adapter will load (merged, it does wherever its base does):"
    for each in runtimes:
        word = words[each.loads]
        yield Text.assemble(f"  {each.name:<10} ", (word, tables.STYLES.get(word, "yellow")), f": {each.note}")


def _bars(counts: DataCounts) -> str:
    """Return a histogram of lengths as one line."""
    most = max(counts.length_histogram)
    marks = " .:-=+*#%" if out.options.ascii_only else " ▁▂▃▄▅▆▇█"
    bars = "".join(marks[-(-count * (len(marks) - 1) // most)] for count in counts.length_histogram)
    return f"0 |{bars}| {counts.length_percentiles[-1]:,} tokens"


def _marked(pieces: Sequence[Marked], most: int | None) -> Text:
    """Return a row's text with the trained part marked; of a long one the first three quarters and the end."""
    text = Text()
    length = sum(len(piece.text) for piece in pieces)
    cut = (0, 0) if most is None or length <= most else (most * 3 // 4, length - most // 4)
    begin = 0
    for piece in pieces:
        end = begin + len(piece.text)
        shown = piece.text
        if begin < cut[1] and end > cut[0]:
            head, tail = shown[: max(0, cut[0] - begin)], shown[max(0, cut[1] - begin) :]
            gap = f"\n... {cut[1] - cut[0]:,} characters ...\n" if begin <= cut[0] < end else ""
            shown = head + gap + tail
        begin = end
        if shown:
            marked = f"[[{shown}]]" if piece.trained and out.color_system is None else shown
            text.append(in_lines(marked), style="bold green" if piece.trained else "dim")
    return text
