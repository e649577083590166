"""`lora check`: what a run would do, found by the code that would do it; no weight is read, nothing is written."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from lora_cli import examples, lora
from lora_cli.config import RunConfig
from lora_cli.data import Conversation
from lora_cli.distributed import current_world
from lora_cli.forward import packed_tokens
from lora_cli.loop import Timetable
from lora_cli.model import choose_dtype
from lora_cli.prepare import Prepared, prepare
from lora_cli.records import CheckReport, MemoryEstimate


def check(config: RunConfig, rows: tuple[Sequence[Conversation], Sequence[Conversation]]) -> CheckReport:
    """Prepare a run on its rows and report on it. Raises what training would raise before its first step."""
    prepared = prepare(config, rows)
    timetable = Timetable.of(len(prepared.train), config)
    shapes = [lora.linear_shape(prepared.skeleton.get_submodule(path)) for path in prepared.targets]
    trainable = sum(config.lora.rank * (inputs + outputs) for inputs, outputs in shapes)
    total = sum(p.numel() for p in prepared.skeleton.parameters())
    return CheckReport(
        train=prepared.train_counts,
        validation=prepared.validation_counts,
        steps_per_epoch=timetable.steps_per_epoch,
        total_steps=timetable.total_steps,
        preview_row=prepared.train[0].where,
        preview=examples.preview(prepared.train[0], prepared.header.tokenizer),
        modules=dict(Counter(path.rsplit(".", 1)[-1] for path in prepared.targets)),
        trainable_parameters=trainable,
        total_parameters=total + trainable,
        memory=estimate_memory(config, prepared, trainable, current_world().device),
        notices=prepared.notices,
    )


def estimate_memory(config: RunConfig, prepared: Prepared, trainable: int, device: torch.device) -> MemoryEstimate:
    """Estimate the bytes training takes on a device; rough: right to about a third for dense decoders.

    Activations are what autograd keeps of one micro-batch: about 24 hidden and 6 intermediate vectors a layer and
    token (measured on SmolLM2-135M), and three copies of a chunk of logits.
    """
    base = sum(p.numel() for p in prepared.skeleton.parameters()) * choose_dtype(config.model.dtype, device).itemsize
    text = prepared.header.config.get_text_config()
    hidden = int(text.hidden_size)
    intermediate = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    longest = prepared.train_counts.length_percentiles[-1]
    packed = packed_tokens(config.train.micro_batch_tokens, device)
    tokens = min(max(packed, longest), prepared.train_counts.tokens)
    size = 4 if device.type == "cpu" else 2
    layers = _blocks(prepared.skeleton)
    head = 3 * 256 * int(text.vocab_size) * 4
    activations = tokens * layers * (24 * hidden + 6 * intermediate) * size + head
    adapter = 16 * trainable
    return MemoryEstimate(base, adapter, activations, base + adapter + activations)


def _blocks(skeleton: nn.Module) -> int:
    """Return the number of decoder blocks: the longest list of modules."""
    return max((len(m) for m in skeleton.modules() if isinstance(m, nn.ModuleList)), default=1)
