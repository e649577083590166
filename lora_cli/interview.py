"""The few questions that `lora init` asks in a terminal, on stderr; each answer is looked at before the next."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer

from lora_cli import base_folder, columns, console
from lora_cli.data_file import kind_of
from lora_cli.errors import NOTHING_READ, InputError, UserError, shown
from lora_cli.nearby import did_you_mean
from lora_cli.sources import is_hub_id

_MODEL, _DATA, _OUTPUT_DIR = "HuggingFaceTB/SmolLM2-135M-Instruct", "train.jsonl", "runs/first"
_MOST = 9  # candidates that are named
_NOT_ROWS = ("package.json", "tsconfig.json", "config.json")


@dataclass(frozen=True)
class Wishes:
    """What is to be trained, on what, where to; null is not said yet. `keep`: what the model knows is to stay."""

    model: str | None
    data: str | None
    output_dir: str | None
    keep: bool = False

    def given(self) -> dict[str, str]:
        """Return what was said, by the keys of the config."""
        named = {"model.path": self.model, "data.train": self.data, "output_dir": self.output_dir}
        return {key: value for key, value in named.items() if value is not None}

    def filled_in(self) -> "Wishes":
        """Return them with the usual where nothing was said."""
        return Wishes(self.model or _MODEL, self.data or _DATA, self.output_dir or _OUTPUT_DIR, self.keep)


def ask(said: Wishes) -> Wishes:
    """Ask for what was not said yet. Raises InputError where nobody answers."""
    try:
        data = said.data or _choose("Training data", _data_here(), _DATA, _check_data)
        model = said.model or _choose("Model to train", [*_models_here(), _MODEL], _MODEL, _check_model)
        output_dir = said.output_dir or _answer("Folder for the run", _OUTPUT_DIR, _check_output)
        keep = typer.confirm("Must it keep what it knows beyond this task?", default=False, err=True)
    except typer.Abort:
        raise InputError(
            "No answer came; --yes asks nothing, and --model, --data and --output-dir answer beforehand."
        ) from None
    return Wishes(model, data, output_dir, keep)


def _choose(question: str, candidates: Sequence[str], usual: str, check: Callable[[str], None]) -> str:
    """Ask for one of some candidates, by its number, or for another."""
    for number, candidate in enumerate(candidates, start=1):
        console.message(f"  {number}  {candidate}")
    what = f"{question} (a number, or another)" if candidates else question
    by_number = {str(number): candidate for number, candidate in enumerate(candidates, start=1)}
    answer = _answer(what, "1" if candidates else usual, lambda text: check(by_number.get(text, text)))
    return by_number.get(answer, answer)


def _answer(question: str, usual: str, check: Callable[[str], None]) -> str:
    """Ask until an answer passes its check."""
    while True:
        answer = str(typer.prompt(question, default=usual, err=True)).strip()
        try:
            check(answer)
        except UserError as error:
            console.message("\n".join(error.problems[:3]))
        else:
            return answer


# --- what is here ---


def _data_here() -> list[str]:
    found = [path for folder in (Path(), Path("data")) if folder.is_dir() for path in sorted(folder.iterdir())]
    rows = [path for path in found if path.is_file() and path.name[0] != "." and kind_of(path) is not None]
    first = sorted(rows, key=lambda path: "train" not in path.name)
    return [str(path) for path in first if path.name not in _NOT_ROWS][:_MOST]


def _models_here() -> list[str]:
    return sorted(str(path.parent) for path in Path("models").glob("*/config.json"))[:_MOST]


# --- checks ---


def _check_data(answer: str) -> None:
    if is_hub_id(answer):
        console.message(
            f"{shown(answer)} is no file here; it is taken for a data set of the hub.{did_you_mean(Path(answer))}"
        )
        return
    columns.settings_for(answer)


def _check_model(answer: str) -> None:
    if base_folder.find_kept(answer) is None:
        hint = did_you_mean(Path(answer), Path.is_dir)
        console.message(
            f"{shown(answer)} is no folder here; it is taken for a model of the hub, to be fetched later.{hint}"
        )


def _check_output(answer: str) -> None:
    if Path(answer).exists() and not Path(answer).is_dir():
        raise InputError(f"{shown(answer)} is a file; name a folder.", state=NOTHING_READ)
