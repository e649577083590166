"""Base + adapter as one ONNX graph, by transformers' own exporter, proven in ONNX Runtime on other lengths.

model.onnx, model.onnx.data    input_ids, attention_mask [batch, length] -> logits [batch, length, V], float32, no cache
export.json                    for transformers' ExportedModel.from_pretrained
and, byte for byte, the files of the base that hold no weights
"""

import contextlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lora_cli import adapter_folder, lora, model, storage, tuned
from lora_cli.errors import AdapterError, ModelError, SurroundingsError
from lora_cli.model import LanguageModel
from lora_cli.tuned import Result

GRAPH = "model.onnx"
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_BESIDE = (".json", ".jinja", ".txt", ".model", ".py")
_TRACED = (2, 12)  # rows and tokens of the example that is followed through the model
_COMPARED = ((1, 7), (1, 1), (3, 40))  # rows and tokens of what is compared; the first of several rows is padded
_BOUND = 1e-4  # of a logit, as a share of the largest


def require_exporter() -> None:
    """Raise SurroundingsError where what this needs is not installed."""
    if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise SurroundingsError(
            f"--format onnx: this needs {', '.join(missing)}, not installed here: pip install 'lora-cli[onnx]'."
        )
    if importlib.util.find_spec("transformers.exporters") is None:
        raise SurroundingsError(
            "--format onnx: this transformers has no exporters; 5.24 has: pip install -U transformers"
        )


def write(result: Result, folder: Path) -> float:
    """Write the graph and the files beside it, run it, and return the largest logit difference from base + adapter.

    Raises ModelError where the exporter cannot follow the model, AdapterError where the logits differ.
    """
    loaded = tuned.load(result, torch.device("cpu"), "float32")
    limit = result.header.max_positions or _COMPARED[-1][1]
    examples = [_example(rows, min(length, limit), loaded) for rows, length in _COMPARED]
    with model.generating(loaded), torch.no_grad():
        wanted = [loaded.module(**example, use_cache=False).logits for example in examples]
        lora.merge_in_place(loaded.module)
        _export(loaded, folder)
    templates = result.adapter.chat_templates
    for source in sorted(result.header.folder.iterdir()):
        beside = source.is_file() and source.suffix in _BESIDE and not source.name.endswith(".index.json")
        if beside and source.name not in templates:
            storage.write_file(folder / source.name, source.read_bytes())  # the exporter wrote a config.json too
    adapter_folder.save_templates(folder, templates)
    return max(_difference(folder, *each) for each in zip(examples, wanted, strict=True))


def _example(rows: int, length: int, loaded: LanguageModel) -> dict[str, Tensor]:
    """Return random tokens; of several rows the first is padded on its left, as generation pads."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, loaded.head.weight.shape[0], (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, : length // 3 if rows > 1 else 0] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _export(loaded: LanguageModel, folder: Path) -> None:
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    ids = torch.ones(_TRACED, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with _quiet():
        try:
            exported = OnnxExporter().export(loaded.module, inputs, config=OnnxConfig(dynamic=True))
        except Exception as error:  # a tracer's errors are of many kinds
            name = type(loaded.module).__name__
            raise ModelError(
                f"--format onnx: transformers' exporter cannot follow {name}: {str(error).strip()[:300]}"
            ) from error
        exported.save_pretrained(folder)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and advice from the results."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.onnx._internal.exporter._registration")]
    levels = [logger.level for logger in loggers]
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _difference(folder: Path, example: Mapping[str, Tensor], wanted: Tensor) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in example.items()})
    attended = example["attention_mask"].bool()
    difference = float((torch.from_numpy(found) - wanted)[attended].abs().max())
    bound = _BOUND * float(wanted[attended].abs().max())
    if not difference <= bound:
        raise AdapterError(
            f"--format onnx: in ONNX Runtime the logits of {tuple(wanted.shape[:2])} tokens differ from base + adapter "
            f"by up to {difference:.3g}; at most {bound:.3g} is allowed."
        )
    return difference
