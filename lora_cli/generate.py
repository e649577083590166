"""Answers to held-out prompts, in batches, with a key-value cache (transformers' own generation)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lora_cli import lora
from lora_cli.distributed import ALONE, World
from lora_cli.ends import end_tokens
from lora_cli.examples import Tokenizer
from lora_cli.model import LanguageModel, generating
from lora_cli.randomness import derive_seed

BATCH = 32


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the most likely one at temperature 0, else drawn, the same for the same seed.

    Drawn among the `top_k` most likely tokens (0: all), of those among the fewest that together have `top_p`.
    """

    temperature: float = 0.0
    seed: int = 0
    top_p: float = 1.0
    top_k: int = 0


GREEDY = Sampling()


@torch.inference_mode()
def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    max_positions: int | None = None,
    sampling: Sampling = GREEDY,
    world: World = ALONE,
) -> list[tuple[int, ...]]:
    """Return a continuation of each prompt (token ids), without its end token; greedy unless a sampling is given.

    A continuation ends at an end token, after `max_new_tokens`, or where the model has no positions left. What the
    model's generation_config asks for beside its end tokens (sampling, a repetition penalty) is left out. Ranks share
    the batches, each with its own seed, and all get the continuations that one alone would.
    """
    lora.set_dropout(model.module, None)
    ends = end_tokens(model, tokenizer)
    pad = ends[0] if ends else 0
    choice = (
        {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
        if sampling.temperature
        else {"do_sample": False}
    )
    answers: dict[int, tuple[int, ...]] = {}
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    with generating(model), torch.random.fork_rng():
        for begin, counts in world.share(range(0, len(order), BATCH)):
            torch.manual_seed(derive_seed(sampling.seed, "answers", begin))
            indices = order[begin : begin + BATCH]
            longest = max(len(prompts[i]) for i in indices)
            ids = torch.full((len(indices), longest), pad, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(indices):  # padding on the left: all prompts end at the same place
                ids[row, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
                mask[row, longest - len(prompts[index]) :] = 1
            output = model.module.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=min(max_new_tokens, max(1, (max_positions or longest + max_new_tokens) - longest)),
                eos_token_id=list(ends) or None,
                pad_token_id=pad,
                use_cache=True,
                synced_gpus=world.in_step,  # who is done goes on until all are
                **choice,
            )
            if not counts:
                continue
            for row, index in enumerate(indices):
                new = output[row, longest:].tolist()
                stop = next((i for i, token in enumerate(new) if token in ends), len(new))
                answers[index] = tuple(new[:stop])
    answers = {index: tuple(ids) for of_rank in world.gather(list(answers.items())) for index, ids in of_rank}
    return [answers[index] for index in range(len(prompts))]
