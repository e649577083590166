"""Which runtimes can load an adapter, by what is known of them; where nothing is known, that is said.

Each runtime's rules are read from the top and the first that applies decides. Sources, read or tried in November 2026:
PEFT 0.21 (tuners_utils.py); vLLM (docs/models/supported_models.md, column LoRA; config/lora.py, MaxLoRARanks;
lora/peft_helper.py), adapters tried in 0.32; llama.cpp, adapters tried through xllamacpp; mlx-lm 0.32.2, every model
type here tried as tests/test_mlx.py does; Ollama (docs/import.mdx; fs/ggml/ggml.go, OllamaEngineRequired).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lora_cli.reports import RuntimeReport


@dataclass(frozen=True)
class Produced:
    """What decides where an adapter loads: its base's type, its method, its largest rank, its layers' last names."""

    model_type: str
    method: str
    rank: int
    modules: frozenset[str]


@dataclass(frozen=True)
class Rule:
    """Whether adapters to which it applies load (null: not known), and what to know of it."""

    loads: bool | None
    note: str
    applies: Callable[[Produced], bool] = lambda produced: True


def _of(types: frozenset[str]) -> Callable[[Produced], bool]:
    return lambda produced: produced.model_type in types


def _dora(produced: Produced) -> bool:
    return produced.method == "dora"


def _types(names: str) -> frozenset[str]:
    return frozenset(names.split())


VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes
_STATE_SPACE = _types("falcon_h1 falcon_mamba mamba mamba2 nemotron_h")
_VLLM = _types(
    "afmoe apertus arcee cohere cohere2 deepseek_v2 deepseek_v3 ernie4_5 ernie4_5_moe exaone4 falcon_h1 gemma gemma2 "
    "gemma3_text gemma4_text glm glm4 glm4_moe gpt_bigcode gpt_oss granite granitemoe granitemoehybrid "
    "granitemoeshared hunyuan_v1_dense hunyuan_v1_moe jamba lfm2 lfm2_moe llama minicpm3 mistral mixtral nemotron "
    "nemotron_h olmo olmo2 olmo3 olmo_hybrid opt phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next seed_oss "
    "smollm3 starcoder2 vaultgemma"
)
_VLLM_WITHOUT = _types(
    "bloom dbrx falcon falcon_mamba gemma3n_text gpt2 gpt_neox gptj mamba mamba2 mpt olmoe stablelm zamba2"
)
GGUF_LORA = _types("gemma gemma2 gemma3_text gpt2 llama mistral mixtral phi3 qwen2 qwen3")
MLX = _types(
    "cohere cohere2 ernie4_5 falcon_h1 gemma gemma2 gemma3_text glm4 gpt2 granite granitemoe helium hunyuan_v1_dense "
    "llama ministral3 mistral mixtral nemotron olmo2 olmoe phi phi3 qwen2 qwen2_moe qwen3 seed_oss smollm3 stablelm "
    "starcoder2"
)
_OLLAMA = _types("gemma gemma2 llama mistral mixtral")
_OLLAMA_OWN_ENGINE = _types(
    "deepseek_v2 deepseek_v3 gemma3_text gemma3n_text gemma4_text gpt_oss lfm2 lfm2_moe nemotron_h olmo3 qwen3 "
    "qwen3_moe qwen3_next"
)

RULES: Mapping[str, Sequence[Rule]] = {
    "PEFT": (
        Rule(
            False,
            "PEFT refuses to adapt out_proj of a state-space model",
            lambda p: p.model_type in _STATE_SPACE and "out_proj" in p.modules,
        ),
        Rule(True, "as it is"),
    ),
    "vLLM": (
        Rule(False, "vLLM serves no DoRA adapters", _dora),
        Rule(False, f"vLLM serves ranks up to {VLLM_RANKS[-1]}", lambda p: p.rank > VLLM_RANKS[-1]),
        Rule(False, "vLLM serves this architecture without adapters", _of(_VLLM_WITHOUT)),
        Rule(True, "as it is, with --max-lora-rank {vllm_rank}", _of(_VLLM)),
        Rule(None, "not among the architectures that vLLM's table names"),
    ),
    "llama.cpp": (
        Rule(False, "a GGUF adapter has no place for DoRA", _dora),
        Rule(True, "after lora export --format gguf-lora", _of(GGUF_LORA)),
        Rule(None, "adapters of this architecture were not tried"),
    ),
    "MLX": (
        Rule(True, "after lora export --format mlx", _of(MLX)),
        Rule(None, "mlx-lm was not tried with this architecture, or has none of this name"),
    ),
    "Ollama": (
        Rule(False, "a GGUF adapter has no place for DoRA", _dora),
        Rule(False, "Ollama's own engine, which runs this architecture, takes no adapters", _of(_OLLAMA_OWN_ENGINE)),
        Rule(True, "after lora export --format gguf-lora, by ADAPTER in a Modelfile", _of(_OLLAMA)),
        Rule(None, "adapters of this architecture are not among those Ollama's documentation names"),
    ),
}


def vllm_rank(rank: int) -> int:
    """Return the smallest --max-lora-rank that holds a rank of at most 512."""
    return min(allowed for allowed in VLLM_RANKS if allowed >= min(rank, VLLM_RANKS[-1]))


def verdicts(produced: Produced) -> list[RuntimeReport]:
    """Return for each runtime whether it loads an adapter, and how or why not."""
    return [_verdict(name, produced) for name in RULES]


def _verdict(name: str, produced: Produced) -> RuntimeReport:
    rule = next(rule for rule in RULES[name] if rule.applies(produced))
    return RuntimeReport(name, rule.loads, rule.note.format(vllm_rank=vllm_rank(produced.rank)))
