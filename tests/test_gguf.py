"""GGUF files give llama.cpp the numbers that base + adapter have here; what llama.cpp would do otherwise is refused."""

import errno
import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import peft
import pytest
import tokenizers
import torch
import transformers
from conftest import CHATML, build_model, build_tokenizer
from tokenizers import pre_tokenizers
from typer.testing import CliRunner

from lora_cli import adapter, adapter_folder, base_folder, cli, lora, tuned, weights
from lora_cli.config import LoraConfig
from lora_cli.errors import AdapterError, InputError, SurroundingsError
from lora_cli.formats import gguf_export, gguf_file, gguf_pre_tokenizer
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
                **options | {"num_hidden_layers": 7},
                head_dim=16,
                query_pre_attn_scalar=16,
                sliding_window=12,
                rope_parameters={
                    "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
                },
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
    adapter_folder.save(
        folder, module, config, adapter_folder.Origin(str(base), None, base_folder.fingerprint(base), {})
    )
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


def test_a_window_that_llama_cpp_does_not_know(trained: Callable[..., Trained], tmp_path: Path):
    """Mistral's sliding window: up to its length both compute the same, so there the context ends."""
    config = config_of("mistral")
    config.sliding_window = 54
    made = trained(config)
    gguf_export.export_model(made.result, tmp_path / "model.gguf", "f32")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields

    assert fields["llama.context_length"].contents() == 54
    prompt = PROMPTS[2][:46]
    assert LlamaCpp(tmp_path / "model.gguf").continuation(prompt, TOKENS) == made.continuation(prompt)


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


def babble(seed: int, count: int) -> list[str]:
    """Strings of a few letters, whose pairs overlap: what is merged first matters."""
    draw = random.Random(seed)
    return ["".join(draw.choices("eeettaaon  sr", k=draw.randint(2, 30))) for _ in range(count)]


def strings() -> list[str]:
    """Odd strings, some hundred drawn from their characters, and babble."""
    draw = random.Random(5)
    characters = sorted(set("".join(ODD)) - set("<|>")) + [" "] * 12 + list("the sky is blue")
    return ODD + ["".join(draw.choices(characters, k=draw.randint(1, 24))) for _ in range(300)] + babble(6, 100)


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
    tokenizer.train_from_iterator([" ".join(ODD)] * 3 + ODD * 3 + babble(7, 300), trainer)
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
    tokenizer.train_from_iterator([*text.split(" ") * 3, *babble(7, 300)], trainer)
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


@pytest.mark.parametrize("family", ["byte-level", "prepend", "never"])
def test_added_tokens(family: str, trained: Callable[..., Trained], tmp_path: Path):
    """Tokens added as text, not as control tokens: they are found first, wherever they stand."""
    tokenizer = byte_level(PRE_TOKENIZERS["gpt-2"]) if family == "byte-level" else sentencepiece(family)
    added = [tokenizers.AddedToken(text, normalized=False) for text in ("<tool>", "two words", "é!", "sky")]
    tokenizer.add_tokens(added)
    engine, _ = engine_for(tokenizer, trained, tmp_path)
    texts = ["the sky", "<tool>x<tool> y", "a two words two words", "two  words", "xé!é!!", "skysky s ky"]

    assert [engine.tokenize(text) for text in texts] == [tokenizer(text)["input_ids"] for text in texts]


def test_phi3_drops_space_after_special_tokens(trained: Callable[..., Trained], tmp_path: Path):
    """Phi-3's special tokens take the white space after them; llama.cpp does so by the model's name."""
    tokenizer = sentencepiece("prepend")
    keeps, drops = ("<unk>", "<s>", "<|endoftext|>"), ("</s>", "<|user|>", "<|end|>")
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [
                tokenizers.AddedToken(text, rstrip=text in drops, normalized=False, special=True)
                for text in (*keeps, *drops)
            ]
        }
    )
    tokenizer.add_tokens([tokenizers.AddedToken("</s>", rstrip=True, normalized=False, special=True)])
    engine, _ = engine_for(tokenizer, trained, tmp_path)
    texts = ["<|user|>\nhi<|end|>\n \n<|user|> x", "<|endoftext|> \na", "</s> a </s>"]

    assert tokenizer("<|user|>\nhi")["input_ids"] == tokenizer("<|user|>hi")["input_ids"]
    assert [engine.tokenize(text) for text in texts] == [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("start", [False, True])
def test_conversations(start: bool, trained: Callable[..., Trained], tmp_path: Path):
    """The chat template in the file gives the same prompt, its start token once."""
    tokenizer = sentencepiece("prepend")
    turns = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    tokenizer.chat_template = ("{{ bos_token }}" if start else "") + turns
    engine, notes = engine_for(tokenizer, trained, tmp_path)
    messages = [{"role": "user", "content": "the sky"}, {"role": "assistant", "content": "é"}]
    messages += [{"role": "user", "content": "?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    assert engine.apply_template(messages) == text.removeprefix("<s>")
    assert engine.chat(messages, 1)[1] == len(tokenizer(text, add_special_tokens=not start)["input_ids"])
    differs = "llama.cpp puts the start token before conversations, and the chat template does not."
    assert notes == ([] if start else [differs])


def test_the_adapters_chat_template(tmp_path: Path):
    """The template that the rows were written with goes into the file, not the base's."""
    write_base(tmp_path / "base", config_of("llama"))
    write_adapter(tmp_path / "adapter", tmp_path / "base", LoraConfig(rank=4, alpha=8))
    adapter_folder.save_templates(tmp_path / "adapter", {adapter.TEMPLATE: CHATML.replace("user", "human") + "!"})
    gguf_export.export_model(tuned.find(tmp_path / "adapter"), tmp_path / "model.gguf", "f16")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields

    assert fields["tokenizer.chat_template"].contents() == CHATML.replace("user", "human") + "!"
    assert fields["general.name"].contents() == "base adapter"


# --- how numbers are stored ---


@pytest.mark.parametrize("kind", gguf_file.KINDS)
def test_stored_numbers_are_the_nearest(kind: gguf_file.Kind, trained: Callable[..., Trained], tmp_path: Path):
    """Matrices are rounded once from the sum in float32; vectors stay in float32; rows of no whole blocks in f16."""
    made = trained("llama")
    report = gguf_export.export_model(made.result, tmp_path / "model.gguf", kind)
    merged = {name: weight for name, weight in merged_weights(made).items() if "down_proj" in name or "norm" in name}
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}

    assert report.tensors == len(found)
    assert found["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    for block in range(2):
        stored = found[f"blk.{block}.ffn_down.weight"]
        values = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type).copy())
        expected = merged[f"model.layers.{block}.mlp.down_proj"]
        assert stored.tensor_type.name == kind.upper()
        assert float((values - expected).abs().max()) <= {"f32": 0.0, "f16": 5e-4, "bf16": 4e-3, "q8_0": 5e-3}[kind]


def merged_weights(made: Trained) -> dict[str, torch.Tensor]:
    """W + scale * B A of each adapted layer, in float32."""
    return {
        path: (layer.base.weight + (layer.lora_B * layer.scale) @ layer.lora_A).detach()
        for path, layer in lora.lora_layers(made.module)
    }


def test_rows_of_no_whole_blocks(trained: Callable[..., Trained], tmp_path: Path):
    """q8_0 stores 32 numbers together; a matrix with other rows is stored in f16, and llama.cpp reads both."""
    config = config_of("llama")
    config.intermediate_size = 48
    made = trained(config)
    gguf_export.export_model(made.result, tmp_path / "model.gguf", "q8_0")
    types = {each.name: each.tensor_type.name for each in gguf.GGUFReader(tmp_path / "model.gguf").tensors}

    assert (types["blk.0.ffn_down.weight"], types["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
    expected, engine = made.likely(PROMPTS[2]), LlamaCpp(tmp_path / "model.gguf")
    assert all(abs(float(expected[token]) - value) < 0.3 for token, value in engine.likely(PROMPTS[2]).items())


def test_too_large_for_f16(trained: Callable[..., Trained], tmp_path: Path):
    """A number beyond f16's range is refused, not written as infinity."""
    made = trained("llama")
    for up in made.result.adapter.lora_B.values():
        up.mul_(1e7)
    with pytest.raises(AdapterError, match=r"too large for f16; take --gguf-type bf16"):
        gguf_export.export_model(made.result, tmp_path / "out" / "model.gguf", "f16")

    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("kind", ["f32", "q8_0"])
def test_a_file_with_another_number_is_refused(
    kind: gguf_file.Kind, trained: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What is read back is compared with what was meant: one changed byte is found, and nothing is left behind."""
    made = trained("llama")

    def write_damaged(path: Path, plan: gguf_file.Plan) -> None:
        write(path, plan)
        with path.open("r+b") as file:
            file.seek(-9, 2)
            byte = file.read(1)
            file.seek(-9, 2)
            file.write(bytes([byte[0] ^ 0x40]))

    write = gguf_file.write
    monkeypatch.setattr(gguf_file, "write", write_damaged)
    with pytest.raises(AdapterError, match="are not those that were meant"):
        gguf_export.export_model(made.result, tmp_path / "out" / "model.gguf", kind)

    assert list((tmp_path / "out").iterdir()) == []


# --- what is refused, before anything is written ---


def refused(made: Trained, folder: Path) -> str:
    """The error of an export that leaves nothing behind."""
    with pytest.raises(InputError) as caught:
        gguf_export.export_model(made.result, folder / "out" / "model.gguf", "f16")
    assert not (folder / "out").exists()
    return caught.value.paragraph()


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("llama", {"rope_parameters": _ROPE | {"rope_type": "dynamic", "factor": 2.0}}, "scaled by dynamic"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("llama", {"mlp_bias": True}, "mlp.down_proj.bias has no place"),
        ("gemma2", {"query_pre_attn_scalar": 256}, "query_pre_attn_scalar is 256, there 16"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "sliding layers"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scales attention"),
    ],
)
def test_models_without_an_equal(
    kind: str, changes: dict[str, Any], reason: str, trained: Callable[..., Trained], tmp_path: Path
):
    """What llama.cpp would compute otherwise is refused with its reason."""
    config = type(config_of(kind))(**config_of(kind).to_dict() | changes)

    assert reason in refused(trained(config), tmp_path)


def test_other_architectures(trained: Callable[..., Trained], tmp_path: Path):
    """An architecture that is not in the table is refused, and those that are in it are named."""
    made = trained(build_model("granite").config)
    message = refused(made, tmp_path)

    assert "A granite model cannot be written as GGUF" in message
    assert "gemma3_text" in message


def test_a_quantised_base(trained: Callable[..., Trained], tmp_path: Path):
    """Weights in four bits are no weights to add an adapter to."""
    made = trained("llama")
    made.result.header.config.quantization_config = {"quant_method": "bitsandbytes"}

    assert "weights are quantised" in refused(made, tmp_path)


def test_an_adapter_on_an_expert(trained: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An adapted tensor that the file has no tensor of its own for cannot be exported alone."""
    made = trained("mixtral")
    name = next(name for name in made.result.adapter.lora_A if name.endswith("0.self_attn.q_proj"))
    experts = "model.layers.0.block_sparse_moe.experts.1.w1"
    read = weights.Weights.__init__

    def adapts_an_expert(self: Any, *arguments: Any) -> None:
        read(self, *arguments)
        self.adapted = {f"{experts}.weight": name}

    monkeypatch.setattr(weights.Weights, "__init__", adapts_an_expert)
    with pytest.raises(AdapterError, match="has no place of its own"):
        gguf_export.export_adapter(made.result, tmp_path / "adapter.gguf")


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (lambda: byte_level(cut_by(r"\p{L}+|\s+|[^\p{L}\s]+")), r"by a rule that is not known here: \p{L}+"),
        (lambda: byte_level(PRE_TOKENIZERS["qwen2"], ignore_merges=True), "and takes whole words without merging"),
        (lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)), "by a ByteLevel step"),
        (lambda: changed(normalizer=tokenizers.normalizers.Lowercase()), "normalizes text (Lowercase)"),
        (lambda: with_added("<|x|>", lstrip=True), "<|x|> has lstrip"),
        (lambda: with_added("a\0b"), "character NUL"),
        (lambda: with_added("<x>", to=sentencepiece("prepend")), "finds <x> only with the mark"),
        (lambda: with_added("[PAD710]"), "named [PAD...]"),
        (lambda: with_added(*(f"<{number}>" for number in range(300))), "the model embeds 720 tokens"),
    ],
)
def test_tokenizers_without_an_equal(
    tokenizer: Callable[[], Any], reason: str, trained: Callable[..., Trained], tmp_path: Path
):
    """A tokenizer that llama.cpp would not follow is refused with its reason."""
    config = config_of("llama")
    config.vocab_size = 720

    assert reason in refused(trained(config, tokenizer=tokenizer()), tmp_path)


def changed(**parts: Any) -> Any:
    """A byte-level tokenizer with other parts."""
    tokenizer = byte_level(PRE_TOKENIZERS["gpt-2"])
    for name, part in parts.items():
        setattr(tokenizer.backend_tokenizer, name, part)
    return tokenizer


def with_added(*contents: str, to: Any = None, **options: Any) -> Any:
    """A tokenizer, byte-level where none is given, with more tokens."""
    tokenizer = to or byte_level(PRE_TOKENIZERS["gpt-2"])
    tokenizer.add_tokens([tokenizers.AddedToken(content, **options) for content in contents])
    return tokenizer


# --- the command ---


def run(*arguments: Any) -> Any:
    """Run the program."""
    return CliRunner().invoke(cli.app, [str(each) for each in arguments])


def test_command(trained: Callable[..., Trained], tmp_path: Path):
    """One line with what was verified, or one JSON object; a second time the file is there and stays."""
    folder = trained("llama").result.adapter.folder
    output = tmp_path / "model.gguf"
    done = run("export", folder, "--format", "gguf", "--gguf-type", "f32", "--output", output)

    assert done.exit_code == 0, done.output
    assert "Read back and compared: 20 tensors" in done.output
    assert "exact" in done.output
    before = output.read_bytes()
    again = run("export", folder, "--format", "gguf", "--output", output)
    assert isinstance(again.exception, AdapterError)
    assert "already exists" in again.exception.paragraph()
    assert output.read_bytes() == before

    done = run("export", folder, "--format", "gguf-lora", "--output", tmp_path / "adapter.gguf", "--json")
    report = json.loads(done.stdout)
    assert (report["format"], report["kind"], report["largest_error"]) == ("gguf-lora", "f32", 0.0)
    assert isinstance(
        run("export", folder, "--format", "gguf", "--output", tmp_path / "folder").exception, AdapterError
    )
    assert isinstance(run("export", folder, "--gguf-type", "q2", "--output", tmp_path / "x.gguf").exception, InputError)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), OSError("9 requested and 4 written")])
@pytest.mark.parametrize("format", ["gguf", "ollama"])
def test_full_disk(
    format: str, error: OSError, trained: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A disk that fills up while writing is named, and nothing is left behind."""

    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    output = tmp_path / "out" / "model.gguf"
    done = run("export", trained("llama").result.adapter.folder, "--format", format, "--output", output)

    assert isinstance(done.exception, SurroundingsError)
    assert "the disk is full" in done.exception.paragraph()
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_without_room(trained: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file larger than the room there is is not begun."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(SurroundingsError, match="are free"):
        gguf_export.export_model(trained("llama").result, tmp_path / "model.gguf", "f16")

    assert not list(tmp_path.glob("*.gguf"))


def test_without_the_package(trained: Callable[..., Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without gguf the error says what to install."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SurroundingsError, match=r"pip install 'lora-cli\[gguf\]'"):
        gguf_export.export_model(trained("llama").result, tmp_path / "model.gguf", "f16")
