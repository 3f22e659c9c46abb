"""From values to answers, on values made by hand: which window a word is read in, what a span's score counts from."""

from types import SimpleNamespace

import numpy as np

from elastic_model.answers import LONGEST_ANSWER, best_span, label_and_score, word_tags

LABELS = ["out", "in"]


def window(words, offsets):
    """A window as tokenizers give it, [CLS] and [SEP] around tokens of these words."""
    ids = [None, *words, None]
    return SimpleNamespace(
        ids=list(range(len(ids))),
        word_ids=ids,
        offsets=[(0, 0), *offsets, (0, 0)],
        sequence_ids=[None if word is None else 1 for word in ids],
    )


def test_a_word_of_two_windows_is_read_where_it_stands_furthest_from_an_edge():
    text = ["a", "b", "c", "d"]
    first, second = window([0, 1, 2], [(0, 1)] * 3), window([1, 2, 3], [(0, 1)] * 3)
    sure = {"logits": np.array([[0.0, 0], [0, 5], [0, 5], [0, 5], [0, 0]])}  # all are in
    other = {"logits": -sure["logits"]}  # and all are out
    found = word_tags(text, [first, second], [sure, other], LABELS)
    # b: 2 tokens from an edge in the first, 1 in the second; c: the other way about
    assert found["label"] == ["in", "in", "out", "out"] and found["words"] == text


def test_a_word_without_a_token_has_no_tag():
    found = word_tags(
        ["a", "\u200b"], [window([0], [(0, 1)])], [{"logits": np.array([[0.0, 0], [0, 5], [0, 0]])}], LABELS
    )
    assert found["label"] == ["in", None] and found["score"][1] == 0.0


def test_several_numbers_are_lists_and_one_is_a_number():
    assert label_and_score(np.array([0.5]), ["score"], "regression") == {"label": "score", "score": 0.5}
    several = label_and_score(np.array([0.5, -2.0]), ["a", "b"], "regression")
    assert several == {"label": ["a", "b"], "score": [0.5, -2.0]}


def test_the_score_of_a_span_counts_from_no_answer_and_no_span_is_longer_than_allowed():
    words = [f"w{number}" for number in range(60)]
    context = " ".join(words)
    starts = np.cumsum([0, *(len(word) + 1 for word in words)])[:-1]
    one = window(range(60), [(start, start + len(word)) for start, word in zip(starts, words, strict=True)])
    start, end = np.zeros(62, np.float32), np.zeros(62, np.float32)
    start[0], end[0] = 1.0, 2.0
    start[5], end[5 + LONGEST_ANSWER - 1] = 9.0, 8.0
    found = best_span(("?", context), [one], [{"start_logits": start, "end_logits": end}], LABELS)
    assert found["label"].split() == words[4 : 4 + LONGEST_ANSWER] and found["score"] == 17 - 3
    assert context[found["start"] : found["end"]] == found["label"]
    end[5 + LONGEST_ANSWER] = 20.0  # a token too far
    found = best_span(("?", context), [one], [{"start_logits": start, "end_logits": end}], LABELS)
    assert len(found["label"].split()) <= LONGEST_ANSWER and found["score"] == 20 - 3  # from where others begin
