"""What is here for `lora doctor`: the machine, its GPUs, the folders that are written to, the hub."""

import contextlib
import locale
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lora_cli import hub, storage
from lora_cli.corpus import cache_folder
from lora_cli.distributed import free_memory
from lora_cli.doctor_report import Gpu, Machine, Place
from lora_cli.errors import UserError
from lora_cli.parallel import usable_processors

_CGROUP = Path("/sys/fs/cgroup")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


def machine() -> Machine:
    """Look at the machine, as far as this process may use it."""
    return Machine(
        system=platform.platform(),
        cpu=_cpu(),
        processors=os.cpu_count() or 1,
        usable=_usable(),
        threads=torch.get_num_threads(),
        memory=_memory(),
        free_memory=free_memory(torch.device("cpu")),
        compiler=next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "clang++", "cl"))), None),
        open_files=_open_files(),
        encoding=sys.stdout.encoding or locale.getpreferredencoding(False),
        proxies=[name for name in _PROXIES if os.environ.get(name) or os.environ.get(name.lower())],
    )


def gpus() -> Sequence[Gpu]:
    """Return the GPUs that torch sees."""
    found = []
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        with torch.cuda.device(number):
            free, memory = torch.cuda.mem_get_info()
            capability = torch.cuda.get_device_capability()
            varlen = capability >= (8, 0) and torch.version.hip is None
            shown = ".".join(map(str, capability))
            name = torch.cuda.get_device_name()
            found.append(Gpu(name, memory, free, shown, torch.cuda.is_bf16_supported(), varlen))
    return found


def has_unseen_gpu() -> bool:
    """Return whether NVIDIA's driver has a device here that torch does not see."""
    return not torch.cuda.is_available() and any(Path("/dev").glob("nvidia[0-9]*"))


def places() -> Sequence[Place]:
    """Look at the folders that runs, tokens and models are written to."""
    kept = cache_folder()
    return [
        _place("here", Path.cwd(), None),
        _place("kept tokens", kept, _size(kept)),
        _place("hub's cache", hub.cache_folder(), _size(hub.cache_folder())),
    ]


def _place(name: str, path: Path, used: int | None) -> Place:
    near = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())
    return Place(name, path, shutil.disk_usage(near).free, used, _problem(near))


def _problem(folder: Path) -> str | None:
    """Return what `storage` cannot do in a folder: locks, syncs, hard links, renames are all tried."""
    tried = storage.temporary_name(folder)
    try:
        with storage.explained(folder):
            storage.make_folder(tried)
            with storage.lock(tried), storage.new_file(tried / "linked") as file:
                storage.add_file(file, b"tried")
            storage.write_file(tried / "renamed", b"tried")
    except UserError as error:
        return error.problems[0]
    finally:
        storage.clear(tried)
    return None


def _size(folder: Path) -> int:
    """Return the bytes of a folder's files, links not followed; of what cannot be read nothing."""
    size = 0
    for path in folder.rglob("*") if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            size += path.lstat().st_size
    return size


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _usable() -> float:
    """Return how many processors this process may use, by its affinity and its container's quota."""
    usable = float(usable_processors())
    with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
        quota, period = map(int, (_CGROUP / "cpu.max").read_text().split())
        usable = min(usable, quota / period)
    return usable


def _memory() -> int | None:
    total: int | None = None
    with contextlib.suppress(OSError, ValueError, AttributeError):
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        most = int((_CGROUP / "memory.max").read_text())
        total = most if total is None else min(total, most)
    return total


def _open_files() -> int | None:
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else soft
