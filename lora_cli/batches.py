"""Which examples each step sees, and how they are laid out in memory.

The plan is data: an epoch is a pure function of (mixture, seed, epoch), a step's micro-batches one of its examples.
"""

import functools
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_cli.attention import Segment, Segments
from lora_cli.dropout import token_keys
from lora_cli.examples import IGNORED, Example
from lora_cli.randomness import derive_seed

Step = tuple[int, ...]  # indices of the examples of one optimizer update
Form = Literal["packed", "padded", "single"]  # sequences in one row, in several rows, or one a forward

_WORTH_SHARING = 16  # tokens: sharing a shorter prefix costs attention more than it saves
_MOST_SHARING = 64  # sequences that are tried as one group


class Group(NamedTuple):
    """Examples (by their number) whose first `prefix` tokens are the same and run once."""

    members: tuple[int, ...]
    prefix: int = 0


MicroBatch = tuple[Group, ...]  # what one forward sees
ALONE: MicroBatch = (Group((0,)),)  # of a single example


@dataclass(frozen=True)
class Batch:
    """Sequences laid out for one forward, and where their targets are.

    A position is a target when the token that follows it is trained; `labels` are those tokens. Examples that share a
    prefix may share a position, which is then the place of several labels.
    """

    input_ids: Tensor  # [1, T] packed, [B, T] padded on the right
    position_ids: Tensor  # as input_ids, from 0 in each sequence
    segments: Segments
    positions: Tensor  # [M], increasing indices into B * T
    labels: Tensor  # [N], N >= M
    places: Tensor | None  # [N], which of the positions a label belongs to; None where each has one
    owners: tuple[int, ...]  # [N], the number of the example a label belongs to
    keys: Tensor  # [B * T], what `dropout.token_keys` gives each token

    @property
    def targets(self) -> int:
        return len(self.labels)


def micro_batches(examples: Sequence[Example], tokens: int, form: Form, share: bool = False) -> list[MicroBatch]:
    """Divide examples into micro-batches: `groups_of` them, as `pack` puts them together."""
    return pack(groups_of(examples, tokens, form, share), examples, tokens, form)


def groups_of(examples: Sequence[Example], tokens: int, form: Form, share: bool) -> list[Group]:
    """Return examples by themselves; `share` puts packed ones together that begin with the same tokens."""
    if share and form == "packed":
        return shared_prefixes(examples, tokens)
    return [Group((number,)) for number in range(len(examples))]


def pack(groups: Sequence[Group], examples: Sequence[Example], tokens: int, form: Form) -> list[MicroBatch]:
    """Put groups into micro-batches of at most `tokens` tokens (padding counts), the longest first.

    A group longer than the budget gets a micro-batch of its own.
    """
    if form == "packed":
        return _bins(groups, examples, tokens)
    if form == "single":
        return [(group,) for group in _largest_first(groups, examples)]
    rows: list[list[Group]] = []
    for group in _largest_first(groups, examples):
        if rows and (len(rows[-1]) + 1) * size_of(rows[-1][0], examples) <= tokens:
            rows[-1].append(group)
        else:
            rows.append([group])
    return [tuple(row) for row in rows]


def _bins(groups: Sequence[Group], examples: Sequence[Example], tokens: int) -> list[MicroBatch]:
    """Put groups into few bins, about equally full where that is possible: then the fullest takes the least memory."""
    size = {group: size_of(group, examples) for group in groups}
    first_fit: list[list[Group]] = []
    free: list[int] = []
    for group in _largest_first(groups, examples):
        fits = next((number for number, room in enumerate(free) if room >= size[group]), None)
        if fits is None:
            first_fit.append([group])
            free.append(tokens - size[group])
        else:
            first_fit[fits].append(group)
            free[fits] -= size[group]
    even = deal(groups, examples, len(first_fit))

    def length(one: Sequence[Group]) -> int:
        return sum(size[group] for group in one)

    longest = max(map(length, even), default=0)
    chosen = even if longest <= max(map(length, first_fit), default=0) else first_fit
    return [tuple(one) for one in sorted(chosen, key=length, reverse=True)]


def deal(groups: Sequence[Group], examples: Sequence[Example], hands: int) -> list[list[Group]]:
    """Give each group, the largest first, to the hand that has the fewest tokens."""
    dealt: list[list[Group]] = [[] for _ in range(hands)]
    lengths = [0] * hands
    for group in _largest_first(groups, examples):
        shortest = lengths.index(min(lengths))
        dealt[shortest].append(group)
        lengths[shortest] += size_of(group, examples)
    return dealt


def _largest_first(groups: Sequence[Group], examples: Sequence[Example]) -> list[Group]:
    return sorted(groups, key=lambda group: (-size_of(group, examples), group))


def size_of(group: Group, examples: Sequence[Example]) -> int:
    """Return the tokens that a group runs."""
    return sum(len(examples[number]) - group.prefix for number in group.members) + group.prefix


def shared_prefixes(examples: Sequence[Example], tokens: int) -> list[Group]:
    """Divide examples into groups that begin alike, so that the fewest tokens are run; none runs more than `tokens`.

    In the order of their tokens those that share most are neighbours, so the best division is found by going through
    it once: the most saved up to each example, over all groups that may end there.
    """
    order = sorted(range(len(examples)), key=lambda number: examples[number].input_ids)
    common = [
        _common(examples[before].input_ids, examples[after].input_ids) for before, after in itertools.pairwise(order)
    ]
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # (saved, where the last group begins, its prefix) up to each place
    for end in range(1, len(order) + 1):
        found = (best[end - 1][0], end - 1, 0)
        prefix, longest = tokens, len(examples[order[end - 1]])
        for begin in range(end - 2, max(-1, end - 1 - _MOST_SHARING), -1):
            prefix = min(prefix, common[begin])
            longest += len(examples[order[begin]])
            saved = (end - begin - 1) * prefix
            if prefix < _WORTH_SHARING or longest - saved > tokens:
                break
            found = max(found, (best[begin][0] + saved, begin, prefix))
        best.append(found)
    groups, end = [], len(order)
    while end:
        _, begin, prefix = best[end]
        groups.append(Group(tuple(order[begin:end]), prefix))
        end = begin
    return groups[::-1]


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens two sequences begin with alike, at least one token of each left over."""
    most = min(len(first), len(second)) - 1
    return next((place for place in range(most) if first[place] != second[place]), most)


def steps_in_epoch(examples: int, batch_size: int) -> int:
    """Return the number of steps of an epoch; the last one may see fewer examples."""
    return -(-examples // batch_size)


@dataclass(frozen=True)
class Part:
    """Neighbouring examples of one source, and how many times an epoch sees each; 0.5 sees half of them."""

    begin: int
    count: int
    times: float = 1.0

    @property
    def drawn(self) -> int:
        """Examples an epoch draws: a whole number, and never none."""
        return max(1, int(self.times) * self.count + round(self.times % 1 * self.count))


@dataclass(frozen=True)
class Mixture:
    """Which examples an epoch sees, before they are put in order."""

    parts: tuple[Part, ...]

    @property
    def drawn(self) -> int:
        """Examples an epoch draws; the same for every epoch."""
        return sum(part.drawn for part in self.parts)

    def draw(self, seed: int, epoch: int) -> list[int]:
        """Return the examples of an epoch (the first is 0). What is seen in part goes on where the last epoch ended."""
        drawn: list[int] = []
        for number, part in enumerate(self.parts):
            once = range(part.begin, part.begin + part.count)
            drawn += list(once) * int(part.times)
            if some := part.drawn - int(part.times) * part.count:
                shuffled = list(once)
                random.Random(derive_seed(seed, "mixture", number)).shuffle(shuffled)
                drawn += [shuffled[(epoch * some + index) % part.count] for index in range(some)]
        return drawn


def plan_epoch(
    mixture: Mixture, batch_size: int, seed: int, epoch: int, keys: Sequence[int] | None = None
) -> list[Step]:
    """Plan the steps of an epoch (the first is 0): what the mixture draws, in an order of its own for each epoch.

    Examples with the same key (one for each example) stay together, where the first of them stands.
    """
    order = _order(mixture, seed, epoch)
    if keys is not None:
        first: dict[int, int] = {}
        for place, index in enumerate(order):
            first.setdefault(keys[index], place)
        order = tuple(sorted(order, key=lambda index: first[keys[index]]))
    return [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]


@functools.lru_cache(maxsize=1)  # the trials of a search have the same
def _order(mixture: Mixture, seed: int, epoch: int) -> tuple[int, ...]:
    order = mixture.draw(seed, epoch)
    random.Random(derive_seed(seed, "order", epoch)).shuffle(order)
    return tuple(order)


def collate(groups: MicroBatch, examples: Sequence[Example], device: torch.device, padded: bool = False) -> Batch:
    """Lay the examples of groups out one behind the other, or (`padded`) each in a row of its own.

    What stands right of a shorter row's end is seen by none of its tokens, in a causal model.
    """
    ids: list[int] = []
    in_sequence: list[int] = []
    segments: list[Segment] = []
    positions: list[int] = []
    labels: list[int] = []
    owners: list[int] = []
    keys: list[Tensor] = []
    width = max(len(examples[number]) for group in groups for number in group.members) if padded else 0

    def put(example: Example, first: int, end: int, prefix: int | None) -> int:
        """Lay out the tokens of an example from `first` to `end`; return where they begin."""
        begin, tokens = len(ids), example.input_ids[first:end]
        empty = max(0, width - len(tokens))
        ids.extend((*tokens, *(0,) * empty))
        in_sequence.extend(range(first, first + len(tokens) + empty))
        segments.append(Segment(len(tokens), prefix))
        keys.append(F.pad(token_keys(example.input_ids)[first:end], (0, empty)))
        return begin

    for group in groups:
        prefix = group.prefix
        shared_at = put(examples[group.members[0]], 0, prefix, None) if prefix else 0
        shared = len(segments) - 1 if prefix else None
        for number in group.members:
            example = examples[number]
            begin = put(example, prefix, len(example), shared) - prefix
            for index, label in enumerate(example.labels[1:]):
                if label != IGNORED:
                    positions.append(index + (begin if index >= prefix else shared_at))
                    labels.append(label)
                    owners.append(number)

    def tensor(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    rows = len(groups) if padded else 1
    input_ids, position_ids = (tensor(values).view(rows, -1) for values in (ids, in_sequence))
    distinct = sorted(set(positions))
    places = None
    if len(distinct) < len(positions):
        number_of = {position: number for number, position in enumerate(distinct)}
        places = tensor([number_of[position] for position in positions])
    of_tokens = torch.cat(keys).to(device)
    where = tensor(distinct), tensor(labels), places, tuple(owners)
    return Batch(input_ids, position_ids, Segments(*segments), *where, of_tokens)
