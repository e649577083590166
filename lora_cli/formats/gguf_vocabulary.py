"""A tokenizer as the metadata of a GGUF file, where llama.cpp's tokenizers give the same tokens; refused where not.

llama.cpp has two that matter here. `gpt2` is byte-level BPE; how text is cut before merging is not in the file, only
the name of a rule that llama.cpp knows. `llama` is SentencePiece's BPE, which merges the pair whose result has the
highest score. Both are found from what the tokenizer does, not from what it is called.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lora_cli import chat_template
from lora_cli.conversation import Conversation, Message, RowError
from lora_cli.errors import ModelError
from lora_cli.examples import Tokenizer
from lora_cli.formats import gguf_pre_tokenizer as pre_tokenizer
from lora_cli.formats.gguf_file import Value

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
_SPACE = "\u2581"  # SentencePiece's mark of a space


def vocabulary(tokenizer: Tokenizer, rows: int, ends: Sequence[int]) -> dict[str, Value]:
    """Return the metadata of a tokenizer for a model with `rows` embeddings, which stops at the tokens `ends`.

    Raises ModelError with everything that llama.cpp would do otherwise.
    """
    described = _describe(tokenizer)
    known = tokenizer.get_vocab()
    problems = [*_problems(tokenizer, described, rows), *_ends_problems(tokenizer, ends)]
    if problems:
        raise ModelError(*(f"The tokenizer has no equal in llama.cpp: {problem}." for problem in problems))
    added = {int(entry["id"]): entry for entry in described["added_tokens"]}
    tokens = [f"[PAD{number}]" for number in range(rows)]
    types = [UNUSED] * rows
    for token, number in known.items():
        tokens[number], types[number] = token, NORMAL
    spm = bool(described["model"]["byte_fallback"])
    for number, entry in added.items():
        types[number] = CONTROL if entry["special"] else USER_DEFINED
        if spm and not entry["special"] and _SPACE in entry["content"]:
            types[number] = NORMAL  # matched against raw text, in which spaces are spaces: it comes from merging
    values: dict[str, Value] = {"tokenizer.ggml.tokens": tokens}
    if spm:
        values |= _sentencepiece(described, tokens, types)
    else:
        values |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre_tokenizer.rule_of(described),
            "tokenizer.ggml.merges": [" ".join(pair) for pair in described["model"]["merges"]],
        }
    return values | {"tokenizer.ggml.token_type": types} | _special(tokenizer, ends) | _templates(tokenizer)


def notes(tokenizer: Tokenizer) -> list[str]:
    """Return in which cases llama.cpp's tokens differ from the tokenizer's all the same."""
    described, found = _describe(tokenizer), []
    if main_template(tokenizer) and chat_template.begins_with_bos(tokenizer) and not _begins(tokenizer, bos_only=True):
        found.append("llama.cpp puts the start token before conversations, and the chat template does not.")
    if _normalizers(described) == ["NFC"]:
        found.append("llama.cpp does not bring text into Unicode's composed form (NFC), as this tokenizer does.")
    if not described["model"]["byte_fallback"]:
        if pre_tokenizer.rule_of(described) in pre_tokenizer.APPROXIMATE:
            found.append(
                "llama.cpp cuts words with combining marks, or with capitals inside them that are not ASCII, otherwise."
            )
        return found
    scheme = _prefix_rule(described)
    if scheme != "never" and described["pre_tokenizer"] is not None:
        found.append("llama.cpp adds a space to a text that begins with one, and to one after a special token.")
    if scheme == "first":
        exact = "that begin with a special token" if _begins(tokenizer) else "without special or added tokens"
        found.append(f"llama.cpp knows no mark of a word's start for a text's start alone: exact are texts {exact}.")
    return found


def _describe(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what tokenizer.json says, as it is in force."""
    described: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return described


# --- what llama.cpp cannot do ---


def _problems(tokenizer: Tokenizer, described: Mapping[str, Any], rows: int) -> Iterator[str]:
    model, known = described["model"], tokenizer.get_vocab()
    if model["type"] != "BPE":
        yield f"its model is {model['type']}; only BPE is written"
        return
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            yield f"its BPE has {key} {model[key]!r}"
    if max(known.values()) >= rows:
        yield f"it has the token {max(known.values())}, and the model embeds {rows} tokens"
    if len(set(known.values())) != len(known):
        yield "two of its tokens have one number"
    if any(f"[PAD{number}]" in known for number in set(range(rows)) - set(known.values())):
        yield "it has tokens named [PAD...] already"
    if any("\0" in token for token in known):
        yield "one of its tokens holds the character NUL, at which llama.cpp ends a token"
    odd = ("lstrip", "single_word") if strips_like_phi3(tokenizer) else ("lstrip", "single_word", "rstrip")
    for entry in described["added_tokens"]:
        for key in odd:
            if entry[key]:
                yield f"{entry['content']} has {key}"
    yield from _spm_problems(described, known) if model.get("byte_fallback") else _bpe_problems(described)


def _bpe_problems(described: Mapping[str, Any]) -> Iterator[str]:
    if _normalizers(described) not in ([], ["NFC"]):
        yield f"it normalizes text ({', '.join(_normalizers(described))})"
    try:
        pre_tokenizer.rule_of(described)
    except ValueError as error:
        yield str(error)


def _spm_problems(described: Mapping[str, Any], known: Mapping[str, int]) -> Iterator[str]:
    if _prefix_rule(described) is None:
        cuts = [step["type"] for step in pre_tokenizer.steps(described["pre_tokenizer"])]
        steps = ", ".join([*_normalizers(described), *cuts])
        yield f"it prepares text by steps that are not known to be llama.cpp's ({steps})"
    marked = [entry["content"] for entry in described["added_tokens"] if entry["normalized"]]
    if marked and "Prepend" in _normalizers(described):
        yield f"it finds {marked[0]} only with the mark of a word's start (normalized)"
    if pre_tokenizer.ignores_merges(described):
        yield "it takes whole words without merging"
    if missing := [byte for byte in range(256) if f"<0x{byte:02X}>" not in known]:
        yield f"it has no token for {len(missing)} of the 256 bytes"
    special = {entry["content"] for entry in described["added_tokens"]}
    made = {"".join(pair) for pair in described["model"]["merges"]} | special
    if left := [token for token in known if len(token) > 1 and token not in made and not _is_byte(token)]:
        yield f"no merge makes {left[0]!r}, which llama.cpp would make"


def _ends_problems(tokenizer: Tokenizer, ends: Sequence[int]) -> Iterator[str]:
    """llama.cpp takes some token for the start and the end where none is named, and knows three ends by number."""
    if tokenizer.eos_token_id is None:
        yield "it has no end token (eos_token)"
    elif len({*ends, tokenizer.eos_token_id}) > 3:
        yield f"the model stops at {len({*ends, tokenizer.eos_token_id})} different tokens, and a GGUF names three"
    if tokenizer.bos_token_id is None and "bos_token" in (main_template(tokenizer) or ""):
        yield "its chat template writes a start token (bos_token), and it has none"
    if _added_around(tokenizer) is None:
        yield "it adds more to a text than a start and an end token"


# --- what it does ---


def strips_like_phi3(tokenizer: Tokenizer) -> bool:
    """Return whether white space after special tokens is dropped as llama.cpp does for models named Phi-3."""
    kept, described = {"<unk>", "<s>", "<|endoftext|>"}, _describe(tokenizer)
    found = {entry["content"]: entry["rstrip"] for entry in described["added_tokens"]}
    return {"</s>", *kept} <= found.keys() and all(found[token] != (token in kept) for token in found)


def _normalizers(described: Mapping[str, Any]) -> list[str]:
    return [step["type"] for step in pre_tokenizer.steps(described["normalizer"])]


def _prefix_rule(described: Mapping[str, Any]) -> str | None:
    """Return where a mark of a word's start is put: always, first (only at a text's start), never; None if unknown."""
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    steps = pre_tokenizer.steps(described["normalizer"])
    pre = [step for step in pre_tokenizer.steps(described["pre_tokenizer"]) if step.get("pattern") != {"String": " "}]
    if not pre and steps == [{"type": "Prepend", "prepend": _SPACE}, spaces]:
        return "always"
    if not pre and steps == [spaces]:
        return "never"
    match pre:
        case [{"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}] if not steps:
            return str(scheme)
    return None


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _sentencepiece(described: Mapping[str, Any], tokens: Sequence[str], types: list[int]) -> dict[str, Value]:
    """Return the metadata of a BPE with byte fallback, and set the types of its byte tokens and its unknown token.

    A token's score is minus the rank of the first merge that makes it; those that none makes are never compared.
    """
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(described["model"]["merges"]):
        ranks.setdefault("".join(pair), rank)
    for number, token in enumerate(tokens):
        if _is_byte(token):
            types[number] = BYTE
        elif token == described["model"]["unk_token"]:
            types[number] = UNKNOWN
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": [float(-ranks.get(token, len(ranks))) for token in tokens],
    }


def _special(tokenizer: Tokenizer, ends: Sequence[int]) -> dict[str, Value]:
    """Return the numbers of special tokens, and whether a text begins and ends with them."""
    assert tokenizer.eos_token_id is not None
    around = _added_around(tokenizer)
    assert around is not None
    others = sorted(set(ends) - {tokenizer.eos_token_id})
    named = {
        "bos": tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        **dict(zip(("eot", "eom"), others, strict=False)),
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    values: dict[str, Value] = {
        f"tokenizer.ggml.{name}_token_id": number for name, number in named.items() if number is not None
    }
    values |= {"tokenizer.ggml.add_bos_token": around[0], "tokenizer.ggml.add_eos_token": around[1]}
    described = _describe(tokenizer)
    if described["model"]["byte_fallback"]:
        rule = _prefix_rule(described)
        values["tokenizer.ggml.add_space_prefix"] = rule == "always" or (rule == "first" and not _begins(tokenizer))
    return values


def _added_around(tokenizer: Tokenizer) -> tuple[bool, bool] | None:
    """Return whether a start and an end token are put around a text; None where anything else is."""
    plain = tokenizer(["a"], add_special_tokens=False)["input_ids"][0]
    whole = tokenizer(["a"])["input_ids"][0]
    for begin in (False, True):
        for end in (False, True):
            if whole == [tokenizer.bos_token_id] * begin + plain + [tokenizer.eos_token_id] * end:
                return begin, end
    return None


def _begins(tokenizer: Tokenizer, bos_only: bool = False) -> bool:
    """Return whether a conversation begins with a special token, or with the start token, by the chat template."""
    template = chat_template.choose(None, tokenizer, "2026-01-01", False)
    if template is None:
        return False
    try:
        asked = Conversation((Message("user", "a", trained=False),), templated=True)
        text = template.render_apart(asked, 1, prompt=True).text
    except RowError:
        return False
    bos = str(tokenizer.special_tokens_map.get("bos_token"))
    return text.startswith((bos,) if bos_only else tuple(tokenizer.all_special_tokens))


def main_template(tokenizer: Tokenizer) -> str | None:
    """Return the chat template for rows without tools."""
    own = tokenizer.chat_template
    return own.get("default") if isinstance(own, dict) else own


def _templates(tokenizer: Tokenizer) -> dict[str, Value]:
    """Return the chat templates; llama.cpp takes the one for tools where there are tools."""
    values: dict[str, Value] = {}
    if template := main_template(tokenizer):
        values["tokenizer.chat_template"] = template
    if isinstance(tokenizer.chat_template, dict) and (tools := tokenizer.chat_template.get("tool_use")):
        values |= {"tokenizer.chat_template.tool_use": tools, "tokenizer.chat_templates": ["tool_use"]}
    return values
