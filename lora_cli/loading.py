"""Weights from a model's files into its module, some rows after the others, each in its last dtype where it stays.

So that loading takes the memory of the weights as they end, and of one piece. What is read and what is done with it
are apart: a `Piece` says which rows of which tensor it holds, wherever it comes from.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_cli import lora
from lora_cli.distributed import World
from lora_cli.lora_linear import is_conv1d, linear_shape
from lora_cli.quantised import BLOCK, Kind, QuantisedLinear
from lora_cli.sharding import as_part, keep_own, own_rows
from lora_cli.tensor_file import TensorInfo, read_rows

_PIECE = 1 << 18  # bytes that are read at once


class Piece(NamedTuple):
    """Some rows [end - begin, ...] of a parameter, as they are stored; all of a scalar. Good until the next is made."""

    name: str
    begin: int
    end: int
    rows: Tensor


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Have modules built in the block put their parameters on torch's meta device; buffers stay real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def name_in(infos: Mapping[str, TensorInfo], parameter: str, prefix: str) -> str | None:
    """Return the name in the files of a model's parameter; None where they have none of that name.

    Files may name tensors from inside the model's base (`h.0...` for `transformer.h.0...`) or from outside.
    """
    places = (parameter, f"{prefix}.{parameter}", parameter.removeprefix(f"{prefix}."))
    return next((place for place in places if place in infos), None)


def find_places(module: nn.Module, infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo] | None:
    """Return where each parameter is; tied ones where any of those tied to them is.

    None where one is not in the files under its own name and in its own shape, as where experts are stored one by one
    and run together.
    """
    found, missing = dict[str, TensorInfo](), dict[str, nn.Parameter]()
    by_parameter: dict[nn.Parameter, TensorInfo] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        stored = name_in(infos, name, getattr(module, "base_model_prefix", ""))
        if stored is None:
            missing[name] = parameter
        elif infos[stored].shape != tuple(parameter.shape):
            return None
        else:
            found[name] = by_parameter[parameter] = infos[stored]
    if any(parameter not in by_parameter for parameter in missing.values()):
        return None
    return found | {name: by_parameter[parameter] for name, parameter in missing.items()}


def tied_names(module: nn.Module) -> list[list[str]]:
    """Return the names of every parameter, those of one together."""
    names = defaultdict[nn.Parameter, list[str]](list)
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[parameter].append(name)
    return list(names.values())


def read_pieces(places: Mapping[str, TensorInfo], read: bool = True) -> Iterator[Piece]:
    """Read tensors in pieces, each after the one before it in its file; matrices in multiples of BLOCK rows.

    Without `read` only room is made for them.
    """
    room = bytearray()
    for name, info in sorted(places.items(), key=lambda place: (place[1].file, place[1].begin)):
        count = info.shape[0] if info.shape else 1
        row = info.size // max(1, count)
        step = max(1, _PIECE // max(1, row))
        if len(info.shape) == 2:
            step = max(BLOCK, step // BLOCK * BLOCK)
        if len(room) < min(step, count) * row:
            room = bytearray(min(step, count) * row)
        for begin in range(0, max(1, count), step):
            end = min(count, begin + step)
            shape = (end - begin, *info.shape[1:]) if info.shape else ()
            rows = read_rows(info, begin, end, room) if read else torch.empty(shape, dtype=info.dtype)
            yield Piece(name, begin, end, rows)


def hand_out(pieces: Iterable[Piece], world: World) -> Iterator[Piece]:
    """Give every rank what the main rank reads; the others have only made room for it."""
    for piece in pieces:
        yield piece._replace(rows=world.spread(piece.rows.to(world.device)))


def fill(module: nn.Module, pieces: Iterable[Piece], dtype: torch.dtype, device: torch.device) -> None:
    """Put what pieces hold into a module's parameters, of which each comes under one of its names.

    A layer that is to be quantised is while its weight is read. What is divided over ranks keeps this rank's rows.
    """
    together = {name: names for names in tied_names(module) for name in names}
    layers = {f"{path}.weight": part for path, part in module.named_modules() if isinstance(part, QuantisedLinear)}
    for layer in layers.values():  # before anything is read: what is freed between them would be lost to other sizes
        layer.make_room(device)
    for name, some in groupby(pieces, key=lambda piece: piece.name):
        if name in layers:
            layers[name].quantise(piece.rows.to(device) for piece in some)
            continue
        empty = module.get_parameter(name)
        first, after = own_rows(empty)
        own = torch.empty((after - first, *empty.shape[1:]) if empty.ndim else (), dtype=dtype, device=device)
        for piece in some:
            if own.ndim:
                keep_own(own, first, piece.begin, piece.rows)
            else:
                own.copy_(piece.rows)
        parameter = nn.Parameter(as_part(empty, own), requires_grad=False)
        for each in together[name]:
            path, _, last = each.rpartition(".")
            module.get_submodule(path)._parameters[last] = parameter


def plan_to_quantise(module: nn.Module, kind: Kind) -> None:
    """Put quantised layers without numbers in the place of the linear ones of a model's blocks."""
    for path in lora.find_targets(module, "all-linear"):
        layer: Any = module.get_submodule(path)
        inputs, outputs = linear_shape(layer)
        parent, _, name = path.rpartition(".")
        planned = QuantisedLinear(kind, (outputs, inputs), layer.bias, layer.weight.dtype, is_conv1d(layer))
        setattr(module.get_submodule(parent), name, planned)


def quantise_loaded(module: nn.Module, kind: Kind) -> None:
    """Quantise a loaded model's layers in place, one after the other."""
    weights = {path: module.get_parameter(f"{path}.weight") for path in lora.find_targets(module, "all-linear")}
    plan_to_quantise(module, kind)
    while weights:
        path, weight = weights.popitem()
        layer = module.get_submodule(path)
        layer.make_room(weight.device)
        layer.quantise([weight.detach()])
