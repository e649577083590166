"""Ask a merged model one held-out question with plain transformers, and compare with the adapter's answer.

Run: python scripts/ask.py MERGED_FOLDER HELDOUT.jsonl RUN_OR_ADAPTER      exit 1 if the two answers differ
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_cli import tuned
from lora_cli.generate import generate


def main(merged: str, heldout: str, adapter: str) -> int:
    """Print the question and both answers; return the exit status."""
    *question, expected = json.loads(Path(heldout).read_text(encoding="utf-8").splitlines()[0])["messages"]
    tokenizer: Any = AutoTokenizer.from_pretrained(merged)
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    output = model.generate(**ids, max_new_tokens=64, do_sample=False)
    answer = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)

    loaded = tuned.load(tuned.find(Path(adapter)), torch.device("cpu"), "float32")
    (tokens,) = generate(loaded, tokenizer, [ids["input_ids"][0].tolist()], max_new_tokens=64)
    adapters = tokenizer.decode(tokens)

    print(f"asked    {question[-1]['content']}")
    print(f"expected {expected['content']}")
    print(f"merged   {answer}")
    print(f"adapter  {adapters}")
    print("The merged model gives the adapter's answer." if answer == adapters else "THE ANSWERS DIFFER.")
    return 0 if answer == adapters else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:4]))
