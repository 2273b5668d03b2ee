"""Bootstrap intervals of means and of differences of means.

Written here and not taken from scipy, which neither torch nor transformers brings: ``evaluate`` works as installed.
The tests hold both against ``scipy.stats.bootstrap``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["interval", "paired_interval"]


def interval(values: ArrayLike, level: float = 0.95, rounds: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron 1979), whatever the order of the values.

    Args:
        values: one number a question, ``(n,)``.
        level: coverage.
        rounds: resamples.
        seed: of the resampling.
    """
    # Sorted, since the same resamples of another order are others.
    data: NDArray[np.float64] = np.sort(np.asarray(values, np.float64))
    rng = np.random.default_rng(seed)
    # In blocks, so that 2,000 resamples of 40,000 questions do not need 600 MB.
    means = [data[rng.integers(0, len(data), (min(50, rounds), len(data)))].mean(1) for _ in range(-(-rounds // 50))]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def paired_interval(
    values: ArrayLike, others: ArrayLike, level: float = 0.95, rounds: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The interval of ``mean(values) - mean(others)`` over the same questions; 0 outside means significant."""
    return interval(np.asarray(values, np.float64) - np.asarray(others, np.float64), level, rounds, seed)
