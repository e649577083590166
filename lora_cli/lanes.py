"""Forwards side by side on a CPU, each on some of its threads: those of a step with their backward passes, or alone.

Threads that divide every operation wait for each other at its end; what is too small to be divided, one of them does
alone. Lanes divide a step's examples instead, and meet once. Each has a model of its own, with the same weights: what a
module remembers during a forward, and its gradients, are then its lane's. Gradients are added up in the lanes' order:
it makes no difference which lane was faster.
"""

import copy
import functools
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from lora_cli import full, tuning
from lora_cli.batches import Form, MicroBatch, deal, groups_of, pack, size_of
from lora_cli.blocks import change_blocks
from lora_cli.config import RunConfig
from lora_cli.examples import Example
from lora_cli.forward import share_inputs
from lora_cli.model import LanguageModel

_LANES = 2
_UNEVEN = 1.1  # times the mean: with a longer lane, all threads in turn are as fast

Work = TypeVar("Work")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Lane:
    """A model, and the gradients [n] of all that is trained in it; [0] where it is only asked."""

    model: LanguageModel
    gradients: Tensor


def count_for(config: RunConfig, device: torch.device, processes: int = 1) -> int:
    """Return how many lanes a run has.

    One by itself where there is nothing to gain or something would be lost: on a GPU; of several processes, which share
    the work already; without two threads of its own; with one example a step; with noise, which is drawn from one
    generator; with a compiler that is not made for it; with gradients as large as the model.
    """
    settings = config.train
    plain = settings.neftune_alpha is None and not settings.compile and config.lora.method != "full"
    return _most(device, processes) if plain and settings.batch_size > 1 else 1


def _most(device: torch.device, processes: int) -> int:
    divided = device.type == "cpu" and processes == 1 and "OpenMP" in torch.__config__.parallel_info()
    return _LANES if divided and torch.get_num_threads() >= _LANES else 1


class Lanes:
    """The lanes of a model, which is that of the first."""

    def __init__(self, models: Sequence[LanguageModel], trained: bool = True) -> None:
        """Make the gradients of each model, where they are trained."""
        self.of_each = [Lane(model, _gradients(model) if trained else torch.empty(0)) for model in models]

    def __len__(self) -> int:
        return len(self.of_each)

    def __str__(self) -> str:
        return f"{len(self)} forwards at a time" if len(self) > 1 else ""

    @property
    def gradients(self) -> Tensor:
        """The sum of all gradients after `run`, in the first lane's place."""
        return self.of_each[0].gradients

    def alone(self) -> "Lanes":
        """Return the first lane by itself."""
        lanes = copy.copy(self)
        lanes.of_each = self.of_each[:1]
        return lanes

    def run(self, work: Callable[[Lane, Work], Result], loads: Sequence[Work]) -> list[Result]:
        """Return what `work` makes of each load in a lane of its own; one load has all threads.

        There are at most as many loads as lanes.
        """
        if len(loads) == 1:
            return [work(self.of_each[0], loads[0])]
        pool = _threads(len(self))
        threads = torch.get_num_threads()

        def with_own_threads(lane: Lane, load: Work) -> Result:
            torch.get_num_threads()  # which a thread that is new would otherwise take over again later
            torch.set_num_threads(max(1, threads // len(self)))
            torch.set_flush_denormal(True)
            return work(lane, load)

        running = [pool.submit(with_own_threads, *pair) for pair in zip(self.of_each, loads, strict=False)]
        futures.wait(running)
        torch.set_num_threads(threads)
        return [each.result() for each in running]

    def collect(self) -> None:
        """Add the gradients of the other lanes to those of the first, and set theirs to zero."""
        for lane in self.of_each[1:]:
            self.gradients.add_(lane.gradients)
            lane.gradients.zero_()

    def clear(self) -> None:
        """Set all gradients to zero."""
        for lane in self.of_each:
            lane.gradients.zero_()


@functools.cache
def _threads(count: int) -> futures.ThreadPoolExecutor:
    """Return the threads of so many lanes; all lanes take turns on them."""
    return futures.ThreadPoolExecutor(count, "lane")


def lanes_of(model: LanguageModel, config: RunConfig, processes: int = 1) -> Lanes:
    """Return the lanes in which a run of a config, one of so many processes, trains an adapted model."""
    share_inputs(model)
    models = twins(model, count_for(config, model.device, processes))
    for each in models:
        change_blocks(each.module, config.train)
    return Lanes(models)


def lanes_to_ask(model: LanguageModel, processes: int = 1) -> Lanes:
    """Return the lanes in which one of so many processes asks a model, as it now is, and trains nothing.

    One by itself where a copy would not be compiled, or would keep weights of its own to change between gains.
    """
    apart = full.of(model.module) or any(part._compiled_call_impl is not None for part in model.module.modules())
    return Lanes(twins(model, 1 if apart else _most(model.device, processes)), trained=False)


def twins(model: LanguageModel, count: int) -> list[LanguageModel]:
    """Return a model and others with modules of their own: the same weights, what is trained with other gradients.

    By itself where its modules hold something that cannot be copied.
    """
    module = model.module
    trained = {id(parameter) for parameter in tuning.trainable(module).values()}
    models = [model]
    try:
        for _ in range(1, count):
            tensors = [*module.parameters(), *module.buffers()]
            shared = {id(t): nn.Parameter(t.detach()) if id(t) in trained else t for t in tensors}
            models.append(replace(model, module=copy.deepcopy(module, shared)))
    except (TypeError, ValueError, AttributeError, RuntimeError, copy.Error):
        return [model]
    return models


def _gradients(model: LanguageModel) -> Tensor:
    return flat_gradients(list(tuning.trainable(model.module).values()))


def flat_gradients(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return one buffer [n] of zeros, the gradients of all parameters: made once, and added up over ranks at once."""
    flat = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device, dtype=parameters[0].dtype)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = part.view_as(parameter)
    return flat


def divide(examples: Sequence[Example], tokens: int, form: Form, share: bool, lanes: int) -> list[list[MicroBatch]]:
    """Return the micro-batches of each lane; all in one list where the lanes would not be about as long."""
    groups = groups_of(examples, tokens, form, share)
    loads = deal(groups, examples, lanes)
    lengths = [sum(size_of(group, examples) for group in load) for load in loads]
    if max(lengths) * lanes > _UNEVEN * sum(lengths):
        loads = [groups]
    return [pack(load, examples, tokens, form) for load in loads]
