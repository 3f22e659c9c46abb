"""From what a graph says of a text to its answer: labels, tags of words, spans of a context, vectors. NumPy alone.

A text is seen through one window, or through several that overlap where it is longer than the model and the task
answers per token. A window's values are the graph's outputs for its real tokens, by name.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .spans import best_answer

Values = dict[str, np.ndarray]
LONGEST_ANSWER = 30  # tokens of an answer's span


def label_and_score(logits: np.ndarray, labels: Sequence[str], problem_type: str) -> dict[str, Any]:
    """Of one row's logits (labels,): several labels as lists, a regression's value as the score."""
    if problem_type == "regression":
        if len(logits) == 1:
            return {"label": labels[0], "score": float(logits[0])}
        return {"label": list(labels), "score": logits.tolist()}
    if problem_type == "multi_label_classification":
        scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
        chosen = np.flatnonzero(scores > 0.5).tolist()
        return {"label": [labels[one] for one in chosen], "score": scores[chosen].tolist()}
    best = int(logits.argmax())
    return {"label": labels[best], "score": float(_shares(logits)[best])}


def word_tags(text: Any, windows: Sequence[Any], values: Sequence[Values], labels: Sequence[str]) -> dict[str, Any]:
    """A tag per word: {"label": tags, "score": probabilities, "words": words}, the tag that of the word's first token.

    Words are those given, or those that the tokenizer finds in a text. A word that several windows hold is read in
    the one where it stands furthest from an edge that cuts the text; a word without a token has no tag (None).
    """
    spans: dict[int, tuple[int, int]] = {}  # word -> its characters
    for window in windows:
        for word, (start, end) in zip(window.word_ids, window.offsets, strict=True):
            if word is not None:
                before = spans.get(word, (start, end))
                spans[word] = (min(before[0], start), max(before[1], end))
    found: dict[int, tuple[int, str | None, float]] = {}  # word -> (tokens to the nearest edge, tag, score)
    for window, value in zip(windows, values, strict=True):
        for token, (word, (start, _)) in enumerate(zip(window.word_ids, window.offsets, strict=True)):
            room = min(token, len(window.ids) - 1 - token)
            if word is None or (word in found and room <= found[word][0]):
                continue
            if start != spans[word][0] or (token and window.word_ids[token - 1] == word):
                continue  # no first piece: several may begin at one character
            logits = value["logits"][token]
            best = int(logits.argmax())
            found[word] = (room, labels[best], float(_shares(logits)[best]))
    given = not isinstance(text, str)
    keys = range(len(text)) if given else sorted(spans)
    tags = [found.get(key, (0, None, 0.0)) for key in keys]
    words = list(text) if given else [text[slice(*spans[key])] for key in keys]
    return {"label": [tag for _, tag, _ in tags], "score": [score for *_, score in tags], "words": words}


def best_span(
    text: Any,
    windows: Sequence[Any],
    values: Sequence[Values],
    labels: Sequence[str],
    no_answer_threshold: float | None = None,
) -> dict[str, Any]:
    """The answer to a (question, context): {"label": its text, "score", "start", "end"}, characters of the context.

    score: the start logit of its first token plus the end logit of its last (Devlin et al. 2019), minus that of [CLS],
    which stands for no answer: "" where the score is not above `no_answer_threshold`.
    """
    longest = max(len(window.ids) for window in windows)
    start, end = (np.zeros((len(windows), longest), np.float32) for _ in range(2))
    offsets, in_context = np.zeros((len(windows), longest, 2), int), np.zeros((len(windows), longest), bool)
    for number, (window, value) in enumerate(zip(windows, values, strict=True)):
        size = len(window.ids)
        start[number, :size], end[number, :size] = value["start_logits"], value["end_logits"]
        offsets[number, :size] = window.offsets
        in_context[number, :size] = [sequence == 1 for sequence in window.sequence_ids]
    if not in_context.any():
        raise ValueError(f"the context {text[1]!r:.80} has no token that could answer; leave such rows out")
    found = best_answer(
        text[1], start, end, offsets, in_context, max_tokens=LONGEST_ANSWER, no_answer_threshold=no_answer_threshold
    )
    return {
        "label": found.text,
        "score": found.score - found.no_answer_score,
        "start": found.start,
        "end": found.end,
    }


def mean_vector(text: Any, windows: Sequence[Any], values: Sequence[Values], labels: Sequence[str]) -> dict[str, Any]:
    """{"embedding": (width,)}: the mean of the last hidden states of the real tokens, which the value is already."""
    return {"embedding": values[0]["last_hidden_state"]}


# problem type -> (text, windows, values, labels) -> the answer; the other types answer by `label_and_score`
PER_TOKEN: dict[str, Callable[[Any, Sequence[Any], Sequence[Values], Sequence[str]], dict[str, Any]]] = {
    "token_classification": word_tags,
    "question_answering": best_span,
    "embedding": mean_vector,
}


def _shares(logits: np.ndarray) -> np.ndarray:
    shares = np.exp(logits.astype(np.float64) - logits.max())
    return shares / shares.sum()
