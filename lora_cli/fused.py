"""RMSNorm, the gated MLP and rotary positions in fewer operations, which keep less for the backward pass.

Of weights that are trained themselves nothing is made here: norms and MLPs are replaced where the base is frozen.

As in `layout`, no name decides alone: a part is replaced where a trial gives the numbers of its own forward. Without
gradients, each part runs as it was.
"""

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.heap import roomy
from lora_cli.layout import agree
from lora_cli.lora_linear import LoraLinear
from lora_cli.projection import project, remember
from lora_cli.sharding import whole


def fuse(model: nn.Module) -> None:
    """Replace the forward of every RMSNorm, gated MLP with an adapted last layer, and attention with rotary positions.

    All in place, and in this model only.
    """
    with whole(model):
        for part in model.children():
            fuse(part)
        ours = _fused_norm(model) or _fused_mlp(model)
    if ours is not None:
        model.forward = functools.partial(_with_gradients, ours, model.forward)
    elif turned := _with_our_rotation(model):
        model.forward = turned


def _with_gradients(
    ours: Callable[[Tensor], Tensor], own: Callable[..., Tensor], x: Tensor, *others: Any, **options: Any
) -> Tensor:
    if others or options or not torch.is_grad_enabled():  # some norms take a gate
        return own(x, *others, **options)
    return ours(x)


class _RmsNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * factor (Zhang and Sennrich 2019, arXiv 1910.07467); factor [D] is frozen.

    It keeps x and one number for each row, and computes in float32 at least.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor, eps: float) -> Tensor:  # [..., D] -> [..., D]
        output, inverse = _RmsNorm.compute(x, factor, eps)
        ctx.save_for_backward(x, inverse, factor)
        return output

    @staticmethod
    def compute(x: Tensor, factor: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Return the output [..., D], and what each row was multiplied by [..., 1]."""
        h = x.to(factor.dtype)
        inverse = torch.linalg.vector_norm(h, dim=-1, keepdim=True).square_().div_(h.shape[-1]).add_(eps).rsqrt_()
        return torch.mul(h, inverse, out=roomy(h.shape, h)).mul_(factor).to(x.dtype), inverse

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        x, inverse, factor = ctx.saved_tensors
        h = x.to(factor.dtype)
        grad = grad_output.to(factor.dtype) * factor
        along = torch.linalg.vecdot(grad, h)[..., None].mul_(inverse.pow(3)).div_(-h.shape[-1])
        return grad.mul_(inverse).addcmul_(h, along).to(x.dtype), None, None


def _fused_norm(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return an RMSNorm's forward in one function; None for what is none. Gemma's multiply by 1 + weight."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parameters = dict(module.named_parameters())
    if not isinstance(eps, float) or list(parameters) != ["weight"] or parameters["weight"].ndim != 1:
        return None
    if parameters["weight"].requires_grad:
        return None
    weight = parameters["weight"].detach()
    x = torch.linspace(-1e-2, 3e-2, 2 * len(weight), device=weight.device).to(weight.dtype).view(2, -1)
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for factor in (wide, 1 + wide):

        def ours(x: Tensor, factor: Tensor = factor) -> Tensor:
            return remember(_RmsNorm.apply(x, factor, eps), lambda x: _RmsNorm.compute(x, factor, eps)[0], x)

        if _same(module, ours, x):
            return ours
    return None


def _fused_mlp(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """Return a gated MLP's forward, down(act(gate(x)) * up(x)), whose product is made again instead of kept."""
    names = ("gate_proj", "up_proj", "down_proj", "act_fn")
    gate, up, down, activation = (getattr(module, name, None) for name in names)
    if gate is None or up is None or activation is None or not isinstance(down, LoraLinear):
        return None

    def product(gated: Tensor, upward: Tensor) -> Tensor:
        return activation(gated) * upward

    def ours(x: Tensor) -> Tensor:
        gated, upward = gate(x), up(x)
        if down.gain != 1.0:
            return down(product(gated, upward))
        dropout = down.active_dropout(gated.shape[:-1].numel())
        return down.finished(project((gated, upward), [down.projection()], dropout, product)[0])

    weight = down.projection().weight()  # [inner, features]
    x = torch.linspace(-1, 1, 2 * weight.shape[1], device=weight.device).to(weight.dtype).view(1, 2, -1)
    return ours if _same(module, ours, x) else None


@torch.no_grad()
def _same(module: nn.Module, ours: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Return whether both give the same for x. On the meta device there are no values, and the structure decides."""
    try:
        theirs = module(x)
        return x.is_meta or agree(ours(x), theirs, x.dtype)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False


class _Rotate(torch.autograd.Function):
    """x turned by its position, in halves: x cos + (-x_2, x_1) sin (Su et al. 2021, arXiv 2104.09864).

    It keeps cos and sin [1, 1, T, D] only, which all blocks share.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # [1, heads, T, D] -> [1, heads, T, D]
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        turned = x * cos
        turned[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
        turned[..., half:].addcmul_(x[..., :half], sin[..., half:])
        return turned

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        half = cos.shape[-1] // 2
        grad = grad_output * cos
        grad[..., :half].addcmul_(grad_output[..., half:], sin[..., half:])
        grad[..., half:].addcmul_(grad_output[..., :half], sin[..., :half], value=-1)
        return grad, None, None


_ROTARY = "apply_rotary_pos_emb"  # the function of this name that a model's file has beside its attention


def _with_our_rotation(module: nn.Module) -> Callable[..., Any] | None:
    """Return a forward that is the module's own but for the rotation of queries and keys; None where it has none."""
    turned = _turned(type(module).forward)
    return None if turned is None else MethodType(turned, module)


@functools.cache
def _turned(forward: Callable[..., Any]) -> FunctionType | None:
    """Return the function with our rotation in it; None where it has none, or another.

    Its code is given another name space, so that no other model is touched.
    """
    if getattr(forward, "__globals__", {}).get("__name__") == "transformers.utils.deprecation":
        forward = inspect.unwrap(forward)  # what is around it only takes old names of arguments
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
        return None
    theirs: Callable[..., Any] = forward.__globals__[_ROTARY]

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *others: Any, **options: Any) -> Any:
        whole = q.shape[-1] == k.shape[-1] == cos.shape[-1] and cos.ndim == 3 and q.dtype == cos.dtype
        if others or options or not whole or not torch.is_grad_enabled():
            return theirs(q, k, cos, sin, *others, **options)
        cos, sin = cos[:, None], sin[:, None]
        return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)

    x = torch.linspace(-1, 1, 48, device="cpu").view(1, 2, 3, 8)
    cos, sin = (torch.linspace(-1, 1, 24, device="cpu").roll(shift).view(1, 3, 8) for shift in (0, 5))
    try:
        with torch.enable_grad():
            pairs = zip(rotate(x, -x, cos, sin), theirs(x, -x, cos, sin), strict=True)
            same = all(agree(mine, other, x.dtype) for mine, other in pairs)
    except (TypeError, ValueError, RuntimeError):
        return None
    if not same:
        return None
    names = {**forward.__globals__, _ROTARY: rotate}
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return ours
