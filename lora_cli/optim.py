"""The optimizer, and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from lora_cli.config import RunConfig, TrainConfig

# Thinking Machines 2025, "LoRA Without Regret": 9.8 times 5e-5 at a width of 2000, falling with a power of the width
# that is 0.08 for Qwen and 0.78 for Llama models; here the one between.
_AT_2000, _POWER = 4.9e-4, 0.43
_LOWER = 0.1  # of that for full fine-tuning (the same source), and for PiSSA (2026, arXiv 2602.04998)


def build_optimizer(parameters: Mapping[str, torch.nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov & Hutter 2019) over the adapter's parameters by name; `set_rate` gives each its rate."""
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        ratio = config.loraplus_ratio if name.endswith(".lora_B") else 1.0
        groups.setdefault(ratio, []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": members, "ratio": ratio} for ratio, members in groups.items()],
        lr=0.0,
        betas=(0.9, 0.999),
        weight_decay=config.weight_decay,
        fused=True,
    )
    # The kernel changes them unseen by autograd, by whose count DoRA's layers know that A and B are others now.
    optimizer.register_step_post_hook(lambda *_: increment_version(list(parameters.values())))
    return optimizer


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next update; lora_B has a multiple of it (LoRA+, Hayou et al. 2024, 2402.12354)."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["ratio"]


def start_rate(width: int, config: RunConfig) -> float:
    """Return the rate around which to look, for a model's hidden size.

    The best rate falls with the root of the update's scale (Chen et al. 2026, arXiv 2602.06204), and with that of
    LoRA+'s ratio, which under Adam is the same knob (LoRA Without Regret).
    """
    rate = _AT_2000 * (2000 / width) ** _POWER
    if config.lora.method == "full":
        return float(f"{_LOWER * rate:.1g}")
    rate *= math.sqrt(32 / config.lora.plain_alpha / config.train.loraplus_ratio)
    return float(f"{rate * (_LOWER if config.lora.init == 'pissa' else 1.0):.1g}")


def lr_at(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the learning rate of update number `step` (the first is 1).

    Linear warm-up over `warmup_ratio` of all steps, then constant, or falling to zero just after the last step.
    """
    assert config.learning_rate != "auto", "resolved before training"
    peak = config.learning_rate
    warmup = round(config.warmup_ratio * total_steps)
    if step <= warmup:
        return peak * step / warmup
    progress = (step - 1 - warmup) / max(1, total_steps - warmup)
    match config.schedule:
        case "constant":
            return peak
        case "linear":
            return peak * (1 - progress)
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * progress))


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their joint norm is at most `max_norm`; return the norm before, a scalar."""
    return torch.nn.utils.clip_grad_norm_(parameters, max_norm)
