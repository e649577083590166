"""Attention of packed sequences: in one call, or the queries of each in blocks, as the loop over sequences."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_cli import attention
from lora_cli.attention import Segment, Segments, attend_varlen, lay_out_varlen, packed_attention
from lora_cli.projection import Projection, project

CPU = torch.device("cpu")
PACKED = {
    "one sequence": [Segment(5)],
    "several": [Segment(3), Segment(1), Segment(4)],
    "a prefix and two that continue it": [Segment(4), Segment(2, prefix=0), Segment(3, prefix=0)],
    "prefixes among others": [Segment(2), Segment(3), Segment(1, prefix=1), Segment(4), Segment(2, prefix=0)],
}


def attend(
    query: Tensor,  # [T, heads, head_dim]
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch documents of varlen_attn, written plainly: causal, the last query sees the last key."""
    assert window_size == (-1, 0)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert (cu_seq_q.dtype, cu_seq_k.dtype) == (torch.int32, torch.int32)
    assert (max_q, max_k) == tuple(int(cu.diff().max()) for cu in (cu_seq_q, cu_seq_k))
    assert (int(cu_seq_q[-1]), int(cu_seq_k[-1])) == (len(query), len(key))
    times = query.shape[1] // key.shape[1]
    outputs = []
    for q_begin, q_end, k_begin, k_end in zip(cu_seq_q, cu_seq_q[1:], cu_seq_k, cu_seq_k[1:], strict=False):
        q = query[q_begin:q_end].transpose(0, 1)  # [heads, T, head_dim]
        k, v = (x[k_begin:k_end].transpose(0, 1).repeat_interleave(times, 0) for x in (key, value))
        scores = q @ k.transpose(1, 2) * (scale or q.shape[-1] ** -0.5)
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(k.shape[1] - q.shape[1] + 1)
        outputs.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_one_call_attends_as_the_loop_does(name: str, scaling: float | None):
    """Outputs and gradients, with fewer heads of keys than of queries, each prefix's keys used again."""
    segments = PACKED[name]
    tokens = sum(segment.length for segment in segments)
    torch.manual_seed(1)
    shapes = [(1, heads, tokens, 8) for heads in (4, 2, 2)]
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    query, key, value = given
    module: Any = torch.nn.Identity()
    loop, _ = packed_attention(module, query, key, value, None, scaling, segments=Segments(*segments))
    ours = attend_varlen(query, key, value, Segments(*segments), scaling, attend)
    weights = torch.randn(loop.shape, dtype=torch.float64)

    assert torch.allclose(ours, loop, atol=1e-12)
    for mine, theirs in zip(gradients(ours, weights, given), gradients(loop, weights, given), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)


LONG = {  # and in how many calls, with a window of 250 and without
    "one sequence": ([Segment(200)], 3, 3),
    "long ones among short": ([Segment(3), Segment(191), Segment(192), Segment(257)], 1 + 1 + 3 + 1, 1 + 1 + 3 + 4),
    "a prefix that two continue": ([Segment(210), Segment(2, prefix=0), Segment(300, prefix=0)], 3 + 1 + 1, 3 + 1 + 4),
    "too many keys": ([Segment(2049), Segment(200, prefix=0)], 2, 2),
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("window", [250, None])
def test_blocks_of_queries_attend_as_whole_sequences_do(name: str, window: int | None, monkeypatch: pytest.MonkeyPatch):
    """Outputs and gradients, where a window hides nothing and there are not too many keys."""
    parts, with_window, without = LONG[name]
    segments = Segments(*parts)
    torch.manual_seed(2)
    heads = 4 * torch.get_num_threads()
    shapes = [(1, count, sum(segments.lengths), 8) for count in (heads, heads // 2, heads // 2)]
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    module: Any = torch.nn.Identity()
    calls: list[int] = []  # the queries of each

    def attended() -> Tensor:
        calls.clear()
        return packed_attention(module, *given, None, sliding_window=window, segments=segments)[0]

    def counted(q: Tensor, *others: Tensor, **options: Any) -> Tensor:
        calls.append(q.shape[2])
        return whole(q, *others, **options)

    whole = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    ours = attended()
    assert sum(calls) == sum(segments.lengths)
    assert len(calls) == (without if window is None else with_window)
    monkeypatch.setattr(attention, "_QUERIES", 10_000)
    plain = attended()
    assert calls == segments.lengths

    weights = torch.randn(plain.shape, dtype=torch.float64)
    assert torch.allclose(ours, plain, atol=1e-12)
    for mine, theirs in zip(gradients(ours, weights, given), gradients(plain, weights, given), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)


def test_what_evaluation_keeps_serves_training():
    """The mask of the blocks is made once: in inference mode, it could not be used with gradients."""
    attention._hidden.cache_clear()
    heads = 4 * torch.get_num_threads()
    query = torch.randn(1, heads, 200, 8, requires_grad=True)
    module: Any = torch.nn.Identity()
    outputs = []
    for mode in (True, False):
        with torch.inference_mode(mode):
            outputs.append(packed_attention(module, *[query] * 3, None, segments=Segments(Segment(200)))[0])

    assert torch.equal(*outputs)
    assert torch.autograd.grad(outputs[1].sum(), query)[0].abs().max() > 0


def test_a_layer_that_reads_the_row_keeps_none_of_it():
    """What attention put together it puts together again for the gradient; a part of it, or one changed, is kept."""
    torch.manual_seed(3)
    query, key, value = (torch.randn(1, 4, 9, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    down, up = torch.randn(2, 32, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    layer = Projection(
        torch.randn(32, 3, dtype=torch.float64).clone, None, down.requires_grad_(), up.requires_grad_(), 1.0
    )
    forms: dict[str, tuple[bool, Callable[[Tensor], Tensor]]] = {
        "as it is": (False, lambda row: row.reshape(1, 9, 32)),
        "another row": (True, lambda row: row.reshape(1, 9, 32).clone()),
        "a part": (True, lambda row: row.reshape(1, 9, 32)[:, 2:7]),
        "another order": (True, lambda row: row.transpose(1, 2).reshape(1, 9, 32)),
        "changed": (True, lambda row: row.reshape(1, 9, 32).mul_(2.0)),
    }
    for name, (is_kept, form) in forms.items():
        segments = Segments(Segment(4), Segment(2, prefix=0), Segment(3))
        row = form(packed_attention(torch.nn.Identity(), query, key, value, None, segments=segments)[0])
        kept: list[int] = []

        def keep(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.untyped_storage().data_ptr())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            ours = project(row, [layer])[0]
        assert (row.untyped_storage().data_ptr() in kept) == is_kept, name
        plain = row @ layer.weight() + (row @ down.T) @ up.T
        inputs, weights = (query, key, value, down, up), torch.randn(plain.shape, dtype=torch.float64)
        assert torch.allclose(ours, plain, rtol=1e-12)
        for mine, theirs in zip(gradients(ours, weights, inputs), gradients(plain, weights, inputs), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-12, atol=1e-12), name


def gradients(output: Tensor, weights: Tensor, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of a weighted sum of an output."""
    return torch.autograd.grad((output * weights).sum(), given, retain_graph=True)


def test_where_queries_and_keys_begin():
    """By hand: two tokens, three, one that continues the first two; without prefixes keys lie as queries do."""
    layout = lay_out_varlen([Segment(2), Segment(3), Segment(1, prefix=0)], CPU)
    plain = lay_out_varlen([Segment(2), Segment(3)], CPU)

    assert layout.queries.tolist() == [0, 2, 5, 6]
    assert layout.keys.tolist() == [0, 2, 5, 8]
    assert layout.tokens is not None
    assert layout.tokens.tolist() == [0, 1, 2, 3, 4, 0, 1, 5]
    assert (layout.most_queries, layout.most_keys) == (3, 3)
    assert plain.tokens is None
    assert plain.queries.tolist() == plain.keys.tolist() == [0, 2, 5]


def test_the_call_is_one_that_torch_takes():
    """Torch's own function, on the meta device: every argument is known to it, and the output lies as it should."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    query, key = (torch.empty(1, heads, 9, 8, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
    segments = Segments(Segment(4), Segment(2, prefix=0), Segment(3, prefix=0))

    assert attend_varlen(query, key, key, segments, 0.3, varlen.varlen_attn).shape == (1, 9, 4, 8)
