"""The base model and its tokenizer: found, checked by their headers, loaded."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lora_cli import base_folder, json_file, loading, remote_code, sharding
from lora_cli.attention import PACKED, packed_attention
from lora_cli.config import ModelConfig
from lora_cli.config_checks import problem_of_remote_code
from lora_cli.distributed import World
from lora_cli.errors import NOTHING_LOADED, ModelError, shown
from lora_cli.examples import Tokenizer
from lora_cli.heap import keep_freed_memory
from lora_cli.layout import Layout, decoder_blocks, probe
from lora_cli.tensor_file import read_all_infos

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)


@dataclass(frozen=True)
class ModelHeader:
    """All that is known of a base model before its weights are read."""

    folder: Path
    config: Any  # transformers' PretrainedConfig
    tokenizer: Tokenizer
    max_positions: int | None

    @property
    def vocabulary(self) -> int | None:
        """The number of tokens it knows, where its configuration says it."""
        return getattr(self.config.get_text_config(), "vocab_size", None) if self.config else None


@dataclass(frozen=True)
class LanguageModel:
    """A loaded causal language model, and how to run it."""

    module: Any  # transformers' PreTrainedModel
    layout: Layout
    own_attention: str  # the attention implementation it came with

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def decoder(self) -> nn.Module:
        return self.module.get_decoder()

    @property
    def head(self) -> Any:
        return self.module.get_output_embeddings()


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever transformers raises for a file it cannot use into an error about the model."""
    try:
        yield
    except Exception as error:  # it raises many kinds, of other libraries too
        reason, hint = shown(error, 160), "Where the file is cut or damaged, fetch it again."
        if "trust_remote_code" in str(error):
            reason, hint = "it comes with Python code of its own.", "Read it, then set model.trust_remote_code: true."
        elif "Unrecognized configuration class" in str(error):
            reason, hint = "it is of no causal language model.", "Name one that writes text."
        raise ModelError(f"{what}: {reason} {hint}", state=NOTHING_LOADED) from None


def read_header(config: ModelConfig, weights: bool = True) -> ModelHeader:
    """Read a model's configuration and tokenizer, without its weights. Raises ModelError, SurroundingsError.

    They have to be there all the same, unless `weights` says that there may be none.
    """
    if problem := problem_of_remote_code(config):
        raise ModelError(f"model.trust_remote_code: {problem}.", state=NOTHING_LOADED)
    folder = base_folder.find_folder(config.path, config.revision, weights)
    base_folder.require_whole(folder, unread=".safetensors")
    if config.trust_remote_code:
        remote_code.require_own(folder)
    raw = json_file.read_object(folder / "config.json", ModelError, NOTHING_LOADED)
    foreign = "auto_map" in raw and raw.get("model_type") not in transformers.CONFIG_MAPPING
    if foreign and not config.trust_remote_code:
        raise ModelError(
            f"{folder}: this model runs Python code of its own. Read it, then set model.trust_remote_code: true.",
            state=NOTHING_LOADED,
        )
    if raw.get("is_encoder_decoder"):
        raise ModelError(
            f"{folder}: is an encoder-decoder model; only causal language models are trained here.",
            state=NOTHING_LOADED,
        )
    found = ", ".join(p.name for kind in ("*.bin", "*.gguf", "*.pt*") for p in folder.glob(kind))
    if not list(folder.glob("*.safetensors")) and (weights or found):
        raise ModelError(
            f"{folder}: has no .safetensors weights ({shown(found or 'no weights at all')}); others are not read. "
            "Fetch them, or load the model with transformers and save it again.",
            state=NOTHING_LOADED,
        )
    options = {"trust_remote_code": config.trust_remote_code, "local_files_only": True}
    with _explained(f"{folder}: config.json is of no model that transformers {transformers.__version__} can read"):
        parsed = AutoConfig.from_pretrained(folder, **options)
    with _explained(f"{folder}: its tokenizer (tokenizer.json, tokenizer_config.json) cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    if config.quantization is not None and getattr(parsed, "quantization_config", None):
        raise ModelError(
            f"{folder}: its weights are stored quantised already (quantization_config in config.json). Leave "
            f"model.quantization at null, or name the unquantised model; found {config.quantization}.",
            state=NOTHING_LOADED,
        )
    if not tokenizer.is_fast:
        raise ModelError(f"{folder}: has no fast tokenizer (tokenizer.json), which is needed.", state=NOTHING_LOADED)
    positions = getattr(parsed.get_text_config(), "max_position_embeddings", None)
    return ModelHeader(folder, parsed, tokenizer, positions)


def with_chat_templates(tokenizer: Tokenizer, templates: Mapping[str, str]) -> Tokenizer:
    """Return a tokenizer with other chat templates, given by the names of the files transformers reads them from."""
    changed = copy.copy(tokenizer)
    named = {"default" if "/" not in name else Path(name).stem: text for name, text in templates.items()}
    changed.chat_template = named if len(named) > 1 else next(iter(named.values()))
    return changed


def build_skeleton(header: ModelHeader, trust_remote_code: bool = False, device: str = "meta") -> nn.Module:
    """Build the model without weights (on torch's meta device), to look at its layers. Raises ModelError."""
    with _explained(f"{header.folder}: no model can be built as config.json describes it"), torch.device(device):
        return AutoModelForCausalLM.from_config(header.config, trust_remote_code=trust_remote_code).eval()


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the frozen base: `auto` is float32 on a CPU (bfloat16 is slower there), else bfloat16."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen: torch.dtype = getattr(torch, dtype)
    return chosen


def load_model(
    header: ModelHeader, config: ModelConfig, device: torch.device, sharded: World | None = None
) -> LanguageModel:
    """Load the weights and choose how forward passes are laid out. Raises ModelError on any missing weight.

    They are divided over the ranks of `sharded`.
    """
    base_folder.require_whole(header.folder)
    if config.quantization is not None:
        keep_freed_memory()  # dense weights come and go
    dtype = choose_dtype(config.dtype, device)
    module = _load_in_pieces(header, config, dtype, device, sharded)
    if module is None:
        module = _load_whole(header, config, dtype).to(device)
        if config.quantization is not None:
            loading.quantise_loaded(module, config.quantization)
        module.requires_grad_(False)
        if sharded is not None:
            _shard(module, sharded)
    return _laid_out(module.eval())


def _laid_out(module: Any) -> LanguageModel:
    """Return a module with how its forward passes are laid out."""
    own_attention = str(module.config._attn_implementation)
    layout = probe(module)
    if layout.packed:
        module.set_attn_implementation(PACKED)
    return LanguageModel(module, layout, own_attention)


def build_random(device: torch.device) -> LanguageModel:
    """Build a small model with random weights, which are nobody's and the same each time."""
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = AutoModelForCausalLM.from_config(config)
    return _laid_out(module.requires_grad_(False).eval().to(device, choose_dtype("auto", device)))


def _load_in_pieces(
    header: ModelHeader, config: ModelConfig, dtype: torch.dtype, device: torch.device, sharded: World | None
) -> Any:
    """Return the module, its weights copied from the files in pieces; None where that is not all there is to do.

    So it is where transformers makes a model's weights of what is stored, where files are not as they should be, which
    it finds as well, and on a CPU where they hold what is wanted: there it maps them, which takes no memory of its own.
    """
    try:
        infos = read_all_infos(base_folder.weight_files(header.folder))
    except ModelError:
        return None
    if getattr(header.config, "quantization_config", None) or not all(
        i.dtype.is_floating_point for i in infos.values()
    ):
        return None
    mapped = device.type == "cpu" and config.quantization is None and sharded is None
    if mapped and {info.dtype for info in infos.values()} == {dtype}:
        return None
    with loading.parameters_on_meta():
        own = copy.deepcopy(header.config)
        module = AutoModelForCausalLM.from_config(own, dtype=dtype, trust_remote_code=config.trust_remote_code)
    places = loading.find_places(module, infos)
    tied = loading.tied_names(module)
    made = get_model_conversion_mapping(module, add_legacy=False) or module._get_dtype_plan(dtype)
    if made or places is None or any(len({places[name] for name in names}) > 1 for names in tied):
        return None
    if module.state_dict().keys() != {name for names in tied for name in names}:  # buffers are stored, too
        return None
    module.requires_grad_(False)
    if config.quantization is not None:
        loading.plan_to_quantise(module, config.quantization)
    wanted = {names[0]: places[names[0]] for names in tied}
    if sharded is None:
        pieces = loading.read_pieces(wanted)
    else:  # one rank reads for all
        _shard(module, sharded)
        pieces = loading.hand_out(loading.read_pieces(wanted, sharded.is_main), sharded)
    loading.fill(module, pieces, dtype, device)
    module.generation_config = _generation_config(header.folder)
    return module.to(device)


def _shard(module: Any, world: World) -> None:
    sharding.shard(module.get_decoder(), decoder_blocks(module)[1], world)


def _generation_config(folder: Path) -> Any:
    """Return how a model generates: by its own file, or what config.json says of it."""
    try:
        return transformers.GenerationConfig.from_pretrained(folder)
    except OSError:  # there is none, or it is damaged
        return transformers.GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )


def _load_whole(header: ModelHeader, config: ModelConfig, dtype: torch.dtype) -> Any:
    """Return the module as transformers loads it. Raises ModelError on any missing weight."""
    try:
        module, info = AutoModelForCausalLM.from_pretrained(
            header.folder,
            config=header.config,
            dtype=dtype,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # so that they are listed; they are an error below
            output_loading_info=True,
        )
    except (ValueError, OSError, RuntimeError, ImportError, safetensors.SafetensorError) as error:
        raise ModelError(
            f"{header.folder}: the weights cannot be read: {shown(error, 160)}. Where they are cut or damaged, "
            "fetch them again."
        ) from None
    missing = [str(name) for name in [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]]
    if missing:
        raise ModelError(
            f"{header.folder}: {len(missing)} weights are missing or have another shape than config.json says "
            f"({', '.join(sorted(missing)[:3])}); they would be random numbers."
        )
    return module


@contextlib.contextmanager
def generating(model: LanguageModel) -> Iterator[None]:
    """Run a block with the attention the model came with, which knows padding masks and caches, and plain decoding."""
    model.module.set_attn_implementation(model.own_attention)
    configured = model.module.generation_config
    model.module.generation_config = transformers.GenerationConfig()
    try:
        yield
    finally:
        model.module.generation_config = configured
        if model.layout.packed:
            model.module.set_attn_implementation(PACKED)
