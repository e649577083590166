"""How forward passes may be laid out: found by trying.

It is not read off an architecture's name: a small probe runs the model in its own way and in ours, and ours is used
only where both give the same logits.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_cli.attention import PACKED, Segment, Segments
from lora_cli.errors import ModelError
from lora_cli.loss import HeadForm, head_logits
from lora_cli.sharding import whole


@dataclass(frozen=True)
class Layout:
    """How forward passes are laid out.

    `packed`: several sequences in one row, none seeing another; `padded`: several rows, filled up on the right;
    neither: one sequence a forward. `head`: how the logits follow from the decoder's last hidden state, None where they
    do not in a known way. `tail`: the path of the last block's module that works on every token by itself and is
    followed by nothing else that mixes tokens, so that only target positions need it; None where there is none.
    """

    packed: bool
    padded: bool
    head: HeadForm | None
    tail: str | None

    def __str__(self) -> str:
        how = "packed sequences" if self.packed else "padded sequences" if self.padded else "one sequence a forward"
        head = "head at target positions" if self.head else "the model's own head"
        return f"{how}, {head}" + (f", so is {self.tail}" if self.tail else "")


@contextlib.contextmanager
def only_rows(module: nn.Module, rows: Tensor) -> Iterator[None]:
    """Let a module compute only some rows of its input [B, T, D] (`rows` index B * T); the others' output is zero."""
    shape = torch.Size()

    def choose(_: nn.Module, inputs: Any) -> tuple[Tensor]:
        nonlocal shape
        (x,) = inputs
        shape = x.shape[:2]
        return (x.flatten(0, 1)[rows][None],)

    def put_back(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        everywhere = output.new_zeros(shape.numel(), output.shape[-1])
        return everywhere.index_copy(0, rows, output[0]).view(*shape, -1)

    handles = [module.register_forward_pre_hook(choose), module.register_forward_hook(put_back)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _logits(module: Any, ids: Tensor, **options: Any) -> Tensor:
    return module(input_ids=ids, use_cache=False, **options).logits.float()


def agree(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Return whether two ways of computing give the same numbers, up to the rounding of a dtype."""
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 3e-2
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


@torch.no_grad()  # in inference mode, a divided block would be made of tensors that no gradient can pass
def probe(module: Any) -> Layout:
    """Run two short sequences in the model's own way and in each of ours, and compare.

    Raises ModelError when a token's logits depend on tokens after it: then it is no causal model.
    """
    device, dtype, own = module.device, module.dtype, module.config._attn_implementation
    vocabulary = module.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(3, 14, device=device) * 37 % vocabulary)[None]
    short, long = ids[:, :5], ids[:, 5:]
    alone = [_logits(module, sequence)[0] for sequence in (short, long)]
    if not all(logits.isfinite().all() for logits in alone):
        raise ModelError(
            "The base model's logits are not finite: its weights are damaged (fetch them again), or too large for "
            f"{str(dtype).removeprefix('torch.')} (set model.dtype: float32)."
        )
    if not agree(_logits(module, long[:, :3])[0], alone[1][:3], dtype):
        raise ModelError(
            f"A {module.config.model_type} model lets tokens see those after them: it cannot be trained here."
        )
    head = _find_head(module, long, alone[1])
    padded = False
    if head is not None:
        both = _logits(module, torch.cat([F.pad(short, (0, 1)), long]))
        padded = agree(torch.cat([both[0, :5], both[1]]), torch.cat(alone), dtype)
    tail = _find_tail(module, long, alone[1]) if head is not None else None
    packed = _can_pack(module, [short, long], torch.cat(alone))
    module.set_attn_implementation(own)
    return Layout(packed, padded, head, tail)


def _find_head(module: Any, ids: Tensor, logits: Tensor) -> HeadForm | None:
    """Return how logits [T, V] follow from the last hidden state, by the config's numbers; None where unknown."""
    config = module.config.get_text_config()
    scales = [getattr(config, name, None) for name in ("logit_scale", "lm_head_multiplier")]
    divisor = getattr(config, "logits_scaling", None)
    forms = [
        HeadForm(float(scale), softcap)
        for scale in (1.0, *scales, 1 / divisor if divisor else None)
        for softcap in (getattr(config, "final_logit_softcapping", None), None)
        if isinstance(scale, int | float)
    ]
    with contextlib.suppress(AttributeError, TypeError, NotImplementedError, RuntimeError):
        decoder, embedding = module.get_decoder(), module.get_output_embeddings()
        if decoder is not module:
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[0]
            for form in forms:
                ours = head_logits(hidden, embedding.weight, embedding.bias, form).float()
                if agree(ours, logits, module.dtype):
                    return form
    return None


def _can_pack(module: Any, sequences: Sequence[Tensor], logits: Tensor) -> bool:
    """Return whether packed sequences, the second run in two segments, give the logits [T, V] they have alone.

    Leaves the packed attention on, where it can be used.
    """
    layers = set(getattr(module.config.get_text_config(), "layer_types", None) or ["full_attention"])
    if layers <= {"full_attention", "sliding_attention"}:
        with contextlib.suppress(NotImplementedError, TypeError, ValueError, RuntimeError, KeyError):
            module.set_attn_implementation(PACKED)
            positions = torch.cat([torch.arange(s.shape[1], device=module.device) for s in sequences])[None]
            first, second = (s.shape[1] for s in sequences)
            segments = Segments(Segment(first), Segment(2), Segment(second - 2, prefix=1))
            together = _logits(module, torch.cat(list(sequences), 1), position_ids=positions, segments=segments)
            return agree(together[0], logits, module.dtype)
    return False


def _find_tail(module: Any, ids: Tensor, logits: Tensor) -> str | None:
    """Return the path of the last block's largest module that only target positions need; None if there is none.

    It must give the same for some tokens as for all, and leaving the others out must not change the logits [T, V].
    """
    path, last = last_block(module)
    rows = torch.tensor([1, 2, ids.shape[1] - 1], device=ids.device)
    sizes = {name: sum(p.numel() for p in child.parameters() if p.ndim > 1) for name, child in last.named_children()}
    for name in sorted(filter(sizes.get, sizes), key=lambda name: -sizes[name]):
        child = last.get_submodule(name)
        seen: list[tuple[Tensor, Tensor]] = []
        handle = child.register_forward_hook(lambda _, inputs, output, seen=seen: seen.append((inputs[0], output)))
        with contextlib.suppress(TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            _logits(module, ids)
            handle.remove()
            (x, output), *_ = seen
            with whole(last):
                some = child(x[:, rows])[0]
            if not agree(some, output[0, rows], module.dtype):
                continue
            with only_rows(child, rows):
                ours = _logits(module, ids)[0]
            if agree(ours[rows], logits[rows], module.dtype):
                return f"{path}.{name}"
        handle.remove()
    return None


def decoder_blocks(module: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the decoder's blocks and their path: the longest list of modules that lies in no other list."""
    outermost: dict[str, nn.ModuleList] = {}
    for path, each in module.named_modules():
        if isinstance(each, nn.ModuleList) and not any(path.startswith(f"{outer}.") for outer in outermost):
            outermost[path] = each
    return max(outermost.items(), key=lambda found: len(found[1]), default=("", nn.ModuleList()))


def last_block(module: nn.Module) -> tuple[str, nn.Module]:
    """Return the decoder's last block and its path; an empty module where there are no blocks."""
    path, found = decoder_blocks(module)
    return (f"{path}.{len(found) - 1}", found[-1]) if len(found) else (path, nn.Module())
