"""Draws how a run ended: from the base to the best in one table, what it took, and what can be typed next."""

import math
from collections.abc import Iterator, Sequence

from lora_cli import tables
from lora_cli.console import say, show_next
from lora_cli.records import Evaluated, Finished, StepDone, duration, perplexity, with_interval


def show_finished(end: Finished, run: str, measured: Sequence[StepDone | Evaluated], already: bool) -> None:
    """Show how a run ended and what to type next; `measured` is its metrics.jsonl."""
    steps = [one for one in measured if isinstance(one, StepDone)]
    passes = {one.step: one for one in measured if isinstance(one, Evaluated)}
    say(f"This run is already finished: {end.reason}." if already else f"Done: {end.reason}.")
    if end.best_loss is not None and end.base_loss is not None:
        tables.show(
            ["", "base", f"step {end.best_step}, the best", "change"],
            _rows(end.base_loss, end.best_loss, end, passes),
            (1, 2, 3),
        )
    for line in _verdicts(end):
        say(line)
    seconds = sum(one.seconds for one in measured)
    tokens, pace = sum(one.tokens for one in steps), sum(one.seconds for one in steps)
    took = f"{end.step} steps in {duration(seconds) if math.isfinite(seconds) else '?'}"
    if pace:
        took += f" with validation; {tokens:,} tokens, {tokens / pace:,.0f} a second without it"
    say(f"{took}.")
    what = "model" if end.adapter.name == "model" else "adapter"
    say(f"{what.capitalize()}: {end.adapter}")
    _show_next(run, what)


def _rows(base: float, best: float, end: Finished, passes: dict[int, Evaluated]) -> list[list[str]]:
    """Return what is known of base and best: their losses, and what else was measured at their steps."""
    rows = [_row("validation loss", base, best, ".4f"), _row("perplexity", perplexity(base), perplexity(best), ",.2f")]
    first, chosen = passes.get(0), passes.get(end.best_step or -1)
    if first is not None and chosen is not None:
        rows.append(_row("token accuracy", first.token_accuracy, chosen.token_accuracy, ".1%"))
    if chosen is not None and chosen.forgetting is not None and chosen.forgetting.rise.value is not None:
        general = chosen.forgetting.base_loss
        rows.append(_row("loss on general text", general, general + chosen.forgetting.rise.value, ".4f"))
    if end.test is not None:
        rows.append(_row("test loss", end.test.base_loss, end.test.loss, ".4f"))
    return rows


def _row(name: str, base: float, best: float, form: str) -> list[str]:
    return [name, format(base, form), format(best, form), format(best - base, f"+{form}")]


def _verdicts(end: Finished) -> Iterator[str]:
    """Say in words what the figures mean where that is not seen at a glance."""
    what = "model" if end.adapter.name == "model" else "adapter"
    if end.best_loss is not None and end.base_loss is not None and end.best_loss >= end.base_loss:
        yield f"No evaluation was better than the base model: this {what} does not help on the validation data."
    if end.best_forgetting is not None:
        went = "rose" if end.best_forgetting > 0 else "fell"
        within = ", which is within eval.forgetting_budget" if end.within_budget else ""
        yield f"Forgetting: the loss on general text {went} by {abs(end.best_forgetting):.4f} nats a token{within}."
    if end.within_budget is False:
        yield (
            "No evaluation was within eval.forgetting_budget; the one that forgot least is kept. A lower "
            "train.learning_rate, data.replay and train.kl_to_base hold forgetting down; so does `lora scale`."
        )
    if end.test is not None:
        flattery = end.test.flattery
        chose = f"The test loss is of {end.test.targets:,} targets that chose nothing"
        by = f"; validation was flattered by {with_interval(flattery, '+.4f')}" if flattery.value is not None else ""
        yield f"{chose}{by}."


def _show_next(run: str, what: str) -> None:
    merge = (["lora", "merge", run, "--output", f"{run.rstrip('/')}-merged"], "an ordinary Hugging Face model")
    show_next(
        (["lora", "eval", run], "beside the base, with intervals"),
        (["lora", "chat", run], "talk to it"),
        *([merge] if what == "adapter" else []),
        (["lora", "report", run], "curves and figures on one page"),
    )
