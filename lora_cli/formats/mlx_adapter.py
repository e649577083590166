"""An adapter as mlx-lm reads it (load_adapters, LoRALinear, DoRALinear of https://github.com/ml-explore/mlx-lm, 0.32).

adapters.safetensors    <path>.lora_a [in, rank] = A^T, <path>.lora_b [rank, out] = (scale * B)^T, float32;
                        of DoRA <path>.m [out] too, the magnitude
adapter_config.json     fine_tune_type, num_layers, lora_parameters: rank, scale, dropout, keys

There is one rank and one scale for all layers, so smaller ranks are padded with zeros and each layer's scale is folded
into its B. mlx-lm wraps what `keys` name inside the last `num_layers` blocks, or by a whole path; a layer it wraps that
has no tensors here starts with lora_b = 0, and with m as its weight has it, and changes nothing.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F

from lora_cli import storage
from lora_cli.adapter import Adapter
from lora_cli.errors import AdapterError
from lora_cli.runtimes import MLX
from lora_cli.tuned import Result

WEIGHTS = "adapters.safetensors"
CONFIG = "adapter_config.json"
_INSIDE_A_BLOCK = re.compile(r".*?\.(?P<block>\d+)\.(?P<inner>.+)")  # model.layers.3.self_attn.q_proj
_READS_ROPE_PARAMETERS = ("ministral3", "qwen3")  # config.json as transformers 5 writes it
_BOUND = 1e-5  # of an update read back, as a share of its largest number: one rounding of float32 and some room


def require_holdable(result: Result) -> None:
    """Raise AdapterError where it was not tried whether MLX can hold an adapter of this base."""
    model_type = result.header.config.model_type
    if model_type not in MLX:
        raise AdapterError(
            f"{result.adapter.folder}: mlx-lm has no model for the type {model_type} of its base, or was not tried "
            f"with it; these were: {', '.join(sorted(MLX))}. `lora merge` writes a model that needs no adapter."
        )


def caveat(result: Result) -> str | None:
    """Return what to know where mlx-lm would silently run the base with rotary positions of its own."""
    raw = json.loads((result.header.folder / "config.json").read_text(encoding="utf-8"))
    theta = (raw.get("rope_parameters") or {}).get("rope_theta")
    if theta is None or "rope_theta" in raw or raw["model_type"] in _READS_ROPE_PARAMETERS:
        return None
    return (
        f"The base's config.json gives rope_theta inside rope_parameters, where mlx-lm does not look for it in a "
        f'{raw["model_type"]} model: add "rope_theta": {theta} at the top of the config.json that MLX runs from.'
    )


def write(result: Result, folder: Path) -> None:
    """Write the files of an adapter for MLX into a folder; read them back and compare. Raises AdapterError."""
    require_holdable(result)
    adapter = result.adapter
    rank = max(down.shape[0] for down in adapter.lora_A.values())
    names = {path: _mlx_path(path) for path in adapter.lora_A}
    tensors = {}
    for path, down in adapter.lora_A.items():
        up = adapter.lora_B[path] * adapter.scales[path]
        missing = rank - down.shape[0]
        tensors[f"{names[path]}.lora_a"] = F.pad(down, (0, 0, 0, missing)).T.contiguous()
        tensors[f"{names[path]}.lora_b"] = F.pad(up, (0, missing)).T.contiguous()
        if path in adapter.magnitudes:
            tensors[f"{names[path]}.m"] = adapter.magnitudes[path].contiguous()
    blocks, keys = _where(list(names.values()), int(result.header.config.get_text_config().num_hidden_layers))
    values: dict[str, Any] = {
        "fine_tune_type": "dora" if adapter.magnitudes else "lora",
        "num_layers": blocks,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys},
    }
    storage.add_json(folder / CONFIG, values)
    storage.add_file(folder / WEIGHTS, safetensors.torch.save(tensors))
    _compare(adapter, names, folder / WEIGHTS)


def _mlx_path(path: str) -> str:
    """Return the path of a layer in mlx-lm's model: the same but for GPT-2, the only one of those tried."""
    return re.sub(r"^transformer\.h\.", "model.h.", path)


def _where(paths: list[str], blocks: int) -> tuple[int, list[str]]:
    """Return how many of the last blocks hold adapted layers, and the names in them (whole paths elsewhere)."""
    found = [(path, _INSIDE_A_BLOCK.fullmatch(path)) for path in paths]
    first = min((int(match["block"]) for _, match in found if match), default=blocks)
    return blocks - first, sorted({match["inner"] if match else path for path, match in found})


def _compare(adapter: Adapter, names: Mapping[str, str], file: Path) -> None:
    """Read the file again and apply every layer's update as mlx-lm does, (x lora_a) lora_b, to one x beside ours."""
    tensors = safetensors.torch.load_file(file)
    generator = torch.Generator().manual_seed(0)
    for path, name in names.items():
        down, up = adapter.lora_A[path], adapter.lora_B[path]
        x = torch.randn(down.shape[1], generator=generator)
        ours = up @ (down @ x) * adapter.scales[path]
        read = x @ tensors[f"{name}.lora_a"] @ tensors[f"{name}.lora_b"]
        same = torch.equal(tensors.get(f"{name}.m", down), adapter.magnitudes.get(path, down))
        if not same or not (read - ours).abs().max() <= _BOUND * ours.abs().max():
            raise AdapterError(f"{adapter.folder}: {path} was read back from {file.name} as another update.")
