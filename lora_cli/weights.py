"""A base model's weights on disk, one tensor at a time, an adapter added where there is one; written the same way.

The files are safetensors (https://github.com/huggingface/safetensors#format): 8 bytes little-endian N, N bytes of JSON
that gives each tensor's dtype, shape and place, then the tensors. They are read and written here tensor by tensor, so
that memory holds one of them, whatever a file's size.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from lora_cli import lora
from lora_cli.adapter import Adapter
from lora_cli.errors import AdapterError, ModelError
from lora_cli.model import weight_files

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes, as the format's own library allows
_PIECE = 1 << 24  # bytes copied at once


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a file: its dtype and shape, and where its bytes are."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_infos(file: Path) -> dict[str, TensorInfo]:
    """Return what a safetensors file holds, in the order of its bytes. Raises ModelError where it is not whole."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > min(size, _LARGEST_HEADER):
                raise ValueError(f"a header of {length} bytes")
            entries = json.loads(opened.read(length))
        entries.pop("__metadata__", None)
        infos = {
            name: TensorInfo(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"][0])
        }
    except KeyError as error:
        raise ModelError(f"{file}: holds tensors of a dtype that is not read here ({error}).") from None
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise ModelError(f"{file}: is no whole safetensors file: {str(error)[:120]}.") from None
    end = 8 + length
    for name, info in infos.items():
        if info.begin != end:
            raise ModelError(f"{file}: the bytes of {name[:80]} are not where they should be.")
        end += info.size
    if end != size:
        raise ModelError(f"{file}: has {size:,} bytes, and its header speaks of {end:,}; it is cut or damaged.")
    return infos


def read_tensor(info: TensorInfo) -> Tensor:
    """Read one tensor, as it is stored."""
    raw = bytearray(info.size)
    with info.file.open("rb") as file:
        file.seek(info.begin)
        if file.readinto(raw) != info.size:
            raise ModelError(f"{info.file}: ends too early.")
    return (
        torch.frombuffer(raw, dtype=info.dtype).reshape(info.shape)
        if raw
        else torch.empty(info.shape, dtype=info.dtype)
    )


class Weights:
    """A base model's tensors by their names in its files; `adapted` are those an adapter changes."""

    def __init__(self, folder: Path, skeleton: nn.Module, adapter: Adapter | None = None) -> None:
        """Read the headers of a model's files, and find the tensor of every layer the adapter changes.

        Raises ModelError where a file is not whole; AdapterError where a layer of the adapter has no tensor, or one
        of another shape.
        """
        self.infos: Mapping[str, TensorInfo] = {
            name: info for file in weight_files(folder) for name, info in read_infos(file).items()
        }
        self.adapter = adapter
        self.adapted: Mapping[str, str] = _find_adapted(self.infos, skeleton, adapter) if adapter else {}
        self._transposed = {path for path in self.adapted.values() if lora.is_conv1d(skeleton.get_submodule(path))}

    def read(self, name: str) -> Tensor:
        """Read one tensor: as it is stored, or W + scale * B A in float32 where the adapter changes it.

        Raises AdapterError where the sum is not finite.
        """
        tensor = read_tensor(self.infos[name])
        if name not in self.adapted or self.adapter is None:
            return tensor
        path, adapter = self.adapted[name], self.adapter
        transposed = path in self._transposed
        merged = lora.merged_weight(
            tensor, adapter.lora_A[path], adapter.lora_B[path], adapter.scales[path], transposed
        )
        if not torch.isfinite(merged).all():
            raise AdapterError(f"{path}: the merged weight is not finite.")
        return merged


def _find_adapted(infos: Mapping[str, TensorInfo], skeleton: nn.Module, adapter: Adapter) -> dict[str, str]:
    """Return the layer's path of every tensor that an adapter changes.

    Files may name tensors from inside the model's base (`h.0...` for `transformer.h.0...`) or from outside.
    """
    prefix = f"{getattr(skeleton, 'base_model_prefix', '')}."
    found, problems = dict[str, str](), []
    for path in adapter.lora_A:
        names = [f"{place}.weight" for place in (path, f"{prefix}{path}", path.removeprefix(prefix))]
        name = next((name for name in names if name in infos), None)
        if name is None:
            problems.append(f"{adapter.folder}: adapts {path}, and the base's files have no {names[0]}.")
        else:
            found[name] = path
    if problems:
        raise AdapterError("The adapter does not fit this base model.", *problems)
    return found


def write_file(target: Path, infos: Mapping[str, TensorInfo], tensors: Iterator[tuple[str, Tensor]]) -> None:
    raise NotImplementedError


def copy_bytes(info: TensorInfo, target: BinaryIO) -> None:
    """Copy a tensor's bytes as they are, piece by piece."""
    with info.file.open("rb") as file:
        file.seek(info.begin)
        left = info.size
        while left:
            piece = file.read(min(left, _PIECE))
            if not piece:
                raise ModelError(f"{info.file}: ends too early.")
            target.write(piece)
            left -= len(piece)
