"""One data file as tokens: made once, in several processes, and kept on the disk as memory-mapped Arrow.

A kept file is found by its content: the data, the tokenizer, the template and the settings are hashed into its name,
so that a change in any of them is another file, and a moved or renamed data file is the same one. Small files are not
kept; making their tokens is quicker than looking.

sequences.arrow   a row a sequence: number, input_ids, answers (token ranges), targets, row_key, prompt_key, ...
facts.json        rows, digest of the tokens
"""

import hashlib
import json
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc

from lora_cli import interrupt, limits, manifest, room, storage
from lora_cli.data import Reader
from lora_cli.data_file import Block
from lora_cli.errors import NOTHING_LOADED, AdapterError, DataError, SurroundingsError
from lora_cli.examples import Encoded, Encoder
from lora_cli.parallel import Overdue, ordered_map, usable_processors
from lora_cli.records import Notice, Preparing

SMALL = 4 << 20  # bytes; a smaller file is neither kept nor cut for several processes
UNUSED_DAYS = 30  # after which a kept file is deleted
_VERSION = 2  # of what is kept; a change in how tokens are made raises it
_SEQUENCES, _FACTS = "sequences.arrow", "facts.json"
_MOST_PROBLEMS = 1000  # kept in memory; the others are counted

_SCHEMA = pyarrow.schema(
    {
        "number": pyarrow.int64(),
        "input_ids": pyarrow.list_(pyarrow.int32()),
        "answers": pyarrow.list_(pyarrow.int32()),  # begin, end, begin, end, ...
        "targets": pyarrow.int32(),
        "row_key": pyarrow.uint64(),
        "prompt_key": pyarrow.uint64(),
        "group_key": pyarrow.uint64(),
        "controls": pyarrow.int32(),
        "flags": pyarrow.int32(),
    }
)
Columns = Mapping[str, np.ndarray]  # by the names of the schema; lists as values and lengths ("input_ids.lengths")


# --- reading ---


class Corpus:
    """The sequences of one data file; arrays have an entry a sequence, in the order of the file."""

    def __init__(self, reader: Reader, batches: Sequence[pyarrow.RecordBatch], digest: str, templated: bool) -> None:
        """`batches` may lie in a memory-mapped file; only numbers of a few bytes a sequence are taken out of them.

        `templated`: some of its rows went through the chat template.
        """
        self.file = reader.file
        self.format = reader.format
        self.unread = reader.unread
        self.digest = digest
        self.templated = templated
        self._ids = [_lists(batch.column("input_ids")) for batch in batches]
        self._answers = [_lists(batch.column("answers")) for batch in batches]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self.lengths = _joined([np.diff(offsets) for _, offsets in self._ids], np.int32)
        self.numbers = self._column(batches, "number", np.int64)
        self.targets = self._column(batches, "targets", np.int32)
        self.row_keys = self._column(batches, "row_key", np.uint64)
        self.prompt_keys = self._column(batches, "prompt_key", np.uint64)
        self.group_keys = self._column(batches, "group_key", np.uint64)
        self.controls = self._column(batches, "controls", np.int32)
        self.flags = self._column(batches, "flags", np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    @staticmethod
    def _column(batches: Sequence[pyarrow.RecordBatch], name: str, dtype: Any) -> np.ndarray:
        return _joined([batch.column(name).to_numpy(zero_copy_only=False) for batch in batches], dtype)

    def sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (ids [T], answers [n, 2]) of a sequence: token ids, and the token ranges that are trained."""
        batch = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = index - int(self._starts[batch])
        lists = (self._ids[batch], self._answers[batch])
        ids, answers = (values[offsets[row] : offsets[row + 1]] for values, offsets in lists)
        return ids, answers.reshape(-1, 2)

    def place(self, index: int) -> str:
        """Return where the row of a sequence stands."""
        return self.file.place(int(self.numbers[index]))


def _lists(column: Any) -> tuple[np.ndarray, np.ndarray]:
    return column.values.to_numpy(), column.offsets.to_numpy()


def _joined(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False)


# --- making ---


@dataclass(frozen=True)
class _Made:
    """What a block of rows became."""

    rows: int
    templated: int  # rows that went through the chat template
    size: int
    columns: Columns
    problems: Sequence[str]


def _columns(sequences: Sequence[Encoded]) -> Columns:
    ids = [token for one in sequences for token in one.input_ids]
    answers = [edge for one in sequences for answer in one.answers for edge in answer]
    return {
        "number": np.array([one.number for one in sequences], np.int64),
        "input_ids": np.array(ids, np.int32),
        "input_ids.lengths": np.array([len(one.input_ids) for one in sequences], np.int32),
        "answers": np.array(answers, np.int32),
        "answers.lengths": np.array([2 * len(one.answers) for one in sequences], np.int32),
        # The first token of a sequence has nothing before it that could predict it.
        "targets": np.array([sum(e - max(b, 1) for b, e in one.answers) for one in sequences], np.int32),
        "row_key": np.array([one.row_key for one in sequences], np.uint64),
        "prompt_key": np.array([one.prompt_key for one in sequences], np.uint64),
        "group_key": np.array([one.group_key for one in sequences], np.uint64),
        "controls": np.array([one.controls for one in sequences], np.int32),
        "flags": np.array([one.flags for one in sequences], np.int32),
    }


def _batch(columns: Columns) -> pyarrow.RecordBatch:
    arrays = []
    for field in _SCHEMA:
        values = columns[field.name]
        if f"{field.name}.lengths" in columns:
            offsets = np.cumsum([0, *columns[f"{field.name}.lengths"]], dtype=np.int32)
            arrays.append(
                pyarrow.ListArray.from_arrays(_array(pyarrow.int32(), offsets), _array(pyarrow.int32(), values))
            )
        else:
            arrays.append(_array(field.type, values))
    return pyarrow.RecordBatch.from_arrays(arrays, schema=_SCHEMA)


def _array(type: pyarrow.DataType, values: np.ndarray) -> pyarrow.Array:
    """Return numbers as Arrow has them; pyarrow.array would import pandas first, which takes a second."""
    return pyarrow.Array.from_buffers(type, len(values), [None, pyarrow.py_buffer(values)])


class _Work:
    """What a process does with a block of rows; it is sent to each process once."""

    def __init__(self, reader: Reader, encoder: Encoder) -> None:
        self.reader = reader
        self.encoder = encoder

    def __call__(self, block: Block) -> _Made:
        rows, problems = self.reader.read(block)
        try:
            sequences, wrong = self.encoder.encode(rows)
        except limits.TemplateLimit as error:
            raise self.refused(error) from None
        problems += [f"{self.reader.file.place(number)}: this row {what}." for number, what in wrong]
        return _Made(len(rows), sum(row.templated for row in rows), block.size, _columns(sequences), problems)

    def refused(self, error: limits.TemplateLimit) -> DataError:
        """Return the error of the row at which the chat template went beyond a limit."""
        place = self.reader.file.place(limits.row_at_work())
        return DataError(f"{place}: {error.problems[0]}", state=NOTHING_LOADED)


class _Digest:
    """A hash of every token and target, in the order of the file."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, columns: Columns) -> None:
        for name in ("input_ids", "input_ids.lengths", "answers", "answers.lengths"):
            self._hash.update(columns[name].tobytes())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()[:32]


def make(reader: Reader, encoder: Encoder) -> Generator[Notice | Preparing, None, Corpus]:
    """Return the corpus of a file: the kept one, or a new one.

    Raises DataError with all wrong rows, each with its place, and then nothing is kept.
    """
    small = reader.file.size < SMALL
    if small:
        batches, digest, templated = list[pyarrow.RecordBatch](), _Digest(), 0
        for made in _iter_made(reader, encoder, processes=1):
            batches.append(_batch(made.columns))
            digest.update(made.columns)
            templated += made.templated
        return Corpus(reader, batches, digest.hexdigest(), templated > 0)
    content = reader.file.digest()
    folder = cache_folder() / _key(reader, encoder, content)
    if folder.is_dir() and (problems := manifest.problems_in(folder)):
        yield Notice(f"{problems[0]}: the kept tokens are damaged; they are made again.")
        storage.remove_directory(folder)
    if not folder.is_dir():
        yield from _keep(reader, encoder, folder, content)
    storage.touch(folder)  # it was used today
    return _open(reader, folder)


def _keep(reader: Reader, encoder: Encoder, folder: Path, content: str) -> Generator[Notice | Preparing, None, None]:
    began, name, total = time.monotonic(), reader.file.name, reader.file.size
    yield Notice(
        f"{name}: {total / 1e6:,.0f} MB are turned into tokens, kept in {folder} for the next time.", warns=False
    )
    try:
        room.require_writable(folder)
        with storage.explained(folder):
            storage.make_folder(folder.parent)
    except SurroundingsError as error:
        raise SurroundingsError(
            *error.problems,
            "Tokens of large files are kept there; LORA_CACHE names another folder.",
            state=NOTHING_LOADED,
        ) from None
    _sweep(folder.parent)
    done = rows = templated = 0
    digest = _Digest()
    try:
        with storage.new_directory(folder) as temporary:
            with (
                storage.explained(folder),
                storage.adding(temporary / _SEQUENCES) as file,
                pyarrow.ipc.new_file(file, _SCHEMA) as writer,
            ):
                for made in _iter_made(reader, encoder, processes=usable_processors()):
                    writer.write_batch(_batch(made.columns))
                    digest.update(made.columns)
                    done, rows, templated = done + made.size, rows + made.rows, templated + made.templated
                    yield Preparing(name, rows, min(1.0, done / total), time.monotonic() - began)
            facts = {"data": name, "rows": rows, "templated": templated, "digest": digest.hexdigest()}
            with storage.explained(folder):
                storage.add_json(temporary / _FACTS, facts)
            if reader.file.digest() != content:
                raise DataError(f"{name}: was changed while it was read; start again.", state=NOTHING_LOADED)
    except AdapterError:  # another process kept it in the meantime
        if not folder.is_dir():
            raise


def _iter_made(reader: Reader, encoder: Encoder, processes: int) -> Iterator[_Made]:
    """Iterate over the blocks of a file as tokens. Raises DataError at the end of a file that has wrong rows."""
    rows = left_out = 0
    problems: list[str] = []
    work = _Work(reader, encoder)
    try:
        for made in ordered_map(work, reader.file.blocks(), processes):
            interrupt.poll()
            rows += made.rows
            problems += made.problems
            left_out += max(0, len(problems) - _MOST_PROBLEMS)
            del problems[_MOST_PROBLEMS:]
            yield made
    except Overdue:
        raise work.refused(limits.too_long()) from None
    if problems:
        raise DataError(*problems, *["..."] * left_out, state=NOTHING_LOADED)
    if not rows:
        raise DataError(f"{reader.file.name}: has no rows to read.", state=NOTHING_LOADED)


def _open(reader: Reader, folder: Path) -> Corpus:
    file = pyarrow.ipc.open_file(pyarrow.memory_map(str(folder / _SEQUENCES)))
    facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    batches = [file.get_batch(number) for number in range(file.num_record_batches)]
    return Corpus(reader, batches, str(facts["digest"]), facts["templated"] > 0)


# --- keeping ---


def cache_folder() -> Path:
    """Return where tokens are kept: $LORA_CACHE, else lora/ in the user's cache folder."""
    if named := os.environ.get("LORA_CACHE"):
        return Path(named) / "tokens"
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora" / "tokens"
    except RuntimeError as error:
        raise SurroundingsError(f"{error} Set LORA_CACHE to a folder for kept tokens.", state=NOTHING_LOADED) from None


def _key(reader: Reader, encoder: Encoder, content: str) -> str:
    """Return the name of a kept file: a hash of all that its tokens depend on."""
    tokenizer, template = encoder.tokenizer, encoder.template
    depends = {
        "version": _VERSION,
        "data": content,
        "kind": reader.file.kind,
        "rows": [reader.format, dict(reader.fields), reader.prompt_template, reader.group_field],
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special": [tokenizer.eos_token_id, tokenizer.bos_token_id, sorted(tokenizer.all_special_tokens)],
        "template": None if template is None else asdict(template),
        "today": None if template is None or template.repeats else str(date.today()),
        "controls": encoder.keep_controls,
        "vocabulary": encoder.vocabulary,
        "libraries": [metadata.version(name) for name in ("tokenizers", "transformers", "jinja2")],
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _sweep(folder: Path) -> None:
    """Delete what was not used for a month; what killed processes left goes when something is written beside it."""
    for kept in folder.iterdir():
        with suppress(OSError, SurroundingsError):
            changed = max(path.stat().st_mtime for path in (kept, *kept.iterdir()))
            if not storage.is_temporary(kept) and time.time() - changed > UNUSED_DAYS * 86400:
                storage.remove_directory(kept)
