"""Extractive question answering: windows over long contexts, the best span, and when to give none (SQuAD v1.1, v2)."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from elastic_model.spans import best_spans, question_tokens
from finetune.data import TokenEncoded, check_fast, rows_of
from finetune.examples import Examples
from finetune.labels import Labels
from finetune.metrics import squad_scores
from finetune.tasks import Task

SHORTEST = 16  # tokens of a window: below it nothing of the context is left
NAMES = ["start", "end"]  # of the two logits a token


@dataclass(frozen=True)
class EncodedQuestions(TokenEncoded):
    """Rows are windows. first: each question's first window, and behind the last; contexts: of each question;
    offsets: of each window, its tokens' characters (tokens, 2); in_context (windows, tokens)."""

    first: np.ndarray
    contexts: list[str]
    offsets: list[np.ndarray]
    in_context: np.ndarray

    head = "question_answering"

    def size(self, max_length: int) -> str:
        """How many questions there are, and in how many windows, in words."""
        return f"{len(self.contexts)} questions in {len(self)} windows of {max_length} tokens"

    def per_example(self, layers: np.ndarray) -> np.ndarray:
        """The highest layer of a question's windows."""
        return np.maximum.reduceat(layers, self.first[:-1])


def answers_of(examples: Examples) -> list[list[tuple[str, int]]]:
    """Every question's answers and where they start; ValueError where one does not stand there in its context."""
    if examples.pairs is None:
        raise ValueError("question answering needs --pair, the column of the contexts")
    return [
        list(_aligned(label, context, place))
        for label, context, place in zip(examples.labels, examples.pairs, examples.places, strict=True)
    ]


def _aligned(label: dict, context: str, place: str) -> Iterator[tuple[str, int]]:
    if not isinstance(label, dict) or not {"text", "answer_start"} <= label.keys():
        raise ValueError(f"{place}: an answer must have text and answer_start, as SQuAD's, got {label!r:.80}")
    texts, starts = label["text"], label["answer_start"]
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
        raise ValueError(
            f"{place}: text and answer_start must be lists of one length, got {texts!r:.60}, {starts!r:.60}"
        )
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{place}: the answer {text!r} is no text; a question without answer has none")
        if not isinstance(start, int) or start < 0 or context[start : start + len(text)] != text:
            there = context[start : start + len(text)] if isinstance(start, int) and start >= 0 else ""
            raise ValueError(f"{place}: the answer {text!r:.60} does not stand at character {start}: {there!r:.60}")
        yield text, start


def has_unanswerable(examples: Examples) -> bool:
    """Whether a question has no answer, as in SQuAD v2."""
    return any(not answers for answers in answers_of(examples))


def encode_questions(
    task: Task, examples: Examples, split: str, labels: Labels, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EncodedQuestions:
    """Every question with windows of its context that overlap by a third of `max_length`.

    Start and end are the first and last token that touch the first answer, [CLS] where a window has none of it.
    """
    check_fast(tokenizer)
    answers, stride = answers_of(examples), max_length // 3
    if max_length < SHORTEST:
        raise ValueError(f"max_length must be at least {SHORTEST} for question answering, got {max_length}")
    if not any(answers):
        raise ValueError(f"the {split} split has no question with an answer ({len(examples)} rows)")
    contexts = examples.pairs or []
    encoding = tokenizer(
        _cut(examples.texts, tokenizer, question_tokens(max_length)),
        contexts,
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    owners = np.array(encoding["overflow_to_sample_mapping"])
    offsets = [np.array(window) for window in encoding["offset_mapping"]]
    longest = max(map(len, offsets))
    in_context = np.zeros((len(owners), longest), dtype=bool)
    for window in range(len(owners)):
        sides = encoding.sequence_ids(window)
        in_context[window, : len(sides)] = [side == 1 for side in sides]
    spans = [
        _span(answers[owner][:1], offsets[window], in_context[window, : len(offsets[window])])
        for window, owner in enumerate(owners)
    ]
    first = np.searchsorted(owners, np.arange(len(examples) + 1))
    truth = np.empty(len(examples), dtype=object)
    truth[:] = [tuple(text for text, _ in one) for one in answers]
    targets = {
        "start_positions": np.array([start for start, _ in spans]),
        "end_positions": np.array([end for _, end in spans]),
    }
    return EncodedQuestions(rows_of(encoding), targets, truth, 0, first, contexts, offsets, in_context)


def _cut(questions: list[str], tokenizer: PreTrainedTokenizerBase, tokens: int) -> list[str]:
    """Questions of at most so many tokens."""
    encoding = tokenizer(questions, add_special_tokens=False, return_offsets_mapping=True)
    return [
        question if len(offsets) <= tokens else question[: offsets[tokens - 1][1]]
        for question, offsets in zip(questions, encoding["offset_mapping"], strict=True)
    ]


def _span(answer: list[tuple[str, int]], offsets: np.ndarray, in_context: np.ndarray) -> tuple[int, int]:
    """First and last token of a window that touch the answer, or [CLS] where the window does not hold it whole."""
    inside = np.flatnonzero(in_context)
    if not answer or not len(inside):
        return 0, 0
    text, start = answer[0]
    end = start + len(text)
    if offsets[inside[0], 0] > start or offsets[inside[-1], 1] < end:
        return 0, 0
    touching = inside[(offsets[inside, 1] > start) & (offsets[inside, 0] < end)]
    return (int(touching[0]), int(touching[-1])) if len(touching) else (0, 0)


def _best(logits: np.ndarray, encoded: EncodedQuestions) -> tuple[np.ndarray, list[str]]:
    """Of every question: how far its best span scores above having no answer (questions,), and the span's text."""
    start, end = logits[..., 0], logits[..., 1]
    scores, firsts, lasts = best_spans(start, end, encoded.in_context)
    nothing = start[:, 0] + end[:, 0]
    margins, texts = np.empty(len(encoded.contexts)), []
    for question, context in enumerate(encoded.contexts):
        windows = slice(encoded.first[question], encoded.first[question + 1])
        best = windows.start + int(scores[windows].argmax())
        margins[question] = scores[best] - nothing[windows].min()
        offsets = encoded.offsets[best]
        texts.append(context[offsets[firsts[best], 0] : offsets[lasts[best], 1]].strip())
    return margins, texts


def read_answers(logits: np.ndarray, encoded: EncodedQuestions, labels: Labels) -> np.ndarray:
    """The answer to every question from logits (windows, tokens, 2): its text, "" for none."""
    margins, texts = _best(logits, encoded)
    threshold = -np.inf if labels.no_answer_threshold is None else labels.no_answer_threshold
    answers = np.empty(len(texts), dtype=object)
    answers[:] = [text if margin > threshold else "" for margin, text in zip(margins, texts, strict=True)]
    return answers


def choose_no_answer(logits: np.ndarray, encoded: EncodedQuestions) -> float:
    """The no-answer threshold of the highest F1 on these (dev) questions, as SQuAD v2's evaluation searches it."""
    margins, texts = _best(logits, encoded)
    given = np.array([squad_scores(text, truth)[1] for text, truth in zip(texts, encoded.labels, strict=True)])
    none = np.array([squad_scores("", truth)[1] for truth in encoded.labels])
    order = np.argsort(-margins, kind="stable")
    gains = np.concatenate([[0.0], np.cumsum((given - none)[order])])  # of answering the first so many
    sure = margins[order]
    limits = np.concatenate([[sure[0]], (sure[:-1] + sure[1:]) / 2, [sure[-1] - 1.0]])
    possible = np.concatenate([[True], sure[:-1] > sure[1:], [True]])  # equal margins are answered together
    return float(limits[np.where(possible, gains, -np.inf).argmax()])
