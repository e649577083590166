"""GGUF files give llama.cpp the numbers that base + adapter have here; what llama.cpp would do otherwise is refused."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import build_tokenizer

from lora_cli import adapter, gguf_export, lora, model, tuned
from lora_cli.config import LoraConfig
from lora_cli.tuned import Result

LlamaCpp = pytest.importorskip("llama_cpp", reason="needs gguf and xllamacpp").LlamaCpp

PROMPTS = ([5, 9, 200, 37, 44], [11], [7 * n % 400 for n in range(3, 53)], [301, 302, 303, 17])
TOKENS = 8  # that are generated after each prompt
BOUND = 1e-2  # of a log probability: llama.cpp computes in another order, with tables for some functions
_ROPE = {"rope_theta": 10000.0}
_SCALED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 24,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24},
}


def config_of(kind: str) -> Any:
    """The configuration of a small model; the second word of `kind` says what is special about it."""
    name, _, special = kind.partition("-")
    common = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2, "max_position_embeddings": 96}
    blocks = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tied = {"tie_word_embeddings": special != "untied"}
    options = {**common, **blocks, **tied, "num_key_value_heads": 2}
    match name:
        case "llama":
            rope = {"rope_parameters": _ROPE | _SCALED[special]} if special in _SCALED else {}
            return transformers.LlamaConfig(**options, **rope, attention_bias=special == "bias", head_dim=16)
        case "mistral":
            return transformers.MistralConfig(**options, sliding_window=None, head_dim=8)
        case "mixtral":
            return transformers.MixtralConfig(**options, num_local_experts=4, num_experts_per_tok=2)
        case "qwen2":
            return transformers.Qwen2Config(**options)
        case "qwen3":
            return transformers.Qwen3Config(**options, head_dim=16)
        case "phi3":
            partial = {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5}} if special == "partial" else {}
            return transformers.Phi3Config(**options | {"hidden_size": 64}, **partial, sliding_window=None)
        case "gemma":
            return transformers.GemmaConfig(**options, head_dim=16)
        case "gemma2":
            return transformers.Gemma2Config(
                **options, head_dim=16, query_pre_attn_scalar=16, sliding_window=12, final_logit_softcapping=3.0
            )
        case "gemma3":
            return transformers.Gemma3TextConfig(
                **options | {"num_hidden_layers": 7}, head_dim=16, query_pre_attn_scalar=16, sliding_window=12
            )
        case "gpt2":
            return transformers.GPT2Config(**common, **tied, n_embd=32, n_layer=2, n_head=4, n_positions=96)
    raise ValueError(kind)


@dataclass(frozen=True)
class Trained:
    """An adapter on disk as a command finds it, and the model it makes of its base."""

    result: Result
    module: Any

    def continuation(self, prompt: Sequence[int]) -> list[int]:
        """Greedy tokens, up to the end token."""
        ids = list(prompt)
        while len(ids) < len(prompt) + TOKENS and (len(ids) == len(prompt) or ids[-1] not in (0, 2)):
            ids.append(int(self.likely(ids).argmax()))
        return ids[len(prompt) :]

    @torch.no_grad()
    def likely(self, prompt: Sequence[int]) -> torch.Tensor:
        """Log probabilities [V] of the next token."""
        return self.module(input_ids=torch.tensor([list(prompt)])).logits[0, -1].log_softmax(-1)


def write_base(folder: Path, config: Any, tokenizer: Any = None) -> None:
    """Save a random model whose every number matters: norms and biases too."""
    torch.manual_seed(11)
    base = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(0.0, 0.15) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.2)
    base.save_pretrained(folder)
    (tokenizer or build_tokenizer()).save_pretrained(folder)


def write_adapter(folder: Path, base: Path, config: LoraConfig) -> Any:
    """Save a random adapter and return base + adapter."""
    module = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    lora.apply_lora(module, config, 0)
    torch.manual_seed(13)
    with torch.no_grad():
        for _, layer in lora.lora_layers(module):
            layer.lora_B.normal_(0.0, 0.1)
    folder.mkdir()
    adapter.save(folder, module, config, adapter.Origin(str(base), None, model.fingerprint(base), {}))
    return module


@pytest.fixture
def trained(tmp_path: Path) -> Callable[..., Trained]:
    """Return a function from a kind of model, or its configuration, to an adapter for it."""

    def make(kind: Any, method: str = "lora", tokenizer: Any = None) -> Trained:
        base = tmp_path / "base"
        write_base(base, config_of(kind) if isinstance(kind, str) else kind, tokenizer)
        config = LoraConfig(method=method, rank=4, alpha=8)
        module = write_adapter(tmp_path / "adapter", base, config)
        return Trained(tuned.find(tmp_path / "adapter"), module)

    return make


def assert_same(trained: Trained, engine: Any) -> None:
    """llama.cpp continues every prompt by the same tokens, and finds the same tokens as likely."""
    for prompt in PROMPTS:
        assert engine.continuation(prompt, TOKENS) == trained.continuation(prompt)
        expected = trained.likely(prompt)
        difference = max(abs(float(expected[token]) - value) for token, value in engine.likely(prompt).items())
        assert difference < BOUND


KINDS = [
    "llama",
    "llama-untied",
    "llama-bias",
    "llama-linear",
    "llama-llama3",
    "llama-yarn",
    "mistral-untied",
    "mixtral-untied",
    "qwen2",
    "qwen2-untied",
    "qwen3",
    "qwen3-untied",
    "phi3-untied",
    "phi3-partial",
    "gemma",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt2-untied",
]


@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_computes_the_same(kind: str, trained: Callable[..., Trained], tmp_path: Path):
    """Every architecture, tied and untied, biases and scaled rotary positions: the merged model in float32."""
    made = trained(kind)
    gguf_export.export_model(made.result, tmp_path / "model.gguf", "f32")

    assert_same(made, LlamaCpp(tmp_path / "model.gguf"))
