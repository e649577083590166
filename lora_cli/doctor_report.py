"""What `lora doctor` reports, as plain frozen records: what is here, what works, and what is missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Package:
    """A package that lora, or one of its extras, wants."""

    name: str  # on the package index
    extra: str | None  # of lora that wants it; null: lora itself
    wanted: str  # versions, as >=2.10,<3
    installed: str | None  # its version; null: it is not there
    fits: bool  # whether that is a wanted one


@dataclass(frozen=True)
class Machine:
    """What this process may use of the machine, containers' limits included."""

    system: str  # its name and version
    cpu: str  # its name
    processors: int  # of the machine
    usable: float  # by affinity and quota
    threads: int  # that torch uses
    memory: int | None  # bytes; null: nobody says
    free_memory: int | None  # bytes; null: nobody says
    compiler: str | None  # of C++, for train.compile; null: none was found
    open_files: int | None  # at once; null: no limit is known
    encoding: str  # of stdout
    proxies: Sequence[str]  # variables that name one; their values may hold passwords


@dataclass(frozen=True)
class Gpu:
    """A GPU, as torch sees it."""

    name: str  # as torch has it
    memory: int  # bytes
    free: int  # bytes of them
    capability: str  # NVIDIA's compute capability
    bfloat16: bool  # whether it computes in it
    varlen: bool  # whether sequences of a step run in one call of FlashAttention


@dataclass(frozen=True)
class Place:
    """A folder that is written to."""

    name: str  # what it is
    path: Path  # the folder
    free: int  # bytes, on its disk
    used: int | None  # bytes, by what is kept there; null: not counted
    problem: str | None  # why what is written there would not be safe; null: there is none


@dataclass(frozen=True)
class Hub:
    """The Hugging Face hub, seen from here."""

    endpoint: str  # its address
    offline: bool  # whether HF_HUB_OFFLINE is set
    token: bool  # whether there is one
    reachable: bool | None  # whether it answered; null: it was not asked


@dataclass(frozen=True)
class SelfTest:
    """A few steps of a small random model on the device, and its adapter merged."""

    device: str  # that it ran on
    steps: int  # that were taken
    first_loss: float  # before the first step, nats
    last_loss: float  # after the last, nats
    effect: float  # largest difference between the logits of the base and of base + adapter
    difference: float  # the same between base + adapter and the merged model
    seconds: float  # all of it
    passed: bool  # whether it learned, and merging kept the logits


Level = Literal["problem", "note", "ok"]


@dataclass(frozen=True)
class Finding:
    """What something means for the user."""

    level: Level  # a problem makes training impossible
    text: str  # a sentence
    fix: str | None = None  # what to do; null: nothing


@dataclass(frozen=True)
class DoctorReport:
    """What is here, what works, and what is missing."""

    versions: Mapping[str, str]  # of this program, Python and the packages that lora wants
    packages: Sequence[Package]  # what lora wants, then its extras
    machine: Machine  # what it has
    gpus: Sequence[Gpu]  # empty: training runs on the CPU
    mps: bool  # whether this is a Mac with a GPU for torch; it is not used
    places: Sequence[Place]  # runs, tokens, models
    hub: Hub  # and whether it can be reached
    self_test: SelfTest | None  # a small model trained; null: skipped, or it failed before its end
    findings: Sequence[Finding]  # the worst first
