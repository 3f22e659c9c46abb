"""The one graph: stages of layers, each the body of an `If`, rows that leave at their own exit."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from elastic_model import ElasticBertConfig
from elastic_model.checks import check_exit_policy, thresholds_of
from export.arithmetic import Arithmetic
from export.builder import CONTRIB, GraphBuilder
from export.encoder import Weights, embeddings, encoder_layer, layout_of
from export.exits import POLICIES, REGRESSION, Passed, exit_logits, exit_uncertainty, pooled_output

OPSET = 17
CONTRIB_OPSET = 1
IR_VERSION = 8
REQUIRES = {"onnxruntime": "1.17", "opset": OPSET, "ir_version": IR_VERSION}
STAY: dict[str, Any] = {"name": "entropy", "threshold": 0.0}  # nothing is below an entropy of 0
STAY_REGRESSION: dict[str, Any] = {"name": "patience", "patience": 1, "threshold": 0.0}


@dataclass(frozen=True)
class Task:
    """What the graph answers and when rows leave: `policy` as in a configuration, its thresholds one per exit."""

    problem_type: str
    policy: dict
    thresholds: list[float]
    max_layer: int


@dataclass(frozen=True)
class Inside:
    """The rows still inside, packed: hidden (tokens, width); row (rows,), their indices in the batch; lengths
    (rows,)."""

    hidden: str
    row: str
    lengths: str

    def values(self) -> list[str]:
        return [self.hidden, self.row, self.lengths]


def task_of(config: ElasticBertConfig, measured: dict[str, Any] | None = None) -> Task:
    """The task and the default operating point of a sequence classifier's configuration.

    measured: the policy of the checkpoint's operating points. Where the configuration names none, that one is built
    in, or without points one whose default threshold lets nobody leave. ValueError where the two are of different
    kinds.
    """
    exits = config.exit_layers
    problem_type = config.problem_type or (REGRESSION if config.num_labels == 1 else "single_label_classification")
    policy, max_layer = check_exit_policy(config.exit_policy, len(exits), problem_type), exits[-1]
    if policy is not None and policy["name"] == "constant":
        max_layer, policy = policy["layer"], None
    if policy is None:
        policy = measured or (STAY_REGRESSION if problem_type == REGRESSION else STAY)
    if measured and measured.get("name") != policy["name"]:
        raise ValueError(
            f"the configuration's exit policy is {policy['name']!r}, but the operating points were measured with "
            f"{measured.get('name')!r}; evaluate the checkpoint again"
        )
    counts = {"patience": policy.get("patience"), "voting": policy.get("votes")}
    settings = policy if "threshold" in policy else {"threshold": counts[policy["name"]]}
    return Task(problem_type, policy, thresholds_of(settings, len(exits)), max_layer)


def metadata(config: ElasticBertConfig, task: Task, max_tokens: int, versions: dict[str, str]) -> dict[str, str]:
    """What a client needs to know, as ONNX metadata: keys `elastic_*`, values JSON."""
    names = config.id2label or {}
    values = {
        "exit_layers": config.exit_layers,
        "labels": [names[number] for number in range(config.num_labels)],
        "problem_type": task.problem_type,
        "policy": task.policy,
        "thresholds": task.thresholds,
        "max_layer": task.max_layer,
        "max_tokens": max_tokens,
        "requires": REQUIRES,
        "versions": versions,
        "config": config.to_diff_dict(),
    }
    return {f"elastic_{name}": json.dumps(value) for name, value in values.items()}


def build_graph(
    config: ElasticBertConfig, tensors: Mapping[str, np.ndarray], task: Task, arithmetic: Arithmetic
) -> onnx.ModelProto:
    """The sequence classifier of a configuration and its tensors as one ONNX model.

    Inputs input_ids, attention_mask, token_type_ids (where the model has two types or more) int64 (batch, sequence),
    and with defaults exit_threshold float32 (exits,) and max_layer int64 (1,): rows still inside leave at the last
    exit that is not above it (at the first, if all are). Outputs logits (batch, labels), exit_layer int64 (batch,) and
    exit_logits (exits, batch, labels), NaN where a row had left.
    """
    graph = GraphBuilder()
    weights = Weights(config, tensors, arithmetic)
    inside, nothing = enter(graph, weights)
    answers: list[str] = []
    for exit_number in range(len(config.exit_layers)):
        inside, answer = stage(graph, weights, task, exit_number, inside, answers, nothing)
        answers.append(answer)
    answer_of(graph, config.exit_layers, answers)
    return finish(graph, config, task)


def enter(graph: GraphBuilder, weights: Weights) -> tuple[Inside, str]:
    """All rows with their real tokens, embedded; and (batch, labels) NaN, what an exit says of rows that have left.

    A row without a real token keeps its first one, so that it can be answered and harms no other.
    """
    zero, one = graph.constant(0, np.int64), graph.constant(1, np.int64)
    with graph.scope("embeddings"):
        shape = graph.op("Shape", "attention_mask")
        batch, sequence = (graph.op("Gather", shape, axis) for axis in (zero, one))
        mask = graph.op("Cast", "attention_mask", to=TensorProto.BOOL)
        counts = graph.op("ReduceSum", graph.op("Cast", mask, to=TensorProto.INT64), graph.integers(1))  # (batch, 1)
        first = graph.op("Equal", graph.op("Range", zero, sequence, one), zero)
        mask = graph.op("Or", mask, graph.op("And", first, graph.op("Equal", counts, zero)))
        slots = graph.op("NonZero", graph.op("Reshape", mask, graph.integers(-1)))
        slots = graph.op("Squeeze", slots, graph.integers(0))  # (tokens,)
        names = ["input_ids", "token_type_ids"] if weights.config.type_vocab_size > 1 else ["input_ids"]
        ids = [graph.op("Gather", graph.op("Reshape", name, graph.integers(-1)), slots) for name in names]
        hidden = embeddings(graph, weights, graph.op("Mod", slots, sequence), *ids)
        lengths = graph.op("Squeeze", graph.op("Max", counts, one), graph.integers(1))
        nothing = graph.op(
            "ConstantOfShape",
            graph.op(
                "Concat",
                graph.op("Reshape", batch, graph.integers(1)),
                graph.integers(weights.config.num_labels),
                axis=0,
            ),
            value=numpy_helper.from_array(np.array([np.nan], np.float32)),
        )
        return Inside(hidden, graph.op("Range", zero, batch, one), lengths), nothing


def stage(
    graph: GraphBuilder, weights: Weights, task: Task, number: int, inside: Inside, answers: list[str], nothing: str
) -> tuple[Inside, str]:
    """The layers up to exit `number` (from 0) with that exit, skipped when no row is left: the rows that go on, and
    (batch, labels) what the exit said. `answers` are those of the exits before it."""
    exits = weights.config.exit_layers
    layers = range(([0] + exits)[number] + 1, exits[number] + 1)
    any_left = graph.op("Greater", graph.op("Size", inside.row), graph.constant(0, np.int64))
    then, otherwise = GraphBuilder(graph), GraphBuilder(graph)
    layout, hidden = layout_of(then, inside.lengths), inside.hidden
    for layer in layers:
        hidden, layout = encoder_layer(then, weights, layer, hidden, layout)
    with then.scope(f"exit_{exits[number]}"):
        pooled = pooled_output(then, weights, exits[number], hidden, layout)
        logits = exit_logits(then, weights, exits[number], pooled)
        answer = then.op("ScatterND", nothing, then.op("Unsqueeze", inside.row, then.integers(1)), logits)
        if number == len(exits) - 1:
            return inside, graph.if_else(any_left, then, otherwise, [(answer, nothing)])[0]
        passed = (
            [then.op("Gather", answer, inside.row) for answer in answers] + [logits]
            if needs_history(task)
            else [logits]
        )
        leaves = leaving(then, weights, task, number, passed, pooled)
        onward = compress(then, then.op("Not", leaves), Inside(hidden, inside.row, layout.lengths), layout.rows)
    results = list(zip(onward.values(), inside.values(), strict=True))
    *values, answer = graph.if_else(any_left, then, otherwise, [*results, (answer, nothing)])
    return Inside(*values), answer


def needs_history(task: Task) -> bool:
    """Whether the policy looks at the exits before the last."""
    return task.policy["name"] in ("patience", "voting")


def leaving(graph: GraphBuilder, weights: Weights, task: Task, number: int, history: list[str], pooled: str) -> str:
    """The rows that leave at exit `number` (from 0), booleans (rows,): by the policy, or all since the next is above
    max_layer."""
    name = task.policy["name"]
    doubt = exit_uncertainty(graph, weights, pooled) if name == "learned" else None
    places = range(number + 1) if needs_history(task) else [number]
    thresholds = [graph.op("Gather", "exit_threshold", graph.constant(place, np.int64)) for place in places]
    passed = Passed(task.policy, task.problem_type, weights.config.num_labels, thresholds, history, doubt)
    next_exit = graph.constant([weights.config.exit_layers[number + 1]], np.int64)
    return graph.op("Or", POLICIES[name](graph, passed), graph.op("Greater", next_exit, "max_layer"))


def compress(graph: GraphBuilder, stay: str, inside: Inside, row_of_token: str) -> Inside:
    """Only the rows of `stay` (booleans (rows,)), with their tokens."""
    hidden = graph.op("Compress", inside.hidden, graph.op("Gather", stay, row_of_token), axis=0)
    return Inside(hidden, *(graph.op("Compress", value, stay, axis=0) for value in (inside.row, inside.lengths)))


def answer_of(graph: GraphBuilder, exit_layers: list[int], answers: list[str]) -> None:
    """The outputs: every exit's logits, and each row's at the last exit that it passed."""
    with graph.scope("answer"):
        stacked = graph.op("Concat", *(graph.op("Unsqueeze", answer, graph.integers(0)) for answer in answers), axis=0)
        graph.op("Identity", stacked, output="exit_logits")
        missing = graph.op("IsNaN", graph.op("Gather", stacked, graph.constant(0, np.int64), axis=2))  # (exits, batch)
        passed = graph.op(
            "ReduceSum",
            graph.op("Cast", graph.op("Not", missing), to=TensorProto.INT64),
            graph.integers(0),
            keepdims=0,
        )
        left_at = graph.op("Sub", passed, graph.constant(1, np.int64))
        graph.op("Gather", graph.integers(*exit_layers), left_at, output="exit_layer")
        by_row = graph.op("Transpose", stacked, perm=[1, 0, 2])
        graph.op("GatherND", by_row, graph.op("Unsqueeze", left_at, graph.integers(1)), batch_dims=1, output="logits")


def finish(graph: GraphBuilder, config: ElasticBertConfig, task: Task) -> onnx.ModelProto:
    """The model with its inputs, outputs and defaults."""
    int64, float32, exits = TensorProto.INT64, TensorProto.FLOAT, len(config.exit_layers)
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if config.type_vocab_size > 1 else [])]
    inputs = [helper.make_tensor_value_info(name, int64, ["batch", "sequence"]) for name in names]
    outputs = [
        helper.make_tensor_value_info("logits", float32, ["batch", config.num_labels]),
        helper.make_tensor_value_info("exit_layer", int64, ["batch"]),
        helper.make_tensor_value_info("exit_logits", float32, [exits, "batch", config.num_labels]),
    ]
    if exits > 1:  # an initializer of an input's name is the input's default
        inputs.append(helper.make_tensor_value_info("exit_threshold", float32, [exits]))
        inputs.append(helper.make_tensor_value_info("max_layer", int64, [1]))
        graph.initializer("exit_threshold", np.array(task.thresholds, np.float32))
        graph.initializer("max_layer", np.array([task.max_layer], np.int64))
    body = helper.make_graph(graph.nodes, "elasticbert", inputs, outputs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, CONTRIB_OPSET)]
    model = helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION, producer_name="elastic-model")
    while graph.initializers:  # moved one by one: the weights are never held twice
        model.graph.initializer.append(graph.initializers.pop())
    return model
