"""Exit policies in the graph: which rows leave, from the logits of the exits that they have passed.

As in elastic_model.exit_policies, which defines them on tensors, every task is read as groups of classes: one group
per row, per label of several, or per token; or two, where an answer starts and ends. The worst group decides. Legend
of shapes: exits (passed so far), rows (still inside), sequence, labels, groups, classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from export.builder import GraphBuilder
from export.task import MULTI_LABEL, QUESTIONS, REGRESSION, TOKENS, Task

NO_TOKEN_LOGIT = -1e30  # the logit of padding, which cannot start or end an answer; its exponential is 0, times it 0


@dataclass(frozen=True)
class Passed:
    """What a policy may look at: the exit just computed and the ones before it."""

    task: Task
    thresholds: list[str]  # scalars, one per exit in `history`
    history: list[str]  # logits of each exit so far: (rows, labels), of tokens (rows, sequence, labels)
    uncertainty: str | None  # (rows,) of the learned exit head
    real: str | None  # (rows, sequence) booleans: which tokens are real; None where a head reads a row's pooled state


def grouped(graph: GraphBuilder, passed: Passed, logits: str) -> str:
    """An exit's logits as (rows, groups, classes). With several labels each is a group of two classes, logits 0 and
    its own."""
    kind = passed.task.problem_type
    if kind == MULTI_LABEL:
        pair = [graph.op("Unsqueeze", part, graph.integers(2)) for part in (graph.op("Sub", logits, logits), logits)]
        return graph.op("Concat", *pair, axis=2)
    if kind == QUESTIONS:
        assert passed.real is not None
        sides = graph.op("Transpose", logits, perm=[0, 2, 1])
        real = graph.op("Unsqueeze", passed.real, graph.integers(1))
        return graph.op("Where", real, sides, graph.constant(NO_TOKEN_LOGIT, np.float32))
    return logits if kind == TOKENS else graph.op("Unsqueeze", logits, graph.integers(1))


def log_probabilities(graph: GraphBuilder, passed: Passed) -> str:
    """Of the last exit: (rows, groups, classes)."""
    log_probs = graph.op("LogSoftmax", grouped(graph, passed, passed.history[-1]), axis=-1)
    # onnxruntime's may be above 0 by a rounding: a certain row would then leave at a threshold that lets nobody leave
    return graph.op("Min", log_probs, graph.constant(0, np.float32))


def least(graph: GraphBuilder, passed: Passed, scores: str) -> str:
    """The smallest of each row's (rows, groups) scores, over real tokens only; (rows,)."""
    if passed.task.problem_type == TOKENS:
        assert passed.real is not None
        scores = graph.op("Where", passed.real, scores, graph.constant(np.inf, np.float32))
    return graph.op("ReduceMin", scores, axes=[1], keepdims=0)


def entropy(graph: GraphBuilder, passed: Passed) -> str:
    """The normalised entropy of the least certain group is below the threshold (FastBERT, eq. 7)."""
    log_probs = log_probabilities(graph, passed)
    product = graph.op("Mul", graph.op("Exp", log_probs), log_probs)
    negative = graph.op("ReduceSum", product, graph.integers(-1), keepdims=0)  # (rows, groups)
    if passed.task.problem_type == QUESTIONS:
        assert passed.real is not None
        tokens = graph.op("ReduceSum", graph.op("Cast", passed.real, to=TensorProto.FLOAT), graph.integers(1))
        largest = graph.op("Log", graph.op("Max", tokens, graph.constant(2, np.float32)))  # (rows, 1)
        scaled = graph.op("Div", negative, largest)
    else:
        classes = 2 if passed.task.problem_type == MULTI_LABEL else max(passed.task.labels, 2)
        scaled = graph.op("Mul", negative, graph.constant(1 / math.log(classes), np.float32))
    return graph.op("Less", graph.op("Neg", least(graph, passed, scaled)), passed.thresholds[-1])


def confidence(graph: GraphBuilder, passed: Passed) -> str:
    """The top probability of the least certain group is above the threshold."""
    top = graph.op("Exp", graph.op("ReduceMax", log_probabilities(graph, passed), axes=[2], keepdims=0))
    return graph.op("Greater", least(graph, passed, top), passed.thresholds[-1])


def margin(graph: GraphBuilder, passed: Passed) -> str:
    """The top probability leads the next by more than the threshold, in every group."""
    probabilities = graph.op("Exp", log_probabilities(graph, passed))
    none = graph.constant(0, np.float32)  # the next of a single class
    probabilities = graph.op("Pad", probabilities, graph.integers(0, 0, 0, 0, 0, 1), none)
    top, _ = graph.ops("TopK", probabilities, graph.integers(2), outputs=2, axis=-1)
    first, second = (graph.op("Gather", top, graph.constant(place, np.int64), axis=2) for place in range(2))
    return graph.op("Greater", least(graph, passed, graph.op("Sub", first, second)), passed.thresholds[-1])


def learned(graph: GraphBuilder, passed: Passed) -> str:
    """The learned exit head's uncertainty is below the threshold (BERxiT, Xin et al. 2021)."""
    assert passed.uncertainty is not None  # the graph has it wherever this policy is
    return graph.op("Less", passed.uncertainty, passed.thresholds[-1])


def patience(graph: GraphBuilder, passed: Passed) -> str:
    """The last `threshold` + 1 exits agree (PABEE, Zhou et al. 2020)."""
    if passed.task.problem_type == REGRESSION:
        return regression_patience(graph, passed)
    said = votes(graph, passed)
    last = graph.op("Slice", said, graph.integers(-1), graph.integers(np.iinfo(np.int64).max), graph.integers(0))
    differs = graph.op("Cast", graph.op("Not", graph.op("Equal", said, last)), to=TensorProto.INT32)
    since = graph.op(
        "CumSum", differs, graph.constant(0, np.int64), reverse=1
    )  # differences from here to the last exit
    agreeing = graph.op("Cast", graph.op("Equal", since, graph.constant(0, np.int32)), to=TensorProto.FLOAT)
    run = graph.op("ReduceSum", agreeing, graph.integers(0), keepdims=0)  # (rows, groups)
    return graph.op("Greater", least(graph, passed, run), passed.thresholds[-1])


def regression_patience(graph: GraphBuilder, passed: Passed) -> str:
    """The last `patience` steps from exit to exit are each smaller than that exit's threshold (PABEE)."""
    assert passed.task.policy is not None
    steps = passed.task.policy["patience"]
    values = passed.history[-steps - 1 :]
    if len(values) <= steps:
        return nobody(graph, passed)
    sizes = [
        graph.op("Abs", graph.op("Sub", after, before)) for before, after in zip(values, values[1:], strict=False)
    ]
    near = [graph.op("Less", size, limit) for size, limit in zip(sizes, passed.thresholds[-steps:], strict=True)]
    together = graph.op("Cast", graph.op("Concat", *near, axis=1), to=TensorProto.INT32)  # (rows, steps * values)
    return graph.op("Cast", graph.op("ReduceMin", together, axes=[1], keepdims=0), to=TensorProto.BOOL)


def voting(graph: GraphBuilder, passed: Passed) -> str:
    """Some class has `threshold` votes among the exits so far, in every group (Sun et al. 2021)."""
    said = votes(graph, passed)
    pairs = [graph.op("Unsqueeze", said, graph.integers(axis)) for axis in range(2)]
    same = graph.op("Cast", graph.op("Equal", *pairs), to=TensorProto.FLOAT)  # (exits, exits, rows, groups)
    most = graph.op("ReduceMax", graph.op("ReduceSum", same, graph.integers(0), keepdims=0), axes=[0], keepdims=0)
    return graph.op("GreaterOrEqual", least(graph, passed, most), passed.thresholds[-1])


def votes(graph: GraphBuilder, passed: Passed) -> str:
    """The class that each exit so far chose: (exits, rows, groups)."""
    chosen = [graph.op("ArgMax", grouped(graph, passed, logits), axis=2, keepdims=0) for logits in passed.history]
    return graph.op("Concat", *(graph.op("Unsqueeze", one, graph.integers(0)) for one in chosen), axis=0)


def nobody(graph: GraphBuilder, passed: Passed) -> str:
    """(rows,) false."""
    rows = graph.op("Slice", graph.op("Shape", passed.history[-1]), graph.integers(0), graph.integers(1))
    return graph.op("Expand", graph.constant(False, np.bool_), rows)


POLICIES: dict[str, Callable[[GraphBuilder, Passed], str]] = {
    "entropy": entropy,
    "confidence": confidence,
    "margin": margin,
    "learned": learned,
    "patience": patience,
    "voting": voting,
}
