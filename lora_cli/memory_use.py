"""The memory that this process takes: what torch holds of a GPU, or of the machine's what is its own."""

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes that getrusage counts the peak in


@dataclass(frozen=True)
class MemoryUse:
    """Bytes now and at most so far; null where the system does not say."""

    place: str
    now: int | None
    peak: int | None


def memory_use() -> MemoryUse:
    """Return what this process takes of the device that it works on. Imports no torch: a GPU is in use through it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return MemoryUse("GPU", torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT
    try:
        now = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # not Linux
        return MemoryUse("CPU", None, peak)
    return MemoryUse("CPU", now, max(peak, now))
