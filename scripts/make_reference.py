"""Write the references that follow from the code: docs/config.md, docs/json.md and docs/json-schema.json.

Run: python scripts/make_reference.py             write them
     python scripts/make_reference.py --check     exit 1 if the files on disk are not what the code says
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from output_shapes import first_paragraph, json_page, json_schema, meanings, table

from lora_cli import config, data_config
from lora_cli.schema import OnResume, Section, rules
from lora_cli.strict_yaml import dump_inline

DOCS = Path(__file__).resolve().parent.parent / "docs"

# A use of each section; tests/test_documents.py loads them.
EXAMPLES = """
model:
  path: HuggingFaceTB/SmolLM2-135M-Instruct
  dtype: bfloat16

lora:
  rank: 16
  alpha: 32
  target_modules: [q_proj, v_proj]

data:
  train: train.jsonl
  validation: 20               # rows
  too_long: drop

train:
  epochs: 2
  learning_rate: 2e-4
  schedule: linear
  trackers: [tensorboard]
  early_stopping:
    patience: 5

eval:
  per_epoch: 8
  forgetting_budget: 0.05      # nats a token on general text

save:
  per_epoch: 1
  keep: 1

tune:
  trials: 12
  space:
    train.learning_rate: {low: 1e-4, high: 1e-2, log: true}
    lora.rank: [8, 32]
""".strip().split("\n\n")
# Sections that stand in lists and maps, by the key that holds them.
INSIDE: Mapping[str, type[Section]] = {
    "data.train": data_config.SourceConfig,
    "data.replay": data_config.ReplayConfig,
    "tune.space": config.Range,
}
RULES = {None: "fixed"} | {rule: rule.name.lower() for rule in OnResume}

CONFIG_HEAD = """# The config, key by key

Written by `scripts/make_reference.py` from the types that a config is read with. Unknown keys are errors, and so is a
value of another type: `"8"` is no number. `lora init` writes a config with all of them, `lora init --schema` prints the
JSON Schema for editors. On the command line `KEY=VALUE` sets a dotted key: `lora train config.yaml lora.rank=8`.

The last column says what becomes of a run that exists already when its config comes with another value:

"""


def accepted(schema: Mapping[str, Any]) -> str:
    """What a key takes, in words."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(accepted(one) for one in schema["anyOf"]))
    if "enum" in schema:
        return " or ".join(f"`{one}`" for one in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const']) if isinstance(schema['const'], bool) else schema['const']}`"
    if "$ref" in schema:
        return "keys"
    match schema.get("type"):
        case "array":
            inner = schema.get("items", {})
            return "a list" if not inner or "$ref" in inner else f"a list of {accepted(inner)}"
        case "object":
            return "keys with values"
        case "integer" | "number" as kind:
            signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
            limits = [f"{sign} {schema[key]:g}" for key, sign in signs.items() if abs(schema.get(key, 1e99)) < 1e9]
            return " ".join(["whole number" if kind == "integer" else "number", *limits])
        case "string":
            return "text"
        case "boolean":
            return "`true` or `false`"
        case "null":
            return "`null`"
    return "any value"


def without_choices(meaning: str, schema: Mapping[str, Any]) -> str:
    """A description without the choices it begins with for those who read `lora init`: here they have a column."""
    head, _, rest = meaning.partition(": ")
    choices = head.split(" | ")
    return rest if len(choices) > 1 and all(f"`{one}`" in accepted(schema) for one in choices) else meaning


def _is_section(kind: Any) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)


def keys_of(section: type[Section], prefix: str, known: Mapping[str, str]) -> Iterator[Sequence[str]]:
    """The rows of a section's table, those of sections inside it after them."""
    schema = section.model_json_schema()["properties"]
    inner = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        if _is_section(kind):
            inner.append((name, kind))
            continue
        default = "" if field.is_required() else f"`{dump_inline(field.default)}`"
        meaning = without_choices(field.description or meanings(section)[name], schema[name])
        yield f"`{prefix}{name}`", accepted(schema[name]), default, meaning, known.get(f"{prefix}{name}", "fixed")
    for name, kind in inner:
        yield from keys_of(kind, f"{prefix}{name}.", known)


def config_page() -> str:
    """docs/config.md."""
    lines = [CONFIG_HEAD + "\n".join(f"- **{rule.name.lower()}**: {rule.value}." for rule in OnResume) + "\n"]
    known = {key: RULES[rule] for key, rule in rules(config.RunConfig)}
    head = ("key", "takes", "default", "meaning", "when a run goes on")
    top = config.RunConfig.model_fields
    examples = {text.partition(":")[0]: text for text in EXAMPLES}
    sections = {name: kind for name, field in top.items() if _is_section(kind := field.annotation)}
    others = [row for row in keys_of(config.RunConfig, "", known) if row[0].strip("`") in top.keys() - sections.keys()]
    for name, section in sections.items():
        lines += [f"## {name}", "", first_paragraph(section), "", *table(head, keys_of(section, f"{name}.", known))]
        for place, inside in INSIDE.items():
            if place.startswith(f"{name}."):
                rows = ((*row[:-1], known.get(place, "fixed")) for row in keys_of(inside, "", known))
                lines += [f"In `{place}`: {first_paragraph(inside)}", "", *table(head, rows)]
        lines += ["```yaml", examples[name], "```", ""]
    lines += ["## Beside the sections", "", *table(head, iter(others))]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> int:
    """Write the files, or with --check compare them; return the exit status."""
    parser = argparse.ArgumentParser(description="Write the references that follow from the code.")
    parser.add_argument("--check", action="store_true", help="only compare the files on disk")
    check = parser.parse_args(argv).check
    pages = {"config.md": config_page(), "json.md": json_page(), "json-schema.json": json_schema()}
    stale = []
    for name, text in pages.items():
        path = DOCS / name
        if not check:
            path.write_text(text, encoding="utf-8", newline="\n")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
    if stale:
        print(f"Not what the code says: {', '.join(stale)}; run python scripts/make_reference.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
