"""How fast `lora chat` answers beside transformers' own generation, and what keeping the cache saves a second turn.

Run: python scripts/bench_chat.py RUN [ROUNDS]      one JSON line a figure; the two take turns, medians are shown

Seconds are those of the processor, on one thread, so that what else runs on the machine counts little.
"""

import json
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lora_cli import tuned, tuning
from lora_cli.conversation import Message
from lora_cli.generate import GREEDY
from lora_cli.model import generating
from lora_cli.speaker import USUAL, Manner, Speaker

TOKENS = 32
QUESTION = "Write a short story about a lighthouse keeper and a storm."


def ours(speaker: Speaker, manner: Manner) -> float:
    """Return the tokens a second of an answer after its first."""
    speaker.decoder.forget()
    pieces = speaker.answer([Message("user", QUESTION, False)], manner).pieces()
    next(pieces)
    began = time.process_time()
    for _ in pieces:
        pass
    return (TOKENS - 1) / (time.process_time() - began)


def theirs(speaker: Speaker, manner: Manner) -> float:
    """Return the same of `model.generate`: what so many tokens take, less what one takes."""
    ids = torch.tensor([speaker.prompts[0].of_conversation([Message("user", QUESTION, False)])])
    sampling = manner.sampling
    drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}

    def seconds(count: int) -> float:
        settings: dict[str, Any] = drawn if sampling.temperature else {"do_sample": False}
        began = time.process_time()
        speaker.model.module.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=count, max_new_tokens=count, **settings
        )
        return time.process_time() - began

    with torch.inference_mode(), generating(speaker.model), tuning.gain(speaker.model.module, manner.gain):
        speed = (TOKENS - 1) / (seconds(TOKENS) - seconds(1))
    speaker.model.module.set_attn_implementation(speaker.model.own_attention)  # the block leaves that of training
    return speed


def second_turn(speaker: Speaker, kept: bool) -> float:
    """Return the seconds until the first token of a second turn."""
    story = "The keeper climbed the stairs and lit the lamp, and the sea went on below him. " * 24
    first = [Message("user", story + QUESTION, False)]
    manner = Manner(GREEDY, 8)
    speaker.decoder.forget()
    answer = speaker.answer(first, manner)
    text = "".join(answer.pieces())
    if not kept:
        speaker.decoder.forget()
    turn = [*first, Message("assistant", text, False), Message("user", "Go on, please.", False)]
    began = time.process_time()
    with closing(speaker.answer(turn, manner).pieces()) as pieces:
        next(pieces)
        return time.process_time() - began


def main(run: str, rounds: int) -> None:
    """Print the figures."""
    torch.set_num_threads(1)
    speaker = Speaker([tuned.find_any(Path(run))], torch.device("cpu"))
    speaker.decoder.ends = frozenset()  # as many tokens from both
    for name, gain in (("base", 0.0), ("adapter", 1.0)):
        for how, sampling in (("greedy", GREEDY), ("drawn", replace(USUAL, seed=1))):
            manner = Manner(sampling, TOKENS, gain)
            pairs = [(ours(speaker, manner), theirs(speaker, manner)) for _ in range(rounds)]
            chat, generate = (median(values) for values in zip(*pairs, strict=True))
            ratio = median(mine / other for mine, other in pairs)
            print(json.dumps({"of": name, "how": how, "chat": chat, "generate": generate, "ratio": ratio}), flush=True)
    times = [(second_turn(speaker, True), second_turn(speaker, False)) for _ in range(rounds)]
    kept, anew = (median(values) for values in zip(*times, strict=True))
    print(json.dumps({"first token of the second turn": {"cache kept": kept, "begun anew": anew}}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3)
