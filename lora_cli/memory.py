"""How much memory training takes: from the tensors that a forward keeps, counted on torch's meta device."""

import contextlib
import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_cli import lora
from lora_cli.attention import PACKED
from lora_cli.batches import ALONE
from lora_cli.config import RunConfig
from lora_cli.distributed import free_memory
from lora_cli.examples import Example
from lora_cli.forward import lay_out, share_inputs, target_loss
from lora_cli.fused import fuse
from lora_cli.layout import Layout, decoder_blocks
from lora_cli.loss import CHUNK, HeadForm
from lora_cli.model import LanguageModel, ModelHeader, build_skeleton, choose_dtype
from lora_cli.reports import MemoryEstimate

# Measured on a CPU with scripts/bench: what a process takes that has imported everything, and what a backward pass
# holds for a moment, the allocator's gaps included, in activations of a block. The number for a GPU is a guess.
_PROCESS = 440 << 20
_PASSING = {"cpu": 5.5, "cuda": 2.0}
_MOST_TOKENS = {"cpu": 1024, "cuda": 8192}
_FEWEST_TOKENS = 128
_CHUNKS_WITH_KL = 7  # arrays of a chunk's logits that exist together; 1 without a KL
_OPTIMIZER = 16  # bytes for each trained number: itself, its gradient, both moments


def estimate_memory(header: ModelHeader, config: RunConfig, longest: int, device: torch.device) -> MemoryEstimate:
    """Estimate the bytes that training takes on a device, with the tokens that one forward sees.

    These are those the config says, or (auto) as many as are worth it and fit into what is free. A sequence longer than
    that, up to `longest`, is a forward by itself.
    """
    dtype = choose_dtype(config.model.dtype, device)
    own = replace(header, config=copy.deepcopy(header.config))  # its attention is changed below
    own.config.pad_token_id = None  # else some models look for padding, and there are no values here to look at
    skeleton = build_skeleton(own, config.model.trust_remote_code).to(dtype)
    base = sum(parameter.numel() for parameter in skeleton.parameters()) * dtype.itemsize
    targets = lora.find_targets(skeleton, config.lora.target_modules)
    lora.wrap(skeleton, dict.fromkeys(targets, (config.lora.rank, 1.0)))
    adapter = sum(parameter.numel() for parameter in lora.trainable(skeleton).values()) * _OPTIMIZER
    vocabulary = skeleton.get_input_embeddings().weight.shape[0]
    blocks = _block_count(skeleton)
    kept = kept_by_a_token(skeleton, config)
    passing = kept / blocks * _PASSING[device.type]
    if config.train.activation_checkpointing:  # each block's input, and one block at a time
        kept = blocks * _vector(skeleton) + kept / blocks
    chunks = _CHUNKS_WITH_KL if config.train.kl_to_base else 1
    fixed = base + adapter + (_PROCESS if device.type == "cpu" else 0)

    def estimate(count: int) -> MemoryEstimate:
        seen = max(count, longest)
        activations = int((kept + passing) * seen) + chunks * min(seen, CHUNK) * vocabulary * 4
        return MemoryEstimate(count, base, adapter, activations, fixed + activations)

    if config.train.micro_batch_tokens != "auto":
        return estimate(config.train.micro_batch_tokens)
    count, free = tokens_worth_it(device), free_memory(device)
    while free is not None and count > _FEWEST_TOKENS and estimate(count).total > free:
        count //= 2
    return estimate(count)


def tokens_worth_it(device: torch.device) -> int:
    """Return how many tokens a forward sees where memory does not matter; more are hardly faster."""
    return _MOST_TOKENS[device.type]


def kept_by_a_token(skeleton: nn.Module, config: RunConfig, length: int = 256) -> float:
    """Return the bytes that a forward keeps for its backward pass, for each token; of an adapted model on any device.

    Nothing is recomputed in it. Where the model cannot run on the meta device it is a
    rule of thumb: 40 vectors of the hidden size in each block.
    """
    example = Example((0,) * length, (0,) * length, "tokens of no row")
    params = {parameter.untyped_storage()._cdata for parameter in skeleton.parameters()}
    own = str(skeleton.config._attn_implementation)
    if not config.train.compile:
        fuse(skeleton)
    for packed in (True, False):
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with contextlib.suppress(NotImplementedError, TypeError, ValueError, RuntimeError, KeyError, AttributeError):
            skeleton.set_attn_implementation(PACKED if packed else own)
            model = LanguageModel(skeleton, Layout(packed, not packed, HeadForm(), None), own)
            share_inputs(model)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                target_loss(model, lay_out(model, ALONE, [example]))
            return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in params) / length
    return 40.0 * _block_count(skeleton) * _vector(skeleton)


def _block_count(skeleton: nn.Module) -> int:
    return max(1, len(decoder_blocks(skeleton)[1]))


def _vector(skeleton: nn.Module) -> int:
    """Return the bytes of one hidden state."""
    return int(skeleton.config.get_text_config().hidden_size) * skeleton.dtype.itemsize
