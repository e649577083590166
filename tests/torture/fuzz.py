"""Fuzzing of everything that is read before it can be trusted: configs, rows, adapters, manifests, a run's records.

Each input is a valid one made wrong by the generator `Random("SEED/AREA/NUMBER")`, so that it can be made again, and
goes through the reader the commands use. It may be accepted or refused with a UserError; any other exception, more than
two seconds or a GiB, a file written, a process, a socket or an import is a failure. A folder in memory is the fastest.
"""

import functools
import multiprocessing
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from torture import config_inputs, data_inputs, stored_inputs
from torture.watched import Watch

# An area prepares a folder and returns how input `n` is made there, and what reads it.
Make = Callable[[random.Random], None]
Read = Callable[[], object]
AREAS: dict[str, Callable[[Path], tuple[Make, Read]]] = {
    "configs": config_inputs.prepare,
    "data": data_inputs.prepare,
    "adapters": stored_inputs.prepare_adapter,
    "manifests": stored_inputs.prepare_manifest,
    "records": stored_inputs.prepare_records,
}
_CHUNK = 2_000  # inputs given to a process at once


def run(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Read `count` configs and as many data files, and a tenth of each of the others; return what was found."""
    processes = len(os.sched_getaffinity(0))
    figures: dict[str, Any] = {"seed": seed, "tried": 0, "failures": []}
    for area in AREAS:
        wanted = count if area in ("configs", "data") else max(1, count // 10)
        began, refused, failures, first = time.perf_counter(), 0, Counter[str](), dict[str, str]()
        chunks = [(area, seed, begin, min(wanted, begin + _CHUNK), folder) for begin in range(0, wanted, _CHUNK)]
        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(processes, context) as pool:
            for of_chunk in pool.map(_read_chunk, *zip(*chunks, strict=True)):
                refused += of_chunk[0]
                failures.update(of_chunk[1])
                first = of_chunk[2] | first
        figures["tried"] += wanted
        figures["failures"] += [f"{area}: {what} (x{times}, {first[what]})" for what, times in failures.most_common()]
        seconds = time.perf_counter() - began
        figures[area] = {"tried": wanted, "refused": refused, "a_second": round(wanted / seconds)}
    return figures


def _read_chunk(area: str, seed: int, begin: int, end: int, folder: Path) -> tuple[int, Counter[str], dict[str, str]]:
    """Read some inputs of an area here; return how many were refused, the failures, and an example of each."""
    inside = folder / f"{area}-{begin}"
    inside.mkdir()
    make, read = AREAS[area](inside)
    read()  # what is valid is read, and what reading needs is imported
    watch = _watch()
    refused, failures, first = 0, Counter[str](), dict[str, str]()
    for number in range(begin, end):
        make(random.Random(f"{seed}/{area}/{number}"))
        was_refused, wrong = watch.failure(read)
        refused += was_refused
        if wrong is not None:
            failures[wrong[0]] += 1
            first.setdefault(wrong[0], f"number {number}: {wrong[1]}")
    shutil.rmtree(inside)
    return refused, failures, first


@functools.cache
def _watch() -> Watch:
    """Return the watch of this process."""
    return Watch()
