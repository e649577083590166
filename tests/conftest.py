"""Tiny real models with random weights, made once a session; no network, no GPU."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # some tests fork, and a forked process has none of its parent's threads
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # as lora sets it for one of several processes
os.environ["LORA_CACHE"] = tempfile.mkdtemp(prefix="lora-tests-")

import peft
import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lora_cli import (
    adapter,
    adapter_folder,
    base_folder,
    checkpoint,
    cli,
    config_file,
    data,
    environment,
    lora,
    metrics,
    model,
    run_dir,
    tuned,
)
from lora_cli.adapter_folder import Origin
from lora_cli.batches import Batch, Group, collate
from lora_cli.config import LoraConfig, ModelConfig, RunConfig
from lora_cli.data_config import DataConfig
from lora_cli.data_reader import DataReader, run_to_end
from lora_cli.dataset import Dataset
from lora_cli.distributed import current_world
from lora_cli.examples import Example
from lora_cli.interrupt import StopRequest
from lora_cli.model import ModelHeader
from lora_cli.prepare import prepare
from lora_cli.records import DataCounts
from lora_cli.run_dir import RunDir
from lora_cli.session import Session, open_session
from lora_cli.train import train

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SHARED = Path(__file__).resolve().parents[2] / "shared"


def build_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few sentences, with ChatML's control tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = [
        "What is the colour of the sky? The sky is blue.",
        "Name a colour. Red is a colour.",
        "user assistant system",
    ]
    tokenizer.train_from_iterator(text * 20, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )


def build_model(kind: str, **settings: Any) -> Any:
    """A small random model of a real architecture, far enough from its initialisation for its logits to differ."""
    torch.manual_seed(7)
    blocks = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    blocks |= {name: settings.pop(name) for name in blocks.keys() & settings.keys()}
    common = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2, **settings}
    match kind:
        case "llama":
            config: Any = transformers.LlamaConfig(
                **blocks, num_key_value_heads=2, **{"tie_word_embeddings": True} | common
            )
        case "tall":
            config = transformers.LlamaConfig(**common, **blocks | {"num_hidden_layers": 4})
        case "qwen2":  # biases on query, key and value
            config = transformers.Qwen2Config(**common, **blocks, num_key_value_heads=2)
        case "qwen3":
            config = transformers.Qwen3Config(**common, **blocks, num_key_value_heads=2, head_dim=16)
        case "gpt2":
            config = transformers.GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=256)
        case "gemma2":  # soft-capped logits and attention
            config = transformers.Gemma2Config(**common, **blocks, num_key_value_heads=2, head_dim=8, sliding_window=12)
        case "gemma":
            config = transformers.GemmaConfig(**common, **blocks, num_key_value_heads=1, head_dim=8)
        case "mixtral":  # a mixture of experts, stored one by one and run together
            config = transformers.MixtralConfig(**common, **blocks, num_key_value_heads=2, num_local_experts=4)
        case "granite":  # logits divided by a number
            config = transformers.GraniteConfig(**common, **blocks, num_key_value_heads=2, logits_scaling=3.0)
        case "cohere":  # logits times a number, attention and MLP side by side
            config = transformers.CohereConfig(**common, **blocks, num_key_value_heads=2, logit_scale=0.25)
        case "mamba":  # a state-space model: no attention, so nothing can be packed by positions
            config = transformers.Mamba2Config(
                **common, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=1
            )
        case "bloom":  # attention with a bias by distance
            config = transformers.BloomConfig(**common, hidden_size=32, n_layer=2, n_head=4)
        case _:
            raise ValueError(kind)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.15)
    return model.eval()


def save_with_peft(folder: str, path: Path, **options: Any) -> Any:
    """An adapter that PEFT made, with random weights."""
    torch.manual_seed(11)
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    made = peft.get_peft_model(base, peft.LoraConfig(**({"init_lora_weights": False} | settings | options)))
    made.save_pretrained(path)
    return made.eval()


def save_base(kind: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "1GB", **settings: Any) -> Path:
    """A random base model, with its tokenizer."""
    build_model(kind, **settings).to(dtype).save_pretrained(folder, max_shard_size=shard)
    build_tokenizer().save_pretrained(folder)
    return folder


def shrink(folder: Path, factor: float) -> None:
    """Make an adapter's update smaller."""
    tensors = safetensors.torch.load_file(folder / adapter.WEIGHTS)
    small = {name: tensor * factor if "lora_B" in name else tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(small, folder / adapter.WEIGHTS)


TOKENS = list(range(5, 15))  # within the sliding window of the small Gemma 2, which mlx-lm does not keep to


def write_adapter(base: str, folder: Path, config: LoraConfig) -> dict[str, Any]:
    """Write a random adapter of a base in PEFT's format; return its adapter_config.json."""
    header = model.read_header(ModelConfig(path=base))
    loaded = model.load_model(header, ModelConfig(path=base), torch.device("cpu"))
    lora.apply_lora(loaded.module, config, seed=0)
    torch.manual_seed(3)
    for _, layer in lora.lora_layers(loaded.module):
        torch.nn.init.normal_(layer.lora_B, std=0.3)
        if layer.magnitude is not None:
            with torch.no_grad():
                layer.magnitude.mul_(torch.rand_like(layer.magnitude) + 0.5)
    folder.mkdir()
    adapter_folder.save(folder, loaded.module, config, Origin(base, None, base_folder.fingerprint(header.folder), {}))
    values: dict[str, Any] = json.loads((folder / adapter.CONFIG).read_text())
    return values


def our_logits(folder: Path) -> torch.Tensor:
    """The logits of base + adapter as we run it, [10, V]."""
    loaded = tuned.load(tuned.find(folder), torch.device("cpu"), "float32")
    loaded.module.set_attn_implementation("eager")
    with torch.no_grad():
        result: torch.Tensor = loaded.module(input_ids=torch.tensor([TOKENS]), use_cache=False).logits[0]
    return result


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function from an architecture to a saved folder of it."""
    folders: dict[str, str] = {}

    def folder(kind: str) -> str:
        if kind not in folders:
            path = tmp_path_factory.mktemp(kind)
            build_model(kind).save_pretrained(path)
            build_tokenizer().save_pretrained(path)
            folders[kind] = str(path)
        return folders[kind]

    return folder


def read_rows(path: str, **settings: Any) -> list[data.Conversation]:
    """The rows of a file as conversations."""
    config = DataConfig(train=path, validation=0, **settings)
    data.require_readable(config)
    readers = [reader for source in config.sources for reader in data.readers(source)]
    return [row for reader in readers for block in reader.file.blocks() for row in reader.read(block)[0]]


def data_reader(config: DataConfig, tokenizer: Any = None, max_positions: int | None = None) -> DataReader:
    """What turns the data of a config into tokens, without a model."""
    return DataReader(config, ModelHeader(Path(), None, tokenizer or build_tokenizer(), max_positions))


def build_examples(
    path: str, tokenizer: Any = None, max_positions: int | None = None, **settings: Any
) -> tuple[Dataset, DataCounts]:
    """All rows of a file as examples, and what was counted."""
    config = DataConfig(train=path, **settings)
    return run_to_end(data_reader(config, tokenizer, max_positions).held_out(config.sources[0]))


def one_batch(examples: Sequence[Example]) -> Batch:
    """All examples packed into one row, nothing shared."""
    return collate(tuple(Group((number,)) for number in range(len(examples))), examples, torch.device("cpu"))


COLOURS = ("red", "blue", "green", "black", "white", "brown")


def conversation(number: int) -> dict[str, Any]:
    """A short question and answer; the length varies with the number."""
    colour = COLOURS[number % len(COLOURS)]
    question = f"Name colour number {number}" + ", please" * (number % 4) + "."
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": f"It is {colour}."}]}


def write_rows(path: Path, rows: list[Any]) -> str:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def facts(place: Path) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """What must be the same: metrics without times, and every file of the result and of the newest checkpoint."""
    measured = [
        {key: value for key, value in record.items() if key != "seconds"} for record in metrics.read(RunDir(place))
    ]
    newest, _ = checkpoint.latest(RunDir(place))
    assert newest is not None
    (result,) = [folder for name in ("adapter", "model") if (folder := place / name).exists()]
    files = [*newest.iterdir(), *result.iterdir()]
    return measured, {str(file.relative_to(place)): file.read_bytes() for file in files}


@pytest.fixture
def shared_model() -> str:
    """A small pretrained model that lies beside the project; skipped where it does not."""
    folder = SHARED / "models" / "stories260k"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return str(folder)


@pytest.fixture
def make_rows(tmp_path: Path) -> Callable[[int], str]:
    """Return a function that writes a number of conversations."""
    return lambda count: write_rows(tmp_path / "rows.jsonl", [conversation(number) for number in range(count)])


@pytest.fixture
def rows_file(make_rows: Callable[[int], str]) -> str:
    """Forty rows of messages."""
    return make_rows(40)


def write_config(folder: Path, model: str, rows: str, overrides: dict[str, Any]) -> Path:
    """Write a small config, dotted keys overriding it."""
    values: dict[str, Any] = {
        "model": {"path": model},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": rows, "validation": 8},
        "train": {"batch_size": 4, "learning_rate": 0.01, "epochs": 2, "micro_batch_tokens": 64},
        "eval": {"general": False},  # a test of forgetting turns it on
        "output_dir": str(folder / "run"),
    }
    for dotted, value in overrides.items():
        section = values
        *parts, last = dotted.split(".")
        for part in parts:
            section = section.setdefault(part, {})
        section[last] = value
    path = folder / "config.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def opened(config: RunConfig) -> Session:
    """A session on what a config names."""
    prepared, world = run_to_end(prepare(config)), current_world("cpu")
    here = environment.describe(config, run_dir.of(config), prepared, [], world)
    return open_session(config, prepared, here, StopRequest(), world)


@pytest.fixture
def make_config(tmp_path: Path, rows_file: str, model_folder: Callable[[str], str]) -> Callable[..., Path]:
    """Return a function that writes a small config, dotted keys overriding it."""
    return lambda kind="llama", **overrides: write_config(tmp_path, model_folder(kind), rows_file, overrides)


DROPOUT = {"lora.dropout": 0.1, "train.max_steps": 12, "data.validation": 8, "eval.per_epoch": 8, "save.per_epoch": 8}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], str]) -> Path:
    """The directory of a run of twelve steps with dropout that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    rows = write_rows(folder / "rows.jsonl", [conversation(number) for number in range(40)])
    list(train(config_file.load(write_config(folder, model_folder("llama"), rows, DROPOUT)), StopRequest()))
    return folder / "run"


@pytest.fixture
def whole(make_config: Callable[..., Path], undisturbed: Path) -> tuple[Path, Path]:
    """A config of the undisturbed run for another directory, and the directory of that run."""
    return make_config(**DROPOUT), undisturbed


Invoke = Callable[..., tuple[int, str, str]]


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    """Return a function that runs a command in this process and gives (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lora", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return code, *capsys.readouterr()

    return run
