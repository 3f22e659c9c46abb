"""Heads of the exits: what they read of the packed rows, and their answers at the rows' places in the batch.

Legend of shapes: batch, sequence (of the inputs), rows (still inside), tokens (theirs), width, labels.
"""

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, numpy_helper

from export.builder import GraphBuilder
from export.encoder import Weights, activate, norm_before, slots_of, starts_of
from export.lengths import Inside
from export.task import Task

NO_TOKEN = 0.0  # what a head that answers per token says of padding


@dataclass(frozen=True)
class Batch:
    """The whole batch, which every stage sees: rows scalar; sequence scalar; mask (batch, sequence) booleans, true at
    real tokens; lengths (batch,), real tokens of each row; slots (tokens,), where they are in (batch, sequence)."""

    rows: str
    sequence: str
    mask: str
    lengths: str
    slots: str

    def shape(self, graph: GraphBuilder, *after: int, flat: bool = False) -> str:
        """The vector (batch, sequence, *after), the first two as one where `flat`."""
        sizes = [graph.op("Mul", self.rows, self.sequence)] if flat else [self.rows, self.sequence]
        sizes = [graph.op("Reshape", size, graph.integers(1)) for size in sizes]
        return graph.op("Concat", *sizes, graph.integers(*after), axis=0) if after or not flat else sizes[0]


def filled(graph: GraphBuilder, shape: str, value: float) -> str:
    """float32 of a shape, one value everywhere."""
    return graph.op("ConstantOfShape", shape, value=numpy_helper.from_array(np.array([value], np.float32)))


def nothing(graph: GraphBuilder, task: Task, batch: Batch) -> str:
    """What an exit says of rows that have left: NaN, (batch, labels) or, per token, (batch, sequence, labels)."""
    if not task.head.pools:
        return filled(graph, batch.shape(graph, task.labels), np.nan)
    rows = graph.op("Reshape", batch.rows, graph.integers(1))
    return filled(graph, graph.op("Concat", rows, graph.integers(task.labels), axis=0), np.nan)


def first_token(graph: GraphBuilder, weights: Weights, batch: Batch, inside: Inside) -> str:
    """[CLS] of each row; (rows, width). Where it may have been dropped, its last state."""
    if inside.dropped is None or weights.config.keep_cls:
        return graph.op("Gather", inside.hidden, starts_of(graph, inside.lengths))
    states, places = inside.everything(graph)
    first = graph.op("Gather", batch.slots, starts_of(graph, batch.lengths))  # (batch,)
    restored = filled(graph, batch.shape(graph, weights.config.hidden_size, flat=True), 0.0)
    restored = graph.op("ScatterND", restored, graph.op("Unsqueeze", places, graph.integers(1)), states)
    return graph.op("Gather", restored, graph.op("Gather", first, inside.row))


def mean_token(graph: GraphBuilder, inside: Inside) -> str:
    """The mean of each row's tokens; (rows, width)."""
    _, _, real, slots = slots_of(graph, inside.lengths)
    count = graph.op("Unsqueeze", graph.op("Cast", inside.lengths, to=TensorProto.FLOAT), graph.integers(1))
    shares = graph.op("Div", graph.op("Cast", real, to=TensorProto.FLOAT), count)  # (rows, longest)
    padded = graph.op("Gather", inside.hidden, slots)  # (rows, longest, width)
    mean = graph.op("MatMul", graph.op("Unsqueeze", shares, graph.integers(1)), padded)
    return graph.op("Squeeze", mean, graph.integers(1))


def pooled_output(graph: GraphBuilder, weights: Weights, layer: int, batch: Batch, inside: Inside) -> str:
    """What the pooler of the exit after layer `layer` (from 1) makes of [CLS], or of the tokens' mean: (rows,
    width)."""
    means = weights.config.exit_pooling[layer - 1] == "mean"
    state = mean_token(graph, inside) if means else first_token(graph, weights, batch, inside)
    pooler = f"elasticbert.encoder.pooler.{layer - 1}.dense"
    bias = weights.vector(graph, f"{pooler}.bias")
    product = weights.product(graph, state, pooler, norm=norm_before(layer + 1))
    return activate(graph, weights.config.pooler_act, product, bias)


def linear(graph: GraphBuilder, weights: Weights, task: Task, layer: int, states: str) -> str:
    """The exit's head: (rows, labels). float32 in every file: a few columns that decide the answer and take no
    time."""
    static = weights.config.num_output_layers == 1
    name = task.head.static_module if static else f"{task.head.module}.{layer - 1}"
    parameters = [weights.vector(graph, f"{name}.{part}") for part in ("weight", "bias")]
    return graph.op("Gemm", states, *parameters, transB=1)


def exit_answer(
    graph: GraphBuilder, weights: Weights, task: Task, layer: int, batch: Batch, inside: Inside, blank: str
) -> tuple[str, str]:
    """The answers of the exit after layer `layer` (from 1) in the whole batch, shaped like `blank`; and what a learned
    exit head reads, (rows, width)."""
    if task.head.pools:
        pooled = pooled_output(graph, weights, layer, batch, inside)
        logits = linear(graph, weights, task, layer, pooled)
        return graph.op("ScatterND", blank, graph.op("Unsqueeze", inside.row, graph.integers(1)), logits), pooled
    states, places = inside.everything(graph)
    logits = linear(graph, weights, task, layer, states)
    flat = graph.op("Reshape", blank, graph.integers(-1, task.labels))
    flat = graph.op("ScatterND", flat, graph.op("Unsqueeze", places, graph.integers(1)), logits)
    answer = graph.op("Reshape", flat, batch.shape(graph, task.labels))
    learned = task.policy is not None and task.policy["name"] == "learned"
    return answer, first_token(graph, weights, batch, inside) if learned else ""


def exit_uncertainty(graph: GraphBuilder, weights: Weights, state: str) -> str:
    """BERxiT's learned exit head, one for all exits: (rows,)."""
    matrix = graph.constant(weights.tensors["exit_uncertainty.weight"], np.float32)
    bias = graph.constant(weights.tensors["exit_uncertainty.bias"], np.float32)
    doubt = graph.op("Sigmoid", graph.op("Gemm", state, matrix, bias, transB=1))
    return graph.op("Squeeze", doubt, graph.integers(1))


def write_outputs(graph: GraphBuilder, task: Task, batch: Batch, answers: list[str], exit_layers: list[int]) -> None:
    """The outputs: every exit's logits, and each row's at the last exit that it passed; NaN where a row had left,
    `NO_TOKEN` at padding."""
    with graph.scope("answer"):
        stacked = graph.op("Concat", *(graph.op("Unsqueeze", answer, graph.integers(0)) for answer in answers), axis=0)
        missing = graph.op("IsNaN", graph.op("Gather", stacked, graph.constant(0, np.int64), axis=-1))
        if not task.head.pools:  # (exits, batch, sequence) -> (exits, batch)
            by_token = graph.op("Cast", missing, to=TensorProto.INT32)
            by_row = graph.op("ReduceMin", by_token, axes=[2], keepdims=1)
            missing_rows = graph.op("Cast", by_row, to=TensorProto.BOOL)
            keep = graph.op("Unsqueeze", graph.op("Or", batch.mask, missing_rows), graph.integers(3))
            stacked = graph.op("Where", keep, stacked, graph.constant(NO_TOKEN, np.float32))
            missing = graph.op("Squeeze", missing_rows, graph.integers(2))
        inside = graph.op("Cast", graph.op("Not", missing), to=TensorProto.INT64)
        passed = graph.op("ReduceSum", inside, graph.integers(0), keepdims=0)
        left_at = graph.op("Sub", passed, graph.constant(1, np.int64))
        graph.op("Gather", graph.integers(*exit_layers), left_at, output="exit_layer")
        order = [1, 0, 2] if task.head.pools else [1, 0, 2, 3]
        index = graph.op("Unsqueeze", left_at, graph.integers(1))
        logits = graph.op("GatherND", graph.op("Transpose", stacked, perm=order), index, batch_dims=1)
        for names, value in ((task.head.exit_outputs, stacked), (task.head.outputs, logits)):
            for number, name in enumerate(names):
                if len(names) == 1:
                    graph.op("Identity", value, output=name)
                else:  # where an answer starts, and where it ends
                    graph.op("Gather", value, graph.constant(number, np.int64), output=name, axis=-1)
