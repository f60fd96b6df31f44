"""The bootstrap: samples of the examples with replacement, and the interval of what is measured on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

RESAMPLES, LEVEL = 1000, 0.95
# Samples drawn at once: their rows for 10,000 examples take 4 MB.
_AT_ONCE = 50


def samples(size: int, resamples: int = RESAMPLES, seed: int = 0) -> Iterator[IntArray]:
    """The rows of the examples in each sample, (some samples, size) at a time. The same seed draws the same
    ones, so that two models are compared on the same samples."""
    rng = np.random.default_rng(seed)
    for drawn in range(0, resamples, _AT_ONCE):
        yield rng.integers(size, size=(min(_AT_ONCE, resamples - drawn), size))


def counts(rows: IntArray, size: int) -> FloatArray:
    """How often each of `size` examples is in each sample, (samples, size), of `samples`' rows."""
    return np.stack([np.bincount(row, minlength=size) for row in rows]).astype(np.float64)


def interval(
    values: Sequence[float] | FloatArray, level: float = LEVEL, least: int = 1
) -> tuple[float, float] | None:
    """The percentile interval of a measure's values, one for each sample; None where fewer than `least` of
    them are finite numbers."""
    every = np.asarray(values, np.float64)
    finite = every[np.isfinite(every)]
    if len(finite) < least:
        return None
    low, high = np.quantile(finite, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
