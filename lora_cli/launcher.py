"""`--nproc N`: this command once more in N processes, started and watched by torch's own launcher."""

import contextlib
import logging
import os
import signal
import sys
import uuid
from types import FrameType
from typing import Any, NoReturn

from torch.distributed.elastic.agent.server import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from lora_cli import console, interrupt
from lora_cli.errors import SurroundingsError
from lora_cli.parallel import usable_processors

_HERE = "127.0.0.1"  # one machine; its name need not lead to it


def launch(processes: int, restarts: int = 0) -> NoReturn:
    """Run this command in several processes, with a share of the processors each, and end as they end.

    What fails for the surroundings is started again, `restarts` times at most; nothing else would end differently.
    A signal is handed on, and they take their time to save; a second one ends all at once. Raises SurroundingsError
    where the main process was killed, so that it could not say so.
    """
    logging.disable()  # torch's report, with a code of its own
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_processors() // processes)))
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are handled here
    signals: list[int] = []
    for left in reversed(range(restarts + 1)):
        failed, code = _run(processes, signals)
        if code < 0:
            what = f"process {failed} of {processes} (counted from 0) was killed by {signal.Signals(-code).name}"
            error = SurroundingsError(
                f"{what}, which the system sends when memory runs out." if code == -signal.SIGKILL else f"{what}.",
                state="What was saved is whole; the same command continues from there.",
            )
            if failed == 0 and not left:
                raise error
            console.message(error.problems[0])
            code = error.exit_code
        if code != SurroundingsError.exit_code or signals or not left:
            break
        console.message(f"Starting the {processes} processes again ({left - 1} more times, where need be).")
    sys.exit(code)


def _run(processes: int, signals: list[int]) -> tuple[int, int]:
    """Start the processes and wait for their end; return the first that failed, and its exit code."""
    here = () if os.getcwd() in sys.path else ("-P",)  # -m would look for modules in the working directory
    spec = WorkerSpec(
        role="lora",
        local_world_size=processes,
        rdzv_handler=get_rendezvous_handler(RendezvousParameters("c10d", "localhost:0", uuid.uuid4().hex, 1, 1, _HERE)),
        entrypoint=sys.executable,
        args=(*here, "-m", "lora_cli", *sys.argv[1:]),
        max_restarts=0,
        local_addr=_HERE,
    )
    agent = LocalElasticAgent(spec, DefaultLogsSpecs(log_dir=os.devnull))
    _hand_on(signals, agent)
    try:
        failures = agent.run().failures
    finally:
        spec.rdzv_handler.shutdown()
    return next(((rank, failure.exitcode) for rank, failure in failures.items()), (0, 0))


def _hand_on(signals: list[int], agent: Any) -> None:
    """Have a signal noted and sent on to the processes: they save and end by themselves. Twice, and all end at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        sent = number if len(signals) == 1 else signal.SIGKILL
        started = [worker.id for worker in agent.get_worker_group().workers if isinstance(worker.id, int)]
        for process in started:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                os.killpg(process, sent)  # each is a session of its own
        if len(signals) > 1 or not started:
            os._exit(128 + number)

    if sys.platform != "win32":
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # Ctrl-Z: halted, it would keep no store for the processes
    for number in interrupt.SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, handle)
