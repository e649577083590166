"""What llama.cpp calls an architecture's numbers and tensors, and how its tensors lie; one table.

llama.cpp's llama turns neighbouring pairs of a head's numbers, Hugging Face's its two halves: the rows of Q and K are
interleaved. Gemma's norms multiply by 1 + weight there and by the weight here; GPT-2's Conv1D stores [in, out].
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_cli.errors import ModelError
from lora_cli.formats.gguf_file import Value, tensor_names

_ATTENTION_BIASES = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Architecture:
    """How a Hugging Face model type is written: llama.cpp's name for it and what differs between them.

    `window` says what becomes of sliding windows: `layers` of a period have one in llama.cpp too, or (0) none has, and
    the context is no longer than the window.
    """

    name: str
    activation: str
    biases: Sequence[str] = ()  # layers that may have one
    interleaved: bool = False  # rows of Q and K
    norms_plus_one: bool = False
    has_head: bool = True  # an output matrix of its own
    window_period: int = 0


ARCHITECTURES = {
    "llama": Architecture("llama", "silu", (*_ATTENTION_BIASES, "o_proj"), interleaved=True),
    "mistral": Architecture("llama", "silu", interleaved=True),
    "mixtral": Architecture("llama", "silu", interleaved=True),
    "qwen2": Architecture("qwen2", "silu", _ATTENTION_BIASES),
    "qwen3": Architecture("qwen3", "silu"),
    "phi3": Architecture("phi3", "silu"),
    "gemma": Architecture("gemma", "gelu_pytorch_tanh", norms_plus_one=True, has_head=False),
    "gemma2": Architecture("gemma2", "gelu_pytorch_tanh", norms_plus_one=True, has_head=False, window_period=2),
    "gemma3_text": Architecture("gemma3", "gelu_pytorch_tanh", norms_plus_one=True, window_period=6),
    "gpt2": Architecture("gpt2", "gelu_new", ("c_attn", "c_proj", "c_fc", "ln_1", "ln_2", "ln_f")),
}
_IGNORED = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")  # buffers in old files
_EXPERT = re.compile(
    r"(?P<block>(?:model\.)?layers\.\d+)\.block_sparse_moe\.experts\.(?P<number>\d+)\.(?P<part>w[123])\.weight"
)


def supported() -> str:
    """Return the model types that can be written, for a message."""
    return ", ".join(ARCHITECTURES)


def find(config: Any) -> Architecture:
    """Return how a model is written. Raises ModelError with everything about it that llama.cpp would do otherwise."""
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise ModelError(
            f"A {config.model_type} model cannot be written as GGUF; this version writes {supported()}. "
            "lora merge writes a Hugging Face folder, which other converters read."
        )
    if problems := list(_problems(config, architecture)):
        raise ModelError(*(f"This {config.model_type} model has no equal in llama.cpp: {each}." for each in problems))
    return architecture


def _problems(config: Any, architecture: Architecture) -> Iterator[str]:
    if getattr(config, "quantization_config", None):
        yield "its weights are quantised; export the adapter alone with --format gguf-lora, or take the full base"
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if (activation or config.activation_function) != architecture.activation:
        yield f"its activation is {activation or config.activation_function}, there {architecture.activation}"
    if getattr(config, "add_cross_attention", False) or getattr(config, "use_bidirectional_attention", None):
        yield "its attention is not causal alone"
    if config.model_type == "gpt2":
        if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
            yield "it scales attention in another way"
        return
    yield from _rope_problems(config)
    if config.model_type in ("gemma2", "gemma3_text"):
        yield from _gemma_problems(config, architecture)


def _gemma_problems(config: Any, architecture: Architecture) -> Iterator[str]:
    """llama.cpp knows the scale of Q by the model's size, the soft caps and which layers slide by its architecture."""
    largest = {"gemma2": 46, "gemma3_text": 62}[config.model_type]
    expected = config.head_dim
    if config.num_hidden_layers == largest:
        expected = config.hidden_size // config.num_attention_heads
    if config.query_pre_attn_scalar != expected:
        yield f"query_pre_attn_scalar is {config.query_pre_attn_scalar}, there {expected}"
    caps = (config.attn_logit_softcapping, config.final_logit_softcapping)
    if config.model_type == "gemma2" and not all(caps):
        yield "it has no soft caps"
    if config.model_type == "gemma3_text" and any(caps):
        yield "it has soft caps"
    period = architecture.window_period
    pattern = [
        "full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != pattern:
        yield f"its sliding layers are not all but every {period}th"


# --- rotary positions ---


def rope_of(config: Any) -> dict[str, Any]:
    """Return the rotary positions' parameters: those of full attention, where sliding layers have their own."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return dict(parameters.get("full_attention", parameters))


def _rope_problems(config: Any) -> Iterator[str]:
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        yield f"its rotary positions are scaled by {kind}; default, linear, llama3 and yarn are written"
    if kind != "default" and config.model_type in ("phi3", "gemma", "gemma2"):
        yield f"its rotary positions are scaled by {kind}, which is not written for this model type"
    if kind == "yarn" and (rope.get("mscale") or rope.get("mscale_all_dim") or rope.get("truncate") is False):
        yield "its yarn scaling has settings beyond the paper's"
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and config.model_type != "phi3":
        yield "only a part of each head is rotated"
    sliding = config.rope_parameters.get("sliding_attention")
    if sliding and sliding.get("rope_type", "default") != "default":
        yield "the rotary positions of its sliding layers are scaled"


def _rope(config: Any) -> dict[str, Value]:
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    values: dict[str, Value] = {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": int(head_dim(config) * rope.get("partial_rotary_factor", 1.0)),
    }
    if kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        values["rope.scaling.original_context_length"] = int(original)
        values["rope.scaling.yarn_beta_fast"] = float(rope.get("beta_fast") or 32)
        values["rope.scaling.yarn_beta_slow"] = float(rope.get("beta_slow") or 1)
    if sliding := config.rope_parameters.get("sliding_attention"):
        values["rope.freq_base_swa"] = float(sliding["rope_theta"])
    return values


def rope_factors(config: Any) -> Tensor | None:
    """Return what each frequency is divided by (`rope_freqs` [head_dim / 2]) for llama3's scaling; None for others.

    High frequencies stay, low ones are divided by `factor`, those between are blended by their wavelength
    (https://github.com/meta-llama/llama-models, `apply_scaling`).
    """
    rope = rope_of(config)
    if rope.get("rope_type") != "llama3":
        return None
    size = head_dim(config)
    frequency = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 / (kept + (1 - kept) / rope["factor"])).float()


def head_dim(config: Any) -> int:
    """Return the size of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


# --- numbers ---


def hyperparameters(config: Any, architecture: Architecture) -> dict[str, Value]:
    """Return the metadata that llama.cpp builds the model from."""
    if config.model_type == "gpt2":
        values: dict[str, Value] = {
            "context_length": config.n_positions,
            "feed_forward_length": config.n_inner or 4 * config.n_embd,
            "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        }
    else:
        values = {
            "context_length": context_length(config, architecture),
            "feed_forward_length": config.intermediate_size,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": head_dim(config),
            "attention.value_length": head_dim(config),
            "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
            **_rope(config),
        }
    if architecture.window_period:
        values["attention.sliding_window"] = config.sliding_window
    if config.model_type == "gemma2":
        values["attn_logit_softcapping"] = float(config.attn_logit_softcapping)
        values["final_logit_softcapping"] = float(config.final_logit_softcapping)
    if config.model_type == "mixtral":
        values |= {"expert_count": config.num_local_experts, "expert_used_count": config.num_experts_per_tok}
    values |= {
        "vocab_size": config.vocab_size,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
    }
    return {f"{architecture.name}.{key}": value for key, value in values.items()}


def context_length(config: Any, architecture: Architecture) -> int:
    """Return the tokens up to which llama.cpp computes the same: a window it does not know ends the context."""
    positions = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    return positions if architecture.window_period or not window else min(positions, int(window))


# --- tensors ---


@dataclass(frozen=True)
class Place:
    """Where a tensor goes in a GGUF file and how it is laid out there; an expert's is stacked with the others'."""

    name: str
    transposed: bool = False
    heads: int = 0  # whose rows are interleaved
    plus_one: bool = False
    expert: int | None = None

    def rows(self, tensor: Tensor) -> Tensor:
        """Return a tensor [out, ...] with its rows in llama.cpp's order."""
        if not self.heads:
            return tensor
        halves = tensor.unflatten(0, (self.heads, 2, tensor.shape[0] // self.heads // 2))
        return halves.transpose(1, 2).flatten(0, 2)

    def lay(self, tensor: Tensor) -> Tensor:
        """Return a weight or a bias as it lies in the file."""
        tensor = self.rows(tensor.T if self.transposed else tensor).float()
        return tensor + 1 if self.plus_one else tensor


def placer(config: Any, architecture: Architecture, prefix: str) -> Callable[[str], Place | None]:
    """Return a function from a tensor's name in the base's files to its place.

    `prefix` is what names from inside the base lack. None is no place; an empty name is a buffer that is left out.
    """
    names = tensor_names(architecture.name, config.num_hidden_layers)

    def place(name: str) -> Place | None:
        if _IGNORED.search(name):
            return Place("")
        if expert := _EXPERT.fullmatch(name):
            found = names(f"{expert['block'].removeprefix('model.')}.feed_forward.experts.{expert['part']}.weight")
            return Place(found, expert=int(expert["number"])) if found else None
        found = names(name) or names(f"{prefix}.{name}")
        layer, _, part = name.rpartition(".")
        layer = layer.rpartition(".")[2]
        if found is None or (part == "bias" and layer not in architecture.biases):
            return None
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(layer)
        return Place(
            found,
            transposed=architecture.name == "gpt2" and part == "weight" and layer in ("c_attn", "c_proj", "c_fc"),
            heads=getattr(config, heads) if heads and architecture.interleaved else 0,
            plus_one=architecture.norms_plus_one and name.endswith("norm.weight"),
        )

    return place
