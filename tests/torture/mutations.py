"""Valid texts made wrong: bytes, lines, words and values changed by a random generator that a seed fixes."""

import copy
import json
import random
from collections.abc import Iterator, Sequence
from typing import Any

LONG = "Q" * 300  # no message may show more than 80 of it
VALUES: Sequence[Any] = (
    None, True, False, 0, -1, 1.5, 10**30, -(10**400), 1e308, float("nan"), float("inf"), "", " ", "~", "null", "8",
    [], {}, [[]], [None], {"": None}, {"a": {"a": {"a": []}}}, LONG, "\x00", "\x1b[2J", "\ud800", "é\u202e\U0001f600",
    "\n\n", "{}", "[1]", "(a+)+$", "*", "../../x", "~nobody/x", "a" * 5, ["x", 1, None], {"path": "x", "weight": -1},
)  # fmt: skip
SCALARS = (
    "1e999", "-.inf", ".nan", "1" * 5000, "0" * 300, "1_0_0", "0x10", "1:30", "010", "1e5", "08", "no", "NO", "true",
    "2026-01-01", "=", "!!python/name:os.system", "!a b", "!!binary aGk=", "!!set {a}", "&a", "*a", "<<", "<<: *a",
    "? [a]", "? {a: b}", "- a", "|", ">-", "%YAML 9.9", "---", "...", "[", "]", "{", "}", "[" * 90, "{a: " * 60, "\t",
    "'", '"', '"\\ud800"', '"\\0"', "@", "`", "#", ": ", ",", "null: 1", "1: 2", "true: {1.5: x}", LONG, "\u2028",
    "\ufeff", "\x85", "é", "\U0001f600",
)  # fmt: skip


def mutated_bytes(raw: bytes, random: random.Random) -> bytes:
    """Return bytes with some of them changed, inserted, taken out or cut off."""
    changed = bytearray(raw)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(changed) + 1)
        match random.randrange(5):
            case 0:
                changed[at : at + 1] = bytes([random.randrange(256)])
            case 1:
                changed[at:at] = bytes(random.randrange(256) for _ in range(random.randint(1, 4)))
            case 2:
                del changed[at : at + random.randint(1, 8)]
            case 3:
                changed[at:at] = changed[at : at + random.randint(1, 40)]
            case _:
                if random.random() < 0.2:
                    del changed[at:]
    return bytes(changed)


def mutated_lines(text: str, random: random.Random) -> str:
    """Return a text with a line doubled, dropped, moved, indented, dedented or replaced."""
    lines = text.splitlines() or [""]
    at = random.randrange(len(lines))
    match random.randrange(7):
        case 0:
            lines.insert(random.randrange(len(lines) + 1), lines[at])
        case 1:
            del lines[at]
        case 2:
            lines.insert(random.randrange(len(lines)), lines.pop(at))
        case 3:
            lines[at] = " " * random.randint(1, 4) + lines[at]
        case 4:
            lines[at] = lines[at][random.randint(1, 4) :]
        case 5:
            lines[at] = lines[at].split(": ")[0] + ": " + random.choice(SCALARS)
        case _:
            lines[at] = random.choice(SCALARS)
    return "\n".join(lines) + "\n"


def mutated_words(text: str, random: random.Random) -> str:
    """Return a text with a word replaced by an odd one, or by another of its own: values and keys change places."""
    words = text.split(" ")
    for _ in range(random.randint(1, 2)):
        at = random.randrange(len(words))
        words[at] = random.choice(SCALARS) if random.random() < 0.5 else random.choice(words)
    return " ".join(words)


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Iterate over (list or object, index or key) of everything inside a value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


def mutated_value(value: Any, random: random.Random) -> Any:
    """Return a JSON value with something inside replaced, renamed, dropped, wrapped, added, or changed for another."""
    value = {"": copy.deepcopy(value)}
    for _ in range(random.choice((1, 1, 2))):
        places = list(_places(value))
        inside, key = random.choice(places)
        match random.randrange(7):
            case 0 | 1:
                inside[key] = copy.deepcopy(random.choice(VALUES))
            case 2 if isinstance(inside, dict) and inside is not value:
                inside[random.choice([str(other) for _, other in places] + [LONG, "", "\x00"])] = inside.pop(key)
            case 3 if inside is not value:
                del inside[key]
            case 4:
                for _ in range(random.choice((1, 2, 30, 150))):
                    inside[key] = [inside[key]] if random.random() < 0.5 else {"a": inside[key]}
            case 5 if isinstance(inside[key], list):
                inside[key] = inside[key] * random.choice((2, 20))
            case _:
                other, its = random.choice(places)
                inside[key] = copy.deepcopy(other[its])
    return value[""]


def mutated_json(value: Any, random: random.Random) -> bytes:
    """Return a JSON text of a changed value, at times with its bytes changed too, or of nothing but depth."""
    if random.random() < 0.01:
        return random.choice((b"[", b'{"a":')) * random.choice((500, 2_000, 100_000))
    text = json.dumps(mutated_value(value, random), ensure_ascii=random.random() < 0.5)
    raw = text.encode("utf-8", "surrogatepass")
    return mutated_bytes(raw, random) if random.random() < 0.15 else raw
