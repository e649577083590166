"""Causal attention over sequences packed one behind the other, none of them seeing another."""

import functools
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_cli.heap import roomy
from lora_cli.projection import remember

PACKED = "lora_packed"  # its name among transformers' attention functions

_QUERIES = 64  # of one call on a CPU, at least; fewer than twice as many
_MOST_KEYS = 2048  # for which queries are divided: with more, torch's kernel leaves most of the hidden ones out itself

# What some architectures add to attention, and this function does not compute.
_UNSUPPORTED = ("s_aux", "position_bias", "head_mask")


class Segment(NamedTuple):
    """Neighbouring tokens of one sequence. `prefix` is the number of the segment they continue, None at the start."""

    length: int
    prefix: int | None = None


class Segments:
    """The segments of a packed row.

    An object and not a tuple: a compiled block would be compiled again for every other number of sequences.
    """

    def __init__(self, *segments: Segment) -> None:
        self.segments = segments
        self._varlen: VarLen | None = None

    @property
    def lengths(self) -> list[int]:
        return [segment.length for segment in self.segments]

    def varlen(self, device: torch.device) -> "VarLen":
        """Return how they lie for variable-length attention; made once for all layers."""
        if self._varlen is None:
            self._varlen = lay_out_varlen(self.segments, device)
        return self._varlen


class VarLen(NamedTuple):
    """Where each segment's queries and keys begin, [segments + 1] int32, and the most that one has of them.

    `tokens` [K] are those whose keys lie so, a prefix's again for each segment that continues it; None: all in order.
    """

    queries: Tensor
    keys: Tensor
    tokens: Tensor | None
    most_queries: int
    most_keys: int


def lay_out_varlen(segments: Sequence[Segment], device: torch.device) -> VarLen:
    """Lay segments out as variable-length attention takes them: each one's keys are its prefix's, then its own."""
    begins = list(accumulate((segment.length for segment in segments), initial=0))
    of_each: list[list[int]] = []
    for number, segment in enumerate(segments):
        parts = [number] if segment.prefix is None else [segment.prefix, number]
        of_each.append([token for part in parts for token in range(begins[part], begins[part + 1])])
    keys = [len(tokens) for tokens in of_each]
    continued = any(segment.prefix is not None for segment in segments)
    return VarLen(
        torch.tensor(begins, dtype=torch.int32, device=device),
        torch.tensor(list(accumulate(keys, initial=0)), dtype=torch.int32, device=device),
        torch.tensor([token for tokens in of_each for token in tokens], device=device) if continued else None,
        max(segment.length for segment in segments),
        max(keys),
    )


@torch.compiler.disable
def packed_attention(
    module: nn.Module,
    query: Tensor,  # [1, heads, T, head_dim]
    key: Tensor,  # [1, key_value_heads, T, head_dim]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    segments: Segments | None = None,
    **features: Any,
) -> tuple[Tensor, None]:
    """Attend within each sequence; an attention function in the form transformers' interface asks for.

    Raises NotImplementedError for what it would compute wrongly, so that the caller can choose another way.
    """
    wanted = [name for name in _UNSUPPORTED if features.get(name) is not None]
    if wanted or attention_mask is not None or dropout:
        raise NotImplementedError(f"packed attention has no {', '.join(wanted) or 'mask or dropout'}")
    if segments is None:
        raise NotImplementedError("the model does not pass segments on to its attention")
    if query.is_meta and softcap is None:
        return _WhatIsKept.apply(query, key, value), None
    if _flash_runs(query, value, segments, sliding_window, softcap):
        from torch.nn.attention.varlen import varlen_attn

        return attend_varlen(query, key, value, segments, scaling, varlen_attn), None
    queries, keys, values = (x.split(segments.lengths, dim=2) for x in (query, key, value))
    outputs = []
    for segment, q, k, v in zip(segments.segments, queries, keys, values, strict=True):
        if segment.prefix is not None:
            k = torch.cat([keys[segment.prefix], k], dim=2)
            v = torch.cat([values[segment.prefix], v], dim=2)
        if softcap is None and _blocks_pay(q, k, sliding_window):
            outputs += _attend_in_blocks(q, k, v, scaling)
            continue
        visible = _visible(q.shape[2], k.shape[2], sliding_window, q.device)
        if softcap is None:
            outputs.append(_attend(q, k, v, visible, scaling))
        else:
            outputs.append(_capped(q, k, v, visible, scaling, softcap))
    return remember(_Row.apply(*outputs), _Row.put, *outputs), None


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scaling: float | None) -> Tensor:
    """Attend to the keys that are visible; None: to those before, of as many keys as queries."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, is_causal=visible is None, scale=scaling, enable_gqa=grouped
    )


def _blocks_pay(q: Tensor, k: Tensor, window: int | None) -> bool:
    """Return whether attention is faster with the queries in blocks.

    Up to 512 keys torch's kernel for CPUs multiplies those that are hidden too. It divides heads and queries over
    threads: these need enough heads each.
    """
    return (
        q.device.type == "cpu"
        and q.shape[2] >= 3 * _QUERIES
        and k.shape[2] <= min(_MOST_KEYS, window or _MOST_KEYS)
        and q.shape[1] >= 4 * torch.get_num_threads()
    )


def _attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, scaling: float | None) -> list[Tensor]:
    """Attend causally, the queries in blocks, each of which is given no keys behind its last one."""
    before = k.shape[2] - q.shape[2]
    size = -(-q.shape[2] // (q.shape[2] // _QUERIES))
    queries = q.split(size, dim=2)
    ends = list(accumulate((block.shape[2] for block in queries), initial=before))[1:]
    keys, values = _Beginnings.apply(ends, k), _Beginnings.apply(ends, v)
    hidden = _hidden(q.dtype)
    outputs = []
    for block, some_keys, some_values in zip(queries, keys, values, strict=True):
        length, behind = block.shape[2], some_keys.shape[2] - block.shape[2]
        begin = _MOST_KEYS - behind
        visible = hidden[:length, begin : begin + some_keys.shape[2]] if behind else None
        outputs.append(_attend(block, some_keys, some_values, visible, scaling))
    return outputs


@functools.cache
@torch.inference_mode(False)  # or what is kept could not be used in training
def _hidden(dtype: torch.dtype) -> Tensor:
    """Return what is added to scores, of which each mask of a block is a part: -inf where column - row > _MOST_KEYS."""
    size = 2 * _QUERIES
    return torch.full((size, _MOST_KEYS + size), -torch.inf, dtype=dtype, device="cpu").triu(_MOST_KEYS + 1)


class _Row(torch.autograd.Function):
    """Outputs of attention, [1, heads, t, head_dim] each, one behind the other: [1, T, heads, head_dim]."""

    @staticmethod
    def put(*outputs: Tensor) -> Tensor:
        """Return the row."""
        _, heads, _, width = outputs[0].shape
        row = roomy((1, sum(output.shape[2] for output in outputs), heads, width), outputs[0])
        return torch.cat([output.transpose(1, 2) for output in outputs], dim=1, out=row)

    @staticmethod
    def forward(ctx: Any, *outputs: Tensor) -> Tensor:
        ctx.lengths = [output.shape[2] for output in outputs]
        return _Row.put(*outputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient.transpose(1, 2).split(ctx.lengths, dim=2)


class _Beginnings(torch.autograd.Function):
    """The beginnings of keys or values [1, heads, K, head_dim] up to each of `ends`, the last of which is K.

    Slices would do, but each of their gradients is filled up with zeros before it is added.
    """

    @staticmethod
    def forward(ctx: Any, ends: Sequence[int], x: Tensor) -> tuple[Tensor, ...]:
        ctx.ends = ends
        return tuple(x[:, :, :end] for end in ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        total = gradients[-1].clone()
        for end, gradient in zip(ctx.ends[:-1], gradients[:-1], strict=True):
            total[:, :, :end] += gradient
        return None, total


def _flash_runs(query: Tensor, value: Tensor, segments: Segments, window: int | None, softcap: float | None) -> bool:
    """Return whether one call of FlashAttention 2 does it all: on which GPUs, for what it is made.

    A window that hides something is left to the loop: how the kernel counts it would not be seen in the trial.
    """
    return (
        query.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] in range(8, 257, 8)
        and softcap is None
        and (window is None or segments.varlen(query.device).most_keys <= window)
    )


def attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, attend: Callable[..., Tensor]
) -> Tensor:
    """Attend within all sequences by one call of `attend` (as torch's varlen_attn): [1, T, heads, head_dim].

    With more keys than queries it has to let the last query see all of them (FlashAttention does since 2.1).
    """
    layout = segments.varlen(query.device)
    if layout.tokens is not None:
        key, value = key.index_select(2, layout.tokens), value.index_select(2, layout.tokens)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, head_dim]
    output = attend(
        *(q, k, v, layout.queries, layout.keys, layout.most_queries, layout.most_keys),
        scale=scaling,
        window_size=(-1, 0),  # causal
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return output[None]


def _visible(length: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return which of the keys the last `length` positions may see, [length, keys]; None where it is all before."""
    if length == keys and (window is None or length <= window):
        return None
    behind = torch.arange(keys - length, keys, device=device)[:, None] - torch.arange(keys, device=device)[None]
    return (behind >= 0) & (behind < (window or keys))


def _capped(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scaling: float | None, softcap: float) -> Tensor:
    """Attend with scores softcap * tanh(score / softcap), as Gemma 2 does."""
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, dim=1), v.repeat_interleave(times, dim=1)
    scores = torch.tanh(q @ k.transpose(2, 3) * ((scaling or q.shape[-1] ** -0.5) / softcap)) * softcap
    if visible is None:
        visible = torch.ones(scores.shape[2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~visible, float("-inf")).softmax(-1, dtype=torch.float32).to(q.dtype) @ v


class _WhatIsKept(torch.autograd.Function):
    """Attention on the meta device, where a fused kernel is not chosen: it keeps what that one would."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> None:
        raise NotImplementedError("there is nothing to go back to on the meta device")
