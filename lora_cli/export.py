"""`lora export`: what other runtimes load. One function a format."""

from pathlib import Path
from typing import Literal, assert_never, get_args

from lora_cli import adapter, run_dir, storage

Format = Literal["peft"]
FORMATS: tuple[Format, ...] = get_args(Format)


def export(path: Path, format: Format, output: Path) -> None:
    """Write RUN's adapter to a new folder in a format. Raises AdapterError."""
    folder, _ = run_dir.find_adapter(path)
    adapter.read(folder)
    match format:
        case "peft":
            with storage.new_directory(output) as new:
                adapter.copy(folder, new)
        case _:
            assert_never(format)
