"""Run commands in this process under an audit hook, and print what they did that no command may do.

    python audited.py COMMANDS.json     a list of commands, each a list of arguments

The last line printed is JSON: each command's exit code and seconds, the events, the largest resident size. Run as a
program, in a process of its own: a hook cannot be taken away again. Forked processes write their events to the same
file. What our own processes send each other by multiprocessing is only counted, where its sender and class are known.
"""

import json
import os
import resource
import sys
import tempfile
import time
from types import FrameType

WATCHED = ("pickle.find_class", "socket.connect", "socket.getaddrinfo", "os.system", "os.exec", "os.posix_spawn",
           "subprocess.Popen", "marshal.load")  # fmt: skip
SENT = ("lora_cli.", "numpy", "multiprocessing.", "concurrent.futures.", "functools", "builtins", "_codecs")
events = tempfile.TemporaryFile()  # noqa: SIM115 - until the end


def between_our_processes(frame: FrameType | None) -> bool:
    """Whether the interpreter is reading what another process of ours sent through a pipe."""
    while frame is not None:
        if frame.f_globals.get("__name__") in ("multiprocessing.connection", "multiprocessing.queues"):
            return True
        frame = frame.f_back
    return False


def hook(event: str, arguments: tuple[object, ...]) -> None:
    """Note an event that is watched."""
    if event not in WATCHED:
        return
    if event == "subprocess.Popen" and arguments[1] == ["uname", "-p"]:
        return  # Python's own platform.processor()
    if event == "pickle.find_class" and str(arguments[0]).startswith(SENT) and between_our_processes(sys._getframe(1)):
        event = "between our processes"
    os.write(events.fileno(), f"{event} {str(arguments)[:200]}\n".encode())


def main() -> None:
    """Import the program under the hook, then run the commands."""
    with open(sys.argv[1], encoding="utf-8") as file:
        commands = json.load(file)
    sys.addaudithook(hook)
    from lora_cli import cli

    done = []
    for command in commands:
        sys.argv = ["lora", *command]
        began, code = time.monotonic(), 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        done.append({"command": command, "code": code, "seconds": round(time.monotonic() - began, 2)})
    events.seek(0)
    lines = events.read().decode().splitlines()
    sent = sum(line.startswith("between our processes") for line in lines)
    found = sorted({line for line in lines if not line.startswith("between our processes")})
    largest = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print("\n" + json.dumps({"commands": done, "events": found, "between_ours": sent, "largest_mib": largest >> 10}))


if __name__ == "__main__":
    main()
