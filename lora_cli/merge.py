"""`lora merge`: adapter -> an ordinary Hugging Face folder, file by file, then reloaded and compared.

The base's files, tensor names and dtypes are kept, and what holds no weights is copied byte for byte: a folder saved
anew by another library version may be read differently by an older one.
"""

import shutil
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_cli import lora, model, storage, tuned
from lora_cli.adapter import Adapter, save_templates
from lora_cli.batches import ALONE, collate
from lora_cli.data_reader import held_out_of, run_to_end
from lora_cli.errors import AdapterError, SurroundingsError, UserError
from lora_cli.examples import Example
from lora_cli.forward import target_logits
from lora_cli.reports import MergeReport
from lora_cli.tuned import Result

# Largest logit difference allowed, as a share of the largest logit, by the dtype the weights are written in.
BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ckpt"}
_PROBES = 8  # rows the merged model is compared on
_SENTENCES = (
    "The library opens at nine on weekdays and at ten on Saturdays.",
    "def mean(values):\n    return sum(values) / len(values)",
    "To bake bread you need flour, water, salt and a little patience.",
)


def merge(path: Path, output: Path, base: str | None) -> MergeReport:
    """Write base + adapter to `output` and prove it: reloaded from disk it must give the same logits.

    Raises AdapterError, with nothing left behind, when a tensor finds no place or the logits differ.
    """
    result = tuned.find(path, base)
    if not any(tensor.any() for tensor in result.adapter.lora_B.values()):
        raise AdapterError(f"{result.adapter.folder}: every lora_B is zero: this adapter is untrained.")
    _require_space(result.header.folder, output)
    skeleton = model.build_skeleton(result.header, result.base.trust_remote_code)
    with storage.new_directory(output) as folder:
        dtypes = _write(result, skeleton, folder)
        return _verify(result, folder, output, dtypes)


def _require_space(base: Path, output: Path) -> None:
    needed = sum(file.stat().st_size for file in base.glob("*") if file.is_file())
    near = next(parent for parent in output.absolute().parents if parent.exists())
    if (free := shutil.disk_usage(near).free) < needed * 1.02:
        raise SurroundingsError(f"{output}: needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free.")


def _write(result: Result, skeleton: nn.Module, folder: Path) -> set[torch.dtype]:
    """Write the merged model's files; return the dtypes of the adapted weights."""
    adapter, prefix = result.adapter, str(getattr(skeleton, "base_model_prefix", ""))
    done: dict[str, torch.dtype] = {}
    for source in model.weight_files(result.header.folder):
        done |= _write_shard(source, folder / source.name, adapter, skeleton, prefix)
    for source in sorted(result.header.folder.iterdir()):
        holds_weights = source.suffix in _OTHER_WEIGHTS or source.name == storage.MANIFEST
        if source.is_file() and not holds_weights and not source.name.startswith("."):
            shutil.copyfile(source, folder / source.name)
    _write_templates(result, folder)
    if left := sorted(adapter.lora_A.keys() - done.keys()):
        raise AdapterError(
            f"{len(left)} adapted layers have no weight of their name in the base's files: {left[0]}, ..."
        )
    return set(done.values())


def _write_templates(result: Result, folder: Path) -> None:
    """Write the chat templates the adapter was trained with, where the base has others."""
    own = model.read_header(result.base).tokenizer.chat_template
    if own != result.header.tokenizer.chat_template:
        save_templates(folder, result.adapter.chat_templates)


def _write_shard(
    source: Path, target: Path, adapter: Adapter, skeleton: nn.Module, prefix: str
) -> dict[str, torch.dtype]:
    tensors: dict[str, Tensor] = {}
    done: dict[str, torch.dtype] = {}
    with safetensors.safe_open(source, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a dict
            tensor = file.get_tensor(name)
            layer = name.removesuffix(".weight")
            places = {layer, f"{prefix}.{layer}", layer.removeprefix(f"{prefix}.")}
            for path in places & adapter.lora_A.keys() if name.endswith(".weight") else ():
                transposed = lora.is_conv1d(skeleton.get_submodule(path))
                merged = lora.merged_weight(
                    tensor, adapter.lora_A[path], adapter.lora_B[path], adapter.scales[path], transposed
                )
                if not torch.isfinite(merged).all():
                    raise AdapterError(f"{path}: the merged weight is not finite.")
                done[path] = tensor.dtype
                tensor = merged.to(tensor.dtype).contiguous()
            tensors[name] = tensor
        try:
            safetensors.torch.save_file(tensors, target, file.metadata())
        except safetensors.SafetensorError as error:
            raise SurroundingsError(f"{target}: cannot be written: {error}.") from None
    return done


@torch.inference_mode()
def _verify(result: Result, folder: Path, output: Path, dtypes: set[torch.dtype]) -> MergeReport:
    """Compare base + adapter with the merged folder, both in float32 on a CPU."""
    device = torch.device("cpu")
    tuned_model = tuned.load(result, device, "float32")
    section = result.base.model_copy(update={"path": str(folder), "revision": None, "dtype": "float32"})
    merged_model = model.load_model(model.read_header(section), section, device)
    difference = largest = effect = kl = 0.0
    positions = same = 0
    for example in _probes(result):
        batch = collate(ALONE, [example], device)
        wanted, got = (target_logits(each, batch) for each in (tuned_model, merged_model))  # [N, V]
        with lora.gain(tuned_model.module, 0.0):
            effect = max(effect, float((target_logits(tuned_model, batch) - wanted).abs().max()))
        difference = max(difference, float((wanted - got).abs().max()))
        largest = max(largest, float(wanted.abs().max()))
        kl += float(F.kl_div(got.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="sum"))
        same += int((wanted.argmax(-1) == got.argmax(-1)).sum())
        positions += batch.targets
    # A merge that lost half of what the adapter does is refused, however small that is against the logits.
    bound = min(max(BOUNDS.get(dtype, 0.0) for dtype in dtypes) * largest, effect / 2)
    if not difference <= bound:
        raise AdapterError(
            f"{output}: the merged model's logits differ from base + adapter by up to {difference:.3g}; at most "
            f"{bound:.3g} is allowed. The adapter itself moves them by up to {effect:.3g}."
        )
    return MergeReport(
        output=output,
        adapted_tensors=len(result.adapter.lora_A),
        dtype=", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
        positions=positions,
        largest_logit_difference=difference,
        mean_kl=max(0.0, kl / positions),
        top1_agreement=same / positions,
        bound=bound,
    )


def _probes(result: Result) -> list[Example]:
    """Return real rows of the run where they are still there, else a few sentences."""
    if result.config is not None and result.data is not None:
        try:
            found, _, _ = run_to_end(held_out_of(result.data, result.config.seed, result.header))
            return found[:_PROBES]
        except UserError:
            pass  # the data moved away: the comparison is as strict on any other text
    encoded = result.header.tokenizer(list(_SENTENCES))["input_ids"]
    return [Example(tuple(ids), tuple(ids), "a sentence of our own") for ids in encoded]
