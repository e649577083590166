"""Tasks of EleutherAI's evaluation harness (lm-eval, an extra) on base and adapter, with the model that is loaded."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lora_cli import lora, tuning
from lora_cli.errors import InputError, SurroundingsError, shown
from lora_cli.evaluate import BASE_AND_ADAPTER
from lora_cli.examples import Tokenizer
from lora_cli.intervals import compare
from lora_cli.model import LanguageModel, generating
from lora_cli.reports import Comparison
from lora_cli.scoring import over_ones

_BATCH = 8


def run_tasks(
    model: LanguageModel, tokenizer: Tokenizer, tasks: Sequence[str], limit: int | None
) -> dict[str, Comparison]:
    """Run tasks, each a name the harness knows or a YAML file, on base and adapter; `limit` documents of each.

    Returns a comparison for each task/metric. Raises InputError for tasks that are not there or cannot be run,
    SurroundingsError where the harness or a task's data cannot be had.
    """
    lora.set_dropout(model.module, None)
    results = []
    with _quietly(), generating(model), torch.random.fork_rng():
        try:
            from lm_eval import evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise SurroundingsError(f"--tasks needs lm-eval: pip install 'lora-cli[harness]' ({error}).") from None
        known = not all(task.endswith((".yaml", ".yml")) for task in tasks)
        for gain in BASE_AND_ADAPTER:
            try:
                loaded = TaskManager(include_defaults=known).load(list(tasks))
                for task in loaded["tasks"].values():
                    task.set_fewshot_seed(seed=0)
                    if task.get_config("num_fewshot") is None:
                        task.set_config(key="num_fewshot", value=0)
                with tuning.gain(model.module, gain), _tied_as_it_is(model.module):
                    language_model = HFLM(
                        pretrained=model.module, tokenizer=tokenizer, batch_size=_BATCH, softmax_dtype="float32"
                    )
                    results.append(evaluate(language_model, loaded, limit=limit, bootstrap_iters=1, log_samples=True))
            except (ConnectionError, OSError) as error:
                raise SurroundingsError(f"--tasks: the data cannot be had: {shown(error, 300)}") from None
            except KeyError as error:
                raise InputError(f"--tasks: there is no such task, or its data lack a field: {error}.") from None
            except (ValueError, TypeError, AssertionError) as error:
                raise InputError(f"--tasks: cannot be run: {shown(error, 300)}") from None
    base, tuned = map(_tables, results)
    return {name: compare(base[name], tuned[name]) for name in base}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what the harness prints off the terminal, and it off the network where the hub is to be left alone."""
    if os.environ.get("HF_HUB_OFFLINE"):
        os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    noise = io.StringIO()
    with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
        yield


@contextlib.contextmanager
def _tied_as_it_is(module: Any) -> Iterator[None]:
    """Keep the harness from tying weights anew, which an adapted output head or embedding would not survive."""
    module.tie_weights = lambda *_, **__: None
    try:
        yield
    finally:
        del module.tie_weights


def _tables(result: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return, for each task/metric that is a mean over documents, their values beside ones: [documents, 2]."""
    found = {}
    for task, samples in result["samples"].items():
        for key in result["results"][task]:
            metric, comma, kept = key.partition(",")
            values = [sample.get(metric) for sample in samples if sample.get("filter", kept) == kept]
            if comma and values and all(isinstance(value, int | float | np.number) for value in values):
                found[f"{task}/{metric}"] = over_ones(values)
    return found
