"""The guarantee: exact bounds against scipy's, and violations no more often than promised."""

import numpy as np
import pytest
from scipy.stats import beta, binom

from elastic_model.calibration import allowed_failures, drift, fixed_sequence, rows_needed, upper_bound


@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_the_test_is_the_exact_binomial_one(epsilon, confidence):
    needed = rows_needed(epsilon, confidence)
    assert (
        allowed_failures(needed - 1, epsilon, confidence) is None
        and allowed_failures(needed, epsilon, confidence) == 0
    )
    for rows in (needed, 2 * needed, 1000, 20000):
        allowed = allowed_failures(rows, epsilon, confidence)
        assert binom.cdf(allowed, rows, epsilon) <= 1 - confidence < binom.cdf(allowed + 1, rows, epsilon)


@pytest.mark.parametrize(("failures", "rows"), [(0, 59), (3, 100), (99, 100), (40, 5000), (7, 7)])
def test_the_upper_bound_is_clopper_and_pearsons(failures, rows):
    exact = 1.0 if failures == rows else beta.ppf(0.95, failures + 1, rows - failures)
    assert upper_bound(failures, rows, 0.95) == pytest.approx(exact, abs=1e-9)


def test_the_sequence_ends_at_the_first_failure():
    assert allowed_failures(100, 0.05, 0.95) == 1
    assert fixed_sequence([0, 1, 2, 0], 100, 0.05, 0.95) == 1
    assert fixed_sequence([2, 0, 0], 100, 0.05, 0.95) is None
    assert fixed_sequence([0, 0], 100, 0.05, 0.95) == 1


def test_too_few_rows_are_refused_with_the_number_needed():
    with pytest.raises(ValueError, match="58 calibration rows .* at least 59 are needed"):
        fixed_sequence([0], 58, 0.05, 0.95)
    for wrong in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            rows_needed(wrong, 0.95)


@pytest.mark.parametrize("epsilon", [0.01, 0.05, 0.1])
def test_violations_are_as_rare_as_promised(epsilon):
    """200 calibration sets drawn with replacement from a pool whose early answers grow worse as settings loosen."""
    confidence, rows, sets = 0.9, 1000, 200
    draw = np.random.default_rng(5)
    hardness = draw.random(5000)  # a row fails from the setting on that exceeds its hardness
    failing = hardness[None] < np.linspace(0, 3 * epsilon, 100)[:, None]  # (settings, pool)
    truth, violations, used = failing.mean(1), 0, []
    for _ in range(sets):
        chosen = fixed_sequence(failing[:, draw.integers(0, 5000, rows)].sum(1), rows, epsilon, confidence)
        violations += chosen is not None and truth[chosen] > epsilon
        used.append(0.0 if chosen is None else truth[chosen])
    assert violations / sets <= (1 - confidence) + 2 * np.sqrt((1 - confidence) * confidence / sets)
    assert np.mean(used) > epsilon / 3  # and not by promising nothing


def test_drift_is_seen_and_its_absence_too():
    draw, calm, shifted = np.random.default_rng(0), [], []
    for number in range(40):
        calibrated = dict(enumerate(draw.multinomial(500, [0.5, 0.3, 0.2]), start=1))
        same = dict(enumerate(draw.multinomial(800, [0.5, 0.3, 0.2]), start=1))
        other = dict(enumerate(draw.multinomial(800, [0.35, 0.35, 0.3]), start=1))
        calm.append(drift(calibrated, same, seed=number).p_value)
        shifted.append(drift(calibrated, other, seed=number))
    assert 0.2 < np.mean(calm) < 0.8 and min(calm) > 0.001
    assert all(one.p_value < 0.01 and 0.05 < one.distance < 0.3 for one in shifted)


def test_a_layer_where_nobody_leaves_is_no_drift():
    assert drift({1: 50, 2: 0, 3: 50}, {1: 50, 2: 0, 3: 50}).p_value == 1.0
    assert drift({1: 50, 2: 0}, {1: 50, 3: 0}) == drift({1: 50}, {1: 50})


def test_an_empty_histogram_is_named():
    with pytest.raises(ValueError, match="counts rows by exit layer"):
        drift({1: 5}, {})


def test_a_p_value_is_never_zero():
    """Of as many permutations as are drawn none may be as far apart: the drawn rows themselves are one."""
    assert 0 < drift({1: 500}, {2: 500}).p_value < 0.01


def test_the_permutations_are_those_of_the_seed():
    near = {1: 52, 2: 48}, {1: 45, 2: 55}
    assert drift(*near, seed=1) == drift(*near, seed=1) and drift(*near, seed=1) != drift(*near, seed=2)
