"""The one graph: stages of layers, each the body of an `If`, rows that leave at their own exit; and the plain graph of
one exit, without control flow."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from onnx import TensorProto, helper

from elastic_model import ElasticBertConfig
from elastic_model.checks import shares_and_mass
from export.arithmetic import Arithmetic
from export.builder import CONTRIB, GraphBuilder, OnnxModel
from export.encoder import Weights, embeddings, encode
from export.heads import (
    Batch,
    exit_answer,
    exit_uncertainty,
    filled,
    linear,
    nothing,
    pooled_output,
    write_outputs,
)
from export.lengths import MASS, SHARES, Inside, Lengths, lengths_of
from export.policies import POLICIES, Passed
from export.task import EMBEDDING, TOKENS, Task

OPSET = 17
CONTRIB_OPSET = 1
IR_VERSION = 8
REQUIRES = {"onnxruntime": "1.23", "opset": OPSET, "ir_version": IR_VERSION}


def build_graph(
    config: ElasticBertConfig, tensors: Mapping[str, np.ndarray], task: Task, arithmetic: Arithmetic
) -> OnnxModel:
    """A configuration and its tensors as one ONNX model that answers at every exit.

    Inputs input_ids, attention_mask, token_type_ids (where the model has two types or more) int64 (batch, sequence);
    with defaults length_config float32 (layers,), shares of a row's real tokens, length_mass float32 (layers,), shares
    of its significance, below 1 where the row chooses itself, and, where there are several exits, exit_threshold
    float32 (exits,) and max_layer int64 (1,): rows still inside leave at the last exit that is not above it (at the
    first, if all are). Outputs logits (batch, labels), exit_layer int64 (batch,), exit_logits (exits, batch, labels),
    NaN where a row had left, and last kept_tokens int64 (batch, layers), what each layer left of a row's tokens up to
    where it left; per token (batch, sequence, labels) and (exits, batch, sequence, labels), 0 at padding; question
    answering start_logits, end_logits (batch, sequence) and exit_start_logits, exit_end_logits; the bare model
    last_hidden_state (batch, sequence, width) and pooler_output (batch, width).
    """
    graph = GraphBuilder()
    weights = Weights(config, tensors, arithmetic)
    batch, inside = enter(graph, weights)
    if not (task.head.pools and config.keep_cls):  # dropped tokens come back
        width = graph.integers(0, config.hidden_size)
        none = graph.constant([], np.int64)
        inside = replace(inside, place=batch.slots, dropped=filled(graph, width, 0.0), dropped_place=none)
    layers = config.num_hidden_layers
    lengths = lengths_of(graph, layers, batch.lengths, config.keep_cls)
    with graph.scope("embeddings"):
        every = graph.op("Unsqueeze", batch.lengths, graph.integers(1))
        inside = replace(inside, kept=graph.op("Tile", every, graph.integers(1, layers)))
    if task.problem_type == EMBEDDING:
        write_embeddings(graph, weights, batch, inside, lengths)
    else:
        with graph.scope("embeddings"):
            blank = nothing(graph, task, batch)
        answers: list[str] = []
        for number in range(len(config.exit_layers)):
            inside, answer = stage(graph, weights, task, number, batch, inside, lengths, answers, blank)
            answers.append(answer)
        write_outputs(graph, task, batch, answers, config.exit_layers)
        write_kept(graph, inside)
    return finish(graph, config, task)


def build_plain_graph(
    config: ElasticBertConfig, tensors: Mapping[str, np.ndarray], task: Task, arithmetic: Arithmetic, layer: int
) -> OnnxModel:
    """The model cut after the exit at `layer`, without control flow and inputs of its own: the outputs that its
    transformers class has, and nothing else."""
    graph = GraphBuilder()
    weights = Weights(config, tensors, arithmetic)
    batch, inside = enter(graph, weights)
    inside, _ = encode(graph, weights, range(1, layer + 1), inside, None)
    inside = replace(inside, place=batch.slots)
    with graph.scope(f"exit_{layer}"):
        if task.head.pools:  # every row is inside: nothing to scatter
            pooled = pooled_output(graph, weights, layer, batch, inside)
            graph.op("Identity", linear(graph, weights, task, layer, pooled), output="logits")
        else:
            write_tokens(graph, weights, task, layer, batch, inside)
    return finish(graph, config, task, plain=True)


def write_tokens(graph: GraphBuilder, weights: Weights, task: Task, layer: int, batch: Batch, inside: Inside) -> None:
    """The plain graph's outputs of a head that answers per token; 0 at padding."""
    assert inside.place is not None
    embedding = task.problem_type == EMBEDDING
    states = inside.hidden if embedding else linear(graph, weights, task, layer, inside.hidden)
    blank = filled(graph, batch.shape(graph, task.labels, flat=True), 0.0)
    answer = graph.op("ScatterND", blank, graph.op("Unsqueeze", inside.place, graph.integers(1)), states)
    answer = graph.op("Reshape", answer, batch.shape(graph, task.labels))
    if embedding:
        graph.op("Identity", answer, output="last_hidden_state")
        pooled = pooled_output(graph, weights, layer, batch, inside)
        graph.op("Identity", pooled, output="pooler_output")
    elif task.problem_type == TOKENS:
        graph.op("Identity", answer, output="logits")
    else:
        for number, name in enumerate(task.head.outputs):
            graph.op("Gather", answer, graph.constant(number, np.int64), output=name, axis=-1)


def enter(graph: GraphBuilder, weights: Weights) -> tuple[Batch, Inside]:
    """The batch, and all its rows with their real tokens, embedded.

    A row without a real token keeps its first one, so that it can be answered and harms no other.
    """
    zero, one = graph.constant(0, np.int64), graph.constant(1, np.int64)
    with graph.scope("embeddings"):
        shape = graph.op("Shape", "attention_mask")
        rows, sequence = (graph.op("Gather", shape, axis) for axis in (zero, one))
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
        batch = Batch(rows, sequence, mask, lengths, slots)
        return batch, Inside(hidden, graph.op("Range", zero, rows, one), lengths)


def stage(
    graph: GraphBuilder,
    weights: Weights,
    task: Task,
    number: int,
    batch: Batch,
    inside: Inside,
    lengths: Lengths,
    answers: list[str],
    blank: str,
) -> tuple[Inside, str]:
    """The layers up to exit `number` (from 0) with that exit, skipped when no row is left: the rows that go on, and
    what the exit said in the whole batch. `answers` are those of the exits before it, `blank` says nothing."""
    exits = weights.config.exit_layers
    layers = range(([0] + exits)[number] + 1, exits[number] + 1)
    any_left = graph.op("Greater", graph.op("Size", inside.row), graph.constant(0, np.int64))
    then, otherwise = GraphBuilder(graph), GraphBuilder(graph)
    reached, row_of_token = encode(then, weights, layers, inside, lengths)
    with then.scope(f"exit_{exits[number]}"):
        answer, state = exit_answer(then, weights, task, exits[number], batch, reached, blank)
        if number == len(exits) - 1:
            assert reached.kept and inside.kept
            counted = (reached.kept, inside.kept)
            answer, kept = graph.if_else(any_left, then, otherwise, [(answer, blank), counted])
            return replace(inside, kept=kept), answer
        history = [then.op("Gather", one, reached.row) for one in [*(answers if task.remembers else []), answer]]
        leaves = leaving(then, weights, task, number, batch, reached, history, state)
        onward = compress(then, then.op("Not", leaves), batch, reached, row_of_token)
    results = list(zip(onward.values(), inside.values(), strict=True))
    *values, answer = graph.if_else(any_left, then, otherwise, [*results, (answer, blank)])
    return inside.with_values(values), answer


def leaving(
    graph: GraphBuilder,
    weights: Weights,
    task: Task,
    number: int,
    batch: Batch,
    inside: Inside,
    history: list[str],
    state: str,
) -> str:
    """The rows that leave at exit `number` (from 0), booleans (rows,): by the policy, or all since the next is above
    max_layer."""
    assert task.policy is not None
    doubt = exit_uncertainty(graph, weights, state) if task.policy["name"] == "learned" else None
    places = range(number + 1 - len(history), number + 1)
    thresholds = [graph.op("Gather", "exit_threshold", graph.constant(place, np.int64)) for place in places]
    real = None if task.head.pools else graph.op("Gather", batch.mask, inside.row)
    passed = Passed(task, thresholds, history, doubt, real)
    next_exit = graph.constant([weights.config.exit_layers[number + 1]], np.int64)
    asked = POLICIES[task.policy["name"]](graph, passed)
    return graph.op("Or", asked, graph.op("Greater", next_exit, "max_layer"))


def compress(graph: GraphBuilder, stay: str, batch: Batch, inside: Inside, row_of_token: str) -> Inside:
    """Only the rows of `stay` (booleans (rows,)), with their tokens, those that were dropped too."""
    tokens = graph.op("Gather", stay, row_of_token)
    hidden = graph.op("Compress", inside.hidden, tokens, axis=0)
    row, lengths = (graph.op("Compress", value, stay, axis=0) for value in (inside.row, inside.lengths))
    after = replace(inside, hidden=hidden, row=row, lengths=lengths)
    if not (inside.place and inside.dropped and inside.dropped_place):
        return after
    rows = graph.op("Reshape", batch.rows, graph.integers(1))
    gone = graph.op("Expand", graph.constant(False, np.bool_), rows)
    staying = graph.op("ScatterND", gone, graph.op("Unsqueeze", inside.row, graph.integers(1)), stay)  # (batch,)
    dropped = graph.op("Gather", staying, graph.op("Div", inside.dropped_place, batch.sequence))
    return replace(
        after,
        place=graph.op("Compress", inside.place, tokens, axis=0),
        dropped=graph.op("Compress", inside.dropped, dropped, axis=0),
        dropped_place=graph.op("Compress", inside.dropped_place, dropped, axis=0),
    )


def write_embeddings(graph: GraphBuilder, weights: Weights, batch: Batch, inside: Inside, lengths: Lengths) -> None:
    """The bare model's outputs at the last exit that is not above max_layer; rows do not leave by themselves."""
    exits, width = weights.config.exit_layers, weights.config.hidden_size
    pooled, left_at = "", graph.integers(exits[0])
    for number, layer in enumerate(exits):
        layers = range(([0] + exits)[number] + 1, layer + 1)
        then = GraphBuilder(graph) if number else graph
        reached, _ = encode(then, weights, layers, inside, lengths)
        with then.scope(f"exit_{layer}"):
            new_pooled = pooled_output(then, weights, layer, batch, reached)
        if not number:
            inside, pooled = reached, new_pooled
            continue
        wanted = graph.op("LessOrEqual", graph.integers(layer), "max_layer")
        results = [(new, old) for new, old in zip(reached.values(), inside.values(), strict=True)]
        results += [(new_pooled, pooled), (graph.integers(layer), left_at)]
        *values, pooled, left_at = graph.if_else(wanted, then, GraphBuilder(graph), results)
        inside = inside.with_values(values)
    with graph.scope("answer"):
        states, places = inside.everything(graph)
        blank = filled(graph, batch.shape(graph, width, flat=True), 0.0)
        found = graph.op("ScatterND", blank, graph.op("Unsqueeze", places, graph.integers(1)), states)
        graph.op("Reshape", found, batch.shape(graph, width), output="last_hidden_state")
        graph.op("Identity", pooled, output="pooler_output")
        rows = graph.op("Reshape", batch.rows, graph.integers(1))
        graph.op("Expand", left_at, rows, output="exit_layer")
    write_kept(graph, inside)


def write_kept(graph: GraphBuilder, inside: Inside) -> None:
    """The output that tells what a row cost."""
    assert inside.kept
    graph.op("Identity", inside.kept, output="kept_tokens")


def finish(graph: GraphBuilder, config: ElasticBertConfig, task: Task, plain: bool = False) -> OnnxModel:
    """The model with its inputs, outputs and defaults; a plain one has BERT's inputs and answers alone."""
    int64, float32, exits = TensorProto.INT64, TensorProto.FLOAT, len(config.exit_layers)
    names = ["input_ids", "attention_mask", *(["token_type_ids"] if config.type_vocab_size > 1 else [])]
    inputs = [helper.make_tensor_value_info(name, int64, ["batch", "sequence"]) for name in names]
    outputs = [helper.make_tensor_value_info(name, float32, shape) for name, shape in _answers(task).items()]
    if not plain:
        outputs.append(helper.make_tensor_value_info("exit_layer", int64, ["batch"]))
        for name, shape in zip(task.head.exit_outputs, _answers(task).values(), strict=False):
            outputs.append(helper.make_tensor_value_info(name, float32, [exits, *shape]))
        outputs.append(helper.make_tensor_value_info("kept_tokens", int64, ["batch", config.num_hidden_layers]))
        # an initializer of an input's name is the input's default
        given = shares_and_mass(task.lengths, config.num_hidden_layers)
        defaults = {name: np.array(one, np.float32) for name, one in zip((SHARES, MASS), given, strict=True)}
        if exits > 1:
            if task.policy is not None:
                defaults["exit_threshold"] = np.array(task.thresholds, np.float32)
            defaults["max_layer"] = np.array([task.max_layer], np.int64)
        for name, value in defaults.items():
            kind = float32 if value.dtype == np.float32 else int64
            inputs.append(helper.make_tensor_value_info(name, kind, value.shape))
            graph.initializer(name, value)
    body = helper.make_graph(graph.nodes, "elasticbert", inputs, outputs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, CONTRIB_OPSET)]
    model = helper.make_model(body, opset_imports=opsets, ir_version=IR_VERSION, producer_name="elastic-model")
    return OnnxModel(model, graph.weights)


def _answers(task: Task) -> dict[str, list]:
    """The task's outputs and their shapes."""
    if task.head.pools:
        return {"logits": ["batch", task.labels]}
    if task.problem_type == EMBEDDING:
        return {"last_hidden_state": ["batch", "sequence", task.labels], "pooler_output": ["batch", task.labels]}
    if task.problem_type == TOKENS:
        return {"logits": ["batch", "sequence", task.labels]}
    return dict.fromkeys(task.head.outputs, ["batch", "sequence"])
