"""`lora export`: what other runtimes load. One function a format."""

from pathlib import Path
from typing import Literal, assert_never, get_args

from lora_cli import adapter, gguf_export, ollama, run_dir, storage, tuned
from lora_cli.gguf_file import Kind
from lora_cli.reports import GgufReport

Format = Literal["peft", "gguf", "gguf-lora", "ollama"]
FORMATS: tuple[Format, ...] = get_args(Format)


def export(path: Path, format: Format, output: Path, kind: Kind = "f16", base: str | None = None) -> GgufReport | None:
    """Write RUN's adapter in a format; `kind` is how a GGUF file stores matrices, `base` the base's place if it moved.

    Raises AdapterError, ModelError.
    """
    match format:
        case "peft":
            folder, _ = run_dir.find_adapter(path)
            adapter.read(folder)
            with storage.new_directory(output) as new:
                adapter.copy(folder, new)
            return None
        case "gguf":
            return gguf_export.export_model(tuned.find(path, base), output, kind)
        case "gguf-lora":
            return gguf_export.export_adapter(tuned.find(path, base), output)
        case "ollama":
            return ollama.export(tuned.find(path, base), output, kind)
        case _:
            assert_never(format)
