"""Draws the events of a run, or of a search, as they come: a live panel in a terminal, plain lines elsewhere."""

import os
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

from rich.live import Live

from lora_cli import interrupt
from lora_cli.console import err, is_live, say
from lora_cli.panel import RunPanel
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
    duration,
    short,
)
from lora_cli.redact import redact
from lora_cli.run_words import forgetting_in_words
from lora_cli.search_panel import SearchPanel
from lora_cli.standing import SearchStanding, Standing

Result = TypeVar("Result")
_QUIET_SECONDS = 5.0  # without a terminal, steps are reported no more often than this
_A_SECOND = 4  # times that the panel is drawn
_STOPPING = "Stopping after this step, and saving; Ctrl-C again stops at once."


class Follower:
    """Draws the events of a run as they come; of a `search` its trials, with one line for each that ended."""

    def __init__(self, silent: bool = False, quiet: bool = False, search: SearchStanding | None = None) -> None:
        """`silent`: another process of the run draws the same events. `quiet`: only what warns is said."""
        self._silent = silent
        self._quiet = quiet
        self._search = search
        self._run = Standing()
        self._panel = SearchPanel(search) if search else RunPanel(self._run)
        self._live: Live | None = None
        self._last_line = 0.0

    def follow(self, events: Iterable[Event]) -> Event | None:
        """Draw every event; return the last."""
        last: Event | None = None
        if self._silent:
            return deque(events, maxlen=1).pop()
        try:
            for last in events:
                try:
                    self.draw(last)
                except (OSError, SystemExit):  # nobody reads any more; over a closed pipe rich would end the process
                    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        finally:
            if self._live is not None:  # what follows a finished run says more than its panel
                self._panel.note = ""
                self._live.transient = isinstance(last, Finished) or self._search is not None
                self._live.stop()
        return last

    def result_of(self, events: Generator[Event, None, Result]) -> Result:
        """Draw every event; return what came of them."""
        result: list[Result] = []

        def passed_on() -> Iterator[Event]:
            result.append((yield from events))

        self.follow(passed_on())
        return result[0]

    def draw(self, event: Event) -> None:
        """Draw one event."""
        if not isinstance(event, Notice):
            (self._search or self._run).take(event)
        match event:
            case Notice():
                if event.warns or not self._quiet:
                    self._say(event.text)
            case _ if self._quiet:
                pass
            case TrialEnded():
                self._trial(event)
            case Evaluated() | Saved() if self._search:
                pass
            case Preparing():
                self._preparing(event)
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
                self._say(f"saved {event.path}{' (best so far)' if event.is_best else ''}")
            case Finished():
                pass

    def _say(self, text: str) -> None:
        say(redact(text), err, indent=2)

    def _preparing(self, event: Preparing) -> None:
        if self._is_time():
            left = event.seconds * (1 - event.done) / event.done if event.done else 0.0
            self._say(f"{event.source}: {event.rows:,} rows, {event.done:.0%}, {duration(left)} left")

    def _trial(self, event: TrialEnded) -> None:
        values = ", ".join(f"{key} {short(value)}" for key, value in event.values.items())
        loss = "" if event.loss is None else f": validation loss {event.loss:.4f}"
        state = "" if event.state == "finished" else f", {event.state} after {event.steps} of {event.of_steps} steps"
        self._say(f"trial {event.number}: {values}{loss}{state}")

    def _start(self, event: Started) -> None:
        if self._live is None and (not self._search or not self._search.ended):
            self._say(self._size(event))
        if self._live is None and is_live():
            self._live = Live(
                self._panel, console=err, refresh_per_second=_A_SECOND, redirect_stdout=False, transient=True
            )
            self._live.start()

    def _size(self, event: Started) -> str:
        share = event.trainable_parameters / event.total_parameters
        held_out = event.validation.examples if event.validation else 0
        return (
            f"{event.train.examples} examples ({event.train.targets:,} of {event.train.tokens:,} tokens trained), "
            f"{held_out} held out; {event.trainable_parameters:,} parameters trained ({share:.2%}); {event.forward}."
        )

    def _step(self, event: StepDone) -> None:
        if self._live is not None:
            self._panel.note = _STOPPING if interrupt.requested().wanted else ""
            return
        run = self._search.current if self._search else self._run
        is_an_end = event.step in (1, run.total) and not self._search
        if self._is_time() or is_an_end:
            self._last_line = time.monotonic()
            validation = f"  val {run.evaluated.loss:.4f}" if run.evaluated else ""
            speed = f"{event.tokens / event.seconds:,.0f} tok/s"
            self._say(
                f"step {event.step}/{run.total}  epoch {event.epoch:.2f}  loss {event.loss:.4f}{validation}  {speed}  "
                f"{duration(run.left or 0.0)} left  lr {event.learning_rate:.2e}"
            )

    def _is_time(self) -> bool:
        """Return whether nothing was said of the progress for a while."""
        now = time.monotonic()
        if now - self._last_line <= _QUIET_SECONDS:
            return False
        self._last_line = now
        return True

    def _evaluated(self, event: Evaluated) -> None:
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


def follow_preparation(news: Generator[Notice | Preparing, None, Result], quiet: bool = False) -> Result:
    """Draw the news of something that gets ready; return its result."""
    return Follower(quiet=quiet).result_of(news)
