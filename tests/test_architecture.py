"""The floors of the package, one door for each third-party library, and no torch before the config is good."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lora_cli"

# From the ground up: a file imports only what stands before it.
FLOORS = [
    "redact",
    "errors",
    "stand_ins",
    "markup",
    "names",
    "nearby",
    "remote_code",
    "json_file",
    "time_limit",
    "records",
    "reports",
    "search_reports",
    "run_reports",
    "doctor_report",
    "init_report",
    "runtimes",
    "randomness",
    "memory_use",
    "schema",
    "data_config",
    "config",
    "space",
    "config_checks",
    "strict_yaml",
    "other_names",
    "recipe",
    "config_file",
    "origins",
    "config_text",
    "launch",
    "interrupt",
    "disk",
    "manifest",
    "storage",
    "room",
    "run_dir",
    "results",
    "metrics",
    "curves",
    "resume",
    "trackers.tracker",
    "trackers.recorder",
    "trackers.tensorboard",
    "trackers.wandb",
    "trackers.mlflow",
    "tracking",
    "heap",
    "loss",
    "likelihood",
    "optim",
    "dropout",
    "projection",
    "heartbeat",
    "distributed",
    "sharding",
    "quantised",
    "magnitude",
    "pissa",
    "lora_linear",
    "lora",
    "full",
    "tuning",
    "attention",
    "parallel",
    "limits",
    "data_file",
    "sources",
    "conversation",
    "data",
    "conversion",
    "peers.rows",
    "peers.base_and_adapter",
    "peers.trainer",
    "peers.trainer_keys",
    "peers.axolotl_keys",
    "peers.axolotl_data",
    "peers.axolotl",
    "peers.llamafactory_keys",
    "peers.llamafactory_data",
    "peers.llamafactory",
    "columns",
    "chat_template",
    "control_tokens",
    "fidelity",
    "spans",
    "examples",
    "formats.gguf_file",
    "formats.gguf_architecture",
    "formats.gguf_pre_tokenizer",
    "formats.gguf_vocabulary",
    "corpus",
    "batches",
    "dataset",
    "layout",
    "base_folder",
    "tensor_file",
    "loading",
    "model",
    "ends",
    "data_reader",
    "general",
    "adapter",
    "adapter_folder",
    "update",
    "weights",
    "streamed",
    "full_folder",
    "checkpoint",
    "forward",
    "intervals",
    "fused",
    "blocks",
    "lanes",
    "evaluate",
    "forgetting",
    "memory",
    "prepare",
    "notices",
    "survey",
    "generate",
    "questions",
    "scoring",
    "scan",
    "harness",
    "tuned",
    "chat_reports",
    "prompts",
    "decoding",
    "text_stream",
    "speaker",
    "chat",
    "how_to_load",
    "card",
    "merged_folder",
    "product",
    "timetable",
    "step",
    "loop",
    "held_out",
    "environment",
    "session",
    "probe",
    "trial",
    "search_dir",
    "study",
    "tune",
    "charts",
    "run_words",
    "run_facts",
    "tornado",
    "page.tables",
    "page.pictures",
    "page.searches",
    "page.document",
    "metrics_table",
    "report",
    "sensitivity",
    "against_full",
    "train",
    "compare",
    "scale",
    "verify",
    "speed",
    "merge",
    "formats.mlx_adapter",
    "formats.onnx_graph",
    "formats.gguf_export",
    "formats.ollama",
    "export",
    "hub",
    "packages",
    "surroundings",
    "self_test",
    "doctor",
    "check",
    "first_config",
    "init",
    "convert",
    "console",
    "slash",
    "prompt_line",
    "conversation_view",
    "key_lists",
    "tables",
    "curve",
    "openai_api",
    "server",
    "figures",
    "summary",
    "outlook",
    "trial_tables",
    "standing",
    "panel",
    "search_panel",
    "doctor_tables",
    "decision_table",
    "follower",
    "interview",
    "launcher",
    "completion",
    "arguments",
    "ending",
    "config_commands",
    "run_commands",
    "chat_commands",
    "tool_commands",
    "cli",
    "api",
    "__main__",
]

DOORS = {
    "yaml": {"strict_yaml"},
    "pydantic": {"completion", "config", "config_file", "data_config", "json_file", "schema", "space"},
    "transformers": {
        "chat_template",
        "environment",
        "formats.onnx_graph",
        "model",
    },  # environment asks the version
    "pyarrow": {"corpus", "data_file", "metrics_table"},
    "huggingface_hub": {"base_folder", "hub"},
    "datasets": {"sources"},
    "safetensors": {"adapter", "adapter_folder", "checkpoint", "environment", "formats.mlx_adapter", "model"},
    "rich": {
        "console",
        "doctor_tables",
        "figures",
        "follower",
        "outlook",
        "panel",
        "search_panel",
        "tables",
        "trial_tables",
    },
    "bitsandbytes": {"quantised"},
    "optuna": {"study"},
    "gguf": {"formats.gguf_file"},
    "typer": {
        "arguments",
        "chat_commands",
        "cli",
        "completion",
        "config_commands",
        "interview",
        "run_commands",
        "tool_commands",
    },
    "packaging": {"packages"},
    "tensorboard": {"trackers.tensorboard"},
    "wandb": {"trackers.wandb"},
    "google": {"trackers.wandb"},  # protobuf, which wandb's records are made of
    "mlflow": {"trackers.mlflow"},
    "lm_eval": {"harness"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    "onnxruntime": {"formats.onnx_graph"},
    "sacrebleu": {"scoring"},
    "rouge_score": {"scoring"},
}


# What runs or builds whatever it is given: calls by their whole name, by the end of it, and modules.
RUNS = {"eval", "exec", "compile", "__import__", "os.system", "torch.load", "torch.save", "yaml.load", "numpy.load"}
ENDS = {"popen", "unsafe_load", "expandvars"}
UNSAFE = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jinja2", "code", "pty", "runpy"}


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
    """No pickle, no eval, no exec, no shell, no loader that makes objects, no import by a name that is computed."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in RUNS, called
            assert called.split(".")[-1] not in ENDS, called
            assert not [each for each in node.keywords if each.arg in ("shell", "allow_pickle")], called
            if called.endswith("import_module"):
                assert isinstance(node.args[0], ast.Constant), called
    assert not {name.split(".")[0] for name in imports(path)} & UNSAFE


# What changes the disk. `storage` alone may, by the operations in `disk`; two libraries write by themselves into a
# folder that storage made: gguf's writer and transformers' ONNX exporter (save_pretrained). Trackers keep their own.
WRITES = {
    *("write_text", "write_bytes", "mkdir", "makedirs", "unlink", "rmdir", "rmtree", "rename", "renames", "touch"),
    *("chmod", "truncate", "link", "symlink", "symlink_to", "hardlink_to", "link_to", "utime", "mkstemp", "mkdtemp"),
    *("copy2", "copyfile", "copytree", "copyfileobj", "move", "save_file", "savez", "tofile", "OSFile", "GGUFWriter"),
    *("save_pretrained", "TemporaryDirectory", "NamedTemporaryFile", "TemporaryFile"),
}
MAY_WRITE = {
    "formats.gguf_file": {"GGUFWriter"},
    "formats.onnx_graph": {"save_pretrained"},
    "console": {"open"},  # of this process's own streams
}


def opens_to_write(call: ast.Call) -> bool:
    """Whether a call is open() or path.open() with a mode that is not for reading."""
    if ast.unparse(call.func).rsplit(".", 1)[-1] not in ("open", "fdopen", "FileIO"):
        return False
    if call.args and ast.unparse(call.args[0]) == "os.devnull":
        return False
    modules = ("os", "io", "gzip", "tokenize")
    place = 0 if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) not in modules else 1
    modes = [*call.args[place : place + 1], *(word.value for word in call.keywords if word.arg == "mode")]
    return any(
        not isinstance(m, ast.Constant) or set("wax+") & set(str(m.value)) for m in modes if "O_" not in ast.unparse(m)
    )


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_storage_writes(path: Path):
    """Nothing but `storage`, by `disk`, changes the disk."""
    name = name_of(path)
    if name == "disk":
        return
    assert name == "storage" or "lora_cli.disk" not in imports(path)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
            called = ast.unparse(node.func)
            if called.startswith(("storage.", "disk.")):
                continue
            assert called.rsplit(".", 1)[-1] not in WRITES - MAY_WRITE.get(name, set()), f"{called}, line {node.lineno}"
            assert called in MAY_WRITE.get(name, set()) or not opens_to_write(node), f"{called}, line {node.lineno}"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the program and print, at its end, which slow libraries it imported."""
    program = (
        "import sys, atexit\n"
        "atexit.register(lambda: print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules))))\n"
        "from lora_cli.cli import main\n"
        "main()\n"
    )
    return subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["train", "--help"], ["version"], ["init", "--schema"], ["report", "--help"]]
)
def test_no_torch_for_help(arguments: list[str]):
    """Help, version and the schema do not pay for torch."""
    done = run(*arguments)

    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]")


def test_the_readme_draws_the_package():
    """One line a file, in the order in which they are read."""
    text = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    drawn = text[text.index("lora_cli/\n  ") : text.index("\nconfigs/ ")]
    folder, names = "", list[str]()
    for line in drawn.splitlines()[1:]:
        name = line.split()[0]
        if name.endswith("/"):
            folder = name.replace("/", ".")
        elif name.endswith(".py"):
            names.append((folder if line.startswith("    ") else "") + name.removesuffix(".py"))

    assert names == [name for name in FLOORS if name != "__main__"]
