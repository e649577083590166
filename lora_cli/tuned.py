"""A base model with an adapter on top, from what RUN names: the start of every command that uses a result."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lora_cli import adapter, base_folder, config_file, model, run_dir
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


def find(path: Path, base: str | None = None) -> Result:
    """Find and check what RUN names, without reading the base's weights. `base` replaces the base's place.

    Raises AdapterError when the base is not the one the adapter was trained on, or runs code and is not named by hand.
    """
    folder, run = run_dir.find_adapter(path)
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
        way_out = [] if base is not None else [f"{folder} is an adapter of it; --base names the place where it is now."]
        raise type(error)(*error.problems, *way_out, state=error.state) from None
    found = base_folder.fingerprint(header.folder)
    if read.base_fingerprint is not None and read.base_fingerprint != found:
        raise AdapterError(
            f"{folder}: was trained on another base than {header.folder} (fingerprint {read.base_fingerprint}, here "
            f"{found}).",
            state="Nothing was written.",
        )
    if read.chat_templates:
        header = replace(header, tokenizer=model.with_chat_templates(header.tokenizer, read.chat_templates))
    return Result(read, section, header, found, run, config)


def on_stored(result: Result) -> Result:
    """Return a result on its base as that is stored, for what knows nothing of how it was quantised in training."""
    return replace(result, base=result.base.model_copy(update={"quantization": None}))


def load(result: Result, device: torch.device, dtype: str | None = None, sharded: World | None = None) -> LanguageModel:
    """Load the base, divided over the ranks of `sharded`, and attach the adapter.

    `dtype` replaces the configured one.
    """
    section = result.base if dtype is None else result.base.model_copy(update={"dtype": dtype})
    loaded = model.load_model(result.header, section, device, sharded)
    adapter.attach(loaded.module, result.adapter)
    return loaded
