"""What `lora doctor` reports, as plain frozen records: what is here, what works, and what is missing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Package:
    """A package that lora, or one of its extras, wants; `installed` is null where it is not there."""

    name: str
    extra: str | None
    wanted: str  # as >=2.10,<3
    installed: str | None
    fits: bool


@dataclass(frozen=True)
class Machine:
    """What this process may use of the machine, containers' limits included; bytes, null where nobody says."""

    system: str
    cpu: str
    processors: int  # of the machine
    usable: float  # by affinity and quota
    threads: int  # that torch uses
    memory: int | None
    free_memory: int | None
    compiler: str | None  # for train.compile
    open_files: int | None  # at once; null: no limit is known
    encoding: str  # of stdout
    proxies: Sequence[str]  # variables that name one; their values may hold passwords


@dataclass(frozen=True)
class Gpu:
    """A GPU, as torch sees it; bytes. `varlen`: sequences of a step run in one call of FlashAttention."""

    name: str
    memory: int
    free: int
    capability: str
    bfloat16: bool
    varlen: bool


@dataclass(frozen=True)
class Place:
    """A folder that is written to; `problem` says why what is written there would not be safe."""

    name: str
    path: Path
    free: int
    used: int | None  # by what is kept there
    problem: str | None


@dataclass(frozen=True)
class Hub:
    """The Hugging Face hub from here; `reachable` is null where it was not asked."""

    endpoint: str
    offline: bool
    token: bool
    reachable: bool | None


@dataclass(frozen=True)
class SelfTest:
    """A few steps of a small random model on the device, and its adapter merged.

    `difference` is the largest between the logits of base + adapter and those of the merged model, `effect` that
    between the base's and base + adapter's.
    """

    device: str
    steps: int
    first_loss: float
    last_loss: float
    effect: float
    difference: float
    seconds: float
    passed: bool


Level = Literal["problem", "note", "ok"]


@dataclass(frozen=True)
class Finding:
    """What something means for the user, and what to do about it. A problem makes training impossible."""

    level: Level
    text: str
    fix: str | None = None


@dataclass(frozen=True)
class DoctorReport:
    """What is here, and the findings of it, worst first. `self_test` is null where it was skipped, or failed."""

    versions: Mapping[str, str]
    packages: Sequence[Package]
    machine: Machine
    gpus: Sequence[Gpu]
    mps: bool
    places: Sequence[Place]
    hub: Hub
    self_test: SelfTest | None
    findings: Sequence[Finding]
