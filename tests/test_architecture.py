"""The floors of the package, one door for each third-party library, and no torch before the config is good."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lora_cli"

# From the ground up: a file imports only what stands before it.
FLOORS = [
    "errors",
    "json_file",
    "time_limit",
    "records",
    "reports",
    "runtimes",
    "randomness",
    "config",
    "config_checks",
    "strict_yaml",
    "config_file",
    "storage",
    "run_dir",
    "interrupt",
    "loss",
    "optim",
    "projection",
    "lora",
    "attention",
    "distributed",
    "data_file",
    "sources",
    "conversation",
    "data",
    "chat_template",
    "control_tokens",
    "fidelity",
    "spans",
    "examples",
    "formats.gguf_file",
    "formats.gguf_architecture",
    "formats.gguf_pre_tokenizer",
    "formats.gguf_vocabulary",
    "parallel",
    "corpus",
    "batches",
    "dataset",
    "layout",
    "model",
    "data_reader",
    "general",
    "adapter",
    "adapter_folder",
    "update",
    "weights",
    "streamed",
    "checkpoint",
    "forward",
    "intervals",
    "evaluate",
    "forgetting",
    "fused",
    "blocks",
    "memory",
    "prepare",
    "generate",
    "questions",
    "scoring",
    "scan",
    "harness",
    "tuned",
    "how_to_load",
    "card",
    "loop",
    "held_out",
    "train",
    "compare",
    "scale",
    "verify",
    "speed",
    "merged_folder",
    "merge",
    "formats.mlx_adapter",
    "formats.onnx_graph",
    "formats.gguf_export",
    "formats.ollama",
    "export",
    "hub",
    "check",
    "console",
    "figures",
    "follower",
    "arguments",
    "cli",
    "__main__",
]

DOORS = {
    "yaml": {"strict_yaml"},
    "pydantic": {"config", "config_file", "json_file"},
    "transformers": {"chat_template", "formats.onnx_graph", "model", "train"},  # train only asks its version
    "pyarrow": {"corpus", "data_file"},
    "huggingface_hub": {"hub", "model"},
    "datasets": {"sources"},
    "safetensors": {"adapter", "adapter_folder", "checkpoint", "formats.mlx_adapter", "model", "train"},
    "rich": {"console", "figures", "follower"},
    "gguf": {"formats.gguf_file"},
    "typer": {"cli"},
    "lm_eval": {"harness"},
    "onnxruntime": {"formats.onnx_graph"},
    "sacrebleu": {"scoring"},
    "rouge_score": {"scoring"},
}


def imports(path: Path) -> set[str]:
    """Every module a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = str(node.module)
            is_folder = module.startswith("lora_cli") and (PACKAGE.parent / module.replace(".", "/")).is_dir()
            found |= {f"{module}.{alias.name}" for alias in node.names} if is_folder else {module}
    return found


def name_of(path: Path) -> str:
    """A file's name as a module of the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.stem != "__init__")


def test_every_file_has_a_floor():
    """The list above names every file of the package, once."""
    assert sorted(FLOORS) == sorted(map(name_of, FILES))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path: Path):
    """A file imports only files on floors below it."""
    below = set(FLOORS[: FLOORS.index(name_of(path))]) | {"__version__"}
    ours = {name.removeprefix("lora_cli.") for name in imports(path) if name.startswith("lora_cli.")}

    assert ours <= below


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_one_door_for_each_library(path: Path):
    """A third-party library is imported only by the files that stand at its door."""
    for library, doors in DOORS.items():
        if any(name.split(".")[0] == library for name in imports(path)):
            assert name_of(path) in doors, library


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_that_runs_what_it_reads(path: Path):
    """No pickle, no eval, no exec, no torch.load, no plain YAML loader."""
    banned = {"eval", "exec", "compile", "__import__"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in banned | {"torch.load", "torch.save", "yaml.load", "yaml.unsafe_load"}, called
    assert not {"pickle", "marshal", "shelve", "dill"} & imports(path)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program and print, at its end, which slow libraries it imported."""
    program = (
        "import sys, atexit\n"
        "atexit.register(lambda: print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules))))\n"
        "from lora_cli.cli import main\n"
        "main()\n"
    )
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["version"], ["init", "--schema"]])
def test_no_torch_for_help(arguments: list[str]):
    """Help, version and the schema do not pay for torch."""
    done = run(*arguments)

    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]")
