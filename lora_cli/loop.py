"""The training loop: a generator of events. It neither prints nor logs; the caller records and draws."""

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from lora_cli import checkpoint, lora, manifest, metrics, run_dir, tuning
from lora_cli.adapter_folder import Origin
from lora_cli.batches import Step, plan_epoch
from lora_cli.blocks import as_loaded
from lora_cli.checkpoint import Stopping, TrainState
from lora_cli.config import RunConfig
from lora_cli.dataset import Dataset, TrainingSet
from lora_cli.distributed import ALONE, World
from lora_cli.errors import AdapterError, Interrupted, SurroundingsError, TrainingStopped
from lora_cli.examples import Example
from lora_cli.forgetting import Validation, measure_chosen, without_surprising
from lora_cli.heap import keep_freed_memory
from lora_cli.interrupt import StopRequest
from lora_cli.lanes import lanes_of
from lora_cli.model import LanguageModel
from lora_cli.optim import build_optimizer, clip_gradients, lr_at, set_rate
from lora_cli.product import Product
from lora_cli.records import Evaluated, Event, Finished, Notice, Saved, StepDone, Tested
from lora_cli.run_dir import RunDir
from lora_cli.step import WINDOW, Summed, add_gradients, jump, lost, worst_rows
from lora_cli.timetable import Timetable


class Loop:
    """One run of the loop: what it reads (fixed) and the state it changes (`state`)."""

    def __init__(
        self,
        config: RunConfig,
        run: RunDir,
        model: LanguageModel,
        train: TrainingSet,
        validation: Validation | None,
        test: Dataset | None,
        origin: Origin,
        stop: StopRequest,
        tokens: int,
        world: World = ALONE,
    ) -> None:
        """Give the model something to train, and an optimizer. `state` is then at step 0; a forward sees `tokens`."""
        self.config = config
        self.run = run
        self.model = model
        self.train = train.examples
        self.mixture = train.mixture
        self.validation = validation
        self.test = test
        self.product = Product(config, run, origin)
        self.stop = stop
        self.timetable = Timetable.of(train.mixture.drawn, config)
        self.tokens = tokens
        self.world = world
        keep_freed_memory()
        torch.set_flush_denormal(True)  # lora_B starts at zero: its first products are denormal, and slow on a CPU
        as_loaded(model.module)
        tuning.apply(model.module, config.lora, config.seed)
        for tensor in lora.taken_from_base(model.module):
            world.spread(tensor)
        self.lanes = lanes_of(model, config, world.size)
        trainable = tuning.trainable(model.module)
        self.parameters = list(trainable.values())
        optimizer = build_optimizer(trainable, config.train)
        self.state = TrainState(model.module, optimizer, 0, Stopping(), evaluated=validation is None)
        self.losses = deque[float](maxlen=WINDOW)  # of the steps before

    def restore(self) -> Iterator[Notice]:
        """Go to the newest whole checkpoint, where there is one, and forget what was measured after it."""
        newest, problems = checkpoint.latest(self.run) if self.world.is_main else (None, [])
        path = Path(found) if (found := self.world.from_main(newest and str(newest))) else None
        for problem in problems:
            yield Notice(f"{problem}; {'an older checkpoint is used' if path else 'training begins anew'}.")
        if path is not None:
            checkpoint.load(path, self.state)
            if self.world.is_main:
                checkpoint.prune(self.run, self.config.save.keep)  # a process may have been killed before it did
            yield Notice(f"Continuing after step {self.state.step} ({path}).", warns=False)
        losses = list[float]()
        if self.world.is_main:
            for problem in metrics.rewind(self.run, self.state.step if path else -1, self.state.evaluated):
                yield Notice(problem)
            losses = [record["loss"] for record in metrics.read(self.run) if record["event"] == "step"]
        self.losses.extend(self.world.from_main(losses[-WINDOW:]))

    def __iter__(self) -> Iterator[Event]:
        """Train to the end, to early stopping, or until asked to stop (Interrupted, after saving)."""
        if not self.state.evaluated:  # of the base, or where a stop cut it short
            yield from self._after_step()
        epoch, plan = -1, list[Step]()
        while self.state.step < self.timetable.total_steps and not self._patience_spent():
            if self.state.step // self.timetable.steps_per_epoch != epoch:
                epoch = self.state.step // self.timetable.steps_per_epoch
                plan = self._plan(epoch)
            yield from self._take_step(plan[self.state.step % self.timetable.steps_per_epoch])
            yield from self._after_step()
        yield self._finish()

    def _plan(self, epoch: int) -> list[Step]:
        together = self.config.train.order == "prompts"
        keys = self.train.column("prompt_keys").tolist() if together else None
        return plan_epoch(self.mixture, self.config.train.batch_size, self.config.seed, epoch, keys)

    def _take_step(self, step: Step) -> Iterator[Notice | StepDone]:
        """Make one optimizer update."""
        began = time.perf_counter()
        number = self.state.step + 1
        examples = [self.train[index] for index in step]
        if (limit := self.config.train.surprise_limit) is not None:
            examples = without_surprising(self.model, examples, limit, self.tokens)
        while (summed := self._add_gradients(number, examples)) is None:
            if len(self.lanes) > 1:
                self.lanes, way = self.lanes.alone(), "one forward at a time"
            else:
                self.tokens //= 2
                way = f"{self.tokens} tokens a forward"
            yield Notice(f"Memory ran out; step {number} is taken again with {way}.")
        loss = summed.loss
        self._require_sound(number, loss.mean, summed)
        self.world.add_up(self.lanes.gradients)
        norm = float(clip_gradients(self.parameters, self.config.train.max_grad_norm))
        if not math.isfinite(norm):
            self.lanes.gradients.zero_()
            summed = self._add_gradients(number, examples, checked=True) or summed  # to find where it comes from
            raise self._stopped(number, f"the gradient norm is {norm}", summed)
        rate = lr_at(number, self.timetable.total_steps, self.config.train)
        set_rate(self.state.optimizer, rate)
        self.state.optimizer.step()
        self.lanes.gradients.zero_()
        self.state.step = number
        self.state.evaluated = not (self.validation and self.timetable.is_due(number, self.config.eval.per_epoch))
        self.losses.append(loss.mean)
        yield StepDone(
            step=number,
            epoch=number / self.timetable.steps_per_epoch,
            loss=loss.mean,
            kl=float(loss.penalty) / weight / loss.targets if (weight := self.config.train.kl_to_base) else None,
            targets=loss.targets,
            tokens=sum(map(len, examples)),
            learning_rate=rate,
            grad_norm=norm,
            seconds=time.perf_counter() - began,
        )

    def _add_gradients(self, number: int, examples: Sequence[Example], checked: bool = False) -> Summed | None:
        return add_gradients(self.lanes, self.config, number, examples, self.tokens, self.world, checked)

    def _require_sound(self, number: int, loss: float, summed: Summed) -> None:
        """Raise TrainingStopped where a step's loss is not finite, or jumped, or training only made the model worse."""
        if not math.isfinite(loss):
            raise self._stopped(number, f"the loss is {loss}", summed)
        factor = self.config.train.max_loss_jump
        if (usual := jump(loss, self.losses, factor)) is not None:
            what = f"the loss is {loss:.4g}, more than {factor:g} times (train.max_loss_jump) the usual {usual:.4g}"
            raise self._stopped(number, what, summed)
        base = self.state.stopping.base_loss
        if (mean := lost([*self.losses, loss][-WINDOW:], base)) is not None:
            what = f"the last {WINDOW} steps had a mean loss of {mean:.4g}; the base has {base:.4g}"
            raise self._stopped(number, what, summed)

    def _stopped(self, number: int, what: str, summed: Summed | None = None) -> TrainingStopped:
        """Return the error of a step that must not be applied; without `summed` it was applied before."""
        rows = f" Rows of it: {worst_rows(summed.suspect, self.world)}." if summed else ""
        path, _ = checkpoint.latest(self.run)
        last = f"The last checkpoint is {path}." if path else "No checkpoint was written."
        return TrainingStopped(
            f"step {number}: {what}.{rows}",
            "A lower train.learning_rate, other rows, or model.dtype: float32, are the usual ways out.",
            state=f"The step was not applied. {last}" if summed else last,
        )

    def _after_step(self) -> Iterator[Event]:
        """Evaluate and save where the timetable says so, and save before stopping on request."""
        step, is_best = self.state.step, False
        if not self.state.evaluated:
            try:
                event = self._evaluate()
            except Interrupted as stop:
                if step:  # as not evaluated: the next run does that first
                    yield self._save(is_best)
                raise self._interrupted(stop.signal_number) from None
            self.state.evaluated = True
            is_best = event.improved
            yield event
        due = self.timetable.is_due(step, self.config.save.per_epoch) or self._patience_spent()
        number = self.world.largest(self.stop.signal_number or 0)
        if step and (is_best or due or number):
            yield self._save(is_best)
        if number:
            raise self._interrupted(number)

    def _interrupted(self, number: int) -> Interrupted:
        step = self.state.step
        return Interrupted(
            number,
            f"stopped on request after step {step} of {self.timetable.total_steps}.",
            state=f"Saved in {self.run.path}." if step else "There was nothing to save yet.",
        )

    def _evaluate(self) -> Evaluated:
        """Measure validation loss and take it into early stopping; at step 0 it is the base that is measured."""
        began = time.perf_counter()
        stopping, patience = self.state.stopping, self.config.train.early_stopping.patience
        assert self.validation is not None, "asked for by the caller"
        measure = self.validation.measure if self.state.step else self.validation.measure_base
        result, forgetting = measure(self.tokens)
        loss, targets = result.mean("loss"), int(result.targets.sum())
        if not math.isfinite(loss):
            raise self._stopped(self.state.step, f"the validation loss is {loss}")
        rise = forgetting.rise.value if forgetting else None
        min_delta, budget = self.config.train.early_stopping.min_delta, self.config.eval.forgetting_budget
        improved = False
        if self.state.step == 0:
            stopping.base_loss = loss
        else:
            improved = stopping.update(self.state.step, loss, min_delta, rise, budget)
        return Evaluated(
            step=self.state.step,
            epoch=self.state.step / self.timetable.steps_per_epoch,
            loss=loss,
            targets=targets,
            token_accuracy=result.mean("correct"),
            improved=improved,
            best_step=stopping.best_step,
            patience_left=None if patience is None else max(0, patience - stopping.without_improvement),
            seconds=time.perf_counter() - began,
            forgetting=forgetting,
            within_budget=None if rise is None or budget is None else rise <= budget,
        )

    def _patience_spent(self) -> bool:
        patience = self.config.train.early_stopping.patience
        return patience is not None and self.state.stopping.without_improvement >= patience

    def _save(self, is_best: bool) -> Saved:
        if self.world.is_main:
            try:
                written = checkpoint.save(self.run, self.state, self._save_trained)
                checkpoint.prune(self.run, self.config.save.keep, written)
            except SurroundingsError as error:
                last, _ = checkpoint.latest(self.run)
                way = f"goes on from {last}" if last else "begins anew, as there is no whole checkpoint yet"
                raise SurroundingsError(
                    *error.problems,
                    f"A checkpoint needs {checkpoint.size(len(self.lanes.gradients), self.config.lora) / 1e6:.1f} MB.",
                    state=f"Training stopped after step {self.state.step}; the same command {way}.",
                ) from error
        self.world.from_main()
        return Saved(self.state.step, run_dir.checkpoint_path(self.run, self.state.step), is_best)

    def _save_trained(self, folder: Path) -> None:
        self.product.save(folder, self.model.module)

    def _finish(self) -> Finished:
        """Write the best checkpoint, or the last one where nothing was evaluated, where the result stands."""
        stopping, place = self.state.stopping, self.product.place
        chosen = run_dir.checkpoint_path(self.run, stopping.best_step or self.state.step)
        # It is there where a process was killed before it could say so.
        is_written = self.world.from_main(place.exists())
        if not is_written and (problems := manifest.problems_in(chosen)):
            raise AdapterError(
                *problems, state=f"The best checkpoint is damaged; the others in {chosen.parent} can be used."
            )
        early = self.state.step < self.timetable.total_steps
        patience = self.config.train.early_stopping.patience
        within = " within the forgetting budget" if self.config.eval.forgetting_budget else ""
        finished = Finished(
            step=self.state.step,
            best_step=stopping.best_step,
            best_loss=stopping.best_loss,
            base_loss=stopping.base_loss,
            best_forgetting=stopping.best_forgetting,
            within_budget=None if self.config.eval.forgetting_budget is None else not stopping.best_excess,
            test=self._test(place if is_written else chosen),
            reason=f"no improvement{within} in {patience} evaluations" if early else "all steps taken",
            adapter=place,
        )
        if not is_written and self.world.is_main:
            self.product.finish(chosen, self.model.module, finished)
        self.world.from_main()
        return finished

    def _test(self, chosen: Path) -> Tested | None:
        """Measure what was chosen on the test rows; it takes the place of the last step's in the model."""
        if self.test is None or self.validation is None:
            return None
        checkpoint.load_trained(chosen, self.model.module)
        try:
            return measure_chosen(self.validation, self.test, self.tokens)
        except Interrupted as stop:
            raise self._interrupted(stop.signal_number) from None
