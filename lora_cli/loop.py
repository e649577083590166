"""The training loop: a generator of events. It neither prints nor logs; the caller records and draws."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_cli import adapter, adapter_folder, card, checkpoint, lora, run_dir, storage
from lora_cli.adapter_folder import Origin
from lora_cli.batches import Step, micro_batches, plan_epoch, steps_in_epoch
from lora_cli.blocks import compile_blocks, recompute_activations
from lora_cli.checkpoint import Stopping, TrainState
from lora_cli.config import RunConfig
from lora_cli.dataset import Dataset, TrainingSet
from lora_cli.distributed import keep_freed_memory, memory_error
from lora_cli.errors import AdapterError, Interrupted, SurroundingsError, TrainingStopped
from lora_cli.examples import Example
from lora_cli.forgetting import Validation, measure_chosen, without_surprising
from lora_cli.forward import base_states, embedding_noise, form, lay_out, share_inputs, target_loss
from lora_cli.fused import fuse
from lora_cli.interrupt import StopRequest
from lora_cli.loss import ZERO, LossSum, Pull
from lora_cli.model import LanguageModel
from lora_cli.optim import build_optimizer, clip_gradients, lr_at
from lora_cli.randomness import derive_seed
from lora_cli.records import Evaluated, Event, Finished, Notice, Saved, StepDone, Tested
from lora_cli.run_dir import RunDir


@dataclass(frozen=True)
class Timetable:
    """At which steps what happens: pure arithmetic."""

    steps_per_epoch: int
    total_steps: int

    @classmethod
    def of(cls, examples: int, config: RunConfig) -> "Timetable":
        """Return the timetable of a run that draws a number of examples an epoch."""
        per_epoch = steps_in_epoch(examples, config.train.batch_size)
        total = per_epoch * config.train.epochs
        return cls(per_epoch, min(total, config.train.max_steps or total))

    def is_due(self, step: int, per_epoch: int) -> bool:
        """Return whether something that happens `per_epoch` times an epoch, and at the end, happens after a step."""
        before, after = ((step - done) * per_epoch // self.steps_per_epoch for done in (1, 0))
        return after > before or step == self.total_steps


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
    ) -> None:
        """Give the model a fresh adapter and an optimizer. `state` is then at step 0; a forward sees `tokens`."""
        self.config = config
        self.run = run
        self.model = model
        self.train = train.examples
        self.mixture = train.mixture
        self.validation = validation
        self.test = test
        self.origin = origin
        self.stop = stop
        self.timetable = Timetable.of(train.mixture.drawn, config)
        self.tokens = tokens
        keep_freed_memory()
        torch.set_flush_denormal(True)  # lora_B starts at zero: its first products are denormal, and slow on a CPU
        lora.apply_lora(model.module, config.lora, config.seed)
        share_inputs(model)
        if config.train.compile:
            compile_blocks(model.module)  # the compiler fuses by itself
        else:
            fuse(model.module)
        if config.train.activation_checkpointing:
            recompute_activations(model.module)
        self.parameters = list(lora.trainable(model.module).values())
        for parameter in self.parameters:  # made once: made anew in each step they would cut the memory into pieces
            parameter.grad = torch.zeros_like(parameter)
        optimizer = build_optimizer(self.parameters, config.train)
        self.state = TrainState(model.module, optimizer, 0, Stopping())

    def restore(self) -> Iterator[Notice]:
        """Go to the newest whole checkpoint, where there is one, and forget what was measured after it."""
        path, problems = checkpoint.latest(self.run)
        for problem in problems:
            yield Notice(f"{problem}; {'an older checkpoint is used' if path else 'training begins anew'}.")
        if path is not None:
            checkpoint.load(path, self.state)
            yield Notice(f"Continuing after step {self.state.step} ({path}).")
        for problem in run_dir.rewind_metrics(self.run, self.state.step if path else -1):
            yield Notice(problem)

    def __iter__(self) -> Iterator[Event]:
        """Train to the end, to early stopping, or until asked to stop (Interrupted, after saving)."""
        if self.validation and self.state.step == 0:
            yield self._evaluate()
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
        while (loss := self._add_gradients(number, examples)) is None:
            self.tokens //= 2
            yield Notice(f"Memory ran out; step {number} is taken again with {self.tokens} tokens a forward.")
        norm = float(clip_gradients(self.parameters, self.config.train.max_grad_norm))
        self._require_finite(norm, "gradient norm", number, examples)
        rate = lr_at(number, self.timetable.total_steps, self.config.train)
        for group_of_parameters in self.state.optimizer.param_groups:
            group_of_parameters["lr"] = rate
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=False)
        self.state.step = number
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

    def _add_gradients(self, number: int, examples: Sequence[Example]) -> LossSum | None:
        """Add up the gradients of the sum of all token losses, divided once by the step's targets.

        Returns None, with the gradients at zero, when memory ran out and smaller micro-batches would need less.
        """
        lora.set_dropout(self.model.module, active=True)
        targets = sum(example.targets for example in examples)
        settings = self.config.train
        share = settings.share_prefixes and settings.neftune_alpha is None  # noise is drawn for each sequence
        plan = micro_batches(examples, self.tokens, form(self.model), share)
        loss = ZERO
        try:
            for micro_batch, groups in enumerate(plan):
                torch.manual_seed(derive_seed(self.config.seed, "dropout", number, micro_batch))
                batch = lay_out(self.model, groups, examples)
                pull = None
                if settings.kl_to_base:
                    pull = Pull(base_states(self.model, batch), settings.kl_to_base, settings.kl_without_target)
                with embedding_noise(self.model, settings.neftune_alpha, batch):
                    part = target_loss(self.model, batch, pull)
                (part.total / targets).backward()
                loss = loss + replace(part, total=part.total.detach())
                seen = [examples[member] for group in groups for member in group.members]
                self._require_finite(float(part.total.detach()), "loss", number, seen)
        except (RuntimeError, MemoryError) as error:
            if len(plan) == len(examples) or memory_error(error) is None:
                raise
        else:
            return loss
        self.state.optimizer.zero_grad(set_to_none=False)
        return None

    def _require_finite(
        self, value: float, name: str, step: int, examples: Sequence[Example], applied: bool = False
    ) -> None:
        if math.isfinite(value):
            return
        rows = ", ".join(example.where for example in examples[:8])
        path, _ = checkpoint.latest(self.run)
        last = f"The last checkpoint is {path}." if path else "No checkpoint was written."
        raise TrainingStopped(
            f"step {step}: the {name} is {value}. Rows of it: {rows}{', ...' if len(examples) > 8 else ''}.",
            "A lower train.learning_rate, or model.dtype: float32, are the usual ways out.",
            state=last if applied else f"The step was not applied. {last}",
        )

    def _after_step(self) -> Iterator[Event]:
        """Evaluate and save where the timetable says so, and save before stopping on request."""
        is_best = False
        if self.validation and self.timetable.is_due(self.state.step, self.config.eval.per_epoch):
            event = self._evaluate()
            is_best = event.improved
            yield event
        due = self.timetable.is_due(self.state.step, self.config.save.per_epoch) or self._patience_spent()
        if is_best or due or self.stop.wanted:
            yield self._save(is_best)
        if self.stop.signal_number is not None:
            raise Interrupted(
                self.stop.signal_number,
                f"stopped on request after step {self.state.step} of {self.timetable.total_steps}.",
                state=f"Saved in {self.run.path}.",
            )

    def _evaluate(self) -> Evaluated:
        """Measure validation loss and take it into early stopping; at step 0 it is the base that is measured."""
        began = time.perf_counter()
        stopping, patience = self.state.stopping, self.config.train.early_stopping.patience
        assert self.validation is not None, "asked for by the caller"
        result, forgetting = self.validation.measure(self.tokens)
        loss, targets = result.mean("loss"), int(result.targets.sum())
        self._require_finite(loss, "validation loss", self.state.step, self.validation.examples, applied=True)
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
        try:
            run_dir.sync_metrics(self.run)
            path = checkpoint.save(self.run, self.state, self._save_adapter)
            checkpoint.prune(self.run, self.config.save.keep)
        except SurroundingsError as error:
            last, _ = checkpoint.latest(self.run)
            way = f"goes on from {last}" if last else "begins anew, as there is no whole checkpoint yet"
            raise SurroundingsError(
                *error.problems,
                f"A checkpoint needs {checkpoint.size(sum(p.numel() for p in self.parameters)) / 1e6:.1f} MB.",
                state=f"Training stopped after step {self.state.step}; the same command {way}.",
            ) from error
        return Saved(self.state.step, path, is_best)

    def _save_adapter(self, folder: Path) -> None:
        adapter_folder.save(folder, self.model.module, self.config.lora, self.origin)

    def _finish(self) -> Finished:
        """Copy the best adapter, or the last one where nothing was evaluated, to where the result stands."""
        stopping = self.state.stopping
        chosen = run_dir.checkpoint_path(self.run, stopping.best_step or self.state.step)
        is_written = self.run.adapter.exists()  # by a process that was killed before it could say so
        if not is_written and (problems := storage.problems_in(chosen)):
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
            test=self._test(self.run.adapter if is_written else chosen),
            reason=f"no improvement{within} in {patience} evaluations" if early else "all steps taken",
            adapter=self.run.adapter,
        )
        if not is_written:
            with storage.new_directory(self.run.adapter) as folder:
                adapter_folder.copy(chosen, folder)
                card.write(folder, card.peft_card(adapter.read(chosen), self.run, finished))
        return finished

    def _test(self, chosen: Path) -> Tested | None:
        """Measure the chosen adapter on the test rows; it takes the place of the last one in the model."""
        if self.test is None or self.validation is None:
            return None
        adapter.load_weights(self.model.module, adapter.read(chosen))
        return measure_chosen(self.model, self.validation.examples, self.test, self.tokens)
