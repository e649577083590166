"""What a command runs on: the device that is asked for or a clear reason, and the memory that processes share."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Invoke

from lora_cli import distributed, launch
from lora_cli.distributed import choose_device, free_memory
from lora_cli.errors import SurroundingsError

CPU = torch.device("cpu")
Make = Callable[..., Path]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that lets torch see a number of GPUs."""

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    return see


def test_the_device_that_is_asked_for_is_used(gpus: Callable[[int], None]):
    """Without GPUs auto is the CPU; with them it is one, each local rank has its own, and cpu stays the CPU."""
    gpus(0)
    assert choose_device("auto") == choose_device("cpu") == CPU
    gpus(2)
    assert choose_device("cpu", local_rank=5) == CPU
    assert [choose_device(wanted, 1) for wanted in ("auto", "cuda")] == [torch.device("cuda", 1)] * 2
    with pytest.raises(SurroundingsError, match=r"fewer GPUs \(2\) than processes"):
        choose_device("auto", local_rank=2)


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_gpu_that_is_not_there_is_named(
    command: str, undisturbed: Path, make_config: Make, invoke: Invoke, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Exit code 3, with what torch sees; a run asks for what its config says, and nothing is written."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    place = make_config(**{"model.device": "cuda"})
    if command == "eval":  # of a run that was trained elsewhere
        place = tmp_path / "elsewhere"
        shutil.copytree(undisturbed, place)
        config = (place / "config.yaml").read_text()
        (place / "config.yaml").write_text(config.replace("device: auto", "device: cuda"))
    code, _, said = invoke(command, place)

    assert code == 3, said
    assert f"model.device: cuda, but torch {torch.__version__} sees no GPU here" in said
    assert "CUDA_VISIBLE_DEVICES is '7'" in said
    assert not (tmp_path / "run").exists()


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch):
    """Each of four may take a quarter; where nobody says how many are here, all of them are."""
    alone = free_memory(CPU)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")

    assert alone is not None
    assert launch.current() == launch.Launch(5, 8, 1, 4)
    assert free_memory(CPU) == pytest.approx(alone / 4, rel=0.2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert free_memory(CPU) == pytest.approx(alone / 8, rel=0.2)


def test_a_cpu_that_is_asked_for_has_no_word_of_gpus(gpus: Callable[[int], None]):
    """Where torch sees GPUs, a command on the CPU is a world of the CPU."""
    gpus(1)
    assert distributed.current_world("cpu").device == CPU
