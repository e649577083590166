"""What is done to the decoder's blocks before training, and undone: recomputing their activations, compiling them."""

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_cli import tuning
from lora_cli.config import TrainConfig
from lora_cli.errors import SurroundingsError
from lora_cli.fused import fuse
from lora_cli.layout import decoder_blocks


def as_loaded(module: nn.Module) -> None:
    """Take off what an earlier run did to a model: what it trained, and other ways to run its parts."""
    tuning.remove(module)
    for part in module.modules():
        part.__dict__.pop("forward", None)  # over which its class's shows again
        part._compiled_call_impl = None


def change_blocks(module: nn.Module, settings: TrainConfig) -> None:
    """Have a model's blocks run as training is to run them, in place."""
    if settings.compile:
        compile_blocks(module)  # the compiler fuses by itself
    else:
        fuse(module)
    if settings.activation_checkpointing:
        recompute_activations(module)


def recompute_activations(module: nn.Module) -> None:
    """Keep only each block's input in a forward with gradients, and run the block again in the backward pass.

    Dropout draws the same again. (Chen et al. 2016, arXiv 1604.06174.) The last block is left as it is: its activations
    would be computed again at once, so nothing would be saved.
    """
    _, blocks = decoder_blocks(module)
    for block in list(blocks)[:-1]:
        block.forward = functools.partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, **options)


def compile_blocks(module: nn.Module) -> None:
    """Compile the blocks when they first run; one compilation serves all of them and all lengths.

    The first and the last stay as they are: their input needs no gradient, or only some rows are computed.
    Raises SurroundingsError where there is no compiler.
    """
    compilers = [os.environ.get("CXX", "g++"), "clang++", "cl"]
    if next(module.parameters()).device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise SurroundingsError("train.compile: needs a C++ compiler (g++) on a CPU, and none is installed.")
    _, blocks = decoder_blocks(module)
    for block in list(blocks)[1:-1]:
        block.compile(dynamic=True)
