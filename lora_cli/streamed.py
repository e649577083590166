"""A model whose weights stay on the disk: each is read when its layer runs, and forgotten after it.

So that a model of any size can be run for a few tokens in the memory of its largest pieces, in float32.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_cli.loading import find_places, parameters_on_meta
from lora_cli.lora_linear import is_conv1d
from lora_cli.model import ModelHeader, build_skeleton
from lora_cli.tensor_file import TensorInfo
from lora_cli.weights import Weights

_PIECE = 1 << 20  # numbers of a weight that are read and multiplied at once


class Source(Protocol):
    """Where tensors come from, some rows at a time: a model's files, or what would be written of them."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def rows(self, name: str, begin: int = 0, end: int | None = None, room: bytearray | None = None) -> Tensor: ...


class CannotStream(Exception):
    """This model runs only when it is loaded."""


def open_model(header: ModelHeader, source: Source, trust_remote_code: bool = False) -> nn.Module:
    """Return a model that reads its weights as it runs.

    Raises CannotStream where a parameter is not in the files under its own name, as where experts are stored one by one
    and run together.
    """
    with parameters_on_meta():
        module = build_skeleton(header, trust_remote_code, device="cpu")
    if (places := find_places(module, source.infos)) is None:
        raise CannotStream("its files have other names")
    names = {info: name for name, info in source.infos.items()}
    room = _Room(source)
    for path, layer in module.named_modules():
        own = {
            name: names[places[f"{path}.{name}" if path else name]]
            for name, there in layer._parameters.items()
            if there is not None
        }
        if type(layer) is nn.Linear:
            layer.forward = _LinearOnDisk(room, **own)
        elif isinstance(layer, nn.Embedding):
            layer.register_forward_pre_hook(_rows_before(source, own["weight"]))
        elif isinstance(layer, nn.Linear) or is_conv1d(layer):
            layer.register_forward_pre_hook(_all_before(source, own))
        else:  # norms, convolutions and the like are small
            _all_before(source, own)(layer)
            continue
        layer.register_forward_hook(_forget)
        _forget(layer)
    return module


@contextlib.contextmanager
def adding(module: nn.Module, changed: Weights) -> Iterator[None]:
    """Run a block with the update of a model's weights added to what its layers give."""
    with _hooked(module, changed, lambda path, x, output: output + changed.output(path, x, output)):
        yield


def with_and_without(module: nn.Module, changed: Weights, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits [B * T, V] of a model without and with an update, its weights read once for both.

    Both run as one batch, the update added to the second half of it. Raises CannotStream where a layer sees the rows in
    another order, or where code reads a layer's weights from elsewhere than the layer.
    """
    rows = 2 * len(ids)

    def add(path: str, x: Tensor, output: Tensor) -> Tensor:
        if len(x) not in (rows, rows * ids.shape[1]):
            raise IndexError(path)
        half = len(x) // 2
        without, base = output.chunk(2)
        return torch.cat([without, base + changed.output(path, x[half:], base)])

    try:
        with _hooked(module, changed, add):
            without, with_update = logits(module, ids.repeat(2, 1)).chunk(2)
    except (RuntimeError, AttributeError, IndexError) as error:
        raise CannotStream(str(error)) from None
    return without, with_update


def logits(module: Any, ids: Tensor) -> Tensor:
    """Return a model's logits [B * T, V] for tokens [B, T]."""
    output: Tensor = module(input_ids=ids, use_cache=False).logits
    return output.flatten(0, 1).float()


@contextlib.contextmanager
def _hooked(module: nn.Module, changed: Weights, add: Callable[[str, Tensor, Tensor], Tensor]) -> Iterator[None]:
    """Run a block with `add` of (path, input, output) in the place of each changed layer's output."""

    def hook(path: str) -> Any:
        return lambda layer, inputs, output: add(path, inputs[0], output)

    handles = [module.get_submodule(path).register_forward_hook(hook(path)) for path in changed.adapted.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Room:
    """Where pieces of matrices are read and widened: made once, because a heap that gives and takes them grows."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._raw = bytearray()
        self._wide = torch.empty(0)

    def read(self, name: str, begin: int, end: int) -> Tensor:
        """Return rows [end - begin, columns] in float32, until the next are read."""
        count = (end - begin) * self.source.infos[name].shape[1]
        if count > len(self._wide):
            with torch.inference_mode(False):  # or it could be used in that mode only
                self._raw, self._wide = bytearray(8 * count), torch.empty(count)
        wide = self._wide[:count].view(end - begin, -1)
        return wide.copy_(self.source.rows(name, begin, end, self._raw))


class _LinearOnDisk:
    """x W^T + b [..., out] for x [..., in], W read some rows at a time."""

    def __init__(self, room: _Room, weight: str, bias: str | None = None) -> None:
        self.room, self.weight, self.bias = room, weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        source = self.room.source
        rows, columns = source.infos[self.weight].shape
        step = max(1, _PIECE // columns)
        output = x.new_empty(*x.shape[:-1], rows)
        for begin in range(0, rows, step):
            end = min(rows, begin + step)
            output[..., begin:end] = F.linear(x, self.room.read(self.weight, begin, end))
        return output if self.bias is None else output + source.rows(self.bias).float()


def _all_before(source: Source, own: dict[str, str]) -> Any:
    def read(layer: nn.Module, *_: Any) -> None:
        for name, stored in own.items():
            layer._parameters[name] = nn.Parameter(source.rows(stored).float(), requires_grad=False)

    return read


def _rows_before(source: Source, weight: str) -> Any:
    """Read the rows of the tokens that are there; the others are memory that nothing touches."""

    def read(layer: nn.Module, inputs: Any) -> None:
        table = torch.empty(source.infos[weight].shape, dtype=torch.float32)
        for row in inputs[0].unique().tolist():
            table[row] = source.rows(weight, row, row + 1)[0]
        layer._parameters["weight"] = nn.Parameter(table, requires_grad=False)

    return read


def _forget(layer: nn.Module, *_: Any) -> None:
    """Leave no numbers where weights were, so that code which reads them elsewhere than in their layer fails."""
    nothing = nn.Parameter(torch.empty(0), requires_grad=False)
    layer._parameters.update({name: nothing for name, there in layer._parameters.items() if there is not None})
