"""Safetensors files, one tensor at a time (https://github.com/huggingface/safetensors#format).

8 bytes little-endian N, N bytes of JSON that gives each tensor's dtype, shape and place, then the tensors. They are
read and written here tensor by tensor, or some rows of one, so that memory holds no more, whatever a file's size.
"""

import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lora_cli import interrupt, storage
from lora_cli.errors import ModelError, shown
from lora_cli.manifest import SMALL

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
    return _read_header(file)[0]


def read_all_infos(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """Return what several files hold, in their order."""
    return {name: info for file in files for name, info in read_infos(file).items()}


def read_metadata(file: Path) -> dict[str, str]:
    """Return the notes in a safetensors file's header."""
    return _read_header(file)[1]


def _read_header(file: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > min(size, _LARGEST_HEADER):
                raise ValueError(f"a header of {length} bytes")
            entries = json.loads(opened.read(length).decode())
        metadata = {str(key): str(value) for key, value in entries.pop("__metadata__", {}).items()}
        found = [_info(file, entry, 8 + length) for entry in entries.values()]
    except (ValueError, TypeError, AttributeError, IndexError, KeyError, RecursionError) as error:
        raise ModelError(f"{file}: is no whole safetensors file: {shown(error, 100)}. Fetch it again.") from None
    infos = dict(sorted(zip(entries, found, strict=True), key=lambda item: item[1].begin))
    end = 8 + length
    for name, info in infos.items():
        if info.begin != end:
            raise ModelError(f"{file}: the bytes of {shown(name)} are not where they should be.")
        end += info.size
    if end != size:
        raise ModelError(f"{file}: has {size:,} bytes, and its header speaks of {end:,}; it is cut or damaged.")
    return infos, metadata


def _info(file: Path, entry: Mapping[str, Any], begin: int) -> TensorInfo:
    """Return what a header says of a tensor. Raises ModelError for a dtype not read here, others where it is none."""
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)):
        raise ValueError(f"no shape or place of a tensor: {shown((shape, offsets))}")
    if entry["dtype"] not in DTYPES:
        raise ModelError(f"{file}: holds tensors of a dtype that is not read here ({shown(entry['dtype'])}).")
    return TensorInfo(file, DTYPES[entry["dtype"]], tuple(shape), begin + offsets[0])


def read_tensor(info: TensorInfo, room: bytearray | None = None) -> Tensor:
    """Read one tensor, as it is stored; into `room`, where that is given. Raises Interrupted: it is what lasts."""
    interrupt.poll()
    raw = bytearray(info.size) if room is None else memoryview(room)[: info.size]
    with info.file.open("rb") as file:
        file.seek(info.begin)
        if file.readinto(raw) != info.size:
            raise ModelError(f"{info.file}: ends too early.")
    return (
        torch.frombuffer(raw, dtype=info.dtype).reshape(info.shape)
        if raw
        else torch.empty(info.shape, dtype=info.dtype)
    )


def read_rows(info: TensorInfo, begin: int, end: int, room: bytearray | None = None) -> Tensor:
    """Read some rows of a tensor [rows, ...], as they are stored; all of a scalar. Into `room`, where that is given."""
    if not info.shape:
        return read_tensor(info, room)
    shape = (end - begin, *info.shape[1:])
    offset = info.begin + begin * math.prod(info.shape[1:]) * info.dtype.itemsize
    return read_tensor(replace(info, begin=offset, shape=shape), room)


def write_tensors(
    file: Path, infos: Mapping[str, TensorInfo], metadata: Mapping[str, str], pieces: Iterable[Tensor | TensorInfo]
) -> None:
    """Write a safetensors file piece by piece.

    `infos` give the names, dtypes and shapes; their tensors, or rows of them, come in the same order, a TensorInfo
    standing for bytes to copy as they are.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, info in infos.items():
        entries[name] = {"dtype": _NAMES[info.dtype], "shape": info.shape, "data_offsets": [end, end + info.size]}
        end += info.size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with storage.adding(file) as target:
        target.write(len(header).to_bytes(8, "little") + header)
        if end < SMALL:
            for piece in pieces:
                _write_piece(piece, target)
        else:
            _write_behind(pieces, target)
        assert target.tell() == 8 + len(header) + end, "the pieces are what the header says"


def _write_behind(pieces: Iterable[Tensor | TensorInfo], target: BinaryIO) -> None:
    """Write each piece while the next is made."""
    with ThreadPoolExecutor(1) as writer:
        pending: Future[None] | None = None
        for piece in pieces:
            if pending is not None:
                pending.result()
            pending = writer.submit(_write_piece, piece, target)
        if pending is not None:
            pending.result()


def write_whole(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors as a safetensors file, as transformers reads it; of one at a time a copy is made, if any."""
    infos = {name: TensorInfo(file, tensor.dtype, tuple(tensor.shape), 0) for name, tensor in tensors.items()}
    write_tensors(file, infos, {"format": "pt"}, (each.detach().cpu().contiguous() for each in tensors.values()))


def _write_piece(piece: Tensor | TensorInfo, target: BinaryIO) -> None:
    if isinstance(piece, Tensor):
        target.write(piece.reshape(-1).view(torch.uint8).numpy())
        return
    with piece.file.open("rb") as file:
        file.seek(piece.begin)
        left = piece.size
        while left:
            part = file.read(min(left, _PIECE))
            if not part:
                raise ModelError(f"{piece.file}: ends too early.")
            target.write(part)
            left -= len(part)
