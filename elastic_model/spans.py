"""Answers from a question-answering model: the best span of a context of any length, seen through overlapping windows.

A context longer than the model is cut into windows that overlap by a stride, each with the question before it. A
span's score is the start logit of its first token plus the end logit of its last (Devlin et al. 2019, section 4.2);
the best span of all windows of a question is its answer. NumPy alone.
"""

from dataclasses import dataclass

import numpy as np

WINDOWS_AT_ONCE = 256  # whose spans are held together: 12 MB for windows of 384 tokens and spans of 30


@dataclass(frozen=True)
class Answer:
    """`context[start:end]`, its score, and that of having no answer; where the latter won, "" and start = end = 0."""

    text: str
    start: int
    end: int
    score: float
    no_answer_score: float


def best_answer(
    context: str,
    start_logits,
    end_logits,
    offsets,
    in_context,
    *,
    max_tokens: int = 30,
    no_answer_threshold: float | None = None,
) -> Answer:
    """The best span of one question's windows.

    start_logits, end_logits (windows, tokens); offsets (windows, tokens, 2): each token's characters in `context`;
    in_context (windows, tokens): true at the context's tokens, false at the question's, special ones and padding. The
    first token of every window is [CLS]. max_tokens: the longest answer. no_answer_threshold: None = there is always
    an answer; a number t: none unless the best span scores more than t above [CLS] as start and end, the lowest of all
    windows, since a window without the answer says nothing against the others (Devlin et al., section 4.3).

    Raises ValueError for shapes that do not fit, logits that are not finite and windows that hold no context.
    """
    start, end = (np.asarray(logits, dtype=np.float32) for logits in (start_logits, end_logits))
    offsets, in_context = np.asarray(offsets), np.asarray(in_context, dtype=bool)
    _check(start, end, offsets, in_context, max_tokens)
    no_answer_score = float((start[:, 0] + end[:, 0]).min())
    scores, firsts, lasts = best_spans(start, end, in_context, max_tokens)
    window = int(scores.argmax())  # the earliest of equals
    score, first, last = float(scores[window]), int(firsts[window]), int(lasts[window])
    if no_answer_threshold is not None and score <= no_answer_score + no_answer_threshold:
        return Answer("", 0, 0, score, no_answer_score)
    left, right = int(offsets[window, first, 0]), int(offsets[window, last, 1])
    text = context[left:right]
    left += len(text) - len(text.lstrip())  # byte-level tokenizers count the space before a word to the word
    return Answer(text.strip(), left, left + len(text.strip()), score, no_answer_score)


def question_tokens(max_tokens: int) -> int:
    """Tokens of a question, at most, in a window of so many: 64 (Devlin et al. 2019's code), or half of a short
    window less its special tokens."""
    return min(64, max_tokens // 2 - 4)


def best_spans(start_logits, end_logits, in_context, max_tokens: int = 30):
    """The best span of every window: scores, first and last tokens, each (windows,); the earliest of equals.

    start_logits, end_logits, in_context (windows, tokens), as in `best_answer`. The score of a window without context
    is minus infinity.
    """
    start, end = (
        np.where(in_context, np.asarray(logits, dtype=np.float32), -np.inf) for logits in (start_logits, end_logits)
    )
    score, first, last = (np.empty(len(start), dtype=kind) for kind in (np.float32, int, int))
    longest = min(max_tokens, start.shape[1])
    for some in range(0, len(start), WINDOWS_AT_ONCE):
        window = slice(some, some + WINDOWS_AT_ONCE)
        behind = np.pad(end[window], ((0, 0), (0, longest - 1)), constant_values=-np.inf)
        ends = np.lib.stride_tricks.sliding_window_view(
            behind, longest, axis=1
        )  # (windows, first, tokens of the span)
        spans = (start[window][:, :, None] + ends).reshape(len(ends), -1)
        best = spans.argmax(axis=1)
        score[window], first[window] = spans[np.arange(len(spans)), best], best // longest
        last[window] = first[window] + best % longest
    return score, first, last


def _check(start, end, offsets, in_context, max_tokens: int) -> None:
    shape = start.shape
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"start_logits must have the shape (windows, tokens) with at least one of each, got {shape}.")
    for name, array, wanted in (
        ("end_logits", end, shape),
        ("offsets", offsets, (*shape, 2)),
        ("in_context", in_context, shape),
    ):
        if array.shape != wanted:
            raise ValueError(f"{name} must have the shape {wanted} to go with start_logits, got {array.shape}.")
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}.")
    if not (np.isfinite(start).all() and np.isfinite(end).all()):
        raise ValueError("start_logits and end_logits must be finite: take an exit that every window reached.")
    if not in_context.any():
        raise ValueError("in_context marks no token of the context in any window: the context is empty, or cut off.")
