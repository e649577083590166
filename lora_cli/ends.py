"""The tokens with which an answer ends: which they are, and whether the base can say them."""

import contextlib
import json
from collections.abc import Sequence
from typing import Any

from lora_cli.examples import Tokenizer
from lora_cli.model import LanguageModel, ModelHeader


def untrained_end(model: LanguageModel, tokenizer: Tokenizer, end: int) -> str | None:
    """Return what to tell the user where the model can never say an end token: its output weights are those of others.

    So they are where none of these tokens was ever trained; their logits are the same whatever is trained into the
    blocks.
    """
    weight = model.head.weight
    margin = 1e-2 * weight[end].abs().max()
    near = ((weight[:, :8] - weight[end, :8]).abs() <= margin).all(1).nonzero()[:, 0]  # few, before whole rows are read
    twins = int(((weight[near] - weight[end]).abs() <= margin).all(1).sum()) - 1
    if not twins:
        return None
    return (
        f"Answers end with {tokenizer.decode([end])}, whose output weights are those of {twins} other tokens: "
        "the base was never trained on it and cannot tell them apart, so answers may not end. Use a base or a chat "
        "template whose end token was trained."
    )


def configured_ends(header: ModelHeader) -> set[int]:
    """Return the tokens at which generation stops, by the model's files and its tokenizer."""
    path, found = header.folder / "generation_config.json", list[Any]()
    with contextlib.suppress(OSError, ValueError, AttributeError):
        named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        found += named if isinstance(named, list) else [named]
    return {int(token) for token in [*found, header.tokenizer.eos_token_id] if token is not None}


def end_tokens(model: LanguageModel, tokenizer: Tokenizer) -> Sequence[int]:
    """Return the tokens after which an answer is over."""
    configured = model.module.generation_config.eos_token_id
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None})
