"""The files of an adapter, written: what training made, several as one, another's copied or scaled."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from lora_cli import lora, storage
from lora_cli.adapter import BASE, CONFIG, PREFIX, TEMPLATES, WEIGHTS, read_config
from lora_cli.config import LoraConfig
from lora_cli.lora_linear import MAGNITUDE, is_conv1d


@dataclass(frozen=True)
class Origin:
    """Where a result comes from: its base, and the chat templates its rows were written with, by their file names.

    `folder` is where the base's files are, where they are at hand.
    """

    base: str
    revision: str | None
    base_fingerprint: str
    chat_templates: Mapping[str, str]
    folder: Path | None = None


def save(folder: Path, model: nn.Module, config: LoraConfig, origin: Origin) -> None:
    """Write the files of an adapter into a folder; whatever its rank there, its update has the same scale."""
    rank = config.written_rank
    more = lora.scale_of(config.method, 1.0, config.rank) / lora.scale_of(config.method, 1.0, rank)
    values = {
        "r": rank,
        "lora_alpha": _whole(config.alpha * more),
        "lora_dropout": config.dropout,
        "use_rslora": config.method == "rslora",
        "use_dora": config.method == "dora",
        "target_modules": _shortest_names(model, [path for path, _ in lora.lora_layers(model)]),
        "fan_in_fan_out": any(is_conv1d(layer.base) for _, layer in lora.lora_layers(model)),
    }
    _write(folder, values, lora.written(model), origin)


def save_factors(
    folder: Path, factors: Mapping[str, tuple[Tensor, Tensor]], origin: Origin, fan_in_fan_out: bool
) -> None:
    """Write the files of an adapter whose layers add B A, given as (A [r, in], B [out, r]) by their paths."""
    ranks = {path: len(down) for path, (down, _) in factors.items()}
    most = max(ranks.values())
    special = {re.escape(path): rank for path, rank in ranks.items() if rank != most}
    values = {
        "r": most,
        "lora_alpha": most,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": fan_in_fan_out,
        "rank_pattern": special,
        "alpha_pattern": special,
    }
    tensors = {
        f"{path}.{name}": tensor
        for path, pair in factors.items()
        for name, tensor in zip(("lora_A", "lora_B"), pair, strict=True)
    }
    _write(folder, values, tensors, origin)


def _write(folder: Path, special: Mapping[str, Any], parameters: Mapping[str, Tensor], origin: Origin) -> None:
    """Write an adapter's files, its settings with what all adapters have in common."""
    values: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": origin.base,
        "revision": origin.revision,
        "use_dora": False,
        "bias": "none",
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "inference_mode": True,
        **special,
    }
    tensors = {
        f"{PREFIX}{name}{'' if name.endswith(MAGNITUDE) else '.weight'}": parameter.detach().cpu().contiguous()
        for name, parameter in parameters.items()
    }
    storage.add_json(folder / CONFIG, values)
    storage.add_file(folder / WEIGHTS, safetensors.torch.save(tensors, {"format": "pt"}))
    storage.add_json(folder / BASE, {"fingerprint": origin.base_fingerprint})
    save_templates(folder, origin.chat_templates)


def save_templates(folder: Path, templates: Mapping[str, str]) -> None:
    """Write chat templates by their file names, into an adapter's folder or a model's."""
    for name, text in templates.items():
        storage.make_folder((folder / name).parent)
        storage.add_file(folder / name, text)


def _shortest_names(model: nn.Module, paths: Sequence[str]) -> list[str]:
    """Return names that select exactly these layers: last parts where they are enough, else whole paths."""
    names = {path.rsplit(".", 1)[-1] for path in paths}
    selected = {path for path, _ in model.named_modules() if path.rsplit(".", 1)[-1] in names}
    return sorted(names) if selected == set(paths) else sorted(paths)


def copy(source: Path, folder: Path) -> None:
    """Copy the files of an adapter out of its folder or a checkpoint."""
    for name in (CONFIG, WEIGHTS):
        storage.add_copy(source / name, folder / name)
    for name in (BASE, *TEMPLATES):
        if (source / name).is_file():  # adapters from elsewhere have not all of them
            storage.make_folder((folder / name).parent)
            storage.add_copy(source / name, folder / name)


def scale_alphas(folder: Path, gain: float) -> float:
    """Multiply every alpha of an adapter's folder by `gain`, in place; return the new one."""
    values = read_config(folder)
    alpha = float(values.get("lora_alpha", 8)) * gain
    special = {pattern: _whole(other * gain) for pattern, other in (values.get("alpha_pattern") or {}).items()}
    values |= {"lora_alpha": _whole(alpha), "alpha_pattern": special}
    storage.write_json(folder / CONFIG, values)
    return alpha


def _whole(alpha: float) -> float:
    """Return 8 for 8.0: readers in other languages take a whole number only (Ollama's, PEFT's own type)."""
    return int(alpha) if alpha == int(alpha) else alpha
