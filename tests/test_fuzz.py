"""Whatever stands in a config, a data file, an adapter or a run's records: it is read, or refused by name, soon."""

import itertools
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torture import fuzz
from torture.mutations import LONG
from torture.watched import Watch

from lora_cli.errors import ConfigError

COUNT = 600  # of configs and of data files; scripts/torture.py takes 200,000


def test_hostile_input_is_read_or_refused(tmp_path: Path):
    """No other exception, no hang, no file, no process, no socket; and what is wrong is refused, not all of it."""
    figures = fuzz.run(seed=0, count=COUNT, folder=tmp_path)

    assert figures["failures"] == []
    assert figures["tried"] == 2 * COUNT + 3 * COUNT // 10
    for area in fuzz.AREAS:
        assert 0 < figures[area]["refused"] < figures[area]["tried"], area


def _refuse(text: str) -> None:
    raise ConfigError(text)


READERS: dict[str, tuple[Callable[[], object], str]] = {
    "an exception that is no UserError": (lambda: 1 / 0, "raises ZeroDivisionError"),
    "a hang": (lambda: sum(1 for _ in itertools.count()), "takes more than 2 seconds"),
    "waiting": (lambda: time.sleep(60), "takes more than 2 seconds"),
    "a file": (lambda: open(os.devnull, "w").close(), "does open"),
    "a process": (lambda: os.system("true"), "does os.system"),
    "a socket": (lambda: socket.socket().close(), "does socket.__new__"),
    "memory": (lambda: bytearray(2 << 30), "raises MemoryError"),
    "a long value": (lambda: _refuse(LONG), "shows more than 80 characters"),
    "silence": (lambda: _refuse(""), "is refused without a word"),
}


@pytest.mark.parametrize("name", READERS)
def test_what_a_reader_must_not_do_is_seen(name: str):
    """The watch of the fuzzing sees each of these."""
    read, expected = READERS[name]
    _, wrong = _in_a_process(read)

    assert wrong is not None
    assert expected in wrong[0]


def _in_a_process(read: Callable[[], object]) -> tuple[bool, tuple[str, str] | None]:
    queue = multiprocessing.get_context("fork").SimpleQueue()
    if (child := os.fork()) == 0:
        queue.put(Watch(waiting=3.0).failure(read))
        os._exit(0)
    os.waitpid(child, 0)
    return queue.get()
