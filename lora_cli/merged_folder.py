"""The files of a whole model, merged or fully tuned, written tensor by tensor.

The base's files, tensor names and order are kept, its dtypes too unless another is asked for, and what holds no weights
is copied byte for byte: a folder saved anew by another library version may be read differently by an older one.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from lora_cli import adapter, card, manifest, model, room, storage
from lora_cli.adapter_folder import save_templates
from lora_cli.base_folder import weight_files
from lora_cli.errors import AdapterError
from lora_cli.model import ModelHeader
from lora_cli.randomness import derive_seed
from lora_cli.reports import MergedLayer
from lora_cli.tensor_file import TensorInfo, read_infos, read_metadata, write_tensors
from lora_cli.tuned import Result
from lora_cli.update import Update
from lora_cli.weights import Weights

Dtype = Literal["keep", "float32", "bfloat16", "float16"]
Rounding = Literal["nearest", "stochastic"]
Onto = Literal["stored", "dequantised"]

RECORD = "merge.json"  # in a merged folder: what it was made of
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ckpt"}
_PIECE = 1 << 19  # numbers that are merged at once
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Form:
    """How merged weights are written, and what of a base that was trained quantised the update is added to.

    That is its weights as they are stored, or as quantisation leaves them.
    """

    dtype: Dtype = "keep"
    rounding: Rounding = "nearest"
    onto: Onto = "stored"

    def dtype_of(self, info: TensorInfo) -> torch.dtype:
        """Return the dtype a tensor is written in; numbers that are no floats keep theirs."""
        if self.dtype == "keep" or not info.dtype.is_floating_point:
            return info.dtype
        written: torch.dtype = getattr(torch, self.dtype)
        return written


@dataclass(frozen=True)
class Merged:
    """The tensors of a merged model, made as they are asked for."""

    weights: Weights
    form: Form

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Return those of the base: names, shapes and places are the same."""
        return self.weights.infos

    def rows(self, name: str, begin: int = 0, end: int | None = None, room: bytearray | None = None) -> Tensor:
        """Return rows of a tensor as they are written."""
        return _rounded(self.weights, self.form, name, begin, end, room)[2]


def open_weights(result: Result, skeleton: nn.Module, update: Update | None, onto: Onto) -> Weights:
    """Return a result's base, as it is stored or as quantisation leaves it, and an update."""
    kind = result.base.quantization if onto == "dequantised" else None
    return Weights(result.header.folder, skeleton, update, kind)


def require_space(weights: Weights, base: Path, output: Path, form: Form) -> None:
    """Raise SurroundingsError where the disk has not the room for what will be written."""
    needed = sum(info.size // info.dtype.itemsize * form.dtype_of(info).itemsize for info in weights.infos.values())
    needed += sum(file.stat().st_size for file in base.iterdir() if file.is_file() and not _stays_behind(file))
    room.require_room(output, needed)


def write(
    weights: Weights, own: ModelHeader, templates: Mapping[str, str], folder: Path, form: Form
) -> list[MergedLayer]:
    """Write a model's files: its weights, and what else its base has; return what became of each update.

    `own` is the base as its files have it, `templates` are chat templates that it may not have.
    """
    base, layers = own.folder, list[MergedLayer]()
    for source in weight_files(base):
        infos = {name: replace(info, dtype=form.dtype_of(info)) for name, info in read_infos(source).items()}
        write_tensors(folder / source.name, infos, read_metadata(source), _merged(weights, infos, form, layers))
    theirs = own.tokenizer.chat_template
    if templates and model.with_chat_templates(own.tokenizer, templates).chat_template == theirs:
        templates = {}
    for source in sorted(base.iterdir()):
        if source.is_file() and not _stays_behind(source) and source.name[0] != "." and source.name not in templates:
            storage.add_copy(source, folder / source.name)
    if form.dtype != "keep":
        _say_dtype(folder, form.dtype)
    save_templates(folder, templates)
    return layers


def _stays_behind(file: Path) -> bool:
    """Return whether a file of the base holds weights or tells of the base alone."""
    return file.suffix in _OTHER_WEIGHTS or file.name in (manifest.MANIFEST, RECORD, adapter.BASE, card.FILE)


def _merged(
    weights: Weights, infos: Mapping[str, TensorInfo], form: Form, layers: list[MergedLayer]
) -> Iterator[Tensor | TensorInfo]:
    """Give a file's tensors in its order as they are to be written, and add what became of each update to `layers`."""
    for name, written in infos.items():
        stored = weights.infos[name]
        if name not in weights.adapted and name not in weights.quantised and written.dtype == stored.dtype:
            yield stored
            continue
        sums = torch.zeros(3, dtype=torch.float64)
        for begin, end in _pieces(stored.shape):
            before, change, rounded = _rounded(weights, form, name, begin, end)
            _require_finite(name, rounded)
            yield rounded
            if change is not None:
                there = rounded.float() - before  # not in place: another thread writes it
                pairs = ((before, before), (change, change), (there, change))
                sums += torch.stack([torch.vdot(a.flatten(), b.flatten()) for a, b in pairs])
        if name in weights.adapted:
            layers.append(_layer(name, *sums.tolist()))


def _rounded(
    weights: Weights, form: Form, name: str, begin: int, end: int | None, room: bytearray | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return rows of a tensor before, what is added to them (None where it is not adapted), and as they are written."""
    before = weights.rows(name, begin, end, room).float()
    change = weights.change(name, before, begin, end) if name in weights.adapted else None
    rounding, seed = (form.rounding, derive_seed(0, name, begin)) if change is not None else ("nearest", 0)
    added = before if change is None else before + change
    return before, change, round_to(added, form.dtype_of(weights.infos[name]), rounding, seed)


def _pieces(shape: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Split a tensor's rows into pieces that fit a processor's cache; what is no matrix is small, and stays whole."""
    rows, columns = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    step = max(1, _PIECE // max(1, columns))
    return ((begin, min(rows, begin + step)) for begin in range(0, rows, step))


def _require_finite(name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor.float().sum()) and not torch.isfinite(tensor).all():  # the sum is the quicker to ask
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise AdapterError(f"{name}: has numbers that are not finite in {dtype}; --dtype takes another.")


def round_to(tensor: Tensor, dtype: torch.dtype, rounding: Rounding, seed: int) -> Tensor:
    """Return a float32 tensor in another dtype, each number rounded to its nearest there, or by chance.

    By chance (stochastic rounding): up as often as it is far from the lower neighbour, so that the mean of many numbers
    stays what it was, and updates far below the dtype's resolution are not lost on balance. Infinite where the nearest
    is.
    """
    nearest = tensor.to(dtype)
    if rounding == "nearest" or dtype == torch.float32:
        return nearest
    size = tensor.abs()
    low = size.to(dtype)
    bits = low.view(torch.int16)  # of positive numbers: the next bit pattern is the next number
    bits -= (low.float() > size).to(torch.int16)
    high = (bits + 1).view(dtype)
    chance = (size - low.float()) / (high.float() - low.float())
    up = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)) < chance
    return torch.where(nearest.isinf(), nearest, torch.where(up, high, low).copysign(nearest))


def _layer(name: str, weight: float, change: float, along: float) -> MergedLayer:
    """Return a layer's report from the sums of squares of weight and change, and that of what is written along it."""
    return MergedLayer(name, math.sqrt(change / max(weight, 1e-38)), along / change if change else None)


def _say_dtype(folder: Path, dtype: Dtype) -> None:
    """Say in config.json, and in the index's total, what the weights are now."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = dtype
    storage.write_json(folder / "config.json", config)
    if (index := folder / _INDEX).is_file():
        values = json.loads(index.read_text(encoding="utf-8"))
        total = sum(info.size for file in weight_files(folder) for info in read_infos(file).values())
        values["metadata"] = {**values.get("metadata", {}), "total_size": total}
        storage.write_json(index, values)
