"""`lora tune`: runs that differ in a few keys, on one base in memory, and the best of them trained whole."""

import contextlib
import hashlib
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lora_cli import config_file, interrupt, json_file, resume, run_dir, search_dir, space, storage, tracking
from lora_cli.config import RunConfig
from lora_cli.errors import AdapterError
from lora_cli.interrupt import StopRequest
from lora_cli.records import Event, Finished, Notice, TrialEnded, as_json
from lora_cli.search_dir import SearchDir
from lora_cli.search_reports import TuneReport

if TYPE_CHECKING:  # torch is imported only once config and rows are good
    from lora_cli.session import Session
    from lora_cli.study import Claim, Sampling, Study
    from lora_cli.trial import IsBehind


def tune(
    config: RunConfig,
    stop: StopRequest,
    sampling: "Sampling | None" = None,
    origins: Mapping[str, str] | None = None,
) -> Generator[Event, None, TuneReport]:
    """Search, or go on with a search; yield what happens and return what came of it.

    Any number of processes may do so at once. `sampling` takes the place of the estimator, for comparisons. Raises
    UserError.
    """
    from lora_cli import study  # where Optuna is not installed this says so, before torch is imported

    tracking.require(config)
    place = search_dir.of(config)
    session = yield from open_search(config, place, stop, origins)
    from lora_cli.optim import start_rate
    from lora_cli.session import with_rate

    rate = start_rate(session.prepared.width, config)
    wanted = config.tune.space or space.default_space(config, rate)
    known = run_dir.read_environment(place.as_run)
    searched = with_rate(config, rate) if config.train.learning_rate == "auto" else config
    trials = study.Study(place.journal, searched, wanted, str(known["search"]), _digest(config, known), sampling)
    yield from _search(session, config, place, trials)
    ended = [json_file.checked(TrialEnded, one, place.journal) for one in trials.outcomes()]
    front = _front(ended, trials.both)
    best = min(front, key=lambda one: (one.excess, one.loss), default=None)
    running, final = trials.running(), None
    if best is not None and not running:
        final = yield from _train_best(session, config, place, best)
    report = TuneReport(
        trials=ended,
        best=best.number if best else None,
        front=[one.number for one in front] if trials.both else [],
        running=running,
        config=place.best_config if final else None,
        final=final,
        saved=place.report,
    )
    storage.write_json(place.report, as_json(report))
    return report


def open_search(
    config: RunConfig, place: SearchDir, stop: StopRequest, origins: Mapping[str, str] | None = None
) -> Generator[Event, None, "Session"]:
    """Load what all trials share, once it is known to be good, and make the search's folder."""
    alone = "several processes share a search when each is started with the same command"
    search_dir.require_ready(config, place, alone)

    from lora_cli import environment, notices
    from lora_cli.distributed import current_world
    from lora_cli.prepare import prepare
    from lora_cli.session import open_session, untrained_ends

    world = current_world(config.model.device)
    prepared = yield from prepare(config)
    interrupt.poll()
    for text in notices.of(prepared, config):
        yield Notice(text)
    largest = space.largest(config, config.tune.space)
    here = environment.describe(largest, place.as_run, prepared, [], world)
    resume.require_same(place.as_run, here)
    search_dir.create(config, place, here)
    session = open_session(config, prepared, here, stop, world, origins)
    for text in untrained_ends(session):
        yield Notice(text)
    return session


def _digest(config: RunConfig, known: Mapping[str, Any]) -> str:
    """Return a hash of what must be the same for all processes of a study."""
    tune = config.tune.model_copy(update={"trials": 1, "storage": None})
    settings = config_file.dump(config.model_copy(update={"tune": tune}))
    return hashlib.sha256(f"{settings}{known['base_fingerprint']}{known['data_fingerprint']}".encode()).hexdigest()[:32]


def _search(session: "Session", config: RunConfig, place: SearchDir, trials: "Study") -> Iterator[Event]:
    """Run trials for as long as there are any to run."""
    from lora_cli.session import for_trials
    from lora_cli.trial import Trial

    alone = for_trials(session, trials.both or config.eval.forgetting_budget is not None)
    while True:
        began = time.perf_counter()
        with contextlib.ExitStack() as holding:
            claim = trials.claim(lambda number: run_dir.held(place.trial(number)), holding)
            if claim is None:
                return
            ours = space.changed(config, claim.values)
            trial = Trial(alone, ours, place.trial(claim.number), claim.number, claim.values, config.tune.budget, began)
            ended = yield from trial.outcome(_judge(trials, claim) if trials.prunes else None)
            trials.end(claim, ended)
        yield ended
        interrupt.poll()


def _judge(trials: "Study", claim: "Claim") -> "IsBehind":
    return lambda ninths, loss: trials.is_behind(claim, ninths, loss)


def _front(ended: Sequence[TrialEnded], both: bool) -> list[TrialEnded]:
    """Return the trials that may be the best: where two figures count, those that no other beats in both."""
    finished = [one for one in ended if one.state == "finished" and one.loss is not None]
    if not both:
        return finished

    def figures(one: TrialEnded) -> tuple[float, float]:
        return one.loss or 0.0, one.forgetting or 0.0

    return [
        one
        for one in finished
        if not any(
            other is not one
            and all(a <= b for a, b in zip(figures(other), figures(one), strict=True))
            and figures(other) != figures(one)
            for other in finished
        )
    ]


def _train_best(
    session: "Session", config: RunConfig, place: SearchDir, best: TrialEnded
) -> Generator[Event, None, Finished | None]:
    """Train the best on all steps, unless its trial had all of them or another process does; write its config."""
    from lora_cli.trial import train_whole

    run = place.trial(best.number) if config.tune.budget == 1 else place.best
    ours = space.changed(config, best.values).model_copy(update={"output_dir": str(run.path)})
    with contextlib.ExitStack() as holding:
        try:
            if run == place.best and run.config.is_file() and config_file.load(run.config) != ours:
                with run_dir.held(run):  # more trials were asked for, and one of them is better
                    storage.remove_directory(run.path)
            holding.enter_context(run_dir.held(run))
        except AdapterError as error:
            yield Notice(f"The best is trained whole by another process: {error.problems[0]}", warns=False)
            return None
        storage.write_file(place.best_config, config_file.dump(ours))
        whole = tracking.tracked(train_whole(session, ours, run), ours, f"{place.path.name}/{run.path.name}")
        return (yield from whole)
