"""The adapter directory, in PEFT's file format, so that other programs read it as it is.

adapter_config.json          PEFT's keys; the only place where `rank` is called `r`
adapter_model.safetensors    base_model.model.<path>.lora_A.weight [r, in], .lora_B.weight [out, r], float32;
                             of DoRA .lora_magnitude_vector [out] too
chat_template.jinja          the chat template its rows were written with, where transformers looks for it
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from lora_cli import json_file, lora
from lora_cli.errors import AdapterError, shown
from lora_cli.json_file import is_number
from lora_cli.lora_linear import MAGNITUDE, linear_shape
from lora_cli.time_limit import time_limit

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"
TEMPLATE = "chat_template.jinja"
TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"  # of models that have a second one for rows with tools
TEMPLATES = (TEMPLATE, TOOL_TEMPLATE)  # where transformers looks for them
PREFIX = "base_model.model."
AGAIN = "fetch or copy the adapter again"
SECONDS = 1.0  # that an adapter's patterns may take
_NAME = re.compile(rf"{re.escape(PREFIX)}(?P<path>.+)\.(?:(?P<part>lora_[AB])\.weight|{MAGNITUDE})")


_LARGEST_HEADER = 32 << 20  # bytes
_MOST_TENSORS = 1_000_000
_DTYPES = {"F64", "F32", "F16", "BF16"}

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
    magnitudes: Mapping[str, Tensor]  # DoRA's, of all layers; else none
    scales: Mapping[str, float]
    chat_templates: Mapping[str, str]  # by their file names; none where the adapter came without


def read(folder: Path) -> Adapter:
    """Read and check an adapter: ours or any PEFT LoRA. Raises AdapterError with everything that cannot be honoured."""
    values = read_config(folder)
    if not (folder / WEIGHTS).is_file():
        hint = " Pickled weights (.bin) are not read; save it again with PEFT." if list(folder.glob("*.bin")) else ""
        raise AdapterError(f"{folder}: has no {WEIGHTS}; {AGAIN}.{hint}", state="Nothing was read.")
    _require_sane(folder / WEIGHTS)
    try:
        with safetensors.safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, safetensors.SafetensorError) as error:
        reason = shown(error, 120).rstrip(".")
        raise AdapterError(
            f"{folder / WEIGHTS}: cannot be read: {reason}; {AGAIN}.", state="Nothing was read."
        ) from None
    parts: dict[str, dict[str, Tensor]] = {"lora_A": {}, "lora_B": {}, MAGNITUDE: {}}
    problems = []
    for name, tensor in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            what = "which is no LoRA weight of a linear layer; only those can be applied"
            problems.append(f"{folder / WEIGHTS}: holds {shown(name)}, {what}.")
        elif tensor.ndim != (2 if match["part"] else 1) or not tensor.numel() or not torch.isfinite(tensor).all():
            what = "matrix" if match["part"] else "vector"
            problems.append(f"{folder / WEIGHTS}: {shown(name)} is not a {what} of finite numbers; {AGAIN}.")
        else:
            parts[match["part"] or MAGNITUDE][match["path"]] = tensor.float()
    for path in sorted(parts["lora_A"].keys() ^ parts["lora_B"].keys()):
        problems.append(f"{folder / WEIGHTS}: {shown(path)} has only one of lora_A and lora_B; {AGAIN}.")
    expected = parts["lora_A"].keys() if values.get("use_dora") else set[str]()
    for path in sorted(parts[MAGNITUDE].keys() ^ expected):
        said = f"{CONFIG} says use_dora: {json.dumps(bool(values.get('use_dora')))}"
        there = "a" if path in parts[MAGNITUDE] else "no"
        problems.append(f"{folder / WEIGHTS}: {shown(path)} has {there} {MAGNITUDE}, and {said}; {AGAIN}.")
    if not tensors:
        problems.append(f"{folder / WEIGHTS}: is empty.")
    if problems:
        raise AdapterError(*problems, state="Nothing was read.")
    return Adapter(
        folder=folder,
        base=str(values.get("base_model_name_or_path") or ""),
        revision=values.get("revision"),
        base_fingerprint=read_base_fingerprint(folder),
        lora_A=parts["lora_A"],
        lora_B=parts["lora_B"],
        magnitudes=parts[MAGNITUDE],
        scales=_scales({path: len(down) for path, down in parts["lora_A"].items()}, values, folder / CONFIG),
        chat_templates=read_templates(folder),
    )


def _require_sane(file: Path) -> None:
    """Raise AdapterError where a file's header is not what an adapter's can be; no tensor is read.

    The library checks then that the tensors lie side by side and fill the file to its end.
    """
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(_LARGEST_HEADER, file.stat().st_size - 8):
                raise ValueError(f"it begins like a header of {length:,} bytes")
            entries = json.loads(opened.read(length).decode())
        dtypes = {entry["dtype"] for name, entry in entries.items() if name != "__metadata__"}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        reason = f"it is no safetensors file: {shown(error, 120)}"
        raise AdapterError(f"{file}: cannot be read: {reason}; {AGAIN}.", state="Nothing was read.") from None
    if len(entries) > _MOST_TENSORS or not dtypes <= _DTYPES:
        what = ", ".join(map(ascii, sorted(map(str, dtypes - _DTYPES)))) or f"{len(entries):,} tensors"
        accepted = f"an adapter has at most {_MOST_TENSORS:,} tensors of {', '.join(sorted(_DTYPES))}"
        raise AdapterError(f"{file}: holds {what[:80]}; {accepted}.", state="Nothing was read.")


def read_config(folder: Path) -> dict[str, Any]:
    """Read adapter_config.json. Raises AdapterError with everything in it that cannot be honoured."""
    path = folder / CONFIG
    values = json_file.read_object(path)
    if values.get("peft_type") != "LORA":
        raise AdapterError(
            f"{path}: is no LoRA adapter: peft_type is {shown(values.get('peft_type'))}, and only LORA can be applied.",
            state="Nothing was read.",
        )
    problems = [f"{path}: {problem}." for problem in _wrong_types(values)]
    if values.get("bias", "none") != "none" or values.get("lora_bias"):
        problems.append(f"{path}: trained biases cannot be applied; train with bias: none.")
    for key in _NOT_PLAIN:
        if values.get(key):
            problems.append(
                f"{path}: {key} ({shown(values[key])}) cannot be applied; merge it with PEFT (merge_and_unload)."
            )
    start = values.get("init_lora_weights", True)
    if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"):
        problems.append(
            f"{path}: was started with {shown(start)}, which changes the base; convert it to a plain LoRA with PEFT "
            "first (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    if problems:
        raise AdapterError(*problems, state="Nothing was read.")
    return values


def _wrong_types(values: Mapping[str, Any]) -> Iterator[str]:
    """Iterate over what is wrong with the settings that are read as numbers or names."""
    for key in ("base_model_name_or_path", "revision"):
        if not isinstance(values.get(key), str | None):
            yield f"{key} must be text or null, found {shown(values[key])}"
    if not is_number(values.get("lora_alpha", 8)):
        yield f"lora_alpha must be a finite number, found {shown(values['lora_alpha'])}"
    if not isinstance(values.get("r", 8), int) or isinstance(values.get("r"), bool):
        yield f"r must be a whole number, found {shown(values['r'])}"
    for key in ("alpha_pattern", "rank_pattern"):
        special = values.get(key) or {}
        if not isinstance(special, dict) or not all(map(is_number, special.values())):
            yield f"{key} must be names with numbers, found {shown(special)}"


def require_low_rank(adapter: Adapter, instead: str) -> None:
    """Raise AdapterError where an adapter does more than add a product B A to its base; `instead` is a way out."""
    if adapter.magnitudes:
        raise AdapterError(
            f"{adapter.folder}: is a DoRA adapter, which makes each row of a weight as long as its magnitude says: "
            f"that is no update that can be added, weighted or scaled by itself. {instead}",
            state="Nothing was written.",
        )


def is_transposed(folder: Path) -> bool:
    """Return whether an adapter is of layers that store their weights as [in, out] (GPT-2's Conv1D)."""
    return bool(read_config(folder).get("fan_in_fan_out"))


def read_templates(folder: Path) -> dict[str, str]:
    """Return the chat templates in a folder, by their file names."""
    return {name: _read_template(folder / name) for name in TEMPLATES if (folder / name).is_file()}


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise AdapterError(
            f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8.", state="Nothing was read."
        ) from None


def read_base_fingerprint(folder: Path) -> str | None:
    """Return the fingerprint of the base that a folder was trained from; None for adapters from elsewhere."""
    path = folder / BASE
    if not path.is_file():
        return None
    fingerprint = json_file.read_object(path).get("fingerprint")
    if not isinstance(fingerprint, str):
        raise AdapterError(
            f"{path}: fingerprint must be text, found {shown(fingerprint)}. It tells which base this was trained from; "
            "fetch or copy it again.",
            state="Nothing was read.",
        )
    return fingerprint


def _scales(ranks: Mapping[str, int], values: Mapping[str, Any], path: Path) -> dict[str, float]:
    """Return each layer's scale by PEFT's rules. Raises AdapterError where a rank is not what the settings say.

    A pattern is a regular expression of whoever made the adapter: it gets no more than SECONDS.
    """
    method = "rslora" if values.get("use_rslora") else "lora"
    scales, problems, where = {}, [], "a pattern in alpha_pattern or rank_pattern"
    try:
        with time_limit(SECONDS):
            for layer, rank in ranks.items():
                said = _special(layer, values.get("rank_pattern") or {}, values.get("r", rank))
                if said != rank:
                    what = f"says that {shown(layer)} has the rank {said}; its tensors have {rank}"
                    problems.append(f"{path}: {what}; {AGAIN}.")
                alpha = _special(layer, values.get("alpha_pattern") or {}, values.get("lora_alpha", 8))
                scales[layer] = lora.scale_of(method, float(alpha), rank)
    except TimeoutError:
        problems = [f"{path}: {where} takes too long to match; write plain names."]
    except (re.error, OverflowError, RecursionError) as error:
        problems = [f"{path}: {where} is no regular expression ({shown(error)}); write plain names."]
    if problems:
        raise AdapterError(*problems, state="Nothing was read.")
    return scales


def _special(path: str, patterns: Mapping[str, Any], usual: float) -> float:
    """Return what the first pattern that matches the end of a layer's path gives, else what is usual."""
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", path))
    return next(found, usual)


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
        here = linear_shape(linear[path])
        up = adapter.lora_B[path]
        there = (down.shape[1], up.shape[0])
        magnitudes = len(adapter.magnitudes.get(path, up))
        if here != there or up.shape[1] != down.shape[0] or magnitudes != here[1]:
            problems.append(
                f"{adapter.folder}: {path} is {there[0]} -> {there[1]}, in the base {here[0]} -> {here[1]}."
            )
    if problems:
        raise AdapterError("The adapter does not fit this base model.", *problems)


def attach(model: nn.Module, adapter: Adapter) -> None:
    """Wrap a base model's layers with an adapter that fits it, in place. Raises AdapterError where it does not."""
    require_fit(model, adapter)
    shapes = {path: (down.shape[0], adapter.scales[path]) for path, down in adapter.lora_A.items()}
    lora.wrap(model, shapes, has_magnitude=bool(adapter.magnitudes))
    load_weights(model, adapter)


def load_weights(model: nn.Module, adapter: Adapter) -> None:
    """Copy an adapter's tensors into the layers that are already wrapped."""
    for path, layer in lora.lora_layers(model):
        layer.load(adapter.lora_A[path], adapter.lora_B[path], adapter.magnitudes.get(path))
