"""The adapter directory, in PEFT's file format, so that other programs read it as it is.

adapter_config.json          PEFT's keys; the only place where `rank` is called `r`
adapter_model.safetensors    base_model.model.<path>.lora_A.weight [r, in], .lora_B.weight [out, r], float32
chat_template.jinja          the chat template its rows were written with, where transformers looks for it
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lora_cli import lora, storage
from lora_cli.errors import AdapterError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"
TEMPLATE = "chat_template.jinja"
TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"  # of models that have a second one for rows with tools
TEMPLATES = (TEMPLATE, TOOL_TEMPLATE)  # where transformers looks for them
PREFIX = "base_model.model."
_NAME = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.(?P<part>lora_[AB])\.weight")


# PEFT settings that make more of an adapter than W + scale * B A.
_NOT_PLAIN = (
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)


@dataclass(frozen=True)
class Adapter:
    """An adapter read from disk: its tensors by layer path, and how strongly each is applied."""

    folder: Path
    base: str  # base_model_name_or_path, as it was given when the adapter was trained
    revision: str | None
    base_fingerprint: str | None  # known for adapters of ours
    lora_A: Mapping[str, Tensor]
    lora_B: Mapping[str, Tensor]
    scales: Mapping[str, float]
    chat_templates: Mapping[str, str]  # by their file names; none where the adapter came without


def read(folder: Path) -> Adapter:
    """Read and check an adapter: ours or any PEFT LoRA. Raises AdapterError with everything that cannot be honoured."""
    values = read_config(folder)
    if not (folder / WEIGHTS).is_file():
        hint = " Pickled weights (.bin) are not read; save it again with PEFT." if list(folder.glob("*.bin")) else ""
        raise AdapterError(f"{folder}: has no {WEIGHTS}.{hint}", state="Nothing was read.")
    try:
        with safetensors.safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, safetensors.SafetensorError) as error:
        raise AdapterError(f"{folder / WEIGHTS}: cannot be read: {error}.", state="Nothing was read.") from None
    parts: dict[str, dict[str, Tensor]] = {"lora_A": {}, "lora_B": {}}
    problems = []
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            problems.append(f"{folder / WEIGHTS}: holds {name}, which is no LoRA weight of a linear layer.")
        elif tensor.ndim != 2 or not torch.isfinite(tensor).all():
            problems.append(f"{folder / WEIGHTS}: {name} is not a matrix of finite numbers.")
        else:
            parts[match["part"]][match["path"]] = tensor.float()
    for path in sorted(parts["lora_A"].keys() ^ parts["lora_B"].keys()):
        problems.append(f"{folder / WEIGHTS}: {path} has only one of lora_A and lora_B.")
    if not tensors:
        problems.append(f"{folder / WEIGHTS}: is empty.")
    if problems:
        raise AdapterError(*problems, state="Nothing was read.")
    return Adapter(
        folder=folder,
        base=str(values.get("base_model_name_or_path") or ""),
        revision=values.get("revision"),
        base_fingerprint=_base_fingerprint(folder),
        lora_A=parts["lora_A"],
        lora_B=parts["lora_B"],
        scales={path: _scale(path, down.shape[0], values) for path, down in parts["lora_A"].items()},
        chat_templates={
            name: (folder / name).read_text(encoding="utf-8") for name in TEMPLATES if (folder / name).is_file()
        },
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises AdapterError with everything in it that cannot be honoured."""
    path = folder / CONFIG
    try:
        values = json.loads(storage.read_text(path))
    except (FileNotFoundError, ValueError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}.", state="Nothing was read.") from None
    problems = []
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: is no LoRA adapter (peft_type must be LORA).", state="Nothing was read.")
    if values.get("use_dora"):
        problems.append(f"{path}: is a DoRA adapter, which this version cannot apply.")
    if values.get("bias", "none") != "none" or values.get("lora_bias"):
        problems.append(f"{path}: trained biases cannot be applied.")
    for key in _NOT_PLAIN:
        if values.get(key):
            problems.append(f"{path}: {key} ({str(values[key])[:80]}) cannot be applied.")
    start = values.get("init_lora_weights", True)
    if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"):
        problems.append(
            f"{path}: was started with {start}, which changes the base; convert it to a plain LoRA with PEFT first "
            "(save_pretrained with path_initial_model_for_weight_conversion)."
        )
    if problems:
        raise AdapterError(*problems, state="Nothing was read.")
    return values


def is_transposed(folder: Path) -> bool:
    """Return whether an adapter is of layers that store their weights as [in, out] (GPT-2's Conv1D)."""
    return bool(read_config(folder).get("fan_in_fan_out"))


def _base_fingerprint(folder: Path) -> str | None:
    """Return the fingerprint of the base an adapter was trained on; None for adapters from elsewhere."""
    path = folder / BASE
    if not path.is_file():
        return None
    try:
        return str(json.loads(storage.read_text(path))["fingerprint"])
    except (ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path}: cannot be read: {error}.", state="Nothing was read.") from None


def _scale(path: str, rank: int, values: Mapping[str, Any]) -> float:
    """Return a layer's scale by PEFT's rules: the first pattern that matches the end of its path gives its alpha."""
    alpha = values.get("lora_alpha", 8)
    for pattern, special in (values.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = special
            break
    return lora.scale_of("rslora" if values.get("use_rslora") else "lora", float(alpha), rank)


def require_fit(model: nn.Module, adapter: Adapter) -> None:
    """Raise AdapterError unless every tensor of an adapter finds its layer in a base model and fits it."""
    linear = lora.linear_modules(model)
    problems = []
    for path, down in adapter.lora_A.items():
        if path not in linear:
            head = any(
                module is model.get_output_embeddings() for name, module in model.named_modules() if name == path
            )
            what = "the output head, which cannot be adapted here" if head else "but the base has no such linear layer"
            problems.append(f"{adapter.folder}: adapts {path}, {what}.")
            continue
        here = lora.linear_shape(linear[path])
        up = adapter.lora_B[path]
        there = (down.shape[1], up.shape[0])
        if here != there or up.shape[1] != down.shape[0]:
            problems.append(
                f"{adapter.folder}: {path} is {there[0]} -> {there[1]}, in the base {here[0]} -> {here[1]}."
            )
    if problems:
        raise AdapterError("The adapter does not fit this base model.", *problems)


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Wrap a base model's layers with an adapter that fits it, in place. Raises AdapterError where it does not."""
    require_fit(model, adapter)
    lora.wrap(model, {path: (down.shape[0], adapter.scales[path]) for path, down in adapter.lora_A.items()})
    load_weights(model, adapter)


@torch.no_grad()
def load_weights(model: nn.Module, adapter: Adapter) -> None:
    """Copy an adapter's tensors into the layers that are already wrapped."""
    for path, layer in lora.lora_layers(model):
        layer.lora_A.copy_(adapter.lora_A[path])
        layer.lora_B.copy_(adapter.lora_B[path])
