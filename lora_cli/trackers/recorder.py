"""A tracker at work in a thread of its own, so that the run waits for nothing that it waits for."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from queue import SimpleQueue

from lora_cli.errors import shown
from lora_cli.records import Notice
from lora_cli.trackers.tracker import NOTHING, Known, Tracker

Row = tuple[int, dict[str, float]]  # a step, and its figures
LONGEST_END_SECONDS = 40.0  # for what is still to be sent when a run ends


class Recorder:
    """Has a tracker do its work in a thread, in order; whatever that waits for, the run does not."""

    def __init__(self, name: str, tracker: Tracker, known: Known) -> None:
        self.known = known
        self._name = name
        self._tracker = tracker
        self._held = NOTHING
        self._problem: str | None = None
        self._said = set[str]()
        self._work = SimpleQueue[Callable[[], None] | None]()
        self._thread = threading.Thread(target=self._do_all, name=f"lora-{name}", daemon=True)

    def start(self, step: int, rows: Sequence[Row]) -> None:
        """Begin or continue, and record those rows that are missing there."""

        def work() -> None:
            self._held = self._tracker.start(step)
            for row in rows:
                self._record(*row)

        self._work.put(work)
        self._thread.start()

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Record a step."""
        self._work.put(lambda: self._record(step, values))

    def flush(self) -> None:
        """Have it whole up to here, and known to be."""

        def work() -> None:
            self._tracker.flush()
            self.known = Known(self.known.id, self._held)

        self._work.put(work)

    def end(self, status: str, reason: str) -> None:
        """End when all is done; `wait` waits for it."""
        self._work.put(lambda: self._tracker.end(status, reason))
        self._work.put(None)

    def wait(self, until: float) -> None:
        """Wait for the end, until a time of time.monotonic()."""
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._problem = f"it has not taken everything within {LONGEST_END_SECONDS:.0f} s"

    def news(self) -> Iterator[Notice]:
        """Iterate over what is to be said and was not."""
        said = {"address": f"{self._name}: {self._tracker.address}" if self._tracker.address else None}
        if self._problem is not None:
            said["problem"] = (
                f"{self._name}: {shown(self._problem, 200)}. It is left alone; the run goes on, and when it is "
                "continued, what is missing there is taken from metrics.jsonl."
            )
        for key, text in said.items():
            if text is not None and key not in self._said:
                self._said.add(key)
                yield Notice(text)

    def _record(self, step: int, values: Mapping[str, float]) -> None:
        if step > self._held:
            self._tracker.record(step, values)
            self._held = step

    def _do_all(self) -> None:
        while (work := self._work.get()) is not None:
            if self._problem is None:
                try:
                    work()
                except BaseException as error:  # of others' code: whatever it is, the run goes on
                    self._problem = f"{type(error).__name__}: {error}"
