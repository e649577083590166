"""Answers to 500 prompts: ours in batches against transformers' `generate` row by row, in turns; the texts must agree.

python scripts/bench_generation.py RUN DATA [--rows 500]
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from lora_cli import tuned
from lora_cli.ends import end_tokens
from lora_cli.generate import generate
from lora_cli.held_out import held_out_rows
from lora_cli.model import generating
from lora_cli.questions import questions_of

BLOCKS, NEW_TOKENS = 5, 32


@torch.inference_mode()
def row_by_row(loaded: Any, prompts: list[tuple[int, ...]], ends: list[int]) -> list[tuple[int, ...]]:
    answers = []
    with generating(loaded):
        for prompt in prompts:
            ids = torch.tensor([prompt])
            new = loaded.module.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=ends,
                pad_token_id=ends[0],
            )[0, len(prompt) :].tolist()
            answers.append(tuple(new[: next((i for i, token in enumerate(new) if token in ends), len(new))]))
    return answers


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("data")
    parser.add_argument("--rows", type=int, default=500)
    asked = parser.parse_args()
    result = tuned.find(asked.run)
    rows = held_out_rows(result, asked.data)[0]
    loaded = tuned.load(result, torch.device("cpu"))
    tokenizer = result.header.tokenizer
    prompts = [question.prompt for question in questions_of(rows, asked.rows)]
    ends = list(end_tokens(loaded, tokenizer))
    size = -(-len(prompts) // BLOCKS)
    seconds, same, new = {"ours": 0.0, "row by row": 0.0}, 0, 0
    for begin in range(0, len(prompts), size):
        block = prompts[begin : begin + size]
        began = time.perf_counter()
        ours = generate(loaded, tokenizer, block, NEW_TOKENS)
        seconds["ours"] += (between := time.perf_counter()) - began
        theirs = row_by_row(loaded, block, ends)
        seconds["row by row"] += time.perf_counter() - between
        same += sum(a == b for a, b in zip(ours, theirs, strict=True))
        new += sum(map(len, ours))
    ours, theirs_seconds = seconds["ours"], seconds["row by row"]
    print(f"{len(prompts)} prompts, {new} new tokens: ours {ours:.1f} s, row by row {theirs_seconds:.1f} s")
    print(f"{theirs_seconds / ours:.2f} times as fast; the same text for {same} of {len(prompts)}")
