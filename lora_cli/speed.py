"""Tokens a second of base, base + adapter and merged model, taken in turns so that a busy machine slows all alike."""

import copy
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from lora_cli import adapter, interrupt, model
from lora_cli.distributed import current_world
from lora_cli.intervals import estimate
from lora_cli.model import LanguageModel, generating
from lora_cli.reports import Speed
from lora_cli.tuned import Result

ROUNDS = 9
PROMPT, ANSWER = 256, 48  # tokens
_BEFORE_ANSWER = 16  # tokens of prompt an answer goes on from


@torch.inference_mode()
def measure_speeds(result: Result, merged: Path, tuned_by: str) -> Mapping[str, Speed]:
    """Time a prompt read at once and an answer of one token after the other, batch 1; the base's weights shared.

    `tuned_by` says what the result's adapter is to the merged model.
    """
    device = current_world(result.base.device).device
    base = model.load_model(result.header, result.base, device)
    shared = {id(parameter): parameter for parameter in base.module.parameters()}
    with_adapter = LanguageModel(copy.deepcopy(base.module, shared), base.layout, base.own_attention)
    adapter.attach(with_adapter.module, result.adapter)
    section = result.base.model_copy(update={"path": str(merged), "revision": None, "quantization": None})
    models = {
        "base": base,
        f"base + {tuned_by}": with_adapter,
        "merged": model.load_model(model.read_header(section), section, device),
    }
    longest = (result.header.max_positions or PROMPT + ANSWER) - ANSWER
    prompt = [3 + n % 100 for n in range(min(PROMPT, longest))]
    seconds = {name: np.zeros((ROUNDS, 2)) for name in models}
    for number in range(-1, ROUNDS):  # the first is to warm up
        names = deque(models)
        names.rotate(number)  # each comes after each other one as often
        for name in names:
            interrupt.poll()
            taken = _seconds(models[name], prompt)
            if number >= 0:
                seconds[name][number] = taken
    return {name: _speed(taken, seconds["base"], len(prompt)) for name, taken in seconds.items()}


def _seconds(model: LanguageModel, prompt: Sequence[int]) -> tuple[float, float]:
    """Return what a prompt takes, and an answer to its last tokens."""
    ids = torch.tensor([prompt], device=model.device)
    last = ids[:, -_BEFORE_ANSWER:]
    with generating(model):
        began = _now()
        model.module(input_ids=ids, use_cache=True, logits_to_keep=1)
        read = _now()
        model.module.generate(
            input_ids=last,
            attention_mask=torch.ones_like(last),
            min_new_tokens=ANSWER,
            max_new_tokens=ANSWER,
            do_sample=False,
            use_cache=True,
        )
        return read - began, _now() - read


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _speed(taken: np.ndarray, base: np.ndarray, prompt: int) -> Speed:
    """Return the speeds from seconds [rounds, prompt and answer]; ratios round by round, so that noise is shared."""
    speeds = [
        estimate(np.stack([np.full(ROUNDS, tokens), taken[:, n]], 1)) for n, tokens in enumerate((prompt, ANSWER))
    ]
    ratios = [estimate(np.stack([base[:, n], taken[:, n]], 1)) for n in range(2)]
    return Speed(*speeds, *ratios)
