"""`lora doctor`: what is here, whether training works with it, and what is missing, in words, worst first."""

import platform
import sys
from collections.abc import Iterator, Sequence
from typing import get_args

import torch

from lora_cli import __version__, hub, packages, surroundings
from lora_cli.distributed import choose_device
from lora_cli.doctor_report import DoctorReport, Finding, Gpu, Hub, Level, Machine, Package, Place, SelfTest
from lora_cli.errors import shown
from lora_cli.records import gigabytes
from lora_cli.self_test import self_test

# What each extra is for; one that is not named here is for `lora` itself to explain.
_EXTRAS = {
    "eval": "lora eval --metric bleu, chrf, rouge-l",
    "harness": "lora eval --tasks",
    "onnx": "lora export --format onnx",
    "gguf": "lora export --format gguf, gguf-lora, ollama",
    "quantization": "model.quantization: nf4",
    "tune": "the search of lora tune",
    "serve": "lora serve",
    "tensorboard": "train.trackers: [tensorboard]",
    "wandb": "train.trackers: [wandb]",
    "mlflow": "train.trackers: [mlflow]",
    "bench": "the benches in scripts/",
}
_LITTLE_MEMORY, _LITTLE_ROOM = 2 << 30, 5 << 30  # bytes
_FEW_FILES = 1024


def doctor(test: bool = True) -> DoctorReport:
    """Look at everything, and try training unless `test` is false. Writes only what it tries, and removes that."""
    wanted, machine, gpus = packages.all_wanted(), surroundings.machine(), surroundings.gpus()
    places, here = surroundings.places(), hub.look()
    findings = [
        *_of_packages(wanted),
        *_of_machine(machine),
        *_of_gpus(gpus),
        *_of_places(places),
        *_of_hub(here),
    ]
    tested: SelfTest | None = None
    if test:
        tested, finding = _tried()
        findings.append(finding)
    levels = get_args(Level)
    return DoctorReport(
        versions={"lora": __version__, "python": platform.python_version()}
        | {each.name: each.installed for each in wanted if each.extra is None and each.installed},
        packages=wanted,
        machine=machine,
        gpus=gpus,
        mps=torch.backends.mps.is_available(),
        places=places,
        hub=here,
        self_test=tested,
        findings=sorted(findings, key=lambda finding: levels.index(finding.level)),
    )


def _of_packages(wanted: Sequence[Package]) -> Iterator[Finding]:
    if not wanted:
        yield Finding("note", "lora runs without being installed, so what it wants is not known.", "pip install .")
    for package in wanted:
        if package.extra is None and not package.fits:
            found = f"is {package.installed}" if package.installed else "is not installed"
            text = f"{package.name} {found}, and lora wants {package.wanted}."
            yield Finding("problem", text, f"pip install '{package.name}{package.wanted}'")
    for extra in dict.fromkeys(package.extra for package in wanted if package.extra is not None):
        unfit = [package for package in wanted if package.extra == extra and not package.fits]
        what = _EXTRAS.get(extra, "what it is named after")
        if unfit:
            names = ", ".join(f"{each.name} {each.installed or 'is missing'}" for each in unfit)
            yield Finding("note", f"Not to be had here: {what} ({names}).", f"pip install '{packages.NAME}[{extra}]'")


def _of_machine(machine: Machine) -> Iterator[Finding]:
    if machine.threads > machine.usable:
        text = f"torch uses {machine.threads} threads, and this process may use {machine.usable:g} processors."
        yield Finding("note", text, f"OMP_NUM_THREADS={max(1, int(machine.usable))}")
    if machine.free_memory is not None and machine.free_memory < _LITTLE_MEMORY:
        text = f"Little memory is free: {gigabytes(machine.free_memory)}."
        yield Finding("note", text, "`lora check CONFIG` says what a run takes")
    if machine.compiler is None:
        yield Finding("note", "There is no C++ compiler, which train.compile needs on a CPU.", "install g++")
    if machine.open_files is not None and machine.open_files < _FEW_FILES:
        text = f"At most {machine.open_files} files may be open at once: few for sharded models and many processes."
        yield Finding("note", text, f"ulimit -n {_FEW_FILES}")
    if "utf" not in machine.encoding.lower():
        text = f"The terminal's encoding is {machine.encoding}, which cannot show every character."
        yield Finding("note", text, "PYTHONUTF8=1, or LC_ALL=C.UTF-8")


def _of_gpus(gpus: Sequence[Gpu]) -> Iterator[Finding]:
    if surroundings.has_unseen_gpu():
        text = f"There is an NVIDIA GPU, and torch {torch.__version__} does not see it: training runs on the CPU."
        yield Finding("note", text, "install torch for the CUDA version that nvidia-smi shows")
    elif not gpus:
        yield Finding("note", "There is no GPU: training runs on the CPU.")
    if torch.backends.mps.is_available():
        yield Finding("note", "This Mac's GPU (MPS) is not used: it has no float64, in which losses are summed.")
    for gpu in gpus:
        if not gpu.varlen:
            text = f"{gpu.name} (compute capability {gpu.capability}) runs the sequences of a step one by one."
            yield Finding("note", text, "FlashAttention for many at once wants 8.0, as an A100 or an RTX 30 has")
        if not gpu.bfloat16:
            yield Finding("note", f"{gpu.name} has no bfloat16, the usual dtype of a base.", "model.dtype=float32")


def _of_places(places: Sequence[Place]) -> Iterator[Finding]:
    for place in places:
        if place.problem is not None:
            level: Level = "problem" if place.name == "here" else "note"
            yield Finding(level, f"{place.name}: {place.problem}", "work in another folder, on a local disk")
        elif place.free < _LITTLE_ROOM:
            text = f"{place.name}: little room is left on the disk of {place.path}: {gigabytes(place.free)}."
            yield Finding("note", text, "save.keep=1, or another output_dir")


def _of_hub(here: Hub) -> Iterator[Finding]:
    if here.offline:
        yield Finding("note", "The hub is switched off (HF_HUB_OFFLINE): only what lies here is found.")
    elif not here.reachable:
        text = f"The hub ({here.endpoint}) did not answer: models and data have to lie here already."
        yield Finding("note", text, "a folder as model.path; HTTPS_PROXY, or HF_ENDPOINT for a mirror")
    if not here.token:
        yield Finding(
            "note", "There is no token for the hub: gated and private models are out of reach.", "hf auth login"
        )


def _tried() -> tuple[SelfTest | None, Finding]:
    """Run the self-test; return what came of it, in figures and in words."""
    device = choose_device("auto")
    try:
        tested = self_test(device)
    except Exception as error:  # whatever a broken installation raises
        text = f"Training does not work on {device}: {type(error).__name__}: {shown(error, 200)}"
        return None, Finding(
            "problem", text, f"install torch again (this is {torch.__version__}, Python {sys.version.split()[0]})"
        )
    figures = (
        f"{tested.steps} steps on {tested.device} took the loss from {tested.first_loss:.3f} to "
        f"{tested.last_loss:.3f}; "
        f"merged, the logits differ by {tested.difference:.1g} (the adapter changed them by {tested.effect:.2g}); "
        f"{tested.seconds:.1f} s."
    )
    if tested.passed:
        return tested, Finding("ok", f"Training works: {figures}")
    return tested, Finding("problem", f"Training computes wrong numbers here: {figures}", "install torch again")
