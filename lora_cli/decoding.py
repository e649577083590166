"""One sequence, token by token, with a key-value cache that is kept for the next prompt.

A loop of our own, where `generate` uses that of transformers: an answer is wanted as it comes, and may be stopped.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from lora_cli.errors import ModelError
from lora_cli.generate import Sampling
from lora_cli.model import LanguageModel

_PIECE = 512  # tokens of a prompt that are read at once, so that reading it can be stopped
_COLDEST = 1e-30  # temperature; float32 takes a much smaller one for 0
_LIKELY = 256  # tokens that have `top_p` together most of the time


def never() -> bool:
    """Return that nobody asks to stop."""
    return False


class Decoder:
    """Runs one model, one sequence at a time; what the cache holds of the next prompt is not read again."""

    def __init__(self, model: LanguageModel, ends: Sequence[int]) -> None:
        self.ends = frozenset(ends)
        self.reused = 0  # tokens of the last prompt that were in the cache
        self._module = model.module
        self._device = model.device
        known = inspect.signature(self._module.forward).parameters
        self._argument = "cache" if "cache" in known else "past_key_values"  # by the release of transformers
        self._cache: Any = None
        self._tokens: list[int] = []  # which the cache holds

    def forget(self) -> None:
        """Leave the cache: it is of another model from now on."""
        self._cache, self._tokens = None, []

    def decode(
        self, prompt: Sequence[int], sampling: Sampling, most: int, stopped: Callable[[], bool] = never
    ) -> Iterator[int]:
        """Iterate over at most so many tokens that follow a prompt; an end token is the last.

        `stopped` is asked before every forward. Raises ModelError where the logits are no numbers.
        """
        generator = torch.Generator(self._device).manual_seed(sampling.seed)
        self.reused = self._reuse(prompt)
        unread = list(prompt[self.reused :])
        size = len(unread) if self._module._is_stateful else _PIECE  # a state is not read on from in pieces
        while len(unread) > size:
            if stopped():
                return
            self._run(unread[:size])
            del unread[:size]
        for _ in range(most):
            if stopped():
                return
            token = choose(self._run(unread), sampling, generator)
            yield token
            if token in self.ends:
                return
            unread = [token]

    def _reuse(self, prompt: Sequence[int]) -> int:
        """Cut the cache down to what the prompt begins with; return how many tokens that is, fewer than it has."""
        pairs = zip(self._tokens, prompt[:-1], strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        extra = len(self._tokens) - shared
        whole = not extra or (shared and all(type(layer).__name__ == "DynamicLayer" for layer in self._cache.layers))
        if self._module._is_stateful or not whole:
            self.forget()  # a window or a state has lost what is to come back
            return 0
        if extra:
            self._cache.crop(-extra)
            del self._tokens[shared:]
        return shared

    @torch.inference_mode()
    def _run(self, tokens: Sequence[int]) -> Tensor:
        """Read tokens; return the logits of what follows them [V]."""
        ids = torch.tensor([tokens], device=self._device)
        try:
            output = self._module(input_ids=ids, use_cache=True, logits_to_keep=1, **{self._argument: self._cache})
        except BaseException:
            self.forget()  # some layers may have read them
            raise
        self._cache = output[self._argument]
        self._tokens += tokens
        return output.logits[0, -1].float()


@torch.inference_mode()
def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Return the next token by its logits [V]. Raises ModelError where they are no numbers."""
    best = logits.max()
    if not torch.isfinite(best):
        raise ModelError(
            "the model's logits are not finite, so no answer can be told from them.",
            "Use --dtype float32; where that does not help, its weights or the adapter's are damaged.",
            state="The conversation is as it was.",
        )
    if not sampling.temperature:
        return int(logits.argmax())
    scaled = (logits - best) / max(sampling.temperature, _COLDEST)
    if sampling.top_k:
        values, tokens = scaled.topk(min(sampling.top_k, len(scaled)))
        shares = values.softmax(0)
    elif sampling.top_p < 1:
        shares, tokens = _most_likely(scaled.softmax(0), sampling.top_p)
    else:
        shares, tokens = scaled.softmax(0), torch.arange(len(scaled), device=scaled.device)
    if sampling.top_p < 1:
        shares = shares.masked_fill(shares.cumsum(0) - shares >= sampling.top_p, 0.0)  # the one that reaches it stays
    return int(tokens[torch.multinomial(shares, 1, generator=generator)])


def _most_likely(shares: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Return (shares, tokens), the most likely first, at least as many as have `top_p` together."""
    first = shares.topk(min(_LIKELY, len(shares)))
    if float(first.values.sum()) >= top_p:
        return first.values, first.indices
    every = shares.sort(descending=True, stable=True)
    return every.values, every.indices
