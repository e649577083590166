"""How forward passes may be laid out: found by trying.

It is not read off an architecture's name: a small probe runs the model in its own way and in ours, and ours is used
only where both give the same logits.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_cli.attention import PACKED
from lora_cli.errors import ModelError


@dataclass(frozen=True)
class Layout:
    """How forward passes are laid out. `packed`: several sequences in one row; else one sequence a forward.

    `plain_head`: the logits are the output embedding times the decoder's last hidden state, nothing else.
    """

    packed: bool
    plain_head: bool

    def __str__(self) -> str:
        return ("packed sequences" if self.packed else "one sequence a forward") + (
            ", head at target positions" if self.plain_head else ", the model's own head"
        )


def _logits(module: Any, ids: Tensor, **options: Any) -> Tensor:
    return module(input_ids=ids, use_cache=False, **options).logits[0].float()


def _agree(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


@torch.inference_mode()
def probe(module: Any) -> Layout:
    """Run two short sequences in the model's own way, packed into one row, and through the plain head; compare.

    Raises ModelError when a token's logits depend on tokens after it: then it is no causal model.
    """
    device, dtype, own = module.device, module.dtype, module.config._attn_implementation
    vocabulary = module.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(3, 14, device=device) * 37 % vocabulary)[None]
    sequences = [ids[:, :5], ids[:, 5:]]
    alone = [_logits(module, sequence) for sequence in sequences]
    if not _agree(_logits(module, sequences[1][:, :3]), alone[1][:3], dtype):
        raise ModelError(
            f"A {module.config.model_type} model lets tokens see those after them: it cannot be trained here."
        )
    try:
        decoder = module.get_decoder()
        hidden = decoder(input_ids=sequences[1], use_cache=False).last_hidden_state[0]
        plain_head = decoder is not module and _agree(module.get_output_embeddings()(hidden).float(), alone[1], dtype)
    except (AttributeError, TypeError, NotImplementedError):
        plain_head = False
    layers = set(getattr(module.config.get_text_config(), "layer_types", None) or ["full_attention"])
    packed = False
    if layers <= {"full_attention", "sliding_attention"}:
        with contextlib.suppress(NotImplementedError, TypeError, ValueError, RuntimeError, KeyError):
            module.set_attn_implementation(PACKED)
            positions = torch.cat([torch.arange(s.shape[1], device=device) for s in sequences])[None]
            lengths = [s.shape[1] for s in sequences]
            together = _logits(module, ids, position_ids=positions, sequence_lengths=lengths)
            packed = _agree(together, torch.cat(alone), dtype)
    module.set_attn_implementation(own)
    return Layout(packed, plain_head)
