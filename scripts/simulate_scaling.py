"""What training would take on 1 to 1,024 GPUs: memory of each and time, on paper. A model, not a measurement.

    python scripts/simulate_scaling.py [--batch-size 1024] [--length 512] [--rank 16] [--sizes 8 70]

prints Markdown tables. Every number it assumes stands at the top of this file.
"""

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

# An H100 SXM and a machine with eight of them, by the vendor's data sheets (H100, DGX H100): dense bfloat16, HBM3,
# NVLink in one direction, eight network cards of 400 Gbit/s.
PEAK, MEMORY_RATE, MEMORY = 989e12, 3.35e12, 80e9
NVLINK, NETWORK, PER_MACHINE = 450e9, 8 * 50e9, 8
# Assumptions. Llama 3 was trained at 38-43 % of the peak on 8,192 to 16,384 of these (arXiv 2407.21783, table 4).
SHARE_OF_PEAK, SHARE_OF_LINKS, USABLE = 0.4, 0.75, 0.9
HOP = 5e-6  # seconds between neighbours in the ring of an all-gather or all-reduce, however little is sent
BLOCK = 3e-4  # seconds that launching a block's kernels takes, forward and backward, however few tokens it sees
MOST_TOKENS = 4096  # of a forward
TRAINED = 1 / 3  # of all tokens are targets
CHUNK = 512  # targets whose logits exist at a time
PROCESS = 1.07e9
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight

GPUS = (1, 8, 16, 64, 256, 1024)
Mode = Literal["replicated", "nf4", "sharded", "nf4, sharded"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class Shape:
    """A decoder as its config.json gives it; `keys` is the width of all its key heads."""

    name: str
    vocabulary: int
    hidden: int
    inner: int
    blocks: int
    queries: int
    keys: int
    tied: bool = False

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(in, out) of a block's linear layers."""
        hidden, inner = self.hidden, self.inner
        attention = [(hidden, self.queries), (hidden, self.keys), (hidden, self.keys), (self.queries, hidden)]
        return [*attention, (hidden, inner), (hidden, inner), (inner, hidden)]

    @property
    def block(self) -> int:
        """The weights of a block."""
        return sum(a * b for a, b in self.layers)

    @property
    def ends(self) -> int:
        """The weights of embedding and head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def adapter(self, rank: int) -> int:
        """The trained numbers."""
        return rank * self.blocks * sum(a + b for a, b in self.layers)

    @property
    def kept(self) -> int:
        """The bytes that a block keeps of a token in bfloat16 (as `lora check` counts them, to a fifth)."""
        return 2 * (4 * self.hidden + 2 * self.queries + 2 * self.keys + 2 * self.inner)


SHAPES = (
    Shape("0.1 B (SmolLM2-135M)", 49152, 576, 1536, 30, 576, 192, tied=True),
    Shape("0.5 B (Qwen2.5)", 151936, 896, 4864, 24, 896, 128, tied=True),
    Shape("1 B (Llama 3.2)", 128256, 2048, 8192, 16, 2048, 512, tied=True),
    Shape("3 B (Llama 3.2)", 128256, 3072, 8192, 28, 3072, 1024, tied=True),
    Shape("8 B (Llama 3.1)", 128256, 4096, 14336, 32, 4096, 1024),
    Shape("14 B (Qwen2.5)", 152064, 5120, 13824, 48, 5120, 1024),
    Shape("32 B (Qwen2.5)", 152064, 5120, 27648, 64, 5120, 1024),
    Shape("70 B (Llama 3.3)", 128256, 8192, 28672, 80, 8192, 1024),
    Shape("405 B (Llama 3.1)", 128256, 16384, 53248, 126, 16384, 1024),
)


@dataclass(frozen=True)
class Plan:
    """A step of `batch` examples of `length` tokens, on some GPUs."""

    shape: Shape
    mode: Mode
    gpus: int
    batch: int
    length: int
    rank: int

    @property
    def tokens(self) -> int:
        """The tokens of a forward: as many as keep all GPUs at work, at least one example."""
        return max(self.length, min(MOST_TOKENS, self.batch * self.length // self.gpus))

    @property
    def rounds(self) -> int:
        """The forwards that the busiest GPU makes in a step."""
        return math.ceil(math.ceil(self.batch * self.length / self.tokens) / self.gpus)

    @property
    def shared(self) -> int:
        """Among how many GPUs the blocks are divided."""
        return self.gpus if "sharded" in self.mode else 1

    @property
    def weight(self) -> float:
        """The bytes of a weight of the blocks."""
        return NF4 if "nf4" in self.mode else 2

    @property
    def recomputes(self) -> bool:
        """Whether activations are computed again: where they do not fit otherwise."""
        return self.memory(again=False) > USABLE * MEMORY

    def memory(self, again: bool) -> float:
        """Return the bytes on each GPU."""
        shape = self.shape
        base = 2 * shape.ends + self.weight * shape.block * shape.blocks / self.shared
        in_flight = 2 * self.weight * shape.block if self.shared > 1 else 0
        if self.weight == NF4:
            in_flight += 2 * max(a * b for a, b in shape.layers)
        kept = shape.blocks * 2 * shape.hidden + 3 * shape.kept if again else (shape.blocks + 2) * shape.kept
        activations = self.tokens * kept + CHUNK * shape.vocabulary * 8
        return base + 16 * shape.adapter(self.rank) + activations + in_flight + PROCESS

    @property
    def fits(self) -> bool:
        """Whether it fits, activations computed again where they have to be."""
        return self.memory(again=True) <= USABLE * MEMORY

    def parts(self) -> dict[str, float]:
        """Return the seconds of a forward and its backward pass, by what they would be bound by alone."""
        shape, passes = self.shape, 3 if self.recomputes else 2
        weights = shape.block * shape.blocks
        attention = 2 * self.length * shape.queries * shape.blocks  # causal: half of all pairs
        of_token = passes * (2 * weights + attention) + 6 * shape.adapter(self.rank) + attention
        of_head = 4 * TRAINED * shape.vocabulary * shape.hidden
        decoded = passes * weights * (NF4 + 2) / MEMORY_RATE if self.weight == NF4 else 0.0
        rate = SHARE_OF_LINKS * (NVLINK if self.shared <= PER_MACHINE else NETWORK)
        hops = shape.blocks * (self.shared - 1) * HOP
        return {
            "arithmetic": (of_token + of_head) * self.tokens / (PEAK * SHARE_OF_PEAK) + decoded,
            "weights' reading": passes * 2 * weights / MEMORY_RATE + decoded,
            "launches": shape.blocks * BLOCK,
            "gathering": 2 * (self.weight * weights * (1 - 1 / self.shared) / rate + hops),
        }

    @property
    def step(self) -> float:
        """The seconds of a step: gathering runs beside arithmetic; then the adapter's gradients are added up."""
        rate = SHARE_OF_LINKS * (NVLINK if self.gpus <= PER_MACHINE else NETWORK)
        added = 2 * 4 * self.shape.adapter(self.rank) * (1 - 1 / self.gpus) / rate + 2 * (self.gpus - 1) * HOP
        return self.rounds * max(self.parts().values()) + added

    @property
    def seconds(self) -> float:
        """The seconds of a million tokens."""
        return self.step * 1e6 / (self.batch * self.length)

    @property
    def bound_by(self) -> str:
        """What a GPU more would not help against."""
        if self.gpus > self.batch:
            return "examples of a step"
        parts = self.parts()
        return max(parts, key=lambda name: parts[name])


def row(cells: Iterable[str]) -> str:
    """Return a row of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def _digits(value: float) -> str:
    """Return a number with two or three digits that mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.3g}"


def table(title: str, head: list[str], shapes: Iterable[Shape], plans: Callable[[Shape, Mode], list[str]]) -> None:
    """Print a Markdown table, a row for each model and way of keeping its base."""
    print(f"\n{title}\n")
    print(row(["model", "base", *head]))
    print(row(["---"] * (2 + len(head))))
    for shape in shapes:
        for mode in MODES:
            print(row([shape.name, mode, *plans(shape, mode)]))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=1024, help="examples of a step, over all GPUs")
    parser.add_argument("--length", type=int, default=512, help="tokens of an example")
    parser.add_argument("--rank", type=int, default=16)
    sizes = [shape.name.split()[0] for shape in SHAPES]
    parser.add_argument("--sizes", nargs="+", choices=sizes, default=sizes, help="models, by their billions")
    asked = parser.parse_args()
    shapes = [shape for shape in SHAPES if shape.name.split()[0] in asked.sizes]

    def plan(shape: Shape, mode: Mode, gpus: int) -> Plan:
        return Plan(shape, mode, gpus, asked.batch_size, asked.length, asked.rank)

    def memory(shape: Shape, mode: Mode) -> list[str]:
        plans = [plan(shape, mode, gpus) for gpus in GPUS]
        return [f"{each.memory(each.recomputes) / 1e9:.0f}" + ("" if each.fits else " (no)") for each in plans]

    def seconds(shape: Shape, mode: Mode) -> list[str]:
        plans = [plan(shape, mode, gpus) for gpus in GPUS]
        shown = [_digits(each.seconds) + ("*" if each.recomputes else "") if each.fits else "-" for each in plans]
        fitting = [each for each in (plan(shape, mode, 2**n) for n in range(11)) if each.fits]
        if not fitting:
            return [*shown, "-", "-"]
        work = fitting[0].seconds * fitting[0].gpus
        worth = [each.gpus for each in fitting if each.seconds * each.gpus <= 2 * work]
        return [*shown, f"{max(worth):,}", plans[-1].bound_by]

    examples = f"{asked.batch_size:,} examples of {asked.length:,} tokens a step, rank {asked.rank}"
    heads = [f"{gpus:,}" for gpus in GPUS]
    table(f"GB on each of so many GPUs ({examples}); (no): not on {MEMORY / 1e9:.0f} GB", heads, shapes, memory)
    table(
        f"Seconds for a million tokens on so many GPUs ({examples}); -: does not fit, *: activations computed again",
        [*heads, "half of linear up to", "at 1,024 bound by"],
        shapes,
        seconds,
    )


if __name__ == "__main__":
    main()
