"""What a command runs on: the device that is asked for or a clear reason; and what `lora check` says of others."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Invoke, build_tokenizer, save_base

from lora_cli import config_file, distributed, launch, lora, memory, model
from lora_cli.config import RunConfig
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


@pytest.mark.parametrize(("processes", "tokens"), [(1, 1024), (2, 400), (4, 200), (64, 128)])
def test_each_process_has_forwards_of_a_step(processes: int, tokens: int, make_config: Make):
    """Of 16 sequences of 100 tokens each of several processes has two forwards, none of fewer than 128 tokens."""
    config = config_file.load(make_config(**{"train.batch_size": 16, "train.micro_batch_tokens": "auto"}))
    header = model.read_header(config.model)
    started = launch.Launch(size=processes, local_size=processes)

    assert memory.estimate_memory(header, config, 100, CPU, started, 100.0).tokens == tokens


def test_processes_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch):
    """Each of four may take a quarter; where nobody says how many are here, all of them are."""
    alone = free_memory(CPU)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")

    assert alone is not None
    assert launch.current() == launch.Launch(5, 8, 1, 4)
    assert free_memory(CPU, launch.current().local_size) == pytest.approx(alone / 4, rel=0.2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert launch.current() == launch.Launch(5, 8, 1, 8)


def test_a_cpu_that_is_asked_for_has_no_word_of_gpus(gpus: Callable[[int], None]):
    """Where torch sees GPUs, a command on the CPU is a world of the CPU."""
    gpus(1)
    assert distributed.current_world("cpu").device == CPU


# --- lora check, of machines that are not here ---


def test_check_needs_neither_the_weights_nor_the_device(
    make_config: Make, model_folder: Callable[[str], str], invoke: Invoke, tmp_path: Path
):
    """Memory is that of the device, in its dtype; the time is not known; two notices say why. Training refuses both."""
    folder = tmp_path / "config-only"
    folder.mkdir()
    shutil.copy(Path(model_folder("llama")) / "config.json", folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    build_tokenizer().save_pretrained(folder)
    config = make_config(**{"model.path": str(folder)})
    code, out, _ = invoke("check", config, "model.device=cuda", "--json")
    report = json.loads(out)
    on_cpu = json.loads(invoke("check", config, "--json")[1])

    assert (code, report["seconds"], report["memory"]["free"], report["memory"]["fits"]) == (0, None, None, None)
    assert 0 < on_cpu["seconds"] < 60
    assert 2 * report["memory"]["base"] == on_cpu["memory"]["base"] == 4 * on_cpu["total_parameters"] - 4 * 3712
    assert [what in " ".join(report["notices"]) for what in ("cuda is not here", "has no weights here")] == [True] * 2
    assert invoke("train", config)[0] == 2
    assert not (tmp_path / "run").exists()


def test_check_says_where_memory_does_not_reach(make_config: Make, invoke: Invoke):
    """A forward of a hundred million tokens fits nowhere, and less does; of several processes each has its part."""
    huge = invoke("check", make_config(**{"train.micro_batch_tokens": 10**8}))[1]
    small = invoke("check", make_config(), "--nproc", "4", "--json")[1]
    alone = invoke("check", make_config(), "--json")[1]
    shared, whole = (json.loads(each)["memory"] for each in (small, alone))

    assert "memory: does not fit" in huge
    assert (shared["processes"], shared["fits"], json.loads(small)["seconds"]) == (4, True, None)
    assert shared["total"] == whole["total"]
    assert shared["free"] == pytest.approx(whole["free"] / 4, rel=0.2)


def test_counting_leaves_a_model_as_it_was(model_folder: Callable[[str], str]):
    """What a forward keeps is found on a copy: the same modules, attention and forwards as before."""
    section = {"model": model_folder("llama"), "data": {"train": "x"}, "output_dir": "x"}
    config = RunConfig.model_validate(section)
    skeleton = model.build_skeleton(model.read_header(config.model))
    lora.wrap(skeleton, dict.fromkeys(lora.find_targets(skeleton, "all-linear"), (4, 1.0)))
    before = [(path, type(each), set(vars(each))) for path, each in skeleton.named_modules()]
    shared = [layer.shared for _, layer in lora.lora_layers(skeleton)]
    attention = skeleton.config._attn_implementation

    assert memory.kept_by_a_token(skeleton, config) > 0
    assert [(path, type(each), set(vars(each))) for path, each in skeleton.named_modules()] == before
    assert [layer.shared for _, layer in lora.lora_layers(skeleton)] == shared
    assert skeleton.config._attn_implementation == attention


@pytest.mark.parametrize("compiled", [False, True])
def test_many_blocks_keep_what_a_few_say(compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of twenty blocks twelve are run, and the count is that of all."""
    folder = save_base("llama", tmp_path / "deep", num_hidden_layers=20)
    section = {"model": str(folder), "data": {"train": "x"}, "train": {"compile": compiled}, "output_dir": "x"}
    config = RunConfig.model_validate(section)
    skeleton = model.build_skeleton(model.read_header(config.model))
    lora.wrap(skeleton, dict.fromkeys(lora.find_targets(skeleton, "all-linear"), (4, 1.0)))
    quick = memory.kept_by_a_token(skeleton, config)
    monkeypatch.setattr(memory, "_RUN", 10)

    assert quick == pytest.approx(memory.kept_by_a_token(skeleton, config), rel=1e-9)


@pytest.mark.parametrize("kind", [None, "int8", "nf4"])
def test_the_base_takes_what_is_estimated(kind: str | None, tmp_path: Path):
    """The bytes of a loaded base, quantised or not, to a hundredth; and the largest matrix it is made whole of."""
    folder = save_base("llama", tmp_path / "base", hidden_size=256, intermediate_size=512)
    section = {"path": str(folder), "quantization": kind, "dtype": "bfloat16"}
    config = RunConfig.model_validate({"model": section, "data": {"train": "x"}, "output_dir": "x"})
    header = model.read_header(config.model)
    loaded = model.load_model(header, config.model, CPU).module
    taken = {id(t): t.nbytes for t in (*loaded.parameters(), *loaded.buffers()) if t.numel() != 32}  # no rotary tables
    base, in_flight = memory.base_memory(model.build_skeleton(header).to(torch.bfloat16), config, processes=1)

    assert base == pytest.approx(sum(taken.values()), rel=0.01)
    assert in_flight == {None: 0, "int8": 6, "nf4": 2}[kind] * 256 * 512
