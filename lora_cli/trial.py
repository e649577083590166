"""One trial of a search: a run on a share of the steps, given up where it is behind the others."""

import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

from lora_cli import metrics, run_dir, storage
from lora_cli.config import RunConfig
from lora_cli.errors import TrainingStopped
from lora_cli.probe import choose_rate
from lora_cli.records import Event, Finished, StepDone, TrialEnded
from lora_cli.run_dir import RunDir
from lora_cli.session import Session, as_trial

RUNGS = (1, 3)  # ninths of a trial after which it is held against the others
IsBehind = Callable[[int, float], bool]  # of the ninths done, and the validation loss there


def train_whole(session: Session, config: RunConfig, run: RunDir) -> Generator[Event, None, Finished]:
    """Train what is left of a run, in a directory that is held; return how it ended."""
    if (ended := run_dir.read_finished(run)) is not None:
        return ended
    rate = (yield from choose_rate(session, config, run)) if config.train.learning_rate == "auto" else None
    for event in session.run(config, run, rate=rate):
        if isinstance(event, Finished):
            ended = event
        yield event
    assert ended is not None, "the loop ends with Finished or raises"
    return ended


@dataclass
class Trial:
    """A trial on its way. `run` is held."""

    session: Session
    config: RunConfig
    run: RunDir
    number: int
    values: Mapping[str, Any]
    share: float  # of the steps
    began: float  # of time.perf_counter()
    last: float | None = None  # validation loss known
    aside: float = 0.0  # seconds of validation that the run's own timetable does not have

    def outcome(self, is_behind: IsBehind | None) -> Generator[Event, None, TrialEnded]:
        """Run; return how it ended. Its checkpoints are gone then, and a finished one has its adapter."""
        steps = max(1, round(self.share * self.session.total_steps(self.config)))
        events = train_whole(self.session, as_trial(self.config, self.run, steps), self.run)
        state, ended = "finished", None
        rungs = {max(1, round(steps * ninths / 9)): ninths for ninths in reversed(RUNGS)} if is_behind else {}
        try:
            while state == "finished":
                event = next(events)
                yield event
                if isinstance(event, StepDone) and event.step in rungs:
                    assert is_behind is not None, "else there are no rungs"
                    if is_behind(rungs[event.step], self._measure()):
                        state = "pruned"
            events.close()
        except StopIteration as end:
            ended = end.value
        except TrainingStopped:
            state = "diverged"
        return self._ended(state, ended, steps)

    def _measure(self) -> float:
        """Return the validation loss of the adapter as it is."""
        assert self.session.validation is not None, "config_checks asks for it"
        began = time.perf_counter()
        tokens = int(self.session.environment["micro_batch_tokens"])
        self.last = self.session.validation.without_general().measure(tokens)[0].mean("loss")
        self.aside += time.perf_counter() - began
        return self.last

    def _ended(self, state: str, ended: Finished | None, steps: int) -> TrialEnded:
        records = metrics.read(self.run)
        taken = [record for record in records if record["event"] == "step"]
        if state == "pruned":
            run_dir.write_status(self.run, "stopped", step=len(taken), reason="given up: behind other trials")
        for _, folder in run_dir.step_folders(self.run):
            storage.remove_directory(folder)
        forgetting = ended.best_forgetting if ended else None
        budget = self.config.eval.forgetting_budget
        return TrialEnded(
            number=self.number,
            values=self.values,
            state=state,
            loss=ended.best_loss if ended else self.last,
            forgetting=forgetting,
            excess=0.0 if budget is None or forgetting is None else max(0.0, forgetting - budget),
            steps=len(taken),
            of_steps=steps,
            tokens=sum(record["tokens"] for record in taken),
            seconds=time.perf_counter() - self.began,
            training=sum(record["seconds"] for record in records) + self.aside,
        )
