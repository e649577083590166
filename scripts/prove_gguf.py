"""Prove on a real run that llama.cpp, given its GGUF files, answers as base + adapter do here.

    python scripts/prove_gguf.py RUN BASE [--rows 20] [--tokens 48] [--data FILE]

The run is exported as gguf (f32, f16, q8_0) and as gguf-lora (on the base in f32). Each is asked held-out questions
greedily: the rows' prompts as they were trained, and the same text as a user's message by the chat template in the
file. The table says how many answers are the same text, and where they part how close the two tokens were here, in
nats. Needs xllamacpp, which carries llama.cpp.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from llama_cpp import LlamaCpp  # noqa: E402

from lora_cli import held_out, questions, tuned  # noqa: E402
from lora_cli.ends import end_tokens  # noqa: E402
from lora_cli.formats import gguf_export, gguf_file  # noqa: E402
from lora_cli.generate import generate  # noqa: E402
from lora_cli.model import LanguageModel, generating  # noqa: E402


@dataclass(frozen=True)
class Asked:
    """A way of asking: questions as text, the prompts they are here, and the answers here."""

    name: str
    chat: bool
    texts: Sequence[str]
    prompts: Sequence[Sequence[int]]
    answers: Sequence[tuple[int, ...]]


def main() -> int:
    """Print the table; return 1 where an answer of an exact file is another one without being a near tie."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("base")
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--data")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = tuned.find(options.run, options.base)
    model = tuned.load(result, torch.device("cpu"), "float32")
    ways = list(ways_of(result, model, options))
    failed = False
    print(f"{'file':<10} {'MB':>6} {'s':>5}  {'prompts':<10} {'same prompt':>11} {'same text':>9}  parted at (nats)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = folder / "base.gguf"
        gguf_file.write(base, gguf_export.model_plan(result, "f32", adapted=False)[0])
        kinds: tuple[Literal["f32", "f16", "q8_0", "lora"], ...] = ("f32", "f16", "q8_0", "lora")
        for kind in kinds:
            file = folder / f"{kind}.gguf"
            begin = time.perf_counter()
            if kind == "lora":
                gguf_export.export_adapter(result, file)
            else:
                gguf_export.export_model(result, file, kind)
            seconds = time.perf_counter() - begin
            engine = LlamaCpp(base, file, 2048) if kind == "lora" else LlamaCpp(file, context=2048)
            for asked in ways:
                same_prompts, same, parted = compare(asked, engine, model, result.header.tokenizer, options.tokens)
                failed |= kind in ("f32", "lora") and any(margin > 0.05 for _, margin in parted)
                failed |= same_prompts < len(asked.prompts)
                where = " ".join(f"{position} ({margin:.3f})" for position, margin in parted)
                count = len(asked.prompts)
                size = file.stat().st_size / 1e6
                print(
                    f"{kind:<10} {size:>6.0f} {seconds:>5.1f}  {asked.name:<10} {same_prompts:>8}/{count} "
                    f"{same:>6}/{count}  {where}"
                )
            del engine
            file.unlink()
    return int(failed)


def ways_of(result: tuned.Result, model: LanguageModel, options: argparse.Namespace) -> Sequence[Asked]:
    """Return the held-out prompts as trained, and as messages by the chat template, each answered here."""
    tokenizer: Any = result.header.tokenizer
    rows, _, _ = held_out.held_out_rows(result, options.data)
    trained = [list(question.prompt) for question in questions.questions_of(rows, options.rows)]
    texts = [tokenizer.decode(prompt) for prompt in trained]
    ways = [("as trained", False, trained)]
    if tokenizer.chat_template:
        chats = [
            tokenizer.apply_chat_template(messages(text), add_generation_prompt=True, return_dict=True)["input_ids"]
            for text in texts
        ]
        ways.append(("as a chat", True, chats))
    return [
        Asked(name, chat, texts, prompts, generate(model, tokenizer, prompts, options.tokens))
        for name, chat, prompts in ways
    ]


def messages(text: str) -> list[dict[str, str]]:
    """A conversation of one question."""
    return [{"role": "user", "content": text}]


def compare(
    asked: Asked, engine: Any, model: LanguageModel, tokenizer: Any, most: int
) -> tuple[int, int, list[tuple[int, float]]]:
    """Return how many prompts llama.cpp reads as the same tokens, how many answers are the same, where others part."""
    ends = set(end_tokens(model, tokenizer))
    same_prompts = same = 0
    parted = []
    for question, prompt, ours in zip(asked.texts, asked.prompts, asked.answers, strict=True):
        text = engine.apply_template(messages(question)) if asked.chat else question
        same_prompts += engine.tokenize(text, add_special=False) == list(prompt)
        tokens = engine.continuation(prompt, most)
        theirs = tuple(tokens[: next((i for i, token in enumerate(tokens) if token in ends), len(tokens))])
        if tokenizer.decode(ours) == tokenizer.decode(theirs):
            same += 1
            continue
        pairs = zip((*ours, -1), (*theirs, -1), strict=False)
        position = next(i for i, (a, b) in enumerate(pairs) if a != b)
        parted.append((position, margin(model, [*prompt, *ours[:position]], tokens[position])))
    return same_prompts, same, parted


@torch.inference_mode()
def margin(model: LanguageModel, prefix: Sequence[int], theirs: int) -> float:
    """Return by how much our most likely next token is more likely here than llama.cpp's choice, in nats."""
    with generating(model):
        values = model.module(input_ids=torch.tensor([list(prefix)])).logits[0, -1].log_softmax(-1)
    return float(values.max() - values[theirs])


if __name__ == "__main__":
    sys.exit(main())
