"""Functions in other processes: over many items in several, results in order; or one call in one of its own."""

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import chain
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from lora_cli import interrupt, launch
from lora_cli.errors import NOTHING_LOADED, SurroundingsError

Item = TypeVar("Item")
Result = TypeVar("Result")
_POLL_SECONDS = 0.1
_function: Callable[[Any], Any] | None = None  # of a worker process


def _begin(function: Callable[[Any], Any], parent: int) -> None:
    """Prepare a worker: it leaves Ctrl-C to its parent, and does not outlive it."""
    global _function
    _function = function
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    launch.die_with(parent)


def _call(item: Any) -> Any:
    assert _function is not None, "the process is a worker"
    return _function(item)


def in_worker() -> bool:
    """Return whether this process was started here, so that it may be ended."""
    return _function is not None


class Overdue(Exception):
    """A process was ended by the kernel: it had a timer of its CPU time (SIGPROF), and that ran out."""


def run_apart(function: Callable[[], Result]) -> Result:
    """Return `function()`, called in a process forked for it; in this one where that is not safe (not Linux).

    Raises what the function raises, Overdue, SurroundingsError when the process is killed otherwise.
    """
    if sys.platform != "linux":
        return function()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(function, sender, os.getpid()))
    process.start()
    sender.close()
    try:
        while not receiver.poll(_POLL_SECONDS):
            interrupt.poll()
        returned, result = receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGPROF:
            raise Overdue from None
        raise _killed() from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if not returned:
        raise result
    return result


def _answer(function: Callable[[], Any], sender: Connection, parent: int) -> None:
    _begin(lambda _: function(), parent)
    try:
        answer = True, function()
    except Exception as error:
        answer = False, error
    sender.send(answer)


def _killed() -> SurroundingsError:
    return SurroundingsError(
        "A process that prepares the data was killed, by the system when memory runs out.", state=NOTHING_LOADED
    )


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
    """Iterate over `function(item)` in the order of the items.

    At most two items a process are under way. When a process is killed, what is left is done one item at a time, as by
    `run_apart`. Raises what the function raises, as `run_apart`, and Interrupted; then the processes are ended in the
    middle of their items.
    """
    # Forked, a worker has the tokenizer without loading it; elsewhere than on Linux that is not safe.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    executor = ProcessPoolExecutor(processes, context, _begin, (function, os.getpid()))
    others = set(multiprocessing.active_children())
    items = iter(items)
    waiting: deque[Item] = deque()
    futures: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(item)
            futures.append(executor.submit(_call, item))
            if len(futures) == 2 * processes:
                yield _result(futures.popleft())
                waiting.popleft()
        while futures:
            yield _result(futures.popleft())
            waiting.popleft()
    except BrokenProcessPool:
        pass
    except BaseException:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
    for item in chain(waiting, items):
        yield run_apart(partial(function, item))
