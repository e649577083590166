"""Secrets are not repeated: what looks like a key, a token or a password is hidden where text leaves the program.

Known are the forms in which services write their keys, names and passwords inside addresses, and the values of
environment variables whose names say that they are secret.
"""

import os
import re
from typing import Any

HIDDEN = "[hidden]"
_FORMS = re.compile(
    r"""
      \bhf_[A-Za-z0-9]{20,} | \bsk-[A-Za-z0-9_-]{20,}                  # Hugging Face; OpenAI, Anthropic and others
    | \bgh[opsur]_[A-Za-z0-9]{20,} | \bgithub_pat_\w{20,} | \bglpat-[\w-]{20,}
    | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b | \bAIza[\w-]{35}                  # Amazon, Google
    | \bxox[abeoprs]-[A-Za-z0-9-]{10,}                                 # Slack
    | \beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}                       # JSON Web Token
    | -----BEGIN\ [A-Z\ ]{0,20}PRIVATE\ KEY-----[^-]{0,10000}
    | (?:(?<=://)|(?<=:/))[^\s/@:'"]{0,200}:[^\s/@'"]{1,200}(?=@)                  # name:password@ in an address
    """,
    re.VERBOSE,
)
# Of each form a piece that is quickly looked for.
_MARKS = (
    "hf_",
    "sk-",
    "ghp_",
    "gho_",
    "ghs_",
    "ghu_",
    "ghr_",
    "github_pat_",
    "glpat-",
    "AKIA",
    "ASIA",
    "AIza",
    "xox",
    "eyJ",
    "PRIVATE KEY",
    ":/",
)
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:API|PG)?(?:TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASS|CREDENTIALS?)(?:_|$)", re.IGNORECASE
)
_SHORTEST = 8  # characters of a variable's value that is taken for a secret


def holds_secret(text: str) -> bool:
    """Return whether a text holds what has the form of a secret."""
    return any(mark in text for mark in _MARKS) and _FORMS.search(text) is not None


def redact(text: str) -> str:
    """Return a text with every secret hidden."""
    if holds_secret(text):
        text = _FORMS.sub(HIDDEN, text)
    if len(text) < _SHORTEST:
        return text
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _SECRET_NAME.search(name) and value[0] not in "/~.":
            text = text.replace(value, HIDDEN)
    return text


def redacted(values: Any) -> Any:
    """Return plain JSON values with every secret in their texts hidden."""
    match values:
        case str():
            return redact(values)
        case dict():
            return {redact(key): redacted(value) for key, value in values.items()}
        case list():
            return [redacted(value) for value in values]
    return values


def cut(text: str, most: int) -> str:
    """Return the start of a text (its end, where `most` is negative), secrets hidden before any is cut in two."""
    near = redact(text)
    return near[:most] if most >= 0 else near[most:]
