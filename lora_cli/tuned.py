"""A base model with an adapter on top, or all of it tuned, from what RUN names: where every use of a result starts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_cli import adapter, base_folder, config_file, full, full_folder, manifest, model, results, run_dir
from lora_cli.adapter import Adapter
from lora_cli.config import ModelConfig, RunConfig
from lora_cli.data_config import DataConfig
from lora_cli.distributed import World
from lora_cli.errors import AdapterError, ModelError, SurroundingsError
from lora_cli.model import LanguageModel, ModelHeader
from lora_cli.run_dir import RunDir


@dataclass(frozen=True)
class Result:
    """An adapter on disk, the base it belongs to, and the run it came from (None for adapters from elsewhere)."""

    adapter: Adapter
    base: ModelConfig
    header: ModelHeader
    base_fingerprint: str  # of the base that was found
    run: RunDir | None
    config: RunConfig | None

    @property
    def data(self) -> DataConfig | None:
        """The data settings of the run, with the chat template that is saved with the adapter."""
        if self.config is None or not self.adapter.chat_templates:
            return self.config.data if self.config else None
        return self.config.data.model_copy(update={"chat_template": None})

    @property
    def folder(self) -> Path:
        """Where the adapter is."""
        return self.adapter.folder

    @property
    def identity(self) -> Path:
        """A file that is like it in no other result."""
        return self.adapter.folder / adapter.WEIGHTS


@dataclass(frozen=True)
class WholeResult:
    """A whole model that full fine-tuning made, a checkpoint of it or the finished one, its base, and its run."""

    folder: Path
    base: ModelConfig
    header: ModelHeader
    base_fingerprint: str
    run: RunDir
    config: RunConfig

    @property
    def data(self) -> DataConfig:
        """The data settings of the run, with the chat template that is saved with the model."""
        templated = bool(adapter.read_templates(self.folder))
        return self.config.data.model_copy(update={"chat_template": None}) if templated else self.config.data

    @property
    def identity(self) -> Path:
        """A file that is like it in no other result."""
        return self.folder / manifest.MANIFEST


AnyResult = Result | WholeResult


def name_of(result: AnyResult) -> str:
    """Return a short name: the run's folder, with the step of a checkpoint; of an adapter from elsewhere its folder."""
    folder = result.folder.resolve()
    if result.run is None:
        return folder.name
    run = result.run.path.resolve().name
    return f"{run}/{folder.name}" if folder.parent.name == "checkpoints" else run


def system_of(result: AnyResult) -> str | None:
    """Return the system message of the rows it was trained on, where they share one and the run is known."""
    start = run_dir.read_start(result.run) if result.run else None
    return start.system if start else None


def find(path: Path, base: str | None = None) -> Result:
    """Find and check the adapter that RUN names, without reading the base's weights. `base` replaces the base's place.

    Raises AdapterError when the base is not the one the adapter was trained on, or runs code and is not named by hand;
    and where RUN is a whole model.
    """
    folder, run = results.find_adapter(path)
    read = adapter.read(folder)
    config = config_file.load(run.config) if run else None
    if config is not None:
        section = config.model
    elif read.base or base:
        section = ModelConfig(path=read.base or str(base), revision=read.revision)
    else:
        raise AdapterError(
            f"{folder}: does not say which base model it is for; give --base.", state="Nothing was read."
        )
    section, header, found = _open_base(folder, section, base, read.base_fingerprint, read.chat_templates)
    return Result(read, section, header, found, run, config)


def find_any(path: Path, base: str | None = None) -> AnyResult:
    """Find and check what RUN names, as `find`, a whole model too."""
    folder, run = results.find_result(path)
    if run is None or not results.is_whole_model(folder):
        return find(path, base)
    config, fingerprint = config_file.load(run.config), adapter.read_base_fingerprint(folder)
    templates = adapter.read_templates(folder)
    section, header, found = _open_base(folder, config.model, base, fingerprint, templates)
    return WholeResult(folder, section, header, found, run, config)


def _open_base(
    folder: Path, section: ModelConfig, base: str | None, fingerprint: str | None, templates: Mapping[str, str]
) -> tuple[ModelConfig, ModelHeader, str]:
    """Return where the base of a result is, its header with the result's chat templates, and its fingerprint."""
    if section.trust_remote_code and base is None:
        raise AdapterError(
            f"{folder}: its base comes with Python code of its own, which the run was allowed to use. A folder cannot "
            f"allow that for other commands: read the code, and name the base by hand: --base {section.path}.",
            state="Nothing was read.",
        )
    if base is not None:
        section = section.model_copy(update={"path": base, "revision": None})
    try:
        header = model.read_header(section)
    except (ModelError, SurroundingsError) as error:
        way_out = [] if base is not None else [f"{folder} was trained on it; --base names the place where it is now."]
        raise type(error)(*error.problems, *way_out, state=error.state) from None
    found = base_folder.fingerprint(header.folder)
    if fingerprint is not None and fingerprint != found:
        raise AdapterError(
            f"{folder}: was trained on another base than {header.folder} (fingerprint {fingerprint}, here {found}).",
            state="Nothing was written.",
        )
    if templates:
        header = replace(header, tokenizer=model.with_chat_templates(header.tokenizer, templates))
    return section, header, found


def on_stored(result: Result) -> Result:
    """Return a result on its base as that is stored, for what knows nothing of how it was quantised in training."""
    return replace(result, base=result.base.model_copy(update={"quantization": None}))


def load(
    result: AnyResult, device: torch.device, dtype: str | None = None, sharded: World | None = None
) -> LanguageModel:
    """Load the base, divided over the ranks of `sharded`, and attach the adapter, or load all weights beside it.

    `dtype` replaces the configured one.
    """
    section = result.base if dtype is None else result.base.model_copy(update={"dtype": dtype})
    loaded = model.load_model(result.header, section, device, sharded)
    if isinstance(result, Result):
        adapter.attach(loaded.module, result.adapter)
    else:
        full.apply_full(loaded.module)
        full_folder.load(result.folder, loaded.module)
    return loaded
