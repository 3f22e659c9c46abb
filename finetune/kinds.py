"""Kinds of tasks as a table: for every problem type its model, its metrics, how labels are encoded and logits read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from elastic_model import (
    ElasticBertForQuestionAnswering,
    ElasticBertForSequenceClassification,
    ElasticBertForTokenClassification,
)
from elastic_model.modeling_elasticbert import ElasticBertExitModel
from finetune import questions, tokens
from finetune.data import Encoded, encode
from finetune.examples import BETWEEN_LABELS, Examples
from finetune.labels import Labels, check_labels, encode_labels, find_labels
from finetune.tasks import ProblemType, Task

MULTI_LABEL_THRESHOLD = 0.0  # of a logit: probability one half
CLASSES = ("accuracy", "f1", "macro_f1", "matthews")


def _encode_sequences(
    task: Task, examples: Examples, split: str, labels: Labels, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    encoded = encode_labels(task, examples, labels.names, labels.problem_type)
    check_labels(encoded, split, labels.problem_type)
    return encode(examples, tokenizer, max_length, encoded)


def _with_no_answer(logits: np.ndarray, encoded: Any, labels: Labels) -> Labels:
    if labels.no_answer_threshold is None:
        return labels
    return replace(labels, no_answer_threshold=questions.choose_no_answer(logits, encoded))


@dataclass(frozen=True)
class Kind:
    """What a problem type means here.

    names: of the classes, from training examples; encode: a split as `Encoded`; answers: from the logits of one exit,
    (rows, ...), to one answer an example, in the form of `Encoded.labels`; tune: labels with what is chosen from the
    last exit's logits on dev. metrics: what fits; default: what is reported where nothing is said, the first decides.
    """

    model: type[ElasticBertExitModel]
    default: tuple[str, ...]
    metrics: tuple[str, ...]
    encode: Callable[[Task, Examples, str, Labels, PreTrainedTokenizerBase, int], Any]
    answers: Callable[[np.ndarray, Any, Labels], np.ndarray]
    names: Callable[[Task, Examples, ProblemType], list[str]] = find_labels
    tune: Callable[[np.ndarray, Any, Labels], Labels] = lambda logits, encoded, labels: labels


def _sequences(
    default: tuple[str, ...], metrics: tuple[str, ...], answers: Callable[[np.ndarray, Any, Labels], np.ndarray]
) -> Kind:
    return Kind(ElasticBertForSequenceClassification, default, metrics, _encode_sequences, answers)


KINDS: Mapping[ProblemType, Kind] = {
    "single_label_classification": _sequences(
        ("accuracy", "macro_f1"), CLASSES, lambda logits, encoded, labels: logits.argmax(-1)
    ),
    "multi_label_classification": _sequences(
        ("micro_f1", "accuracy"),
        ("micro_f1", "accuracy"),
        lambda logits, encoded, labels: (logits > MULTI_LABEL_THRESHOLD).astype(np.float32),
    ),
    "regression": _sequences(
        ("pearson+spearman", "pearson", "spearman"),
        ("pearson", "spearman"),
        lambda logits, encoded, labels: logits[:, 0].astype(np.float64),
    ),
    "token_classification": Kind(
        ElasticBertForTokenClassification,
        ("entity_f1", "entity_precision", "entity_recall", "token_accuracy"),
        ("entity_f1", "entity_precision", "entity_recall", "token_accuracy"),
        tokens.encode_tags,
        tokens.read_tags,
        lambda task, examples, problem_type: tokens.find_tags(examples),
    ),
    "question_answering": Kind(
        ElasticBertForQuestionAnswering,
        ("squad_f1", "exact_match"),
        ("squad_f1", "exact_match"),
        questions.encode_questions,
        questions.read_answers,
        lambda task, examples, problem_type: list(questions.NAMES),
        _with_no_answer,
    ),
}


def kind_of(labels: Labels) -> Kind:
    """The kind of a task, by its problem type."""
    return KINDS[labels.problem_type]


def problem_type_of(config: Any) -> ProblemType | None:
    """What the head of a checkpoint, elastic or stock, answers; None where it has no head of these kinds."""
    names = " ".join(config.architectures or [])
    if "ForTokenClassification" in names:
        return "token_classification"
    if "ForQuestionAnswering" in names:
        return "question_answering"
    if "ForSequenceClassification" not in names:
        return None
    return config.problem_type or ("regression" if config.num_labels == 1 else "single_label_classification")


def answers_of(logits: np.ndarray, encoded: Encoded, labels: Labels) -> np.ndarray:
    """What one exit's logits (rows, ...) say: one answer an example, in the form of `encoded.labels`."""
    return kind_of(labels).answers(logits, encoded, labels)


def text_of(answer: Any, labels: Labels) -> str:
    """An answer, or the truth, as one cell of a table: names of classes, numbers, tags of words, text of spans."""
    if labels.problem_type == "single_label_classification":
        return labels.names[answer]
    if labels.problem_type == "multi_label_classification":
        return BETWEEN_LABELS.join(name for name, given in zip(labels.names, answer, strict=True) if given)
    if labels.problem_type == "token_classification":
        return " ".join(answer)
    if labels.problem_type == "question_answering":
        texts = [answer] if isinstance(answer, str) else answer
        return BETWEEN_LABELS.join(" ".join(text.split()) for text in texts)
    return str(answer)
