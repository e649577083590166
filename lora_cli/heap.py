"""How this process holds its memory: what the C library is told, so that tensors that come and go leave few gaps.

All of this is about glibc. It cuts a tensor, aligned to 64 bytes, out of a free block that is larger by 96 bytes, and
what is left over beside it is soon some small object's: when the tensor is freed, its place is too small for another
of the same size (glibc 2.36, malloc.c: `_int_memalign`).
"""

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_NO_CACHES = "glibc.malloc.tcache_count=0"
_SPARE = 64  # elements


def restart_without_caches() -> None:
    """Begin this program once more, as it was begun, with a C library that keeps no freed blocks for each thread.

    Between two free blocks one that is so kept is in use: what it divides cannot become one, and stays a gap. Only the
    environment says so, before a program begins. Nothing is done where a number is set already, or without glibc.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.tcache_count" in tunables or not sys.executable or not _has_glibc():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, _NO_CACHES]))
    with contextlib.suppress(OSError):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def keep_freed_memory() -> None:
    """Have this process keep the memory it frees for its next tensors.

    The C library gives large blocks back to the system, and a step would get them anew and zeroed, page by page.
    Threads that are started later take from the same memory: in one of their own they would each keep as much again.
    """
    if _has_glibc():
        import ctypes

        with contextlib.suppress(OSError, AttributeError):
            adjust = ctypes.CDLL(None).mallopt  # the numbers are those of glibc's malloc.h
            adjust(-3, 2**31 - 1)  # M_MMAP_THRESHOLD: no block is a mapping by itself
            adjust(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: what is free at the end is kept
            adjust(-8, 1)  # M_ARENA_MAX


def roomy(shape: Sequence[int], like: "Tensor") -> "Tensor":
    """Return a tensor without values, of another's kind, whose place on a CPU fits a plain tensor once it is freed.

    What a block makes for a moment is followed by what it keeps, which then lies in the same place.
    """
    import torch

    if like.device.type != "cpu" or torch.compiler.is_compiling():
        return like.new_empty(shape)
    return like.new_empty(torch.Size(shape).numel() + _SPARE).resize_(shape)


def _has_glibc() -> bool:
    try:
        return sys.platform == "linux" and (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (ValueError, OSError):
        return False
