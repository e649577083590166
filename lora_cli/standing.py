"""Where a run, or a search, stands: its events so far, as what is to be looked at."""

import math
import time
from collections import deque
from dataclasses import dataclass, field

from lora_cli.records import Evaluated, Event, Started, StepDone, TrialEnded

_RECENT = 20  # steps that the speed is taken from
_SMOOTH = 0.02  # share of a run over which its loss is smoothed
_MOST = 2048  # points of a curve that are kept


@dataclass
class Standing:
    """A run as it goes on. `smooth` and `validation` are curves, points of (step, loss)."""

    started: Started | None = None
    step: StepDone | None = None
    evaluated: Evaluated | None = None
    base: Evaluated | None = None
    best: Evaluated | None = None
    smooth: list[tuple[float, float]] = field(default_factory=list)
    validation: list[tuple[float, float]] = field(default_factory=list)
    began: float = 0.0  # of time.monotonic()
    aside: float = 0.0  # seconds of validation since
    taken: int = 0  # steps since
    recent: deque[StepDone] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def take(self, event: Event) -> None:
        """Take in what happened."""
        match event:
            case Started():
                self.started = event
                for earlier in event.before:
                    self.take(earlier)
                self.began, self.aside, self.taken = time.monotonic(), 0.0, 0
                self.recent.clear()
            case StepDone():
                self._step(event)
            case Evaluated():
                self._evaluated(event)
            case _:
                pass

    @property
    def at(self) -> int:
        """The last step that was taken."""
        return self.step.step if self.step else self.started.step if self.started else 0

    @property
    def total(self) -> int:
        """How many steps there are, if nothing stops the run before."""
        return self.started.total_steps if self.started else 0

    @property
    def loss(self) -> float | None:
        """The smoothed training loss."""
        return self.smooth[-1][1] if self.smooth else None

    @property
    def elapsed(self) -> float:
        """Seconds since this process took the run up."""
        return time.monotonic() - self.began

    @property
    def left(self) -> float | None:
        """Seconds to the last step at the present pace, validation counted in."""
        recent = tuple(self.recent)  # another thread may be looking
        if not recent:
            return None
        a_step = sum(step.seconds for step in recent) / len(recent) + self.aside / self.taken
        return (self.total - self.at) * a_step

    @property
    def speed(self) -> float | None:
        """Tokens a second of the last steps."""
        recent = tuple(self.recent)
        seconds = sum(step.seconds for step in recent)
        return sum(step.tokens for step in recent) / seconds if seconds else None

    def _step(self, event: StepDone) -> None:
        self.step = event
        self.taken += 1
        self.recent.append(event)
        if not math.isfinite(event.loss):
            return
        share = max(1 / max(1.0, _SMOOTH * self.total), 1 / (len(self.smooth) + 1))  # the first ones count alike
        before = event.loss if self.loss is None else self.loss
        self.smooth.append((event.step, before + share * (event.loss - before)))
        if len(self.smooth) > _MOST:
            del self.smooth[1:-1:2]

    def _evaluated(self, event: Evaluated) -> None:
        self.evaluated = event
        self.aside += event.seconds
        self.validation.append((event.step, event.loss))
        if event.step == 0:
            self.base = event
        if event.improved:
            self.best = event


@dataclass
class SearchStanding:
    """A search as it goes on: the trials that ended here, out of how many (null: not known), and the one under way."""

    of: int | None
    ended: list[TrialEnded] = field(default_factory=list)
    current: Standing = field(default_factory=Standing)

    def take(self, event: Event) -> None:
        """Take in what happened."""
        match event:
            case TrialEnded():
                self.ended.append(event)
                self.current = Standing()
            case Started():
                begun = Standing()
                begun.take(event)
                self.current = begun  # whole before another thread draws it
            case _:
                self.current.take(event)
