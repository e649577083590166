"""GGUF files give llama.cpp the numbers that base + adapter have here; what llama.cpp would do otherwise is refused."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import tokenizers
import torch
import transformers
from conftest import CHATML, build_tokenizer
from tokenizers import pre_tokenizers

from lora_cli import adapter, gguf_export, gguf_file, gguf_pre_tokenizer, lora, model, tuned
from lora_cli.config import LoraConfig
from lora_cli.tuned import Result

LlamaCpp = pytest.importorskip("llama_cpp", reason="needs gguf and xllamacpp").LlamaCpp

PROMPTS = ([5, 9, 200, 37, 44], [11], [7 * n % 400 for n in range(3, 53)], [301, 302, 303, 17])
TOKENS = 8  # that are generated after each prompt
BOUND = 3e-3  # of a log probability: llama.cpp computes in another order, GELU from a table in float16
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


# --- the adapter alone ---


def engine_with_adapter(result: Result, folder: Path) -> Any:
    """The base without the adapter as one file, the adapter as another, in llama.cpp."""
    plan, _ = gguf_export.model_plan(result, "f32", adapted=False)
    gguf_file.write(folder / "base.gguf", plan)
    gguf_export.export_adapter(result, folder / "adapter.gguf")
    return LlamaCpp(folder / "base.gguf", folder / "adapter.gguf")


@pytest.mark.parametrize("method", ["lora", "rslora"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3-untied", "gemma3", "gpt2", "mixtral"])
def test_adapter_alone(kind: str, method: str, trained: Callable[..., Trained], tmp_path: Path):
    """Base and adapter as two files: the scale is in B, Q and K rows are interleaved, fused layers are whole."""
    made = trained(kind, method)

    assert_same(made, engine_with_adapter(made.result, tmp_path))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapter_with_ranks_and_alphas_by_layer(kind: str, tmp_path: Path):
    """PEFT's rank_pattern and alpha_pattern: each layer has its own scale."""
    first, second = ("q_proj", "down_proj") if kind == "llama" else ("c_attn", "c_fc")
    write_base(tmp_path / "base", config_of(kind))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=[first, second],
        rank_pattern={first: 2},
        alpha_pattern={second: 24},
        use_rslora=True,
        fan_in_fan_out=kind == "gpt2",
        task_type="CAUSAL_LM",
    )
    module = peft.get_peft_model(base, config).eval()
    torch.manual_seed(13)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1)
    module.save_pretrained(tmp_path / "adapter")
    result = tuned.find(tmp_path / "adapter", str(tmp_path / "base"))

    assert_same(Trained(result, module), engine_with_adapter(result, tmp_path))


# --- the tokenizer ---

ODD = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n \n",
    "\t\tindented\r\n",
    "a",
    " a",
    "a ",
    "  a  b   c    ",
    "123456789 1,234.56 12:30 007",
    "１２３ ½ Ⅷ ²",
    "don't DON'T it's I'll we've they're 'sup 'S",
    "naïve café Ünïcödé ß ſ",
    "Привет, мир! Ёлка",
    "你好，世界。こんにちは",
    "مرحبا بالعالم",
    "नमस्ते दुनिया",
    "👋🏽 🎉👨‍👩‍👧 ❤️",
    "e\u0301 \u00a0\u2003\u200b\u3000x",
    "def f(x):\n    return {'a': [x, -1e-5]}  # ok\n",
    "!!!???...---___***",
    "<|im_start|>user\nhi<|im_end|>\n",
    "<|im_start|><|im_start|> <|im_end|>x",
    "<|endoftext|>",
    "<|im_start |> <s> </s> <unk>",
    "\x00\x01\x7f\ufeff\ufffd",
    "a" * 300,
    "\\n \\t \" ' `",
]


def strings() -> list[str]:
    """Odd strings, and some hundred drawn from their characters."""
    draw = random.Random(5)
    characters = sorted(set("".join(ODD)) - set("<|>")) + [" "] * 12 + list("the sky is blue")
    return ODD + ["".join(draw.choices(characters, k=draw.randint(1, 24))) for _ in range(300)]


def byte_level(pre_tokenizer: Any, ignore_merges: bool = False) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE with ChatML's control tokens, which cuts text before merging in some way."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([" ".join(ODD)] * 3 + ODD * 3, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=CHATML
    )


def cut_by(*steps: Any) -> Any:
    """Cut by regular expressions, then into bytes."""
    splits = [pre_tokenizers.Split(tokenizers.Regex(step), "isolated") for step in steps]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


PRE_TOKENIZERS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    **{
        name: cut_by(*steps)
        for (steps, _), name in gguf_pre_tokenizer.PRE_TOKENIZERS.items()
        if name not in ("gpt-2", "smollm")
    },
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level_tokens(name: str, trained: Callable[..., Trained], tmp_path: Path):
    """Every rule of cutting that is written gives llama.cpp the same tokens."""
    tokenizer = byte_level(PRE_TOKENIZERS[name], ignore_merges=name in ("llama-bpe", "tekken"))
    engine, notes = engine_for(tokenizer, trained, tmp_path)

    wrong = [text for text in strings() if engine.tokenize(text) != tokenizer(text)["input_ids"]]
    if name in ("tekken", "gpt-4o"):
        assert "combining marks" in notes[0]
        wrong = [text for text in wrong if text.isascii()]
    else:
        assert notes == []
    assert wrong == []


def engine_for(tokenizer: Any, trained: Callable[..., Trained], folder: Path) -> tuple[Any, Sequence[str]]:
    """A small model with a tokenizer, in llama.cpp, and what the export said."""
    config = config_of("llama")
    config.vocab_size = 720  # more embeddings than tokens
    made = trained(config, tokenizer=tokenizer)
    report = gguf_export.export_model(made.result, folder / "model.gguf", "f32")
    return LlamaCpp(folder / "model.gguf"), report.notes


def sentencepiece(style: str) -> transformers.PreTrainedTokenizerFast:
    """A BPE with byte fallback, which marks spaces as SentencePiece does, in one of the ways that there are."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    spaces = tokenizers.normalizers.Replace(" ", "\u2581")
    if style == "prepend":
        tokenizer.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("\u2581"), spaces])
    elif style == "never":
        tokenizer.normalizer = spaces
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=style, split=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        max_token_length=8,
    )
    text = " ".join(ODD[:14]) + " the sky is blue, what is the colour of the sky? "  # the other characters are bytes
    tokenizer.train_from_iterator(text.split(" ") * 3, trainer)
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][:3]  # the bytes are not special
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(data))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


@pytest.mark.parametrize("style", ["prepend", "never", "always", "first"])
@pytest.mark.parametrize("begins", [True, False])
def test_sentencepiece_tokens(style: str, begins: bool, trained: Callable[..., Trained], tmp_path: Path):
    """Every way of marking spaces gives llama.cpp the same tokens, but in the cases that the export names."""
    tokenizer = sentencepiece(style)
    tokenizer.chat_template = "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]" if begins else None
    engine, notes = engine_for(tokenizer, trained, tmp_path)
    texts = [text for text in strings() if text]
    if style in ("always", "first"):
        assert "begins with one" in notes[0]
        texts = [text for text in texts if not text.startswith((" ", "\u2581")) and "s> " not in text]
    if style == "first":
        assert ("that begin with a special" in notes[1]) is begins
        texts = [f"<s>{text}" if begins else text for text in texts if "<s>" not in text and "</s>" not in text]
    wrong = [
        (text, engine.tokenize(text), tokenizer(text)["input_ids"])
        for text in texts
        if engine.tokenize(text) != tokenizer(text)["input_ids"]
    ]
    assert wrong == []
