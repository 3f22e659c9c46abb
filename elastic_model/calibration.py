"""Thresholds with a guarantee: learn-then-test (Angelopoulos et al. 2021) on arrays. Loads no torch.

A failure is a row whose early answer is not acceptable (it differs from the full model's, say). With n calibration
rows drawn as the rows to come are, a setting whose failures are few enough for the exact binomial test has a failure
rate of at most epsilon, with confidence 1 - delta over the draw of the calibration rows. Settings are tested in one
fixed order, strict to loose, up to the first that fails (fixed-sequence testing), so that no correction is due.
The guarantee is marginal: a mean over rows, not a promise for each class or each row.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000  # of the permutation test: its p-values then move by a hundredth of themselves near 0.01


def rows_needed(epsilon: float, confidence: float) -> int:
    """The fewest calibration rows that can certify anything: those whose test passes without a failure."""
    _check_share("max_disagreement", epsilon)
    _check_share("confidence", confidence)
    return math.ceil(math.log(1 - confidence) / math.log1p(-epsilon) - 1e-12)


def allowed_failures(rows: int, epsilon: float, confidence: float) -> int | None:
    """The most failures of `rows` at which a rate above epsilon is rejected, None where not even 0 would be enough.

    The exact binomial test: the largest k with P(Binomial(rows, epsilon) <= k) <= 1 - confidence.
    """
    if rows < rows_needed(epsilon, confidence):
        return None
    delta, total, failures = 1 - confidence, 0.0, -1
    while failures < rows:
        total += math.exp(_log_binomial(rows, failures + 1, epsilon))
        if total > delta * (1 + 1e-12):
            break
        failures += 1
    return failures


def upper_bound(failures: int, rows: int, confidence: float) -> float:
    """Clopper and Pearson's exact upper bound of a rate of which `failures` of `rows` were seen, by bisection."""
    if not 0 <= failures <= rows or not rows:
        raise ValueError(f"failures must be 0 to the number of rows (at least 1), got {failures} of {rows}")
    low, high = failures / rows, 1.0
    if failures == rows:
        return 1.0
    for _ in range(60):
        middle = (low + high) / 2
        tail = math.fsum(math.exp(_log_binomial(rows, k, middle)) for k in range(failures + 1))
        low, high = (middle, high) if tail > 1 - confidence else (low, middle)
    return high


def check_rows(rows: int, epsilon: float, confidence: float) -> None:
    """ValueError, with the number needed, where there are too few calibration rows for any setting."""
    needed = rows_needed(epsilon, confidence)
    if rows < needed:
        raise ValueError(
            f"{rows} calibration rows cannot bound a rate by {epsilon:g} with confidence {confidence:g}; at least "
            f"{needed} are needed (and more where some rows fail)"
        )


def fixed_sequence(failures: Sequence[int] | np.ndarray, rows: int, epsilon: float, confidence: float) -> int | None:
    """The last setting certified, of settings in their fixed order with `failures` among `rows`; None: not one.

    ValueError, with the number needed, where there are too few rows for any setting.
    """
    check_rows(rows, epsilon, confidence)
    allowed = allowed_failures(rows, epsilon, confidence)
    passed = np.asarray(failures) <= allowed
    certified = len(passed) if passed.all() else int(passed.argmin())
    return certified - 1 if certified else None


@dataclass(frozen=True)
class Drift:
    """How far the exits in service are from those calibrated: shares of rows by exit layer, total variation distance
    (the share of rows that would have to leave elsewhere), and the p-value of their being the same."""

    calibrated: dict[int, float]
    served: dict[int, float]
    distance: float
    p_value: float


def drift(calibrated: Mapping[int, int], served: Mapping[int, int], seed: int = 0) -> Drift:
    """Compare two histograms, {exit layer: rows}: a permutation test of the chi-squared statistic.

    A small p-value says that the rows in service are not like the calibration rows: the guarantee then does not hold.
    ValueError for an empty histogram.
    """
    layers = sorted({int(layer) for one in (calibrated, served) for layer, rows in one.items() if rows})
    counts = np.array([[int(one.get(layer, 0)) for layer in layers] for one in (calibrated, served)], dtype=np.int64)
    if (counts < 0).any() or not counts.sum(1).all():
        raise ValueError(f"a histogram counts rows by exit layer and has some, got {calibrated} and {served}")
    shares, together = counts / counts.sum(1, keepdims=True), counts.sum(0)
    draws = np.random.default_rng(seed).multivariate_hypergeometric(together, counts[1].sum(), DRAWS)
    expected = together * counts[1].sum() / counts.sum()
    distances = (((draws - expected) ** 2) / expected).sum(1)  # of the other half: the same but for a constant factor
    observed = (((counts[1] - expected) ** 2) / expected).sum()
    p_value = (1 + int((distances >= observed - 1e-9).sum())) / (1 + DRAWS)
    first, second = (dict(zip(layers, map(float, row), strict=True)) for row in shares)
    return Drift(first, second, float(np.abs(shares[0] - shares[1]).sum() / 2), p_value)


def _log_binomial(rows: int, failures: int, rate: float) -> float:
    ways = math.lgamma(rows + 1) - math.lgamma(failures + 1) - math.lgamma(rows - failures + 1)
    return ways + failures * math.log(rate) + (rows - failures) * math.log1p(-rate)


def _check_share(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie between 0 and 1, both left out, got {value}")
