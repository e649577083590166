"""The text of a config to start from: what is set, each with its reason; behind #, everything else at its default."""

from collections.abc import Iterator, Mapping
from typing import Any

from lora_cli.config import RunConfig
from lora_cli.schema import Section
from lora_cli.strict_yaml import dump_inline

SCHEMA = ".lora-schema.json"  # beside the config, so that both may be moved, and are read without a network
_MODELINE = f"# yaml-language-server: $schema={SCHEMA}"  # as the YAML extensions of editors read it
_HOW = "# What starts with # is a default: take the # away to change it. `lora check` shows what a run would do."
# What is set in every config, since it is what is changed first.
_SHOWN = frozenset(
    {
        *("model.path", "lora.rank", "lora.alpha", "data.train", "data.validation", "data.max_length", "data.too_long"),
        *("train.epochs", "train.batch_size", "train.learning_rate", "eval.per_epoch", "output_dir"),
    }
)


def text(settings: Mapping[str, Any], reasons: Mapping[str, str]) -> str:
    """Return a config with some dotted keys set; a reason stands in the place of a key's description."""
    config = RunConfig.model_validate(nested(settings))
    lines = [_MODELINE, _HOW, *_section(config, frozenset(settings) | _SHOWN, reasons, "")]
    return "\n".join(lines) + "\n"


def with_schema(recipe: str) -> str:
    """Return a recipe's text that names the schema for editors."""
    return f"{_MODELINE}\n{recipe}"


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return dotted keys as sections."""
    values: dict[str, Any] = {}
    for dotted, value in settings.items():
        *above, last = dotted.split(".")
        section = values
        for part in above:
            section = section.setdefault(part, {})
        section[last] = value
    return values


def _section(section: Section, live: frozenset[str], reasons: Mapping[str, str], prefix: str) -> Iterator[str]:
    """Iterate over a section's lines, those that are set first."""
    indent = "  " * prefix.count(".")
    plain = section.model_dump(mode="json")
    fields = type(section).model_fields
    for name in sorted(fields, key=lambda name: bool(prefix) and not _is_live(prefix + name, live)):
        key, value, off = prefix + name, getattr(section, name), not _is_live(prefix + name, live)
        if isinstance(value, Section):
            what = (type(value).__doc__ or "").strip().rstrip(".").lower()
            inner = list(_section(value, live, reasons, f"{key}."))
            yield from ("",) if not prefix else ()
            yield _line(indent, off, f"{name}:", what)
            yield from (_off(line, indent) for line in inner) if off else inner
        else:
            said = reasons.get(key, fields[name].description or "")
            yield from ("",) if key == "seed" else ()
            written = value if isinstance(value, int) else plain[name]  # 32, not 32.0
            yield _line(indent, off, f"{name}: {dump_inline(written)}", said)


def _is_live(key: str, live: frozenset[str]) -> bool:
    return any(each == key or each.startswith(f"{key}.") for each in live)


def _line(indent: str, off: bool, code: str, comment: str) -> str:
    return f"{indent}{'# ' if off else ''}{code}".ljust(37) + f" # {comment}"


def _off(line: str, indent: str) -> str:
    """Return a line of a section that is off: its own sign for that goes where the section's is."""
    return f"{indent}# {line.removeprefix(indent).replace('# ', '', 1)}"
