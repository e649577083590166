"""What earlier runs and other programs left on the disk, made wrong: adapters, manifests, a run's records."""

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_cli import adapter, checkpoint, json_file, manifest, metrics, run_dir, storage, tensor_file
from lora_cli.errors import AdapterError
from lora_cli.run_dir import RunDir
from torture.mutations import mutated_bytes, mutated_json

Prepared = tuple[Callable[[random.Random], None], Callable[[], object]]
CONFIG = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "a/b", "revision": None, "r": 1,
    "lora_alpha": 2, "use_rslora": False, "bias": "none", "alpha_pattern": {"q_proj": 4}, "rank_pattern": {},
    "init_lora_weights": True, "modules_to_save": None, "fan_in_fan_out": False,
}  # fmt: skip
LAYER = "base_model.model.layers.0.q_proj"
HEADER = {
    "__metadata__": {"format": "pt"},
    f"{LAYER}.lora_A.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
    f"{LAYER}.lora_B.weight": {"dtype": "F32", "shape": [2, 1], "data_offsets": [8, 16]},
}
NUMBERS = struct.pack("<4f", 1.0, 2.0, 3.0, 4.0)


def _safetensors(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + NUMBERS


def prepare_adapter(folder: Path) -> Prepared:
    """An adapter of one layer; its settings, its header or its base's fingerprint are changed."""
    valid = {
        adapter.CONFIG: json.dumps(CONFIG).encode(),
        adapter.WEIGHTS: _safetensors(json.dumps(HEADER).encode()),
        adapter.BASE: b'{"fingerprint": "0"}',
    }
    readers = (lambda: adapter.read(folder), lambda: tensor_file.read_infos(folder / adapter.WEIGHTS))
    chosen: list[Callable[[], object]] = [readers[0]]

    def make(random: random.Random) -> None:
        files = dict(valid)
        match random.randrange(8):
            case 0 | 1 | 2:
                files[adapter.CONFIG] = mutated_json(CONFIG, random)
            case 3 | 4:
                files[adapter.WEIGHTS] = _safetensors(mutated_json(HEADER, random))
            case 5:
                length = random.choice((0, 1, 2**31, 2**63, 2**64 - 1, random.randrange(400)))
                files[adapter.WEIGHTS] = _safetensors(json.dumps(HEADER).encode(), length)
            case 6:
                files[adapter.WEIGHTS] = mutated_bytes(files[adapter.WEIGHTS], random)
            case _:
                files[adapter.BASE] = mutated_json({"fingerprint": "0"}, random)
        for name, raw in files.items():
            (folder / name).write_bytes(raw)
        chosen[0] = random.choice(readers)

    for name, raw in valid.items():
        (folder / name).write_bytes(raw)
    return make, lambda: chosen[0]()


def prepare_manifest(folder: Path) -> Prepared:
    """A sealed folder of two files; its manifest, or one of the files, is changed."""
    inside = folder / "sealed"
    with storage.new_directory(inside) as new:
        (new / "a.bin").write_bytes(b"a")
        (new / "b.bin").write_bytes(b"bb")
    listed = inside / manifest.MANIFEST
    valid: dict[str, Any] = json.loads(listed.read_text())

    def make(random: random.Random) -> None:
        kind, written = random.random(), json_file.as_text(valid).encode()
        if kind >= 0.1:  # else it stays as it was written
            written = mutated_json(valid, random) if kind < 0.5 else mutated_bytes(written, random)
        listed.write_bytes(written)

    def read() -> None:
        if problems := manifest.problems_in(inside):
            raise AdapterError(*problems)

    return make, read


STATUS = {
    "status": "finished", "step": 4, "best_step": 4, "best_loss": 1.0, "base_loss": 2.0, "best_forgetting": None,
    "within_budget": None, "reason": "all epochs",
    "test": {"targets": 9, "base_loss": 2.0, "loss": 1.0, "change": {"value": 1.0, "low": 0.5, "high": 2.0, "n": 3},
             "flattery": {"value": None, "low": None, "high": None, "n": 0}},
}  # fmt: skip
ESTIMATE = {"value": 1.0, "low": None, "high": None, "n": 1}
EVENTS: tuple[Any, ...] = (
    {"event": "step", "step": 1, "epoch": 0.5, "loss": 1.0, "kl": None, "targets": 3, "tokens": 4},
    {"event": "evaluated", "step": 1, "epoch": 0.5, "loss": 1.0, "targets": 3, "token_accuracy": 0.5, "improved": True,
     "best_step": 1, "patience_left": 3, "seconds": 0.1, "within_budget": None,
     "forgetting": {"rise": ESTIMATE, "base_loss": 1.0, "tokens": 3, "kl": ESTIMATE, "kl_tokens": 2}},
)  # fmt: skip
NUMBERS_OF = {"step": 4, "stopping": {"base_loss": 2.0, "best_loss": 1.0, "best_step": 4, "without_improvement": 0}}


def prepare_records(folder: Path) -> Prepared:
    """What a run wrote of itself: run.json, environment.json, metrics.jsonl, a checkpoint's numbers."""
    run = RunDir(folder)
    environment = {"lora": "1", "base_fingerprint": "0", "data_fingerprint": "1", "micro_batch_tokens": 64}
    chosen: list[Callable[[], object]] = [lambda: run_dir.read_finished(run)]

    def make(random: random.Random) -> None:
        match random.randrange(4):
            case 0:
                run.status.write_bytes(mutated_json(STATUS, random))
                chosen[0] = lambda: run_dir.read_finished(run)
            case 1:
                run.environment.write_bytes(mutated_json(environment, random))
                chosen[0] = lambda: run_dir.read_environment(run)
            case 2:
                run.metrics.write_bytes(b"\n".join(mutated_json(event, random) for event in EVENTS))
                chosen[0] = lambda: (metrics.read(run), metrics.read_evaluated(run))
            case _:
                (folder / checkpoint.STATE).write_bytes(mutated_json(NUMBERS_OF, random))
                chosen[0] = lambda: checkpoint.read_numbers(folder)

    run.status.write_text(json.dumps(STATUS))
    return make, lambda: chosen[0]()
