"""Python code that comes with a model: what `model.trust_remote_code` lets run, by name and content."""

import contextlib
import hashlib
import json
from pathlib import Path

from lora_cli.errors import NOTHING_LOADED, ModelError

_NAMING = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")


def hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every Python file in a model's folder: those it names, and what these may import."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*.py"))
    }


def require_own(folder: Path) -> None:
    """Raise ModelError where a model names code of another repository, which its revision does not pin."""
    for name in _NAMING:
        named = None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            named = json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map")
        if "--" in json.dumps(named):
            raise ModelError(
                f"{folder / name}: auto_map names code of another repository, which may change at any time. Copy that "
                "code into the model's folder, and name it there.",
                state=NOTHING_LOADED,
            )
