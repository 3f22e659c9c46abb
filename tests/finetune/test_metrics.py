"""Metrics against scikit-learn and scipy, at the edges, and the coverage of their intervals."""

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as oracle

from finetune.metrics import METRICS, interval, metric, of_samples, paired_bootstrap, squad_scores


@pytest.fixture
def draw():
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("accuracy", oracle.accuracy_score),
        ("f1", oracle.f1_score),
        ("macro_f1", lambda labels, answers: oracle.f1_score(labels, answers, average="macro")),
        ("matthews", oracle.matthews_corrcoef),
    ],
)
def test_two_classes_agree_with_scikit_learn(name, expected, draw):
    labels, answers = draw.integers(0, 2, 200), draw.integers(0, 2, 200)
    assert metric(name)(answers, labels) == pytest.approx(expected(labels, answers), abs=1e-12)


def test_macro_f1_ignores_a_class_that_nobody_names(draw):
    labels, answers = draw.choice([0, 1, 3], 100), draw.choice([0, 1, 3], 100)
    assert metric("macro_f1")(answers, labels) == pytest.approx(oracle.f1_score(labels, answers, average="macro"))


def test_micro_f1_and_accuracy_of_several_labels_a_row(draw):
    labels, answers = draw.integers(0, 2, (50, 4)).astype(float), draw.integers(0, 2, (50, 4)).astype(float)
    assert metric("micro_f1")(answers, labels) == pytest.approx(oracle.f1_score(labels, answers, average="micro"))
    assert metric("accuracy")(answers, labels) == pytest.approx(oracle.accuracy_score(labels, answers))


def test_correlations_agree_with_scipy_also_with_ties(draw):
    labels = draw.integers(0, 6, 300).astype(float)
    answers = np.round(labels + draw.normal(size=300), 1)
    assert metric("pearson")(answers, labels) == pytest.approx(stats.pearsonr(answers, labels).statistic)
    assert metric("spearman")(answers, labels) == pytest.approx(stats.spearmanr(answers, labels).statistic)


def test_a_sum_of_names_is_the_mean_of_the_metrics(draw):
    labels, answers = draw.integers(0, 2, 200), draw.integers(0, 2, 200)
    mean = (metric("accuracy")(answers, labels) + metric("f1")(answers, labels)) / 2
    assert metric("accuracy+f1")(answers, labels) == pytest.approx(mean)


def of_tuples(rows):
    array = np.empty(len(rows), dtype=object)
    array[:] = rows
    return array


CONSTANT = {
    "micro_f1": (np.zeros((4, 2)), np.array([[0, 1], [1, 0], [1, 1], [0, 0]])),
    **{
        name: (of_tuples([("O", "O")] * 3), of_tuples([("B-x", "I-x"), ("O", "O"), ("O", "B-y")]))
        for name in METRICS
        if name.startswith(("entity", "token"))
    },
    **{name: (of_tuples([""] * 3), of_tuples([("a b",), (), ("c", "d")])) for name in ("squad_f1", "exact_match")},
}


@pytest.mark.parametrize("name", METRICS)
def test_constant_answers_give_a_number(name):
    answers, labels = CONSTANT.get(name, (np.zeros(4, dtype=int), np.array([0, 1, 1, 0])))
    assert np.isfinite(metric(name)(answers, labels))
    assert all(np.isfinite(end) for end in interval(name, answers, labels))


TAGS = ("O", "B-x", "I-x", "B-y", "I-y")


def test_entities_agree_with_seqeval(draw):
    """Also where a model says I without a B before it."""
    from seqeval import metrics as seqeval

    labels, answers = ([tuple(draw.choice(TAGS, size)) for size in range(1, 40)] for _ in range(2))
    answers = [
        tuple(np.where(draw.random(len(true)) < 0.7, true, given)) for given, true in zip(answers, labels, strict=True)
    ]
    plain = [list(map(list, rows)) for rows in (labels, answers)]
    for name in ("f1", "precision", "recall"):
        expected = getattr(seqeval, f"{name}_score")(*plain)
        assert metric(f"entity_{name}")(of_tuples(answers), of_tuples(labels)) == pytest.approx(expected, abs=1e-12)
    expected = seqeval.accuracy_score(*plain)
    assert metric("token_accuracy")(of_tuples(answers), of_tuples(labels)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "truths", "exact", "f1"),
    [
        ("Denver Broncos", ("Denver Broncos", "The Denver Broncos"), 1, 1),
        ("the Denver Broncos!", ("Denver broncos",), 1, 1),  # case, articles and punctuation do not count
        ("Broncos", ("Denver Broncos", "Carolina Panthers"), 0, 2 / 3),
        ("in the city of Santa Clara", ("Santa Clara", "Santa Clara, California"), 0, 4 / 7),
        ("a to a to a", ("to",), 0, 2 / 3),  # a word counts as often as it occurs: "to to" against "to"
        ("10,000", ("10000",), 1, 1),
        ("co-op", ("coop",), 1, 1),
        ("Panthers", ("Broncos",), 0, 0),
        ("", (), 1, 1),  # v2: no answer, and there is none
        ("Broncos", (), 0, 0),
        ("", ("Broncos",), 0, 0),
        ("the", ("a",), 1, 1),  # nothing is left of either
        ("the", ("Broncos",), 0, 0),
    ],
)
def test_squad_scores_of_known_answers(answer, truths, exact, f1):
    assert squad_scores(answer, truths) == (exact, pytest.approx(f1))


@pytest.mark.parametrize("name", ["f1", "macro_f1", "matthews", "pearson", "spearman", "accuracy+f1"])
def test_the_bootstrap_is_the_metric_of_the_drawn_rows(name, draw):
    labels = draw.integers(0, 3 if name in ("macro_f1", "matthews") else 2, 60)
    answers = np.where(draw.random(60) < 0.7, labels, draw.integers(0, 2, 60))
    if name in ("pearson", "spearman"):
        labels, answers = labels + draw.normal(size=60).round(1), answers.astype(float)
    rows = draw.integers(0, 60, (20, 60))
    weights = np.stack([np.bincount(one, minlength=60) for one in rows]).astype(float)
    expected = [metric(name)(answers[one], labels[one]) for one in rows]
    assert of_samples(name)(answers, labels, weights) == pytest.approx(expected, abs=1e-9)


def test_matthews_of_three_classes_agrees_with_scikit_learn(draw):
    labels, answers = draw.integers(0, 3, 200), draw.integers(0, 3, 200)
    assert metric("matthews")(answers, labels) == pytest.approx(oracle.matthews_corrcoef(labels, answers))


def test_an_unknown_metric_is_named_with_those_allowed():
    with pytest.raises(ValueError, match="'f2' is unknown; allowed: accuracy, f1"):
        metric("accuracy+f2")


def test_the_interval_covers_the_truth_about_as_often_as_it_says(draw):
    """40 samples of 100 rows at a true accuracy of 0.8: a 95 % interval misses in about 2 of them."""
    covered = 0
    for _ in range(40):
        low, high = interval("accuracy", (draw.random(100) < 0.8).astype(int), np.ones(100, dtype=int))
        covered += low <= 0.8 <= high
    assert 34 <= covered <= 40
    assert high - low < 0.2


def test_the_interval_is_a_function_of_the_seed(draw):
    labels, answers = draw.integers(0, 2, 50), draw.integers(0, 2, 50)
    assert interval("f1", answers, labels, seed=1) == interval("f1", answers, labels, seed=1)
    assert interval("f1", answers, labels, seed=1) != interval("f1", answers, labels, seed=2)


def test_the_interval_is_as_wide_as_theory_says():
    right = np.arange(1000) % 2
    low, high = interval("accuracy", right, np.ones(1000, dtype=int))
    assert high - low == pytest.approx(2 * 1.96 * (0.25 / 1000) ** 0.5, rel=0.1)


def test_a_resample_counts_the_tokens_of_the_rows_drawn():
    labels = of_tuples([("O",) * size for size in (1, 5, 9)])
    answers = of_tuples([("O",), ("B-x",) * 5, ("O",) * 9])
    found = of_samples("token_accuracy")(answers, labels, np.array([[0.0, 2.0, 1.0]]))
    assert found == pytest.approx([9 / 19])


def test_the_seeds_of_a_pair_are_drawn_too():
    """Their spread is part of the interval: a mean over all seeds has none."""
    labels = np.array([0, 1] * 200)
    worse = np.concatenate([1 - labels[:40], labels[40:]])
    assert paired_bootstrap("accuracy", [labels, worse], [worse, worse], labels, 1000).std() > 0.03
