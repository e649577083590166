"""What a trained adapter is measured on: held-out rows, and general text."""

from collections.abc import Sequence

from lora_cli import run_dir
from lora_cli.config import EvalConfig
from lora_cli.data_config import DataConfig, SourceConfig
from lora_cli.data_reader import DataReader, held_out_of, run_to_end
from lora_cli.dataset import Dataset
from lora_cli.errors import DataError
from lora_cli.examples import Example
from lora_cli.general import read_general
from lora_cli.tuned import AnyResult


def held_out_rows(result: AnyResult, data_path: str | None) -> tuple[Dataset, int, str]:
    """Return held-out rows, how many there are, and their name: those of a file, or the run's own. Raises DataError."""
    if data_path is not None:
        settings = result.data or DataConfig(train=data_path)
        reader = DataReader(settings, result.header)
        rows, counts = run_to_end(reader.held_out(settings.source(SourceConfig(path=data_path))))
        return rows, counts.rows, data_path
    if result.config is None or result.data is None:
        raise DataError(f"{result.folder}: belongs to no run with validation rows; give --data FILE.")
    held_out, counts, name = run_to_end(held_out_of(result.data, result.config.seed, result.header))
    if name == "training":
        raise DataError("The run had no validation rows (data.validation: 0); give --data FILE.")
    assert result.run is not None, "it has a config"
    before = run_dir.read_environment(result.run).get(f"{name}_fingerprint")
    if before not in (None, held_out.fingerprint()):
        raise DataError(
            f"{result.run.path}: the data changed since this run, so its {name} rows cannot be told from those it "
            "was trained on. Put it back, or give --data FILE."
        )
    return held_out, counts.rows, f"the run's {name} rows"


def general_text(result: AnyResult, path: str | None) -> Sequence[Example]:
    """Return the general text of a path, else that of the run, else ours; empty for false, here or in the run."""
    settings = result.config.eval if result.config else EvalConfig()
    if path is not None:
        settings = settings.model_copy(update={"general": path if path != "false" else False})
    reader = DataReader(result.data or DataConfig(train="-"), result.header)
    return run_to_end(read_general(settings, reader)) or ()
