"""Metrics of the field on arrays, each with a bootstrap interval."""

from collections.abc import Callable

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray], float]
SAMPLES = 1000  # bootstrap resamples: the ends of a 95 % interval then move by about a tenth of its width


def accuracy(answers: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows answered right; for several labels a row (rows, labels), of rows with every label right."""
    right = answers == labels
    return float(right.mean() if right.ndim == 1 else right.all(axis=1).mean())


def _f1_scores(answers: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """F1 of each class, NaN for a class that neither the answers nor the labels hold."""
    classes = int(max(answers.max(), labels.max())) + 1
    right = np.bincount(labels[answers == labels], minlength=classes)
    named = np.bincount(answers, minlength=classes) + np.bincount(labels, minlength=classes)
    return np.divide(2 * right, named, out=np.full(classes, np.nan), where=named > 0)


def f1(answers: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1, the positive one, as GLUE scores MRPC; 0 where nothing is positive."""
    scores = _f1_scores(answers, labels)
    return float(np.nan_to_num(scores[1])) if len(scores) > 1 else 0.0


def macro_f1(answers: np.ndarray, labels: np.ndarray) -> float:
    """Mean F1 over the classes that occur among the answers or the labels."""
    return float(np.nanmean(_f1_scores(answers, labels)))


def micro_f1(answers: np.ndarray, labels: np.ndarray) -> float:
    """F1 over all (row, label) pairs of a multi-label task; 0 where nothing is positive."""
    named = answers.sum() + labels.sum()
    return float(2 * (answers * labels).sum() / named) if named else 0.0


def matthews(answers: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation of two classes (CoLA); 0 where answers or labels are all of one class."""
    return pearson(answers, labels)  # of two 0/1 variables


def pearson(answers: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation; 0 where either side is constant, so that a constant model never wins as NaN."""
    answers, labels = answers - answers.mean(), labels - labels.mean()
    norms = np.sqrt((answers**2).sum() * (labels**2).sum())
    return float((answers * labels).sum() / norms) if norms > 0 else 0.0


def spearman(answers: np.ndarray, labels: np.ndarray) -> float:
    """Spearman correlation: Pearson of the ranks, ties at their mean rank."""
    return pearson(_ranks(answers), _ranks(labels))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "micro_f1": micro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def metric(name: str) -> Metric:
    """The metric called `name`; `accuracy+f1` is the mean of two (ELUE's score of MRPC). ValueError: unknown."""
    parts = name.split("+")
    unknown = [part for part in parts if part not in METRICS]
    if unknown:
        raise ValueError(f"metric {unknown[0]!r} is unknown; allowed: {', '.join(METRICS)}, or several joined by +")
    return lambda answers, labels: float(np.mean([METRICS[part](answers, labels) for part in parts]))


def interval(name: str, answers: np.ndarray, labels: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a metric over rows (Efron and Tibshirani 1993, section 13.3)."""
    score, draw = metric(name), np.random.default_rng(seed)
    scores = []
    for _ in range(SAMPLES):
        rows = draw.integers(0, len(labels), len(labels))
        scores.append(score(answers[rows], labels[rows]))
    low, high = np.percentile(scores, [2.5, 97.5])
    return float(low), float(high)
