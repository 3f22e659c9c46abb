"""Exits of the graph: the heads, and the policies that say which rows leave.

Legend of shapes: exits (passed so far), rows (still inside), labels, groups (of classes: one, or one per label of
several).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from export.builder import GraphBuilder
from export.encoder import Layout, Weights, activate

MULTI_LABEL, REGRESSION = "multi_label_classification", "regression"


@dataclass(frozen=True)
class Passed:
    """What a policy may look at: the exit just computed and the ones before it."""

    policy: dict
    problem_type: str
    labels: int
    thresholds: list[str]  # scalars, one per exit so far
    history: list[str]  # logits (rows, labels) of each exit so far
    uncertainty: str | None  # (rows,) of the learned exit head


def pooled_output(graph: GraphBuilder, weights: Weights, layer: int, hidden: str, layout: Layout) -> str:
    """The pooled first token of each row at the exit after layer `layer` (from 1): (rows, width)."""
    pooler = f"elasticbert.encoder.pooler.{layer - 1}.dense"
    first = graph.op("Gather", hidden, layout.starts)
    bias = weights.vector(graph, f"{pooler}.bias")
    return activate(graph, weights.config.pooler_act, weights.product(graph, first, pooler), bias)


def exit_logits(graph: GraphBuilder, weights: Weights, layer: int, pooled: str) -> str:
    """(rows, labels). float32 in every file: a few columns that decide the answer and take no time."""
    name = "classifier" if weights.config.num_output_layers == 1 else f"classifiers.{layer - 1}"
    return graph.op(
        "Gemm", pooled, weights.vector(graph, f"{name}.weight"), weights.vector(graph, f"{name}.bias"), transB=1
    )


def exit_uncertainty(graph: GraphBuilder, weights: Weights, pooled: str) -> str:
    """BERxiT's learned exit head, one for all exits: (rows,)."""
    matrix = graph.constant(weights.tensors["exit_uncertainty.weight"], np.float32)
    bias = graph.constant(weights.tensors["exit_uncertainty.bias"], np.float32)
    return graph.op(
        "Squeeze", graph.op("Sigmoid", graph.op("Gemm", pooled, matrix, bias, transB=1)), graph.integers(1)
    )


def log_probabilities(graph: GraphBuilder, passed: Passed) -> str:
    """Of the last exit: (rows, groups, classes). With several labels each is a group of two classes, logits 0 and its
    own."""
    logits = passed.history[-1]
    if passed.problem_type == MULTI_LABEL:
        classes = [
            graph.op("Unsqueeze", part, graph.integers(2)) for part in (graph.op("Sub", logits, logits), logits)
        ]
        log_probs = graph.op("LogSoftmax", graph.op("Concat", *classes, axis=2), axis=-1)
    else:
        log_probs = graph.op("Unsqueeze", graph.op("LogSoftmax", logits, axis=-1), graph.integers(1))
    # onnxruntime's may be above 0 by a rounding: a certain row would then leave at a threshold that lets nobody leave
    return graph.op("Min", log_probs, graph.constant(0, np.float32))


def entropy(graph: GraphBuilder, passed: Passed) -> str:
    """The normalised entropy of the least certain group is below the threshold (FastBERT, eq. 7)."""
    classes = 2 if passed.problem_type == MULTI_LABEL else passed.labels
    log_probs = log_probabilities(graph, passed)
    negative = graph.op(
        "ReduceSum", graph.op("Mul", graph.op("Exp", log_probs), log_probs), graph.integers(-1), keepdims=0
    )
    scaled = graph.op("Mul", negative, graph.constant(-1 / math.log(classes), np.float32))  # (rows, groups)
    return graph.op("Less", graph.op("ReduceMax", scaled, axes=[1], keepdims=0), passed.thresholds[-1])


def confidence(graph: GraphBuilder, passed: Passed) -> str:
    """The top probability of the least certain group is above the threshold."""
    top = graph.op("Exp", graph.op("ReduceMax", log_probabilities(graph, passed), axes=[2], keepdims=0))
    return graph.op("Greater", graph.op("ReduceMin", top, axes=[1], keepdims=0), passed.thresholds[-1])


def margin(graph: GraphBuilder, passed: Passed) -> str:
    """The top probability leads the next by more than the threshold, in every group."""
    probabilities = graph.op("Exp", log_probabilities(graph, passed))
    top, _ = graph.ops("TopK", probabilities, graph.integers(2), outputs=2, axis=-1)
    first, second = (graph.op("Gather", top, graph.constant(place, np.int64), axis=2) for place in range(2))
    lead = graph.op("ReduceMin", graph.op("Sub", first, second), axes=[1], keepdims=0)
    return graph.op("Greater", lead, passed.thresholds[-1])


def learned(graph: GraphBuilder, passed: Passed) -> str:
    """The learned exit head's uncertainty is below the threshold (BERxiT, Xin et al. 2021)."""
    assert passed.uncertainty is not None  # the graph has it wherever this policy is
    return graph.op("Less", passed.uncertainty, passed.thresholds[-1])


def patience(graph: GraphBuilder, passed: Passed) -> str:
    """The last `threshold` + 1 exits agree (PABEE, Zhou et al. 2020)."""
    if passed.problem_type == REGRESSION:
        return regression_patience(graph, passed)
    said = votes(graph, passed)
    last = graph.op("Slice", said, graph.integers(-1), graph.integers(np.iinfo(np.int64).max), graph.integers(0))
    differs = graph.op("Cast", graph.op("Not", graph.op("Equal", said, last)), to=TensorProto.INT32)
    since = graph.op(
        "CumSum", differs, graph.constant(0, np.int64), reverse=1
    )  # differences from here to the last exit
    agreeing = graph.op("Cast", graph.op("Equal", since, graph.constant(0, np.int32)), to=TensorProto.FLOAT)
    run = graph.op("ReduceSum", agreeing, graph.integers(0), keepdims=0)  # (rows, groups)
    return graph.op("Greater", graph.op("ReduceMin", run, axes=[1], keepdims=0), passed.thresholds[-1])


def regression_patience(graph: GraphBuilder, passed: Passed) -> str:
    """The last `patience` steps from exit to exit are each smaller than that exit's threshold (PABEE)."""
    steps = passed.policy["patience"]
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
    return graph.op("GreaterOrEqual", graph.op("ReduceMin", most, axes=[1], keepdims=0), passed.thresholds[-1])


def votes(graph: GraphBuilder, passed: Passed) -> str:
    """The class that each exit so far chose: (exits, rows, groups)."""
    logits = [graph.op("Unsqueeze", logits, graph.integers(0)) for logits in passed.history]
    stacked = graph.op("Concat", *logits, axis=0)
    if passed.problem_type == MULTI_LABEL:
        return graph.op("Cast", graph.op("Greater", stacked, graph.constant(0, np.float32)), to=TensorProto.INT64)
    return graph.op("ArgMax", stacked, axis=2, keepdims=1)


def nobody(graph: GraphBuilder, passed: Passed) -> str:
    """(rows,) false."""
    rows = graph.op("Slice", graph.op("Shape", passed.history[-1]), graph.integers(0), graph.integers(1))
    return graph.op("Expand", graph.constant(False, np.bool_), rows)


# as in elastic_model.exit_policies, which defines them on tensors
POLICIES: dict[str, Callable[[GraphBuilder, Passed], str]] = {
    "entropy": entropy,
    "confidence": confidence,
    "margin": margin,
    "learned": learned,
    "patience": patience,
    "voting": voting,
}
