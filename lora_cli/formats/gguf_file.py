"""GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): written by tensors, read back, compared.

A file is metadata (keys and values), the tensors' names, types and shapes, then the tensors. Memory holds one of them.
"""

import errno
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from lora_cli.errors import AdapterError, SurroundingsError

Kind = Literal["f32", "f16", "bf16", "q8_0"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Value = bool | int | float | str | Sequence[int] | Sequence[float] | Sequence[str]
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}  # general.file_type
_BLOCK = 32  # numbers that share one scale in q8_0
_PIECE = 1 << 20  # numbers compared at once


@dataclass(frozen=True)
class Planned:
    """A tensor to write: `read` makes it in float32, in `shape`, whose last dimension is the one that lies together."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Plan:
    """A whole file to write; tensors in their order in it."""

    architecture: str
    metadata: Mapping[str, Value]
    tensors: Sequence[Planned]

    @property
    def size(self) -> int:
        """About how many bytes the file will have."""
        return sum(_bytes_of(tensor) for tensor in self.tensors) + 64 * sum(
            len(value) for value in self.metadata.values() if not isinstance(value, bool | int | float | str)
        )


@dataclass(frozen=True)
class Verified:
    """What was compared after a file was read back; `largest_error` is by rounding, in units of the weights."""

    tensors: int
    values: int
    metadata: int
    largest_error: float


def library() -> Any:
    """Return the package gguf. Raises SurroundingsError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise SurroundingsError(
            "GGUF files are written with the package gguf, which is not installed: pip install 'lora-cli[gguf]'."
        ) from None
    return gguf


def tensor_names(architecture: str, blocks: int) -> Callable[[str], str | None]:
    """Return a function from a tensor's name in a Hugging Face file to that in a GGUF file; None where it has none."""
    gguf = library()
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, blocks)
    return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))


def kind_of(kind: Kind, shape: Sequence[int]) -> Kind:
    """Return how a tensor is stored in a file of a kind: vectors in f32, rows that are no whole blocks in f16."""
    if len(shape) < 2:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % _BLOCK else kind


def file_type(kind: Kind) -> Mapping[str, Value]:
    """Return the metadata that says how most tensors are stored."""
    return {"general.file_type": _FILE_TYPES[kind]} | ({"general.quantization_version": 2} if kind == "q8_0" else {})


def write(path: Path, plan: Plan) -> None:
    """Write a file. Raises AdapterError where a number does not fit its type, OSError where the disk does not."""
    gguf = library()
    writer = gguf.GGUFWriter(path, plan.architecture)
    try:
        for key, value in plan.metadata.items():
            _add(gguf, writer, key, value)
        for tensor in plan.tensors:
            kind = gguf.GGMLQuantizationType[tensor.kind.upper()]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), _bytes_of(tensor), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in plan.tensors:
            writer.write_tensor_data(_encoded(gguf, tensor, tensor.read()))
    except OSError as error:
        if error.errno is not None:
            raise
        raise OSError(errno.ENOSPC, str(error)) from None  # numpy says only how much it could write
    finally:
        writer.close()


def _add(gguf: Any, writer: Any, key: str, value: Value) -> None:
    types = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    writer.add_key_value(key, value, gguf.GGUFValueType[types.get(type(value), "ARRAY")])


def _bytes_of(tensor: Planned) -> int:
    """Bytes of a tensor as it is stored; a block of q8_0 is a float16 scale and a byte for each number."""
    count = math.prod(tensor.shape)
    if tensor.kind == "q8_0":
        return count // _BLOCK * (2 + _BLOCK)
    return count * (4 if tensor.kind == "f32" else 2)


def _encoded(gguf: Any, tensor: Planned, values: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor's bytes, each number rounded once."""
    assert tuple(values.shape) == tensor.shape, tensor.name
    values = values.float().contiguous()
    if not torch.isfinite(values).all():
        raise AdapterError(f"{tensor.name}: has numbers that are not finite.")
    match tensor.kind:
        case "f32":
            return values.numpy()
        case "q8_0":
            return gguf.quantize(values.numpy(), gguf.GGMLQuantizationType.Q8_0)
        case kind:
            rounded = _rounded(values, kind)
            if not torch.isfinite(rounded).all():
                raise AdapterError(
                    f"{tensor.name}: {float(values.abs().max()):.3g} is too large for {kind}; take --gguf-type bf16."
                )
            return rounded.view(torch.int16).numpy()


def _rounded(values: Tensor, kind: Kind) -> Tensor:
    dtypes = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    return values.to(dtypes[kind])


def verify(path: Path, plan: Plan) -> Verified:
    """Read a file and compare everything in it with what was meant. Raises AdapterError at the first difference.

    Numbers must be the same in f32, the nearest in f16 and bf16, and within their block's step in q8_0.
    """
    gguf = library()
    reader = gguf.GGUFReader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    if [tensor.name for tensor in plan.tensors] != list(found):
        raise AdapterError(f"{path}: holds other tensors than were written.")
    for key, value in plan.metadata.items():
        if key not in reader.fields or not _same(reader.fields[key].contents(), value):
            raise AdapterError(f"{path}: {key} is not what was written.")
    largest = 0.0
    for tensor in plan.tensors:
        stored = found[tensor.name]
        if stored.tensor_type.name != tensor.kind.upper() or tuple(reversed(stored.shape.tolist())) != tensor.shape:
            raise AdapterError(f"{path}: {tensor.name} has another type or shape than was written.")
        for got, meant in _pieces(gguf, stored, tensor.read().float()):
            if not _within(got, meant, tensor.kind):
                raise AdapterError(f"{path}: the numbers of {tensor.name} are not those that were meant.")
            largest = max(largest, float((got - meant).abs().max()))
    values = sum(math.prod(tensor.shape) for tensor in plan.tensors)
    return Verified(len(plan.tensors), values, len(plan.metadata), largest)


def _pieces(gguf: Any, stored: Any, meant: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some rows at a time of a tensor in a file, and of what it should be, in float32."""
    rows = stored.data.reshape(-1, stored.data.shape[-1])
    meant = meant.reshape(len(rows), -1)
    count = max(1, _PIECE // meant.shape[1])
    for begin in range(0, len(rows), count):
        got = gguf.dequantize(rows[begin : begin + count], stored.tensor_type)
        yield torch.from_numpy(np.array(got)), meant[begin : begin + count]


def _same(got: Any, meant: Value) -> bool:
    """Return whether metadata is what was meant; floats are stored in 32 bits."""
    (ours, theirs) = ([meant], [got]) if isinstance(meant, bool | int | float | str) else (meant, got)
    if any(isinstance(each, float) for each in ours):
        return bool(np.array_equal(np.asarray(ours, np.float32), np.asarray(theirs, np.float32)))
    return list(ours) == list(theirs)


def _within(got: Tensor, meant: Tensor, kind: Kind) -> bool:
    """Return whether stored numbers are as near as their type allows.

    In q8_0 a block's step is its largest number over 127, rounded to float16 (11 bits, or 2^-25 near zero).
    """
    if kind != "q8_0":
        return bool((got == _rounded(meant, kind).float()).all())
    blocks = meant.reshape(-1, _BLOCK)
    step = blocks.abs().amax(1, keepdim=True) / 127
    bound = step * (0.5 + 128 * 2**-11) + 128 * 2**-25
    return bool(((got.reshape(-1, _BLOCK) - blocks).abs() <= bound).all())
