"""Whether the other processes of a run live: each shows every second that it does, and looks at the next one.

So one that was killed or halted, or whose machine is gone, ends all within seconds, whatever they wait for. Of a
thousand processes each still asks the store where they met for three keys a second.
"""

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from lora_cli.errors import SurroundingsError
from lora_cli.launch import Launch

BEAT = 1.0  # seconds
SILENT = 10  # beats of our own without one of the other: where all were suspended, none is blamed
_LEFT = -(2**40)  # what a process that is done adds to its count
_GONE = "gone"


@contextlib.contextmanager
def beating(store: Any, started: Launch) -> Iterator[None]:
    """Show that this process lives while the block runs, and end it (exit code 3) when another one is gone.

    A block that raises only falls silent, which leaves the others the time to end in their own way.
    """
    heart = _Heart(dist.PrefixStore("heartbeat", store), started)
    threads = [threading.Thread(target=act, daemon=True) for act in (heart.talk, heart.watch)]
    for thread in threads:
        thread.start()
    try:
        yield
        heart.done = True
    finally:
        heart.over.set()
        threads[0].join(BEAT)


class _Heart:
    """What two threads of a process share: one asks the store, which may block, one sees that it is answered."""

    def __init__(self, store: Any, started: Launch) -> None:
        self.store = store
        self.started = started
        self.over = threading.Event()
        self.done = False  # with the work
        self.unanswered = 0  # beats

    def talk(self) -> None:
        """Show that this process lives, and look whether the next one does."""
        ours, neighbour = self.started.rank, (self.started.rank + 1) % self.started.size
        before, silent = -1, 0
        try:
            while not self.over.is_set():
                self.store.add(str(ours), 1)
                count = self.store.add(str(neighbour), 0)
                before, silent = count, silent + 1 if count == before else 0
                if silent > SILENT and count >= 0:
                    self.store.set(_GONE, str(neighbour))
                if self.store.check([_GONE]):
                    self._end_with(int(self.store.get(_GONE)))
                self.unanswered = 0
                self.over.wait(BEAT)
            if self.done:
                self.store.add(str(ours), _LEFT)
        except RuntimeError:  # the store is gone, as it is when all are done
            if not self.over.wait(SILENT * BEAT):
                self._end_without_store("has ended")

    def watch(self) -> None:
        """See that the store answers."""
        while not self.over.wait(BEAT):
            self.unanswered += 1
            if self.unanswered > SILENT:
                self._end_without_store(f"has not answered for {SILENT * BEAT:.0f} seconds")

    def _end_with(self, gone: int) -> None:
        rank, size = self.started.rank, self.started.size
        _end(
            f"process {gone} of {size} (counted from 0) was killed or halted, or its machine is gone: it has shown no "
            f"life for {SILENT * BEAT:.0f} seconds.",
            aloud=rank == 0 or (gone == 0 and rank == size - 1),
        )

    def _end_without_store(self, what: str) -> None:
        where = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
        _end(
            f"the process at {where}, where the {self.started.size} processes of this run meet, {what}.",
            aloud=self.started.rank < 2 or self.started.local_rank == 0,
        )


def _end(problem: str, aloud: bool) -> None:
    """End this process at once; its main thread may wait for what never comes."""
    error = SurroundingsError(problem, state="What was saved is whole; the same command continues from there.")
    if aloud:
        cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
        with contextlib.suppress(OSError):
            os.write(2, f"{cursor}\nerror: {error.paragraph()}\n".encode())
    os._exit(error.exit_code)
