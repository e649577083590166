"""`lora export`: what other runtimes load. One function a format."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, assert_never

from lora_cli import adapter, adapter_folder, card, launch, room, run_dir, sources, storage, tuned
from lora_cli.formats import gguf_export, mlx_adapter, ollama, onnx_graph
from lora_cli.formats.gguf_file import Kind
from lora_cli.reports import ExportReport, GgufReport
from lora_cli.tuned import Result

Format = Literal["peft", "gguf", "gguf-lora", "ollama", "mlx", "onnx"]
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
            notes = export_peft(path, output)
        case "gguf":
            return gguf_export.export_model(tuned.find(path, base), output, kind)
        case "gguf-lora":
            return gguf_export.export_adapter(tuned.find(path, base), output)
        case "ollama":
            return ollama.export(tuned.find(path, base), output, kind)
        case "mlx":
            notes = export_mlx(tuned.find(path, base), output)
        case "onnx":
            notes = export_onnx(tuned.find(path, base), output)
        case _:
            assert_never(format)
    return ExportReport(format, output, notes)


def export_peft(path: Path, output: Path) -> Sequence[str]:
    """Write the adapter as it is, with its card. The base need not be here."""
    folder, run = run_dir.find_adapter(path)
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
