"""What the numbers of a run depend on beside its config: versions, the machine, fingerprints of base and data."""

import platform
from collections.abc import Sequence
from typing import Any

import safetensors
import torch
import transformers

from lora_cli import __version__, base_folder, launch, remote_code, run_dir
from lora_cli.config import RunConfig
from lora_cli.distributed import World
from lora_cli.memory import estimate_memory
from lora_cli.prepare import Prepared
from lora_cli.quantised import bitsandbytes
from lora_cli.resume import Change
from lora_cli.run_dir import RunDir
from lora_cli.schema import flat


def describe(
    config: RunConfig, run: RunDir, prepared: Prepared, changes: Sequence[Change], world: World
) -> dict[str, Any]:
    """Return what environment.json says: the main process's, which agrees with the others on config, base and data."""
    base_fingerprint, data_fingerprint = base_folder.fingerprint(prepared.header.folder), prepared.data_fingerprint()
    settings = {key: str(value) for key, value in flat(config)}
    world.require_same(settings | {"base model": base_fingerprint, "data": data_fingerprint})
    environment = _versions(str(world.device), base_fingerprint, data_fingerprint)
    environment |= {f"{name}_fingerprint": value for name, value in prepared.fingerprints().items()}
    # A run that goes on keeps its micro-batches, whatever is free now: sums are rounded in the same order.
    tokens = config.train.micro_batch_tokens
    if tokens == "auto" or all(change.key != "train.micro_batch_tokens" for change in changes):
        tokens = run_dir.read_environment(run).get("micro_batch_tokens") or tokens
    if tokens == "auto":  # only then is the model looked at
        lengths = prepared.train.examples.lengths
        longest, mean = int(lengths.max()), float(lengths.mean())
        tokens = estimate_memory(prepared.header, config, longest, world.device, launch.current(), mean).tokens
    environment |= {"processes": world.size, "micro_batch_tokens": tokens}
    if config.model.quantization == "nf4":
        environment["bitsandbytes"] = bitsandbytes().__version__
    if config.model.trust_remote_code:
        environment["remote_code"] = remote_code.hashes(prepared.header.folder)
    environment["model_type"] = str(prepared.header.config.model_type)
    counted = {"train": prepared.train_counts, "validation": prepared.validation_counts, "test": prepared.test_counts}
    environment["data"] = {
        name: {"rows": counts.rows, "targets": counts.targets} for name, counts in counted.items() if counts
    }
    for name, held_out in (("validation", prepared.validation), ("test", prepared.test)):
        environment[f"{name}_fingerprint"] = held_out.fingerprint() if held_out else None
    ours: dict[str, Any] = world.from_main(environment)
    return ours


def _versions(device: str, base_fingerprint: str, data_fingerprint: str) -> dict[str, Any]:
    """Return what the numbers of a run depend on beside its config; an allow-list, so never a secret."""
    return {
        "lora": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "base_fingerprint": base_fingerprint,
        "data_fingerprint": data_fingerprint,
    }
