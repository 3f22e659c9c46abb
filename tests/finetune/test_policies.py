"""Thresholds: from strict to loose, chosen in fixed sequence, written as operating points hold them."""

import numpy as np
import pytest

from elastic_model.exit_policies import simulate
from finetune.policies import CANDIDATES, at_one_exit, candidates, choose, never, policy_name, thresholds

NAMES = [name for name in CANDIDATES if name != "learned"]  # which needs its head
KINDS = [(name, "single_label_classification") for name in NAMES] + [("patience", "regression")]


def logits_for(problem_type, exits=4, rows=200):
    labels = 1 if problem_type == "regression" else 3
    steps = np.random.default_rng(0).normal(size=(exits, rows, labels))
    return np.cumsum(steps, axis=0).astype(np.float32)


def mean_layer(policy, logits, problem_type):
    return simulate(policy, logits, [1, 2, 3, 4], problem_type)[1].double().mean().item()


@pytest.mark.parametrize(("name", "problem_type"), KINDS)
def test_candidates_go_from_strict_to_loose(name, problem_type):
    logits = logits_for(problem_type)
    layers = [mean_layer(policy, logits, problem_type) for policy in candidates(name, logits, problem_type)]
    assert all(after <= before for before, after in zip(layers, layers[1:], strict=False))
    assert layers[0] > layers[-1]
    if name != "patience":
        assert layers[-1] == 1.0  # everybody leaves at the first exit
    elif problem_type == "regression":
        assert layers[-1] == 2.0  # at the first that has one to compare with


@pytest.mark.parametrize(("name", "problem_type"), KINDS)
def test_never_is_full_depth(name, problem_type):
    logits = logits_for(problem_type)
    policy = never(name, 4, problem_type)
    assert mean_layer(policy, logits, problem_type) == 4.0
    assert thresholds(name, None, 4, problem_type) == thresholds(name, policy, 4, problem_type)


@pytest.mark.parametrize(("name", "problem_type"), KINDS)
def test_all_rows_can_leave_at_one_exit(name, problem_type):
    logits = logits_for(problem_type)
    loosest = candidates(name, logits, problem_type)[-1]
    found = [simulate(one, logits, [1, 2, 3, 4], problem_type)[1] for one in at_one_exit(loosest, 4, problem_type)]
    counts = name == "voting" or (name == "patience" and problem_type != "regression")
    assert [set(layers.tolist()) for layers in found] == ([] if counts else [{2}, {3}])


def test_small_changes_have_as_many_settings_as_large_ones():
    logits = 1e-6 * logits_for("regression")
    found = [policy["threshold"] for policy in candidates("patience", logits, "regression")]
    assert len(set(found)) == len(found) == 100


def test_the_choice_stops_at_the_first_failure():
    assert choose([0.90, 0.90, 0.88, 0.91], full=0.9, permitted_loss=0.01) == 1
    assert choose([0.80, 0.95], full=0.9, permitted_loss=0.01) is None
    assert choose([0.90, 0.89], full=0.9, permitted_loss=0.0101) == 1
    assert choose([], full=0.9, permitted_loss=0.0) is None


def test_regression_calibrates_patience_only():
    assert (
        policy_name(None, "regression") == "patience" and policy_name(None, "single_label_classification") == "entropy"
    )
    with pytest.raises(ValueError, match="'entropy' cannot be calibrated for regression; allowed: patience, learned"):
        policy_name("entropy", "regression")
    with pytest.raises(ValueError, match="allowed: entropy, confidence, margin, patience, voting, learned"):
        policy_name("constant", "single_label_classification")


def test_thresholds_are_finest_where_rows_stay_longest():
    """Squares of even steps: most rows of a good model are sure, and thresholds near 0 tell them apart."""
    steps = np.array(
        [one["threshold"] for one in candidates("entropy", np.zeros((3, 5, 2)), "multi_label_classification")]
    )
    assert steps[-1] == 1.0 and (np.diff(np.diff(steps)) > 0).all()
    np.testing.assert_allclose(steps**0.5, np.arange(1, len(steps) + 1) / len(steps), atol=1e-4)
