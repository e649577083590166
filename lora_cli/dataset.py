"""Corpora -> the sets a run sees: split, checked for overlap, cut to length, mixed."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from lora_cli.batches import Mixture, Part
from lora_cli.corpus import Corpus
from lora_cli.data_config import DataConfig, HeldOut
from lora_cli.data_file import DataFile
from lora_cli.errors import NOTHING_LOADED, DataError
from lora_cli.examples import IGNORED, Example, Flag
from lora_cli.randomness import derive_seed
from lora_cli.records import DataCounts, Overlap, SourceCounts

_PERCENTILES = (50, 90, 99, 100)
_BINS = 12


class Dataset(Sequence[Example]):
    """Sequences of one or several corpora, cut to a number of tokens; an Example is made when it is asked for.

    `lengths`, `targets`: tokens and trained tokens of each sequence, after the cut.
    """

    def __init__(self, corpora: Sequence[Corpus], chosen: Sequence[np.ndarray], limit: int) -> None:
        """`chosen`: the indices of the sequences taken from each corpus."""
        self.corpora = corpora
        self.limit = limit
        self.sizes = [len(indices) for indices in chosen]
        self._corpus = np.repeat(np.arange(len(corpora), dtype=np.int32), self.sizes)
        self._index = np.concatenate([np.empty(0, np.int64), *chosen])
        lengths = [corpus.lengths[indices] for corpus, indices in zip(corpora, chosen, strict=True)]
        self.whole_lengths = np.concatenate([np.empty(0, np.int32), *lengths])
        self.lengths = np.minimum(self.whole_lengths, limit)
        self.targets = np.concatenate(
            [np.empty(0, np.int32), *(c.targets[indices] for c, indices in zip(corpora, chosen, strict=True))]
        )
        self.whole_targets = self.targets.copy()
        for index in np.flatnonzero(self.whole_lengths > limit):
            _, answers = self._sequence(int(index))
            self.targets[index] = np.maximum(0, np.minimum(answers[:, 1], limit) - np.maximum(answers[:, 0], 1)).sum()

    def _sequence(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.corpora[self._corpus[index]].sequence(int(self._index[index]))

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "list[Example]": ...
    def __getitem__(self, index: int | slice) -> "Example | list[Example]":
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        ids, answers = self._sequence(index)
        labels = np.full(len(ids), IGNORED, np.int32)
        for begin, end in answers:
            labels[begin:end] = ids[begin:end]
        return Example(tuple(ids[: self.limit].tolist()), tuple(labels[: self.limit].tolist()), self.place(index))

    def place(self, index: int) -> str:
        """Return where the row of a sequence stands."""
        return self.corpora[self._corpus[index]].place(int(self._index[index]))

    def file(self, index: int) -> DataFile:
        """Return the file of a sequence."""
        return self.corpora[self._corpus[index]].file

    def column(self, name: str) -> np.ndarray:
        """Return one number of each sequence, by its name in Corpus."""
        parts = [getattr(c, name)[i] for c, i in zip(self.corpora, self.by_corpus(), strict=True)]
        return np.concatenate([np.empty(0, parts[0].dtype if parts else np.int64), *parts])

    def by_corpus(self) -> list[np.ndarray]:
        """Return the indices of the sequences taken from each corpus."""
        return np.split(self._index, np.cumsum(self.sizes)[:-1]) if self.sizes else []

    def where(self, kept: np.ndarray) -> "Dataset":
        """Return the sequences for which `kept` is true."""
        masks = np.split(kept, np.cumsum(self.sizes)[:-1])
        chosen = [indices[mask] for indices, mask in zip(self.by_corpus(), masks, strict=True)]
        return Dataset(self.corpora, chosen, self.limit)

    def rows(self) -> np.ndarray:
        """Return the number of the row of each sequence, counted through the set; sequences of a row are neighbours."""
        numbers = self.column("numbers")
        new = (np.diff(numbers, prepend=-1) != 0) | (np.diff(self._corpus, prepend=-1) != 0)
        return np.cumsum(new) - 1

    def first_of_rows(self) -> np.ndarray:
        """Return the first sequence of each row."""
        return np.flatnonzero(np.diff(self.rows(), prepend=-1))

    def fingerprint(self) -> str:
        """Return a hash of every token and target of the set, and of their order."""
        digest = hashlib.sha256(str(self.limit).encode())
        for corpus, indices in zip(self.corpora, self.by_corpus(), strict=True):
            digest.update(corpus.digest.encode())
            digest.update(indices.tobytes())
        return digest.hexdigest()[:32]


def whole(corpora: Sequence[Corpus], limit: int) -> Dataset:
    """Return all sequences of some corpora."""
    return Dataset(corpora, [np.arange(len(corpus)) for corpus in corpora], limit)


# --- split ---


def split(dataset: Dataset, config: DataConfig, seed: int, name: HeldOut) -> tuple[Dataset, Dataset | None]:
    """Return a set without the rows that `name` holds out, and these; rows that share `split_by` stay together.

    The same rows for the same data and seed. Raises DataError when a part is left empty.
    """
    held_out = getattr(config, name)
    assert not isinstance(held_out, str), "a file of its own is not split off"
    rows = dataset.rows()
    first = dataset.first_of_rows()
    if not held_out:
        return dataset, None
    count = held_out if isinstance(held_out, int) else round(held_out * len(first))
    if not 0 < count < len(first):
        raise DataError(
            f"data.{name}: {held_out} of {len(first)} rows leaves {len(first) - count} to train on and holds {count} "
            "out; both need at least one. Give a number of rows, a file of its own, or 0 for none.",
            state=NOTHING_LOADED,
        )
    match config.split_by:
        case "row":
            keys = np.arange(len(first))
        case "prompt":
            keys = dataset.column("prompt_keys")[first]
        case _:
            keys = dataset.column("group_keys")[first]
    _, at, group = np.unique(keys, return_index=True, return_inverse=True)
    group = np.argsort(np.argsort(at))[group]  # numbered in the order in which they appear
    chosen = np.isin(group, _choose_groups(np.bincount(group), count, derive_seed(seed, f"{name} split")))
    if chosen.all():
        raise DataError(
            f"data.split_by: all {len(first)} rows have the same {config.split_by}, so none can be held out. Give a "
            f"file of its own as data.{name}, or set data.split_by: row.",
            state=NOTHING_LOADED,
        )
    held = chosen[rows]
    return dataset.where(~held), dataset.where(held)


def _choose_groups(sizes: np.ndarray, count: int, seed: int) -> list[int]:
    """Choose groups at random until they have `count` rows; those that would be too many are passed over."""
    order = list(range(len(sizes)))
    random.Random(seed).shuffle(order)
    chosen, left = [], count
    for group in order:
        if left == 0:
            break
        if sizes[group] <= left:
            chosen.append(group)
            left -= int(sizes[group])
    return chosen or [int(sizes.argmin())]


def find_overlap(train: Sequence[Dataset], held_out: Dataset) -> Overlap:
    """Count the held-out rows that also stand in what is trained on, and those whose prompt does."""
    first = held_out.first_of_rows()
    same_row, same_prompt = (
        np.isin(held_out.column(name)[first], np.concatenate([part.column(name) for part in train]))
        for name in ("row_keys", "prompt_keys")
    )
    shared = np.flatnonzero(same_row | same_prompt)
    places = tuple(held_out.place(int(first[index])) for index in shared[:3])
    return Overlap(int(same_row.sum()), len(shared), len(first), places)


def require_no_overlap(overlap: Overlap, config: DataConfig, name: HeldOut) -> None:
    """Raise DataError where held-out rows are trained on and `data.allow_overlap` does not allow it."""
    if not overlap.prompts or config.allow_overlap:
        return
    split_off = not isinstance(getattr(config, name), str)
    way = "data.split_by: prompt keeps such rows on one side, or" if split_off else "Take them out of one file, or set"
    raise DataError(
        f"data.{name}: {overlap.prompts} of {overlap.of} {name} rows have a prompt that is also trained on "
        f"({overlap.rows} of them are the same row), so {name} would measure memory: {', '.join(overlap.places)}, "
        f"... {way} data.allow_overlap: true accepts them.",
        state=NOTHING_LOADED,
    )


# --- length ---


def fit(dataset: Dataset, config: DataConfig, max_positions: int | None) -> tuple[Dataset, DataCounts]:
    """Return the sequences that fit into `data.max_length`, by the rule of `data.too_long`, and count what was lost.

    Raises DataError naming the rows that are too long (`error`), or when no target is left.
    """
    named = "data.max_length" if dataset.limit == config.max_length else "the model's number of positions"
    too_long = dataset.whole_lengths > dataset.limit
    places = [
        f"{dataset.place(int(i))}: {dataset.whole_lengths[i]} tokens, {named} is {dataset.limit}."
        for i in np.flatnonzero(too_long)[:1000]
    ]
    if places and config.too_long == "error":
        more = int(too_long.sum()) - len(places)
        raise DataError(
            f"data.too_long: {too_long.sum()} of {len(dataset)} sequences are longer than {named}. Raise "
            "data.max_length, or choose drop (leave them out) or truncate (cut their end).",
            *places,
            *["..."] * more,
            state=NOTHING_LOADED,
        )
    kept = dataset.targets > 0
    if config.too_long == "drop":
        kept &= ~too_long
    fitting = dataset.where(kept)
    if not len(fitting):
        raise DataError("No row keeps a single token to train on. Raise data.max_length.", state=NOTHING_LOADED)
    lost = int(dataset.whole_targets.sum()) - int(fitting.targets.sum())
    return fitting, _count(dataset, fitting, int((too_long & kept).sum()), lost, places[:3])


def _count(before: Dataset, after: Dataset, truncated: int, lost: int, places: Sequence[str]) -> DataCounts:
    first = before.first_of_rows()
    keys = before.column("row_keys")[first]
    controls, flags = before.column("controls"), before.column("flags")
    return DataCounts(
        rows=len(first),
        examples=len(after),
        tokens=int(after.lengths.sum()),
        targets=int(after.targets.sum()),
        dropped=len(before) - len(after),
        truncated=truncated,
        lost_targets=lost,
        too_long=tuple(places),
        length_percentiles=_percentiles(after.lengths),
        target_percentiles=_percentiles(after.targets),
        length_histogram=_histogram(after.lengths),
        duplicates=len(keys) - len(np.unique(keys)),
        control_rows=int((controls[first] > 0).sum()),
        control_tokens=int(controls[first].sum()),
        lossy=int((flags & Flag.LOSSY > 0).sum()),
        blank=int((flags & Flag.BLANK > 0)[first].sum()),
        secrets=len(np.unique(before.rows()[flags & Flag.SECRET > 0])),
        without_tools=int((flags & Flag.WITHOUT_TOOLS > 0)[first].sum()),
        sources=tuple(
            SourceCounts(
                corpus.file.name, corpus.format or "", len(np.unique(corpus.numbers[i])), len(i), corpus.unread
            )
            for corpus, i in zip(after.corpora, after.by_corpus(), strict=True)
        ),
    )


def _percentiles(values: np.ndarray) -> tuple[int, ...]:
    ordered = np.sort(values)
    return tuple(int(ordered[min(len(ordered) - 1, len(ordered) * p // 100)]) for p in _PERCENTILES)


def _histogram(values: np.ndarray) -> tuple[int, ...]:
    """Return how many values lie in each of twelve equal steps from 0 to the largest."""
    counts, _ = np.histogram(values, bins=_BINS, range=(0, int(values.max())))
    return tuple(map(int, counts))


# --- mixing ---


@dataclass(frozen=True)
class TrainingSet:
    """What is trained on: the sequences, and how often each source is drawn in an epoch."""

    examples: Dataset
    mixture: Mixture


def mix(train: Dataset, weights: Sequence[tuple[float, int]], replay: Dataset | None, ratio: float) -> TrainingSet:
    """Put sources together: each is seen `weight` times an epoch, replay often enough to be `ratio` of all tokens.

    `weights`: of each source its weight and the number of its files.
    """
    parts, begin, tokens, sizes = [], 0, 0.0, iter(train.sizes)
    for weight, files in weights:
        size = sum(next(sizes) for _ in range(files))
        if size:
            parts.append(Part(begin, size, weight))
            tokens += parts[-1].drawn / size * float(train.lengths[begin : begin + size].sum())
        begin += size
    if replay is None:
        return TrainingSet(train, Mixture(tuple(parts)))
    times = tokens * ratio / (1 - ratio) / float(replay.lengths.sum())
    parts.append(Part(begin, len(replay), times))
    both = Dataset([*train.corpora, *replay.corpora], [*train.by_corpus(), *replay.by_corpus()], train.limit)
    return TrainingSet(both, Mixture(tuple(parts)))
