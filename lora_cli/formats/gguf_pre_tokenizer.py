"""How a byte-level tokenizer cuts text before it merges, and which of llama.cpp's rules that is.

A GGUF file holds only the rule's name; llama.cpp has the regular expressions (src/llama-vocab.cpp). Each rule here has
been compared with it on hundreds of odd strings.
"""

from collections.abc import Mapping
from typing import Any

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = _WORDS.replace("{DIGITS}", "{1,3}")
_QWEN2 = _WORDS.replace("{DIGITS}", "")
_CASED = (  # words by their capital letters
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{SHORT}"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{SHORT}"
    r"|\p{N}{DIGITS}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = _CASED.replace("{SHORT}", "").replace("{DIGITS}", "")
_GPT4O = _CASED.replace("{SHORT}", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("{DIGITS}", "{1,3}")

# How text is cut, and whether a whole word of the vocabulary is taken without merging -> the rule's name in llama.cpp.
PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGIT, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",
}

# Rules that llama.cpp writes in simpler regular expressions: they differ beyond ASCII.
APPROXIMATE = ("tekken", "gpt-4o")


def steps(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the steps of a normalizer or a pre-tokenizer, in their order."""
    if part is None:
        return []
    inner = part.get("normalizers", part.get("pretokenizers"))
    return [part] if inner is None else [step for each in inner for step in steps(each)]


def ignores_merges(described: Mapping[str, Any]) -> bool:
    """Return whether a word that is in the vocabulary is taken whole, whatever merging gives."""
    return bool(described["model"].get("ignore_merges"))


def cuts(described: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the regular expressions by which text is cut, one after the other. Raises ValueError."""
    found, byte_level = [], False
    for step in steps(described["pre_tokenizer"]):
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}:
                byte_level = True
                found += [_GPT2] if use_regex else []
            case {"type": "Digits", "individual_digits": True}:
                found.append(_DIGIT)
            case {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}:
                found.append(regex)
            case _:
                raise ValueError(f"it cuts text by a {step['type']} step that llama.cpp has not")
    if not byte_level:
        raise ValueError("its BPE works on characters, not on bytes")
    return tuple(found)


def rule_of(described: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for how a tokenizer cuts text. Raises ValueError saying why where it has none."""
    found, whole = cuts(described), ignores_merges(described)
    if (found, whole) not in PRE_TOKENIZERS:
        also = ", and takes whole words without merging" if whole else ""
        raise ValueError(f"it cuts text by a rule that is not known here: {' then '.join(found)[:300]}{also}")
    return PRE_TOKENIZERS[found, whole]
