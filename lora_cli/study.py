"""The memory of a search: an Optuna study, which any number of processes and machines share.

A trial has a number, claimed by one process; what it tries follows from the seed, its number and the trials before it.
One that a killed process left goes on where its run stands. Optuna: Akiba et al. 2019, arXiv 1907.10902; its Parzen
estimator (TPE): Bergstra et al. 2011; giving trials up: successive halving, Li et al. 2020, arXiv 1810.05934.
"""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cli import storage
from lora_cli.config import Range, RunConfig
from lora_cli.errors import AdapterError, ConfigError, SurroundingsError, shown
from lora_cli.randomness import derive_seed
from lora_cli.records import TrialEnded, as_json
from lora_cli.schema import value_of
from lora_cli.space import Space, is_whole

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.samplers import BaseSampler, TPESampler
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, TrialState
except ImportError:
    raise SurroundingsError(
        "lora tune needs the package optuna, which is not installed: pip install 'lora-cli[tune]'. "
        "train.learning_rate: auto and lora tune --one-at-a-time need nothing."
    ) from None

_OUTCOME, _BEHIND = "outcome", "behind"
_STARTUP = 5  # trials drawn at random before the estimator says anything
_OPENINGS = 4
_UNHELD_SECONDS = 60.0  # after which a trial without a run was left by a process that was killed at once
Sampling = Callable[[int], BaseSampler]  # of a seed
Hold = Callable[[int], AbstractContextManager[object]]  # the folder of a trial, for this process


@dataclass(frozen=True)
class Claim:
    """A trial that this process holds, and its values of dotted keys."""

    number: int
    values: Mapping[str, Any]
    trial: optuna.Trial


class Study:
    """The trials of one search."""

    def __init__(
        self,
        journal: Path,
        config: RunConfig,
        space: Space,
        machine: str,
        digest: str,
        sampling: Sampling | None = None,
    ) -> None:
        """Open the study, or begin it.

        `machine` names the file system on which this process's trials lie, `digest` all that must be the same for all
        processes. Raises ConfigError where it is not.
        """
        optuna.logging.disable_default_handler()
        self._space, self._machine, self._wanted = space, machine, config.tune.trials
        self._distributions = {key: _distribution(config, key, wanted) for key, wanted in space.items()}
        self.both = config.tune.objective == "loss-and-forgetting"
        own = {key: _stored(wanted, value_of(config, key)) for key, wanted in space.items()}
        constrained = config.eval.forgetting_budget is not None and not self.both
        self.prunes = config.tune.prune and not self.both
        self._study = optuna.create_study(
            storage=_storage(config.tune.storage or str(journal)),
            study_name=config.output_dir,
            load_if_exists=True,
            directions=["minimize"] * (2 if self.both else 1),
            sampler=_Sampler(config.seed, sampling or _estimator(constrained), self._distributions, own),
            pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
            if self.prunes
            else optuna.pruners.NopPruner(),
        )
        known = self._study.user_attrs.get("digest")
        if known is None:
            self._study.set_user_attr("digest", digest)
        elif known != digest:
            raise ConfigError(
                f"tune.storage: {shown(config.tune.storage or journal)} holds a study of the name "
                f"{shown(config.output_dir)} around another config, base or data; set another output_dir."
            )

    def claim(self, hold: Hold, holding: ExitStack) -> Claim | None:
        """Return a trial that a killed process left, else a new one; None where no more is wanted.

        Its folder is held for as long as `holding` is open.
        """
        for left in self._trials(TrialState.RUNNING):
            if (held := self._take(left, hold)) is not None:
                holding.enter_context(held)
                return self._claimed(optuna.Trial(self._study, left._trial_id))
        while sum(trial.state != TrialState.FAIL for trial in self._trials()) < self._wanted:
            trial = self._study.ask()
            before = sum(one.state != TrialState.FAIL for one in self._trials() if one.number < trial.number)
            if before >= self._wanted:  # another process was as quick
                self._study.tell(trial, state=TrialState.FAIL)
                return None
            try:
                holding.enter_context(hold(trial.number))
            except AdapterError:
                continue
            return self._claimed(trial)
        return None

    def _take(self, left: FrozenTrial, hold: Hold) -> ExitStack | None:
        """Hold the folder of a running trial, where it is of this file system and nobody does."""
        there = left.user_attrs.get("machine")
        age = time.time() - (left.datetime_start.timestamp() if left.datetime_start else 0)
        if there != self._machine and (there is not None or age < _UNHELD_SECONDS):
            return None
        with ExitStack() as stack:
            try:
                stack.enter_context(hold(left.number))
            except AdapterError:
                return None
            now = next(trial for trial in self._trials() if trial.number == left.number)
            return stack.pop_all() if now.state == TrialState.RUNNING else None
        return None

    def _claimed(self, trial: optuna.Trial) -> Claim:
        trial.set_user_attr("machine", self._machine)
        values = dict[str, Any]()
        for key, wanted in self._space.items():
            match self._distributions[key]:
                case FloatDistribution() as floats:
                    values[key] = trial.suggest_float(key, floats.low, floats.high, log=floats.log)
                case IntDistribution() as whole:
                    values[key] = trial.suggest_int(key, whole.low, whole.high, log=whole.log)
                case CategoricalDistribution() as choices:
                    found = trial.suggest_categorical(key, choices.choices)
                    values[key] = next(value for value in wanted if repr(value) == found)
        return Claim(trial.number, values, trial)

    def is_behind(self, claim: Claim, resource: int, loss: float) -> bool:
        """Take in a validation loss at `resource` ninths of a trial; return whether it should be given up."""
        if resource == claim.trial.user_attrs.get(_BEHIND):  # found before by a process that could not say so any more
            return True
        claim.trial.report(loss, resource)
        is_behind = claim.trial.should_prune()
        if is_behind:
            claim.trial.set_user_attr(_BEHIND, resource)
        return is_behind

    def end(self, claim: Claim, ended: TrialEnded) -> None:
        """Write down how a trial ended."""
        claim.trial.set_user_attr(_OUTCOME, as_json(ended))
        if ended.state != "finished":
            self._study.tell(claim.trial, state=TrialState.PRUNED)
        else:
            objectives = (ended.loss, ended.forgetting) if self.both else (ended.loss,)
            self._study.tell(claim.trial, [float("inf") if value is None else value for value in objectives])

    def outcomes(self) -> list[dict[str, Any]]:
        """Return what was written down of the trials that have ended, by their numbers."""
        return [one.user_attrs[_OUTCOME] for one in self._trials(TrialState.COMPLETE, TrialState.PRUNED)]

    def running(self) -> int:
        """Return how many trials are under way, here or elsewhere."""
        return len(self._trials(TrialState.RUNNING))

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=states or None)


class _Sampler(BaseSampler):
    """Gives the first trial the config's own values; every other's draws are a function of the seed and its number."""

    def __init__(
        self, seed: int, sampling: Sampling, space: Mapping[str, BaseDistribution], own: Mapping[str, Any]
    ) -> None:
        self._seed, self._sampling = seed, sampling
        self._own = {key: value for key, value in own.items() if _contains(space[key], value)}
        self._first = {key: space[key] for key in self._own}
        self._inner = sampling(seed)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        self._inner = self._sampling(derive_seed(self._seed, "tune", trial.number) % 2**32)
        self._inner.before_trial(study, trial)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._inner.infer_relative_search_space(study, trial) if trial.number else dict(self._first)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._inner.sample_relative(study, trial, search_space) if trial.number else dict(self._own)

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        self._inner.after_trial(study, trial, state, values)


def _estimator(constrained: bool) -> Sampling:
    """Return TPE over all keys together, which knows of trials that forget too much where there is a budget."""
    excess = (lambda trial: (float(trial.user_attrs[_OUTCOME]["excess"]),)) if constrained else None

    def sampling(seed: int) -> BaseSampler:
        with warnings.catch_warnings():  # Optuna 5 says that 7 will have another way, which 4 does not have
            warnings.simplefilter("ignore", FutureWarning)
            return TPESampler(seed=seed, multivariate=True, n_startup_trials=_STARTUP, constraints_func=excess)

    return sampling


def _distribution(config: RunConfig, key: str, wanted: Range | Sequence[Any]) -> BaseDistribution:
    if not isinstance(wanted, Range):
        return CategoricalDistribution([repr(value) for value in wanted])
    if is_whole(config, key):
        return IntDistribution(int(wanted.low), int(wanted.high), log=wanted.log)
    return FloatDistribution(float(wanted.low), float(wanted.high), log=wanted.log)


def _stored(wanted: Range | Sequence[Any], value: Any) -> Any:
    """Return a value as the study has it: of a list as text, for all types are allowed there."""
    return value if isinstance(wanted, Range) else repr(value)


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    return isinstance(value, int | float) and bool(distribution._contains(value))


def _storage(place: str) -> optuna.storages.BaseStorage:
    """Open a database by its URL, or a journal file. Raises SurroundingsError."""
    for left in reversed(
        range(_OPENINGS)
    ):  # two processes that make the tables of a database at once hinder each other
        try:
            if "://" in place:
                return optuna.storages.RDBStorage(place)
            _mend(Path(place))
            return optuna.storages.JournalStorage(JournalFileBackend(place))
        except Exception as error:  # of whichever database it is
            if not left:
                reason = shown(error, 200)
                raise SurroundingsError(f"tune.storage: {shown(place)} cannot be opened: {reason}.") from None
            time.sleep(0.3)
    raise AssertionError("the last opening returns or raises")


def _mend(journal: Path) -> None:
    """Cut off a last line that a power cut or a full disk left unfinished: with another after it none could be read."""
    if not journal.exists() or time.time() - journal.stat().st_mtime < _UNHELD_SECONDS:  # somebody may be writing it
        return
    lines = journal.read_bytes()
    whole = lines.rfind(b"\n") + 1
    if whole < len(lines):
        storage.write_file(journal, lines[:whole])
