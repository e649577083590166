"""A function over many items in several processes, results in order, a bounded number of them in memory."""

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from lora_cli import interrupt, launch
from lora_cli.errors import NOTHING_LOADED, SurroundingsError

Item = TypeVar("Item")
Result = TypeVar("Result")
_POLL_SECONDS = 0.1
_function: Callable[[Any], Any]  # of a worker process


def _begin(function: Callable[[Any], Any], parent: int) -> None:
    """Prepare a worker: it leaves Ctrl-C to its parent, and does not outlive it."""
    global _function
    _function = function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    launch.die_with(parent)


def _call(item: Any) -> Any:
    return _function(item)


def _result(future: Future[Any]) -> Any:
    while True:
        try:
            return future.result(_POLL_SECONDS)
        except TimeoutError:
            if future.done():  # it is the function's own
                raise
            interrupt.poll()


def usable_processors() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(function: Callable[[Item], Result], items: Iterable[Item], processes: int) -> Iterator[Result]:
    """Iterate over `function(item)` in the order of the items; with one process, in this one.

    At most two items a process are under way. Raises what the function raises, SurroundingsError when a process is
    killed from outside, Interrupted; then the processes are ended in the middle of their items.
    """
    if processes == 1:
        yield from map(function, items)
        return
    # Forked, a worker has the tokenizer without loading it; elsewhere than on Linux that is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    executor = ProcessPoolExecutor(processes, context, _begin, (function, os.getpid()))
    others = set(multiprocessing.active_children())
    waiting: deque[Future[Any]] = deque()
    try:
        for item in items:
            waiting.append(executor.submit(_call, item))
            if len(waiting) == 2 * processes:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    except BrokenProcessPool:
        raise SurroundingsError(
            "A process that prepares the data was killed, by the system when memory runs out.", state=NOTHING_LOADED
        ) from None
    except BaseException:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
