"""Causal attention over sequences packed one behind the other, none of them seeing another."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED = "lora_packed"  # its name among transformers' attention functions

# What some architectures add to attention, and this function does not compute.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")


def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, key_value_heads, T, head_dim]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    sequence_lengths: list[int] | None = None,
    **features: Any,
) -> tuple[Tensor, None]:
    """Attend within each sequence; an attention function in the form transformers' interface asks for.

    Raises NotImplementedError for what it would compute wrongly, so that the caller can choose another way.
    """
    wanted = [name for name in _UNSUPPORTED if features.get(name) is not None]
    if wanted or attention_mask is not None or dropout:
        raise NotImplementedError(f"packed attention has no {', '.join(wanted) or 'mask or dropout'}")
    if sequence_lengths is None:
        raise NotImplementedError("the model does not pass sequence_lengths on to its attention")
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    for q, k, v in zip(*(x.split(sequence_lengths, dim=2) for x in (query, key, value)), strict=True):
        length = q.shape[2]
        near = None
        if sliding_window is not None and length > sliding_window:
            distance = torch.arange(length, device=q.device)
            distance = distance[:, None] - distance[None, :]
            near = (distance >= 0) & (distance < sliding_window)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=near, is_causal=near is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None  # [1, T, heads, head_dim]
