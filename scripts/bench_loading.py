"""What loading a model takes at most, against the weights as they end.

    python scripts/bench_loading.py models/SmolLM2-135M-Instruct [--peak 1.15]

The base is copied in float32 and in bfloat16; each copy is loaded in the other dtype, and quantised. Every load is a
process of its own, and so is one that only imports what they do: its peak of resident memory (VmHWM) is taken off.
transformers' own loader is measured beside ours.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LOADS = (  # what is stored, what is wanted, quantised how
    ("bfloat16", "float32", None),
    ("float32", "bfloat16", None),
    ("bfloat16", "bfloat16", None),
    ("bfloat16", "float32", "nf4"),
    ("float32", "float32", "nf4"),
    ("bfloat16", "float32", "int8"),
    ("float32", "float32", "int8"),
)


def copy(source: Path, target: Path, dtype: str) -> None:
    """Write a model in another dtype."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    model.save_pretrained(target)
    for file in source.iterdir():
        if not (target / file.name).exists() and file.suffix != ".safetensors":
            shutil.copyfile(file, target / file.name)


def load(folder: str, dtype: str, quantization: str, whose: str) -> None:
    """Load in this process, and print peak and weights in bytes."""
    import torch
    import transformers

    from lora_cli import model
    from lora_cli.config import ModelConfig

    if quantization == "nf4":
        import bitsandbytes  # noqa: F401 - which ours imports only when it is asked to

    config = ModelConfig(path=folder, dtype=dtype, quantization=None if quantization == "null" else quantization)
    header = model.read_header(config)
    before, began = peak(), time.perf_counter()
    loaded = None
    if whose == "ours":
        loaded = model.load_model(header, config, torch.device("cpu")).module
    elif whose == "theirs":
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    seconds = time.perf_counter() - began
    tensors = {t.data_ptr(): t.nbytes for t in (*loaded.parameters(), *loaded.buffers())} if loaded is not None else {}
    print(json.dumps({"before": before, "peak": peak(), "weights": sum(tensors.values()), "seconds": seconds}))


def peak() -> int:
    """Return the most bytes that this process has had in memory."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(*job: str) -> dict[str, float]:
    """Load in a fresh process."""
    done = subprocess.run([sys.executable, __file__, "--job", *job], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Measure and print; the exit status says whether every load kept to the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--peak", type=float, default=1.15, help="allowed, as a share of the weights")
    parser.add_argument("--job", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        load(*arguments.job)
        return
    over = False
    with tempfile.TemporaryDirectory() as name:
        for dtype in ("float32", "bfloat16"):
            copy(arguments.model, Path(name) / dtype, dtype)
        for stored, wanted, quantization in LOADS:
            job = (str(Path(name) / stored), wanted, str(quantization or "null"))
            nothing = measure(*job, "nobody's")["peak"]
            for whose in ("ours", "theirs") if quantization is None else ("ours",):
                found = measure(*job, whose)
                share = (found["peak"] - nothing) / found["weights"]
                over |= whose == "ours" and share > arguments.peak
                print(
                    f"{stored:8} -> {quantization or wanted:8} {whose:6} weights {found['weights'] / 1e6:6.1f} MB, "
                    f"peak {share:.3f} of them, {found['seconds']:.1f} s"
                )
    sys.exit(over)


if __name__ == "__main__":
    main()
