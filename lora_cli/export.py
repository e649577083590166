"""`lora export`: what other runtimes load. One function a format."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, TypeVar, assert_never

from lora_cli import adapter, adapter_folder, card, launch, results, room, sources, storage, tuned
from lora_cli.formats import gguf_export, mlx_adapter, ollama, onnx_graph
from lora_cli.formats.gguf_file import Kind
from lora_cli.reports import ExportReport, GgufReport
from lora_cli.tuned import Result

Format = Literal["peft", "gguf", "gguf-lora", "ollama", "mlx", "onnx"]
AnyReport = TypeVar("AnyReport", ExportReport, GgufReport)
FILES: Sequence[Format] = ("gguf", "gguf-lora")  # the others are folders


def export(
    path: Path, format: Format, output: Path, kind: Kind = "f16", base: str | None = None
) -> ExportReport | GgufReport:
    """Write RUN's adapter in a format; return what was compared, and what to know of it.

    `kind` is how a GGUF file stores matrices, `base` the base's place if it moved. Raises UserError, with nothing left
    behind.
    """
    launch.require_alone("the disk sets the pace of an export")
    room.require_new(output)
    match format:
        case "peft":
            return ExportReport(format, output, export_peft(path, output))
        case "gguf":
            return _with_note(gguf_export.export_model(result := _find(path, base), output, kind), result)
        case "gguf-lora":
            return _with_note(gguf_export.export_adapter(result := _find(path, base), output), result)
        case "ollama":
            return _with_note(ollama.export(result := _find(path, base), output, kind), result)
        case "mlx":
            notes = export_mlx(result := _find(path, base), output)
        case "onnx":
            notes = export_onnx(result := _find(path, base), output)
        case _:
            assert_never(format)
    return _with_note(ExportReport(format, output, notes), result)


def _find(path: Path, base: str | None) -> Result:
    """Find what RUN names, on its base as that is stored."""
    return tuned.on_stored(tuned.find(path, base))


def _with_note(report: AnyReport, result: Result) -> AnyReport:
    """Say of a run with a quantised base that what is exported is for another one."""
    kind = result.config.model.quantization if result.config else None
    if kind is None:
        return report
    note = (
        f"In training the base was quantised ({kind}); this is with its weights as they are stored. `lora merge` says "
        "how far that is from what was trained, and can write what quantisation leaves (--onto dequantised)."
    )
    return replace(report, notes=[*report.notes, note])


def export_peft(path: Path, output: Path) -> Sequence[str]:
    """Write the adapter as it is, with its card. The base need not be here."""
    folder, run = results.find_adapter(path)
    found = adapter.read(folder)
    with storage.explained(output), storage.new_directory(output) as new:
        adapter_folder.copy(folder, new)
        card.write(new, card.peft_card(found, run))
    if sources.is_hub_id(found.base):
        return []
    return [f"{adapter.CONFIG} calls the base {found.base}; readers elsewhere have to name their own."]


def export_mlx(result: Result, output: Path) -> Sequence[str]:
    """Write the adapter for mlx-lm, with its card."""
    mlx_adapter.require_holdable(result)
    with storage.explained(output), storage.new_directory(output) as new:
        mlx_adapter.write(result, new)
        card.write(new, card.mlx_card(result))
    return [caveat] if (caveat := mlx_adapter.caveat(result)) else []


def export_onnx(result: Result, output: Path) -> Sequence[str]:
    """Write base + adapter as one graph, with its card."""
    onnx_graph.require_exporter()
    with storage.explained(output), storage.new_directory(output) as new:
        difference = onnx_graph.write(result, new)
        card.write(new, card.onnx_card(result))
    return [f"In ONNX Runtime the logits of other lengths, padded ones too, differ by at most {difference:.2g}."]
