"""Metrics of the field on arrays, each with a bootstrap interval.

A metric takes one answer and one truth an example, and weights (samples, examples): how often each example counts in
each sample; it gives a value a sample. All ones is the plain value, draws with replacement are the bootstrap.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

Metric = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
SAMPLES = 1000  # bootstrap resamples: the ends of a 95 % interval then move by about a tenth of its width
WEIGHTS_AT_ONCE = 4_000_000  # counts that are held together
SCORED = 100_000  # answers whose reading is kept: the settings of a sweep differ in few


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, 0 where there is no whole."""
    return np.divide(part, whole, out=np.zeros_like(part, dtype=np.float64), where=whole > 0)


def accuracy(answers: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of rows answered right; for several labels a row (rows, labels), of rows with every label right."""
    right = answers == labels
    return weights @ (right if right.ndim == 1 else right.all(axis=1)) / weights.sum(axis=1)


def _one_hot(values: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes)[values.astype(int)]


def _confusion(answers: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
    """How often each class is right, answered and true in every sample; each (samples, classes)."""
    classes = int(max(answers.max(), labels.max(), 1)) + 1
    answered, true = _one_hot(answers, classes), _one_hot(labels, classes)
    return weights @ (answered * true), weights @ answered, weights @ true


def f1(answers: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """F1 of class 1, the positive one, as GLUE scores MRPC; 0 where nothing is positive."""
    right, answered, true = _confusion(answers, labels, weights)
    return _ratio(2 * right[:, 1], answered[:, 1] + true[:, 1])


def macro_f1(answers: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur among the answers or the labels."""
    right, answered, true = _confusion(answers, labels, weights)
    named = answered + true
    return _ratio(2 * right, named).sum(axis=1) / (named > 0).sum(axis=1)


def micro_f1(answers: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """F1 over all (row, label) pairs of a multi-label task; 0 where nothing is positive."""
    return _ratio(2 * (weights @ (answers * labels).sum(axis=1)), weights @ (answers + labels).sum(axis=1))


def matthews(answers: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Matthews correlation (CoLA), for any number of classes (Gorodkin 2004); 0 where either side is of one class."""
    right, answered, true = _confusion(answers, labels, weights)
    rows = weights.sum(axis=1)
    covariance = right.sum(axis=1) * rows - (answered * true).sum(axis=1)
    spread = (rows**2 - (answered**2).sum(axis=1)) * (rows**2 - (true**2).sum(axis=1))
    return _ratio(covariance, np.sqrt(np.maximum(spread, 0.0)))


def _correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson correlation of x and y, each (examples,) or (samples, examples); 0 where either side is constant."""
    rows = weights.sum(axis=1, keepdims=True)
    x = x - (weights * x).sum(axis=1, keepdims=True) / rows
    y = y - (weights * y).sum(axis=1, keepdims=True) / rows
    spread_x, spread_y = (weights * x**2).sum(axis=1), (weights * y**2).sum(axis=1)
    tiny = np.finfo(np.float64).eps * rows[:, 0]  # what rounding leaves of a constant side
    norms = np.where((spread_x > tiny) & (spread_y > tiny), np.sqrt(spread_x * spread_y), 0.0)
    return _ratio((weights * x * y).sum(axis=1), norms)


def _standard(values: np.ndarray) -> np.ndarray:
    """Of mean 0 and deviation 1 over all examples, so that rounding does not depend on the scale."""
    values = values.astype(np.float64)
    values = values - values.mean()
    return values / values.std() if values.std() > 0 else values


def pearson(answers: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson correlation; 0 where either side is constant, so that a constant model never wins as NaN."""
    return _correlation(_standard(answers), _standard(labels), weights)


def spearman(answers: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Spearman correlation: Pearson of the ranks in each sample, ties at their mean rank."""
    return _correlation(_ranks(answers, weights), _ranks(labels, weights), weights)


def _ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Ranks (samples, examples) among the examples of each sample, as shares of their number."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    inside = np.add.reduceat(weights[:, order], np.cumsum(sizes) - sizes, axis=1)  # (samples, different values)
    return ((np.cumsum(inside, axis=1) - inside / 2) / weights.sum(axis=1, keepdims=True))[:, group]


@lru_cache(SCORED)
def _entities_of(tags: tuple[str, ...]) -> frozenset[tuple[str, int, int]]:
    from seqeval.metrics.sequence_labeling import get_entities

    return frozenset(get_entities(list(tags)))


def _entities(answers: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Entities right, answered and true in every sample, (samples, 3); rows are tuples of IOB2 tags, one a word."""
    pairs = [(_entities_of(given), _entities_of(true)) for given, true in zip(answers, labels, strict=True)]
    counts = [(len(given & true), len(given), len(true)) for given, true in pairs]
    return weights @ np.array(counts, dtype=np.float64)


def entity_f1(answers: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """F1 of whole entities (CoNLL-2003's score), as seqeval reads them; 0 without any."""
    right, answered, true = _entities(answers, labels, weights).T
    return _ratio(2 * right, answered + true)


def entity_precision(answers: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of the entities answered that are right; 0 where none is answered."""
    right, answered, _ = _entities(answers, labels, weights).T
    return _ratio(right, answered)


def entity_recall(answers: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of the true entities that are found; 0 where there is none."""
    right, _, true = _entities(answers, labels, weights).T
    return _ratio(right, true)


def token_accuracy(answers: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of the words that are tagged right."""
    right = [sum(map(str.__eq__, given, true)) for given, true in zip(answers, labels, strict=True)]
    return _ratio(weights @ np.array(right, dtype=np.float64), weights @ np.array([len(true) for true in labels]))


def normalise_answer(text: str) -> list[str]:
    """The words of an answer as SQuAD's evaluation compares them: lower case, no punctuation, no articles."""
    text = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


@lru_cache(SCORED)
def squad_scores(answer: str, truths: tuple[str, ...]) -> tuple[float, float]:
    """Exact match and F1 of an answer, the best over the true ones (Rajpurkar et al. 2016, section 6.1).

    No true answers: the question has none, and only "" is right (v2). The same holds where nothing but articles and
    punctuation is left of either side.
    """
    given = normalise_answer(answer)
    wanted = [normalise_answer(truth) for truth in truths] or [[]]
    return max(float(given == one) for one in wanted), max(_word_f1(given, one) for one in wanted)


def _word_f1(given: list[str], wanted: list[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    return 2 * common / (len(given) + len(wanted))


def _squad(score: int) -> Metric:
    def mean(answers: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
        scores = [squad_scores(answer, truths)[score] for answer, truths in zip(answers, labels, strict=True)]
        return weights @ np.array(scores) / weights.sum(axis=1)

    return mean


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "f1": f1,
    "macro_f1": macro_f1,
    "micro_f1": micro_f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
    "entity_f1": entity_f1,
    "entity_precision": entity_precision,
    "entity_recall": entity_recall,
    "token_accuracy": token_accuracy,
    "exact_match": _squad(0),
    "squad_f1": _squad(1),
}


def of_samples(name: str) -> Metric:
    """The metric called `name` as a value a sample. ValueError: unknown."""
    parts = name.split("+")
    unknown = [part for part in parts if part not in METRICS]
    if unknown:
        raise ValueError(f"metric {unknown[0]!r} is unknown; allowed: {', '.join(METRICS)}, or several joined by +")
    return lambda answers, labels, weights: np.mean(
        [METRICS[part](answers, labels, weights) for part in parts], axis=0
    )


def metric(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
    """The metric called `name`; `accuracy+f1` is the mean of two (ELUE's score of MRPC). ValueError: unknown."""
    values = of_samples(name)
    return lambda answers, labels: float(values(answers, labels, np.ones((1, len(labels))))[0])


def interval(name: str, answers: np.ndarray, labels: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a metric over examples (Efron and Tibshirani 1993, section 13.3)."""
    values, draw, examples = of_samples(name), np.random.default_rng(seed), len(labels)
    at_once = max(1, WEIGHTS_AT_ONCE // examples)
    sizes = [min(at_once, SAMPLES - first) for first in range(0, SAMPLES, at_once)]
    share = np.full(examples, 1 / examples)
    scores = [values(answers, labels, draw.multinomial(examples, share, size).astype(np.float64)) for size in sizes]
    low, high = np.percentile(np.concatenate(scores), [2.5, 97.5])
    return float(low), float(high)


def paired_bootstrap(
    name: str, ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], labels: np.ndarray, samples: int
) -> np.ndarray:
    """Differences of a metric, mean over seeds, ours - theirs, in resamples of rows and of seeds: (samples,).

    ours, theirs: the answers after each seed. A resample takes the same rows of both sides, and of each seed.
    """
    draw, rows, value = np.random.default_rng(0), len(labels), of_samples(name)
    weights = draw.multinomial(rows, np.full(rows, 1 / rows), samples).astype(np.float64)
    by_seed = np.stack(
        [value(one, labels, weights) - value(other, labels, weights) for one, other in zip(ours, theirs, strict=True)]
    )
    seeds = draw.integers(0, len(by_seed), (len(by_seed), samples))
    return by_seed[seeds, np.arange(samples)].mean(axis=0)
