"""Tests and intervals of a mean by betting.

Source: Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", 2020. Why not a t-test: a
result may be read after every value, so sampling can stop as soon as it is decided, and the error rate holds for any
distribution of bounded values. Often a few prompts fail outright, and a dozen prompts that all went well say nothing
about them.
"""

import math

import numpy as np

BET_FRACTIONS = np.linspace(0.05, 0.95, 10)[:, None]  # of the largest possible bet; all are made in parallel
BISECTIONS = 16  # of a bound, which is then exact to 2^-16 of the values' range


def compute_log_wealth(values: np.ndarray, mean: float, population: int | None) -> float:
    """Return the logarithm of the largest wealth, from 1, of bets that the mean is above `mean`.

    If the mean of all values is at most `mean`, the wealth ever reaches 1 / risk with a probability of at most `risk`.
    The wealth falls as `mean` rises.

    Args:
        values: Values [n] in [0, 1], the first of the population in a random order.
        mean: The mean that is bet against.
        population: Number of all values, drawn without replacement; None: infinite.
    """
    n = len(values)
    if population is None:
        expected = np.full(n, mean)
    else:  # mean of the values that are not seen yet
        expected = (population * mean - np.cumsum(values) + values) / (population - np.arange(n))
    if (expected <= 0).any():
        return math.inf
    log_wealth = np.cumsum(np.log1p(BET_FRACTIONS * (values / expected - 1)), axis=1)
    return float((np.logaddexp.reduce(log_wealth, axis=0) - math.log(len(BET_FRACTIONS))).max())


def compute_bounds(values: np.ndarray, tail: float, population: int | None) -> tuple[float, float]:
    """Return the bounds of the mean of all values.

    Each of them is ever wrong with a probability of at most `tail`.

    Args:
        values: See compute_log_wealth; so is population.
        tail: Probability of each side.
    """
    return _compute_lower_bound(values, tail, population), 1 - _compute_lower_bound(1 - values, tail, population)


def _compute_lower_bound(values: np.ndarray, tail: float, population: int | None) -> float:
    """Return the largest mean that is rejected, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        is_rejected = compute_log_wealth(values, middle, population) >= -math.log(tail)
        low, high = (middle, high) if is_rejected else (low, middle)
    return low
