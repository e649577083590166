"""`lora export --format gguf` and `gguf-lora`: base + adapter as one file for llama.cpp, or the adapter alone.

The base's tensors are read one by one, the adapter is added in float32, and the sum is rounded once. What llama.cpp
would compute otherwise is refused before anything is written; what was written is read back and compared.
"""

import contextlib
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_cli import ends, model, room, storage
from lora_cli.adapter import require_low_rank
from lora_cli.errors import AdapterError, ModelError
from lora_cli.formats import gguf_architecture, gguf_file, gguf_vocabulary
from lora_cli.formats.gguf_architecture import Architecture, Place
from lora_cli.formats.gguf_file import Kind, Plan, Planned, Value
from lora_cli.reports import GgufReport
from lora_cli.tuned import Result
from lora_cli.update import Update
from lora_cli.weights import Weights

_EXACT = ("ffn_gate_inp", "position_embd")  # small matrices that llama.cpp wants in float32
_HEAD, _EMBEDDING = "lm_head.weight", "token_embd.weight"


def export_model(result: Result, output: Path, kind: Kind) -> GgufReport:
    """Write base + adapter as a GGUF file. Raises ModelError, AdapterError before anything is written."""
    plan, notes = model_plan(result, kind)
    with _new_file(output, plan) as file:
        return write(plan, file, "gguf", kind, notes, shown=output)


def export_adapter(result: Result, output: Path) -> GgufReport:
    """Write the adapter alone as a GGUF file in float32, for llama.cpp's --lora."""
    plan = adapter_plan(result)
    with _new_file(output, plan) as file:
        return write(plan, file, "gguf-lora", "f32", [], shown=output)


def _new_file(output: Path, plan: Plan) -> contextlib.AbstractContextManager[Path]:
    if output.suffix != ".gguf":
        raise AdapterError(f"--output {output}: is one file, whose name ends in .gguf.")
    room.require_room(output, plan.size)
    return storage.new_file(output)


def write(plan: Plan, file: Path, format: str, kind: Kind, notes: Sequence[str], shown: Path) -> GgufReport:
    """Write a GGUF file, read it back and compare; `shown` is where it will stand. Raises SurroundingsError."""
    with storage.explained(shown):
        gguf_file.write(file, plan)
        verified = gguf_file.verify(file, plan)
        size = file.stat().st_size
    return GgufReport(
        format=format,
        output=shown,
        kind=kind,
        bytes=size,
        tensors=verified.tensors,
        values=verified.values,
        metadata=verified.metadata,
        largest_error=verified.largest_error,
        notes=notes,
    )


def model_plan(result: Result, kind: Kind, *, adapted: bool = True) -> tuple[Plan, list[str]]:
    """Return what a GGUF file of base + adapter holds, and in which cases llama.cpp differs all the same.

    Without `adapted` it is the base alone. Raises ModelError, AdapterError where llama.cpp has no equal.
    """
    config, tokenizer = result.header.config, result.header.tokenizer
    architecture, skeleton, weights = _read(result, adapted)
    vocabulary = gguf_vocabulary.vocabulary(tokenizer, config.vocab_size, sorted(ends.configured_ends(result.header)))
    tensors = list(_tensors(result, architecture, skeleton, weights, kind))
    metadata: dict[str, Value] = {
        "general.type": "model",
        "general.name": _name(result),
        **gguf_file.file_type(kind),
        **gguf_architecture.hyperparameters(config, architecture),
        **vocabulary,
    }
    return Plan(architecture.name, metadata, tensors), gguf_vocabulary.notes(tokenizer)


def adapter_plan(result: Result) -> Plan:
    """Return what a GGUF file of the adapter alone holds.

    Each layer's own scale is multiplied into its B: `adapter.lora.alpha` of 0 tells llama.cpp to add none.
    """
    require_low_rank(result.adapter, "--format gguf writes base and adapter as one model.")
    architecture, skeleton, weights = _read(result)
    place = gguf_architecture.placer(result.header.config, architecture, skeleton.base_model_prefix)
    adapter, tensors = result.adapter, []
    for name, path in weights.adapted.items():
        found = _placed(place(name), name, result)
        down, up = adapter.lora_A[path], found.rows(adapter.lora_B[path] * adapter.scales[path])
        for suffix, tensor in (("lora_a", down), ("lora_b", up)):
            shape = tuple(tensor.shape)
            tensors.append(Planned(f"{found.name}.{suffix}", shape, "f32", partial(torch.clone, tensor)))
    metadata: dict[str, Value] = {
        "general.type": "adapter",
        "general.name": _name(result),
        "adapter.type": "lora",
        "adapter.lora.alpha": 0.0,
    }
    return Plan(architecture.name, metadata, tensors)


def _read(result: Result, adapted: bool = True) -> tuple[Architecture, nn.Module, Weights]:
    """Find how the base is written, and read the headers of its files."""
    architecture = gguf_architecture.find(result.header.config)
    skeleton = model.build_skeleton(result.header, result.base.trust_remote_code)
    return (
        architecture,
        skeleton,
        Weights(result.header.folder, skeleton, Update.of(result.adapter) if adapted else None),
    )


def _placed(place: Place | None, name: str, result: Result) -> Place:
    """Return the place of an adapted tensor. Raises AdapterError where a GGUF file has none."""
    if place is None or not place.name or place.expert is not None:
        raise AdapterError(
            f"{result.adapter.folder}: adapts {name.removesuffix('.weight')}, which has no place of its own in a GGUF "
            f"file of a {result.header.config.model_type} model."
        )
    return place


def _tensors(
    result: Result, architecture: Architecture, skeleton: nn.Module, weights: Weights, kind: Kind
) -> Iterator[Planned]:
    """Yield the tensors of base + adapter, in the order of the base's files; experts are stacked [experts, out, in]."""
    config = result.header.config
    place = gguf_architecture.placer(config, architecture, skeleton.base_model_prefix)
    left_out = {_HEAD} if _repeats_embedding(architecture, config, weights) else set()
    sources: dict[str, list[tuple[str, Place]]] = {}
    for name in weights.infos:
        found = place(name)
        if found is None and name not in left_out:
            raise ModelError(f"{weights.infos[name].file}: {name} has no place in a GGUF file of {config.model_type}.")
        if found is not None and found.name and name not in left_out:
            sources.setdefault(found.name, []).append((name, found))
    _require_all(config, skeleton, weights, sources)
    for name, parts in sources.items():
        parts.sort(key=lambda part: part[1].expert or 0)
        source, first = parts[0]
        shape = weights.infos[source].shape
        shape = tuple(reversed(shape)) if first.transposed else shape
        shape = (len(parts), *shape) if first.expert is not None else shape
        stored: Kind = "f32" if any(word in name for word in _EXACT) else gguf_file.kind_of(kind, shape)
        yield Planned(name, shape, stored, partial(_make, weights, parts))
    if (factors := gguf_architecture.rope_factors(config)) is not None:
        yield Planned("rope_freqs.weight", tuple(factors.shape), "f32", lambda: factors)


def _make(weights: Weights, parts: list[tuple[str, Place]]) -> Tensor:
    """Return a tensor as it lies in the file, in float32."""
    if parts[0][1].expert is None:
        ((name, place),) = parts
        return place.lay(weights.read(name))
    return torch.stack([place.lay(weights.read(name)) for name, place in parts])


def _repeats_embedding(architecture: Architecture, config: object, weights: Weights) -> bool:
    """Return whether an output matrix in the base's files is the embedding once more, and is left out."""
    if _HEAD not in weights.infos:
        return False
    embedding = next(name for name in weights.infos if name.endswith(("embed_tokens.weight", "wte.weight")))
    same = _HEAD not in weights.adapted and torch.equal(weights.read(_HEAD), weights.read(embedding))
    if getattr(config, "tie_word_embeddings", False) and not same:
        raise ModelError(
            f"{weights.infos[_HEAD].file}: holds an output matrix of its own, and config.json says that it is the "
            "embedding (tie_word_embeddings); set it to false where it is not."
        )
    if not architecture.has_head and not same:
        raise ModelError(
            f"{weights.infos[_HEAD].file}: holds an output matrix of its own, which a GGUF file of "
            f"{architecture.name} has no place for."
        )
    return same


def _require_all(
    config: object, skeleton: nn.Module, weights: Weights, sources: dict[str, list[tuple[str, Place]]]
) -> None:
    """Raise ModelError unless the files hold every parameter of the model; of experts, all of them."""
    prefix = f"{skeleton.base_model_prefix}."
    needed = [name for name, _ in skeleton.named_parameters() if ".experts." not in name and ".mlp.gate." not in name]
    missing = [name for name in needed if not {name, name.removeprefix(prefix)} & weights.infos.keys()]
    if getattr(config, "tie_word_embeddings", False):
        missing = [name for name in missing if name != _HEAD]
    experts = getattr(config, "num_local_experts", 0)
    missing += [name for name, parts in sources.items() if parts[0][1].expert is not None and len(parts) != experts]
    if missing:
        raise ModelError(f"The base's files lack {missing[0]}, so the model would not be whole.")


def _name(result: Result) -> str:
    """Return what llama.cpp shows: the base's name and the run's.

    It strips white space after special tokens in models with `phi-3` in their name, so that this says which ones do.
    """
    base = Path(result.adapter.base or result.base.path).name
    run = result.run.path.name if result.run else result.adapter.folder.name
    name = f"{base} {run}"
    if gguf_vocabulary.strips_like_phi3(result.header.tokenizer):
        return f"Phi-3 {name}"
    return re.sub("phi-?3", "Phi 3", name, flags=re.IGNORECASE)
