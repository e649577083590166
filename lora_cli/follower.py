"""Draws the events of a run, and of its preparation, as they come: a bar in a terminal, plain lines elsewhere."""

import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

from rich.progress import BarColumn, Progress, TaskID, TextColumn

from lora_cli.console import duration, err
from lora_cli.records import (
    Evaluated,
    Event,
    Finished,
    Notice,
    Preparing,
    Probed,
    Saved,
    Started,
    StepDone,
    TrialEnded,
    short,
)
from lora_cli.redact import redact
from lora_cli.run_words import forgetting_in_words

Result = TypeVar("Result")
_QUIET_SECONDS = 5.0  # without a terminal, steps are reported no more often than this


class Follower:
    """Draws the events of a run as they come."""

    def __init__(self, silent: bool = False, brief: bool = False) -> None:
        """`silent`: another process of the run draws the same events. `brief`: there are many runs, each has a line."""
        self._silent = silent
        self._brief = brief
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[facts]}"),
            console=err,
            disable=not err.is_terminal,
        )
        self._task: TaskID | None = None
        self._total = 0
        self._seconds: list[float] = []
        self._validation = ""
        self._last_line = 0.0

    def follow(self, events: Iterable[Event]) -> Event | None:
        """Draw every event; return the last."""
        last: Event | None = None
        if self._silent:
            return deque(events, maxlen=1).pop()
        with self._progress:
            for last in events:
                try:
                    self._draw(last)
                except (OSError, SystemExit):  # nobody reads any more; over a closed pipe rich would end the process
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        return last

    def result_of(self, events: Generator[Event, None, Result]) -> Result:
        """Draw every event; return what came of them."""
        result: list[Result] = []

        def passed_on() -> Iterator[Event]:
            result.append((yield from events))

        self.follow(passed_on())
        return result[0]

    def _draw(self, event: Event) -> None:
        match event:
            case TrialEnded():
                self._trial(event)
            case Evaluated() | Saved() if self._brief:
                pass
            case Preparing():
                self._preparing(event)
            case Notice():
                self._say(event.text)
            case Probed():
                came_to = "training stopped" if event.loss is None else f"validation loss {event.loss:.4f}"
                self._say(f"learning rate {event.rate:.2g}: {came_to} after {event.steps} steps")
            case Started():
                self._start(event)
            case StepDone():
                self._step(event)
            case Evaluated():
                self._evaluated(event)
            case Saved():
                if event.is_best:
                    self._say(f"saved {event.path} (best so far)")
            case Finished():
                pass

    def _say(self, text: str) -> None:
        self._progress.console.print(redact(text), markup=False, soft_wrap=True)

    def _preparing(self, event: Preparing) -> None:
        now = time.monotonic()
        if now - self._last_line > _QUIET_SECONDS:
            self._last_line = now
            left = event.seconds * (1 - event.done) / event.done if event.done else 0.0
            self._say(f"{event.source}: {event.rows:,} rows, {event.done:.0%}, {duration(left)} left")

    def _trial(self, event: TrialEnded) -> None:
        values = ", ".join(f"{key} {short(value)}" for key, value in event.values.items())
        loss = "" if event.loss is None else f": validation loss {event.loss:.4f}"
        state = "" if event.state == "finished" else f", {event.state} after {event.steps} of {event.of_steps} steps"
        self._say(f"trial {event.number}: {values}{loss}{state}")

    def _start(self, event: Started) -> None:
        if not self._brief or self._task is None:
            self._say(self._size(event))
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._total = event.total_steps
        self._task = self._progress.add_task("", total=event.total_steps, completed=event.step, facts="")

    def _size(self, event: Started) -> str:
        share = event.trainable_parameters / event.total_parameters
        held_out = event.validation.examples if event.validation else 0
        return (
            f"{event.train.examples} examples ({event.train.targets:,} of {event.train.tokens:,} tokens trained), "
            f"{held_out} held out; {event.trainable_parameters:,} parameters trained ({share:.2%}); {event.forward}."
        )

    def _step(self, event: StepDone) -> None:
        self._seconds = [*self._seconds[-19:], event.seconds]
        left = (self._total - event.step) * sum(self._seconds) / len(self._seconds)
        speed = f"{event.tokens / event.seconds:,.0f} tok/s"
        facts = f"loss {event.loss:.4f}{self._validation}  {speed}  {duration(left)} left"
        if self._task is not None:
            self._progress.update(self._task, completed=event.step, facts=facts)
        now = time.monotonic()
        if not err.is_terminal and (
            now - self._last_line > _QUIET_SECONDS or (event.step in (1, self._total) and not self._brief)
        ):
            self._last_line = now
            self._say(
                f"step {event.step}/{self._total}  epoch {event.epoch:.2f}  {facts}  lr {event.learning_rate:.2e}"
            )

    def _evaluated(self, event: Evaluated) -> None:
        self._validation = f"  val {event.loss:.4f}"
        what = "base model" if event.step == 0 else f"step {event.step}"
        note = ", best so far" if event.improved else ""
        left = f", patience {event.patience_left}" if event.patience_left is not None and event.step else ""
        self._say(
            f"{what}: validation loss {event.loss:.4f}, token accuracy {event.token_accuracy:.1%} "
            f"({event.targets:,} targets){note}{left}"
        )
        if event.forgetting is not None and event.step:
            over = "; over the budget" if event.within_budget is False else ""
            self._say(f"  forgetting: {forgetting_in_words(event.forgetting)}{over}")


def follow_preparation(news: Generator[Notice | Preparing, None, Result]) -> Result:
    """Draw the news of something that gets ready; return its result. Notices are part of the result's own."""
    follower = Follower()
    while True:
        try:
            follower._draw(next(news))
        except StopIteration as end:
            result: Result = end.value
            return result
