"""How much memory training takes: from the tensors that a forward keeps, counted on torch's meta device."""

import contextlib
import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from lora_cli import lanes, lora, tuning
from lora_cli.attention import PACKED
from lora_cli.batches import ALONE
from lora_cli.config import RunConfig
from lora_cli.distributed import free_memory
from lora_cli.examples import Example
from lora_cli.forward import lay_out, share_inputs, target_loss
from lora_cli.fused import fuse
from lora_cli.launch import Launch
from lora_cli.layout import Layout, decoder_blocks
from lora_cli.loss import CHUNK, HeadForm, goes_in_pieces
from lora_cli.model import LanguageModel, ModelHeader, build_skeleton, choose_dtype
from lora_cli.reports import MemoryEstimate

# Measured on a CPU with scripts/bench: what a process takes that has imported everything, and what a backward pass
# holds for a moment, the allocator's gaps included, in activations of a block. The numbers for a GPU are guesses.
_PROCESS = {"cpu": 440 << 20, "cuda": 1 << 30}
_PASSING = {"cpu": 1.5, "cuda": 2.0}
_MOST_TOKENS = {"cpu": 1024, "cuda": 8192}
_FEWEST_TOKENS = 128
_FORWARDS = 2  # of a step for each of several processes: of fewer, one process often has one more than the others
_CHUNKS_WITH_KL = 7  # arrays of a chunk's logits that exist together; 1 without a KL, none where they go in pieces
_OPTIMIZER = 16  # bytes for each trained number: itself, its gradient, both moments
_MADE_WHOLE = 2  # gradients of head and embedding, where they are trained, before they are added to those there are
_RUN = 6  # blocks, and twice as many: a whole period of what alternates between them in known models
_GATHERED = 2  # blocks of a sharded base that are whole at a time: the one that runs, and the next
# Bytes of a quantised weight. nf4: half a byte, and for 64 of them a scale of a byte, for 256 of which there is one of
# four (QLoRA's double quantisation, arXiv 2305.14314). int8: a byte, and four for each row.
_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
_INT8, _INT8_ROW = 1, 4


def estimate_memory(
    header: ModelHeader,
    config: RunConfig,
    longest: int,
    device: torch.device,
    started: Launch | None = None,
    mean: float | None = None,
) -> MemoryEstimate:
    """Estimate the bytes that training takes on the device of each process, with the tokens that one forward sees.

    These are those the config says, or (auto) as many as are worth it and fit into what is free; of several processes
    each is to have some forwards of a step of sequences of a `mean` length. A sequence longer than that, up to
    `longest`, is a forward by itself. Of a device that is not here nothing is known to be free.
    """
    started = started or Launch()
    skeleton = _skeleton(header, config, choose_dtype(config.model.dtype, device))
    base, in_flight = base_memory(skeleton, config, started.size)
    if config.lora.method == "full":
        tuning.apply(skeleton, config.lora, config.seed)
        in_flight += _MADE_WHOLE * skeleton.get_input_embeddings().weight.nbytes
    else:
        targets = lora.find_targets(skeleton, config.lora.target_modules)
        shapes = dict.fromkeys(targets, (config.lora.written_rank, 1.0))  # a frozen start takes about as much
        lora.wrap(skeleton, shapes, has_magnitude=config.lora.method == "dora")
    adapter = sum(parameter.numel() for parameter in tuning.trainable(skeleton).values()) * _OPTIMIZER
    for_each, logits = _activations(skeleton, config, device)
    process = _PROCESS[device.type]
    free = free_memory(device, started.local_size)
    forwards = lanes.count_for(config, device, started.size)
    in_flight *= forwards

    def estimate(count: int) -> MemoryEstimate:
        seen = max(count, longest)
        activations = forwards * (int(for_each * seen) + min(seen, CHUNK) * logits)
        total = base + adapter + activations + in_flight + process
        fits = None if free is None else total <= free
        return MemoryEstimate(
            device.type,
            started.size,
            count,
            forwards,
            base,
            adapter,
            activations,
            in_flight,
            process,
            total,
            free,
            fits,
        )

    if config.train.micro_batch_tokens != "auto":
        return estimate(config.train.micro_batch_tokens)
    count = tokens_worth_it(device)
    if started.size > 1 and mean is not None:
        of_each = config.train.batch_size * mean / started.size
        count = max(_FEWEST_TOKENS, min(count, round(of_each / _FORWARDS)))
    while count > _FEWEST_TOKENS and estimate(count).fits is False:
        count //= 2
    return estimate(count)


def _skeleton(header: ModelHeader, config: RunConfig, dtype: torch.dtype) -> nn.Module:
    own = replace(header, config=copy.deepcopy(header.config))  # it is changed below
    own.config.pad_token_id = None  # else some models look for padding, and there are no values here to look at
    return build_skeleton(own, config.model.trust_remote_code).to(dtype)


def base_memory(skeleton: nn.Module, config: RunConfig, processes: int) -> tuple[int, int]:
    """Return the bytes of the frozen base on each device, and those of it that are made there for a moment.

    Sharding divides the matrices of the blocks; whatever else there is, each process has whole. Quantised are the
    linear layers of the blocks, each of which is made whole again while it is multiplied.
    """
    shared = processes if config.train.shard else 1
    size = skeleton.dtype.itemsize
    path, blocks = decoder_blocks(skeleton)
    linear = [each for name, each in lora.linear_modules(skeleton).items() if name.startswith(f"{path}.")]
    weights = [each.get_parameter("weight") for each in linear] if config.model.quantization else []
    quantized = {id(weight): _quantized(weight, str(config.model.quantization)) for weight in weights}
    of_block = [
        sum(quantized.get(id(p), p.numel() * size) for p in block.parameters() if p.ndim > 1) for block in blocks
    ]
    divided = {id(p) for block in blocks for p in block.parameters() if p.ndim > 1}
    whole = sum(p.numel() * size for p in skeleton.parameters() if id(p) not in divided)
    gathered = _GATHERED * max(of_block, default=0.0) if shared > 1 else 0.0
    wide = 4 if config.model.quantization == "int8" and size < 4 else 0  # its product with the scales, in float32
    multiplied = max((weight.numel() * (size + wide) for weight in weights), default=0)
    return int(whole + sum(of_block) / shared), int(gathered + multiplied)


def _quantized(weight: Tensor, kind: str) -> float:
    """Return the bytes of a weight [out, in] when it is quantised."""
    return weight.numel() * _NF4 if kind == "nf4" else weight.numel() * _INT8 + len(weight) * _INT8_ROW


def _activations(skeleton: nn.Module, config: RunConfig, device: torch.device) -> tuple[float, int]:
    """Return the bytes that an adapted model's training holds for each token, and for the logits of each target."""
    blocks, kept = _block_count(skeleton), kept_by_a_token(skeleton, config)
    passing = kept / blocks * _PASSING[device.type]
    if config.train.activation_checkpointing:  # each block's input, and one block at a time
        kept = blocks * _vector(skeleton) + kept / blocks
    chunks = _CHUNKS_WITH_KL if config.train.kl_to_base else 1
    if goes_in_pieces(device, skeleton.dtype, bool(config.train.kl_to_base), config.lora.method == "full"):
        chunks = 0
    narrow = 2 * skeleton.dtype.itemsize if skeleton.dtype.itemsize < 4 else 0  # as multiplied, before and behind
    vocabulary: int = skeleton.get_input_embeddings().weight.shape[0]
    return kept + passing, vocabulary * (4 * chunks + narrow)


def tokens_worth_it(device: torch.device) -> int:
    """Return how many tokens a forward sees where memory does not matter; more are hardly faster."""
    return _MOST_TOKENS[device.type]


def kept_by_a_token(skeleton: nn.Module, config: RunConfig, length: int = 256) -> float:
    """Return the bytes that a forward keeps for its backward pass, for each token; of an adapted model on any device.

    Nothing is recomputed in it. Of many blocks only the first are run, and the others taken to keep as much as the last
    of those. Where the model cannot run on the meta device it is a rule of thumb: 40 vectors of the hidden size in each
    block.
    """
    count = _block_count(skeleton)
    if count > 2 * _RUN:
        fewer, more = (_kept(skeleton, blocks, config, length) for blocks in (_RUN, 2 * _RUN))
        if fewer is not None and more is not None:
            return more + (count - 2 * _RUN) * (more - fewer) / _RUN
    kept = _kept(skeleton, count, config, length)
    return 40.0 * count * _vector(skeleton) if kept is None else kept


def _kept(skeleton: nn.Module, blocks: int, config: RunConfig, length: int) -> float | None:
    """Return the bytes that a model with only the first blocks keeps of a token; None where it does not run."""
    skeleton = copy.deepcopy(skeleton, {id(p): p for p in skeleton.parameters()})
    del decoder_blocks(skeleton)[1][blocks:]
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

        with contextlib.suppress(NotImplementedError, TypeError, ValueError, RuntimeError, LookupError, AttributeError):
            skeleton.set_attn_implementation(PACKED if packed else own)
            model = LanguageModel(skeleton, Layout(packed, not packed, HeadForm(), None), own)
            share_inputs(model)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                target_loss(model, lay_out(model, ALONE, [example]))
            return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in params) / length
    return None


def _block_count(skeleton: nn.Module) -> int:
    return max(1, len(decoder_blocks(skeleton)[1]))


def _vector(skeleton: nn.Module) -> int:
    """Return the bytes of one hidden state."""
    return int(skeleton.config.get_text_config().hidden_size) * skeleton.dtype.itemsize
