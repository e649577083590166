"""How a process holds its memory: what it tells glibc, and that places are used again."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told anything")

_FAULTS = """
import resource, torch
from lora_cli.heap import keep_freed_memory
if {kept}:
    keep_freed_memory()
for _ in range(12):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""

_BEGUN_AGAIN = """
import os, sys
from lora_cli import heap
print("began", os.getpid(), flush=True)
heap.restart_without_caches()
print(os.environ["GLIBC_TUNABLES"], sys.argv[1:])
"""

_PLACES = """
import torch
from lora_cli.heap import keep_freed_memory, roomy
keep_freed_memory()
like, among = torch.zeros(1), []
def place(make):
    among.append(make())  # a gap of this size is between two of these
    tensor = make()
    among.append(make())
    return tensor.data_ptr()
shape = (1 << 20,)
freed = place(lambda: roomy(shape, like))
print(abs(torch.empty(shape).data_ptr() - freed) <= 256, roomy(shape, like).shape == torch.Size(shape))
"""


def run(program: str, *arguments: str, **environment: str) -> list[str]:
    """The lines that a program prints."""
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.check_output(command, text=True, env=os.environ | environment).splitlines()


def test_freed_memory_is_used_again():
    """A tensor of 64 MiB, made twelve times, is not new to the system each time."""
    faults = [int(run(_FAULTS.format(kept=kept))[0]) for kept in (True, False)]
    assert faults[1] - faults[0] >= 2 * (64 << 20) // 4096


def test_a_program_begins_again_once_and_as_it_was_begun():
    """With its arguments; what the environment says already is kept, another number above all."""
    wanted = "glibc.malloc.tcache_count=0"
    for before, after, times in (
        ("", wanted, 2),
        ("glibc.malloc.check=0", f"glibc.malloc.check=0:{wanted}", 2),
        ("glibc.malloc.tcache_count=3", "glibc.malloc.tcache_count=3", 1),
    ):
        *began, last = run(_BEGUN_AGAIN, "a b", "--c", GLIBC_TUNABLES=before)
        assert began == began[:1] * times  # the same process
        assert last == f"{after} ['a b', '--c']"


@pytest.mark.parametrize(("command", "again"), [("train", True), ("tune", True), ("eval", False), ("--help", False)])
def test_commands_that_train_begin_again(command: str, again: bool, tmp_path: Path):
    """As `lora` and as `python -m lora_cli` alike; what comes of it is the command's own."""
    (tmp_path / "sitecustomize.py").write_text("import os\nprint('began', os.environ.get('GLIBC_TUNABLES'))\n")
    arguments = [command] if command == "--help" else [command, "missing.yaml"]
    program = str(Path(sys.executable).with_name("lora"))
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "GLIBC_TUNABLES": ""}
    for begin in ([program], [sys.executable, "-m", "lora_cli"]):
        done = subprocess.run([*begin, *arguments], capture_output=True, text=True, env=environment, check=False)
        began = [line for line in done.stdout.splitlines() if line.startswith("began")]
        assert began == ["began ", "began glibc.malloc.tcache_count=0"][: 1 + again]
        assert ("missing.yaml" in done.stderr, done.returncode) == ((False, 0) if command == "--help" else (True, 2))


def test_the_place_of_a_roomy_tensor_fits_a_plain_one():
    """Between two others, where there is no more room than it left."""
    assert run(_PLACES) == ["True True"]
