"""General text, on which forgetting is measured: what the user names, or a small text that comes along."""

from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np

from lora_cli import data
from lora_cli.chat_template import begins_with_bos
from lora_cli.config import EvalConfig
from lora_cli.data_reader import DataReader, News
from lora_cli.examples import Example
from lora_cli.sources import is_plain_text, read_plain_text

OURS = Path(__file__).with_name("general.txt")
WINDOW = 128  # tokens: many short windows say more about the error than a few long ones


def read_general(config: EvalConfig, reader: DataReader) -> Generator[News, None, Sequence[Example] | None]:
    """Return `eval.general` as examples of at most `eval.general_tokens` tokens in all, spread evenly over it.

    Plain text is cut into windows, each trained token for token; rows are taken as data is. None where it is off.
    """
    if config.general is False:
        return None
    if (source := data.general_source(config.general_source)) is None or is_plain_text(source.path):
        path = Path(source.path).expanduser() if source else OURS
        return _windows(path, reader, config.general_tokens)
    rows, _ = yield from reader.held_out(source)
    return [rows[int(index)] for index in spread(len(rows), config.general_tokens / float(rows.lengths.mean()))]


def _windows(path: Path, reader: DataReader, tokens: int) -> list[Example]:
    tokenizer = reader.encoder.tokenizer
    start = (tokenizer.bos_token_id,) if begins_with_bos(tokenizer) else ()
    lines = read_plain_text(path).splitlines(keepends=True)
    encoded = tokenizer(lines, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ids = [token for line in encoded for token in line]
    size = min(WINDOW, reader.limit) - len(start)
    whole = [(*start, *ids[begin : begin + size]) for begin in range(0, max(1, len(ids) - size + 1), size)]
    return [
        Example(whole[index], whole[index], f"{path.name}: window {index + 1} of {len(whole)}")
        for index in map(int, spread(len(whole), tokens / (size + len(start))))
    ]


def spread(count: int, wanted: float) -> np.ndarray:
    """Return indices below a count, evenly spread: the wanted number of them, at most all and at least one."""
    taken = max(1, min(count, int(wanted)))
    return np.arange(taken) * count // taken
