"""Memory and time of a merge of a large model: a random one of 2 GB in shards, against the disk's own speed.

    python scripts/bench_merge.py OUT [--gigabytes 2] [--rounds 3]

The disk's speed is that of copying the base's files and syncing the copy, in turns with the merge; both begin with
files that are not in memory. The peak is the process's largest resident memory (ru_maxrss), Python and torch included.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models

from lora_cli import adapter_folder, lora
from lora_cli.adapter_folder import Origin
from lora_cli.base_folder import fingerprint
from lora_cli.config import LoraConfig

HIDDEN, INNER, VOCABULARY = 2048, 5632, 32_000
BYTES_A_BLOCK = 2 * (2 * HIDDEN * HIDDEN + 2 * HIDDEN * 512 + 3 * HIDDEN * INNER)


def make(out: Path, gigabytes: float) -> None:
    """Write a random bfloat16 Llama and an adapter of rank 16 on all its linear layers."""
    blocks = round((gigabytes * 1e9 - 4 * VOCABULARY * HIDDEN) / BYTES_A_BLOCK)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=16,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(out / "base", max_shard_size="500MB")
    words = {word: number for number, word in enumerate(["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz ."])}
    tokenizer = Tokenizer(models.BPE(words, []))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(out / "base")
    settings = LoraConfig(rank=16)
    lora.apply_lora(model, settings, seed=0)
    for _, layer in lora.lora_layers(model):
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    (out / "adapter").mkdir()
    origin = Origin(str(out / "base"), None, fingerprint(out / "base"), {})
    adapter_folder.save(out / "adapter", model, settings, origin)


def copy(base: Path, target: Path) -> float:
    """Return the seconds that copying a folder and syncing the copy takes."""
    forget(base)
    began = time.perf_counter()
    target.mkdir()
    for source in base.iterdir():
        with source.open("rb") as read, (target / source.name).open("wb") as written:
            shutil.copyfileobj(read, written, 1 << 24)
            written.flush()
            os.fsync(written.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(target)
    return seconds


def forget(folder: Path) -> None:
    """Have the system drop a folder's files from its memory."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def merge(out: Path) -> tuple[float, float]:
    """Return (seconds, peak bytes) of `lora merge`."""
    forget(out / "base")
    arguments = ["merge", str(out / "adapter"), "--output", str(out / "merged"), "--json"]
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "lora_cli", *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    report = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    assert status == 0, report
    shutil.rmtree(out / "merged")
    return seconds, usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    if not (out / "adapter").exists():
        make(out, arguments.gigabytes)
    size = sum(file.stat().st_size for file in (out / "base").glob("*.safetensors"))
    shards = sorted(file.stat().st_size for file in (out / "base").glob("*.safetensors"))
    print(f"base: {size / 1e9:.2f} GB in {len(shards)} files, the largest {shards[-1] / 1e6:.0f} MB")
    ratios = []
    for _ in range(arguments.rounds):
        disk = copy(out / "base", out / "copy")
        seconds, peak = merge(out)
        ratios.append(seconds / disk)
        print(
            f"merge {seconds:5.1f} s, peak {peak / 1e6:,.0f} MB; copy {disk:5.1f} s ({size / disk / 1e6:,.0f} MB/s); "
            f"ratio {ratios[-1]:.2f}"
        )
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
