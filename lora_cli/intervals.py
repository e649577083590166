"""How sure a measured figure is: 95 % confidence intervals from the rows themselves.

A figure is a function of sums over rows (loss = sum of losses / number of targets), so a table of sums [units, K] is
all that is needed. A unit is what can be drawn again by itself: the rows that share a prompt.
"""

from collections.abc import Callable
from statistics import NormalDist

import numpy as np

from lora_cli.records import Estimate
from lora_cli.reports import Comparison, Verdict

Figure = Callable[[np.ndarray], np.ndarray]  # sums [..., K] -> figures [...]

_LEVEL = 0.95
_DRAWS = 2000
_MOST_DRAWN = 4096  # units; more are drawn in bags
_NORMAL = NormalDist()


def ratio(sums: np.ndarray) -> np.ndarray:
    """Return the first sum divided by the second: a mean, a share."""
    with np.errstate(divide="ignore", invalid="ignore"):
        quotients: np.ndarray = sums[..., 0] / sums[..., 1]
    return quotients


def estimate(sums: np.ndarray, figure: Figure = ratio) -> Estimate:
    """Return a figure of a table of sums [units, K], with its interval.

    A share of units is judged by Wilson's interval (1927), which is not empty where all units are alike; anything else
    by the bootstrap.
    """
    if not len(sums):
        return Estimate(None, None, None, 0)
    value = float(figure(sums.sum(0)))
    if figure is ratio and _are_shares(sums):
        return Estimate(value, *_wilson(sums[:, 0].sum(), len(sums)), len(sums))
    return _bootstrap(value, sums[None], lambda table: figure(table[0]))


def difference(base: np.ndarray, tuned: np.ndarray, figure: Figure = ratio) -> Estimate:
    """Return a figure of `tuned` less that of `base`, both on the same units: what one unit adds to both is drawn
    together, so that hard and easy rows do not blur the difference.

    A difference of shares is judged after half a unit was added to each of the four outcomes (Agresti and Min 2005).
    """
    if not len(base):
        return Estimate(None, None, None, 0)
    value = float(figure(tuned.sum(0)) - figure(base.sum(0)))
    if figure is ratio and _are_shares(base) and _are_shares(tuned):
        return Estimate(value, *_paired_shares(base[:, 0], tuned[:, 0]), len(base))
    return _bootstrap(value, np.stack([base, tuned]), lambda table: figure(table[1]) - figure(table[0]))


def independent_difference(first: Estimate, second: Estimate) -> Estimate:
    """Return second less first, of different units: the ends' distances add up as independent errors do."""
    if None in (first.low, second.low, first.value, second.value):
        return Estimate(None, None, None, 0)
    a, b = (np.array([each.value, each.low, each.high], np.float64) for each in (first, second))
    value, down, up = b[0] - a[0], np.hypot(b[0] - b[1], a[2] - a[0]), np.hypot(b[2] - b[0], a[0] - a[1])
    return Estimate(float(value), float(value - down), float(value + up), min(first.n, second.n))


def compare(base: np.ndarray, tuned: np.ndarray, figure: Figure = ratio, lower_is_better: bool = False) -> Comparison:
    """Return a figure of both, their difference, and what may be said of it."""
    gap = difference(base, tuned, figure)
    verdict: Verdict | None = None
    if gap.low is not None and gap.high is not None:
        verdict = "no difference shown"
        if gap.low > 0 or gap.high < 0:
            verdict = "better" if (gap.high < 0) == lower_is_better else "worse"
    return Comparison(estimate(base, figure), estimate(tuned, figure), gap, verdict)


def _are_shares(sums: np.ndarray) -> bool:
    return sums.shape[1] == 2 and bool((sums[:, 1] == 1).all() and np.isin(sums[:, 0], (0, 1)).all())


def _wilson(hits: float, count: int) -> tuple[float, float]:
    z = _NORMAL.inv_cdf((1 + _LEVEL) / 2)
    centre = (hits + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * float(np.sqrt(hits * (count - hits) / count + z * z / 4))
    return float(max(0.0, centre - half)), float(min(1.0, centre + half))


def _paired_shares(base: np.ndarray, tuned: np.ndarray) -> tuple[float, float]:
    z = _NORMAL.inv_cdf((1 + _LEVEL) / 2)
    gained, lost = ((tuned > base).sum() + 0.5, (tuned < base).sum() + 0.5)
    count = len(base) + 2
    centre = (gained - lost) / count
    half = z * float(np.sqrt(gained + lost - (gained - lost) ** 2 / count)) / count
    return float(max(-1.0, centre - half)), float(min(1.0, centre + half))


def _bootstrap(value: float, tables: np.ndarray, figure: Figure) -> Estimate:
    """Return a value with the percentile interval of its bootstrap, for tables [tables, units, K] drawn together.

    The percentiles are moved outwards as far as a t-interval is wider than a normal one, without which intervals of few
    units are too narrow (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", section 5.3).
    """
    units = tables.shape[1]
    if units < 2:
        return Estimate(value, None, None, units)
    generator = np.random.default_rng(0)
    tables = _in_bags(tables, generator)
    even = np.full(tables.shape[1], 1 / tables.shape[1])
    counts = generator.multinomial(tables.shape[1], even, size=_DRAWS).astype(np.float64)  # [draws, units or bags]
    drawn = figure(counts @ tables)
    outside = _NORMAL.cdf(-student(units - 1) * float(np.sqrt(units / (units - 1))))
    low, high = np.quantile(drawn[np.isfinite(drawn)], (outside, 1 - outside))  # 0 / 0 where all drawn have nothing
    return Estimate(value, float(low), float(high), units)


def _in_bags(tables: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return tables [tables, units, K] with many units put into as many bags as are drawn at most, at random.

    Sums of bags vary as those of their units do.
    """
    units = tables.shape[1]
    if units <= _MOST_DRAWN:
        return tables
    shuffled = tables[:, generator.permutation(units)]
    return np.stack([bag.sum(1) for bag in np.array_split(shuffled, _MOST_DRAWN, axis=1)], axis=1)


def student(freedom: int) -> float:
    """Return the quantile of Student's t that leaves half of 5 % above it (Cornish and Fisher's expansion)."""
    z = _NORMAL.inv_cdf((1 + _LEVEL) / 2)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + (z**3 + z) / 4 / freedom + second / freedom**2 + third / freedom**3
