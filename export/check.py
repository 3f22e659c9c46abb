"""What is checked before an artefact is kept: float32 against PyTorch at every exit and several lengths, rows that
leave, the other files against float32."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch

from elastic_model.checks import LengthConfig
from elastic_model.exit_policies import simulate
from elastic_model.session import ElasticSession, Encoding, exit_values
from export.builder import OnnxModel
from export.checkpoint import Checkpoint
from export.task import EMBEDDING, MULTI_LABEL, QUESTIONS, REGRESSION, SINGLE_LABEL, Task

TOLERANCE = 1e-4  # of float32 logits, absolute and relative
NEAR = 1e-3  # of a threshold: rounding may decide there
LARGEST_ERROR = 0.3  # of logits without rows to compare on: mean difference over root mean square
SHAPES = ((1, 3), (1, 40), (5, 24), (16, 64))  # rows and the longest of them, cut to the model's longest input
CHOSEN = 0.8  # share of the significance that a row keeps at each layer
SIMILAR = 0.98  # cosine of two mean vectors that count as the same answer
BATCH, BATCH_TOKENS = 16, 2048


@dataclass(frozen=True)
class Reference:
    """What PyTorch says of a batch under a length configuration: for each row every exit's values, (exits, labels) or
    (exits, tokens, labels)."""

    rows: list[Encoding]
    lengths: LengthConfig
    values: list[np.ndarray]


def random_rows(checkpoint: Checkpoint) -> list[list[Encoding]]:
    """Batches of rows of random tokens, ragged, of several shapes, up to the longest input."""
    rng = np.random.default_rng(0)
    config, longest = checkpoint.config, checkpoint.max_tokens
    batches = []
    for rows, tokens in (*SHAPES, (2, longest)):
        tokens = min(tokens, longest)
        lengths = [tokens, *rng.integers(min(2, tokens), tokens + 1, rows - 1)]
        batches.append([_random_row(rng, int(length), config) for length in lengths])
    return batches


def _random_row(rng: np.random.Generator, tokens: int, config) -> Encoding:
    ids = rng.integers(0, config.vocab_size, tokens).tolist()
    types = (np.arange(tokens) >= rng.integers(1, tokens + 1)) & (config.type_vocab_size > 1)
    return Encoding(ids, types.astype(int).tolist())


def references(checkpoint: Checkpoint, task: Task, exit_layers: list[int]) -> list[Reference]:
    """PyTorch at some exits on random rows: all lengths kept, falling from layer to layer, halved at once, and chosen
    by the row."""
    layers = checkpoint.config.num_hidden_layers
    plans: list[tuple[list[Encoding], LengthConfig]]
    falling = [round(1 - 0.7 * (layer + 1) / layers, 3) for layer in range(layers)]
    halved = [1.0] * (layers // 4) + [0.5] * (layers - layers // 4)
    batches = random_rows(checkpoint)
    plans = [(rows, [1.0] * layers) for rows in batches] + [(batches[2], falling), (batches[3], halved)]
    plans.append((batches[1], {"mass": [CHOSEN] * layers}))
    if task.lengths != [1.0] * layers:
        plans.append((batches[2], task.lengths))
    return [
        Reference(rows, lengths, [_pytorch(checkpoint, task, row, lengths, exit_layers) for row in rows])
        for rows, lengths in plans
    ]


@torch.inference_mode()
def _pytorch(
    checkpoint: Checkpoint, task: Task, row: Encoding, lengths: LengthConfig, exit_layers: list[int]
) -> np.ndarray:
    """One row by itself, without padding."""
    types = {"token_type_ids": torch.tensor([row.type_ids])} if checkpoint.config.type_vocab_size > 1 else {}
    given = {"input_ids": torch.tensor([row.ids]), **types, "length_config": lengths}
    if task.problem_type == EMBEDDING:
        states = [
            checkpoint.model(**given, exit_policy={"name": "constant", "layer": layer}).last_hidden_state
            for layer in exit_layers
        ]
        return torch.stack(states)[:, 0].numpy()
    output = checkpoint.model(**given, exit_policy={"name": "never"})
    sides = [torch.stack(output[name])[:, 0] for name in task.head.exit_outputs]
    every = sides[0] if len(sides) == 1 else torch.stack(sides, dim=-1)
    return every[[checkpoint.config.exit_layers.index(layer) for layer in exit_layers]].numpy()


def all_exits(session: ElasticSession, rows: Sequence[Any], lengths: LengthConfig | None) -> list[np.ndarray]:
    """The graph's values of every exit, for each row (exits, labels) or (exits, tokens, labels)."""
    if session.problem_type == EMBEDDING:
        runs = [session.run(rows, None, layer, lengths)["last_hidden_state"] for layer in session.exit_layers]
        every = np.stack(runs)
    else:
        every = exit_values(session.run(rows, session.never, session.exit_layers[-1], lengths))
    return [every[:, place, : len(row.ids)] if every.ndim > 3 else every[:, place] for place, row in enumerate(rows)]


def check_float32(session: ElasticSession, task: Task, expected: list[Reference]) -> dict[str, Any]:
    """The largest difference from PyTorch at each exit; ValueError where one is too large or a row leaves
    elsewhere."""
    worst = np.zeros(len(session.exit_layers))
    droppable = "length_config" in session.inputs
    whole = [1.0] * session.layers
    for one in expected:
        if not droppable and one.lengths != whole:
            continue
        found = all_exits(session, one.rows, one.lengths if droppable else None)
        for row, (ours, theirs) in enumerate(zip(found, one.values, strict=True)):
            difference = np.abs(ours - theirs).reshape(len(worst), -1)
            allowed = TOLERANCE * np.maximum(1, np.abs(theirs)).reshape(len(worst), -1)
            wrong = ~(difference <= allowed).all(axis=1)
            worst = np.maximum(worst, difference.max(axis=1))
            if wrong.any():
                raise ValueError(
                    f"check failed: {session.file.name} differs from PyTorch by {difference.max():.2g} in row {row} "
                    f"of {len(one.rows)} (allowed is {TOLERANCE:g}; length_config {one.lengths}); the exit after "
                    f"layer {session.exit_layers[int(wrong.argmax())]} is the first to"
                )
        if task.policy is not None and one.lengths == whole:
            _check_leaving(session, task, one.rows)
    lengths = [one.lengths for one in expected] if droppable else []
    return {
        "largest_difference": dict(zip(map(str, session.exit_layers), worst.tolist(), strict=True)),
        "length_configs": [one for place, one in enumerate(lengths) if one not in lengths[:place]],
        "batch_shapes": [[len(one.rows), max(len(row.ids) for row in one.rows)] for one in expected],
    }


def _check_leaving(session: ElasticSession, task: Task, rows: list[Encoding]) -> None:
    """Rows leave where the policy's definition says, with the logits they have when nobody leaves."""
    assert task.policy is not None
    if task.policy["name"] == "learned" or len(session.exit_layers) == 1:
        return  # the uncertainty is no output: its policy is compared with PyTorch in the tests
    whole = [1.0] * session.layers
    logits = exit_values(session.run(rows, session.never, session.exit_layers[-1], whole))
    mask = np.arange(max(len(row.ids) for row in rows)) < np.array([len(row.ids) for row in rows])[:, None]
    for thresholds in (task.thresholds, *_other_thresholds(task, logits)):
        found = session.run(rows, thresholds, None, whole)
        layers = [_leaves_at(task, thresholds, logits, mask, session.exit_layers, shift) for shift in (-NEAR, 0, NEAR)]
        sure = (layers[0] == layers[1]) & (layers[1] == layers[2])
        capped = np.minimum(layers[1], task.max_layer)
        wrong = sure & (found["exit_layer"] != capped)
        places = [session.exit_layers.index(layer) for layer in found["exit_layer"]]
        expected = logits[places, np.arange(len(rows))]
        said = found["logits"] if "logits" in found else np.stack([found["start_logits"], found["end_logits"]], -1)
        far = np.abs(said - expected) > TOLERANCE * np.maximum(1, np.abs(expected))
        wrong |= far.reshape(len(rows), -1).any(axis=1)
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"check failed: {session.file.name}, thresholds {thresholds}: row {row} leaves after layer "
                f"{found['exit_layer'][row]} with {said[row].ravel()[:4]}, expected {capped[row]}, "
                f"{expected[row].ravel()[:4]}"
            )


def _other_thresholds(task: Task, logits: np.ndarray) -> list[list[float]]:
    """Thresholds that make some rows leave early; counts are part of the policy."""
    assert task.policy is not None
    if "threshold" not in task.policy or task.problem_type == REGRESSION:
        return []
    return [[value] * len(logits) for value in (0.2, 0.5, 0.8, 0.95)]


def _leaves_at(
    task: Task,
    thresholds: Sequence[float],
    logits: np.ndarray,
    mask: np.ndarray,
    exit_layers: list[int],
    shift: float,
) -> np.ndarray:
    policy = dict(task.policy or {})
    if "threshold" in policy:
        highest = np.inf if task.problem_type == REGRESSION else 1.0
        policy["threshold"] = [float(np.clip(value + shift, 0.0, highest)) for value in thresholds]
    else:  # a count: where the configuration has no policy, one that nobody reaches
        policy[{"voting": "votes"}.get(policy["name"], policy["name"])] = int(thresholds[0])
    _, layers = simulate(policy, logits, exit_layers, task.problem_type, None if task.head.pools else mask)
    return layers.numpy()


@dataclass(frozen=True)
class Answers:
    """What one file says of some rows: for each every exit's values, its answer as the file runs by itself, and the
    layer it then leaves at."""

    exits: list[np.ndarray]
    default: list[np.ndarray]
    layers: np.ndarray


def answers_of(session: ElasticSession, rows: Sequence[Any]) -> Answers:
    """A file's answers, batch by batch in order of length."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place].ids))
    exits: list[np.ndarray] = [np.empty(0)] * len(rows)
    default, layers = list(exits), np.zeros(len(rows), int)
    for places in _batches(order, [len(row.ids) for row in rows]):
        batch = [rows[place] for place in places]
        outputs = session.run(batch)
        if "start_logits" in outputs:
            said = np.stack([outputs["start_logits"], outputs["end_logits"]], axis=-1)
        else:
            said = outputs["logits" if "logits" in outputs else "last_hidden_state"]
        found = zip(places, all_exits(session, batch, None), said, outputs["exit_layer"], strict=True)
        for place, every, one, layer in found:
            tokens = len(rows[place].ids)
            # copies: a view of an output keeps all the memory that its session ever took
            exits[place], layers[place] = every.copy(), layer
            default[place] = (one[:tokens] if every.ndim > 2 else one)[None].copy()
    return Answers(exits, default, layers)


def _batches(order: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """Consecutive places of at most `BATCH` rows and `BATCH_TOKENS` padded tokens, or one row."""
    batch: list[int] = []
    for place in order:
        if batch and (len(batch) == BATCH or (len(batch) + 1) * lengths[place] > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(place)
    yield batch


def check_against_float32(
    session: ElasticSession, ours: Answers, float32: Answers, real_rows: bool, least: float
) -> dict[str, Any]:
    """How far a file is from float32 at each exit, at full depth and as it runs by itself.

    ValueError where fewer than the share `least` of real rows get the same answer, at full depth or at the default;
    on rows of random tokens, whose answers mean little, where the values of an exit differ too much.
    """
    kind, names = session.problem_type, [str(layer) for layer in session.exit_layers]
    flat = [
        np.concatenate([one.reshape(len(names), -1) for one in answers.exits], axis=1) for answers in (ours, float32)
    ]
    error = np.abs(flat[0] - flat[1]).mean(axis=1) / np.sqrt(np.square(flat[1]).mean(axis=1) + 1e-12)
    same = same_answers(ours.exits, float32.exits, kind)
    default = float(same_answers(ours.default, float32.default, kind).mean())
    agreement = dict(zip(names, same.mean(axis=1).tolist(), strict=True))
    result = {
        "rows": len(ours.exits),
        "real_rows": real_rows,
        "relative_error": dict(zip(names, error.tolist(), strict=True)),
        "agreement": agreement,
        "default_agreement": default,
        "exit_layer_agreement": float((ours.layers == float32.layers).mean()),
    }
    file, full = session.file.name, float(same[-1].mean())
    if not np.isfinite(error).all():  # whose argmax is class 0
        first = names[int(np.argmin(np.isfinite(error)))]
        raise ValueError(
            f"check failed: {file} says NaN or infinity; the exit after layer {first} is the first to. Its arithmetic "
            "cannot hold these weights or states"
        )
    if real_rows and not min(full, default) >= least:
        first = next((name for name, one in agreement.items() if one < least), names[-1])
        where = f"the exit after layer {first} is the first below it" if full < least else "as the file runs by itself"
        raise ValueError(
            f"check failed: {file} answers {min(full, default):.3f} of {len(ours.exits)} rows like float32, expected "
            f"{least:g}; {where}. Choose another arithmetic (--files), or accept it (--min_agreement)"
        )
    if not real_rows and not error.max() <= LARGEST_ERROR:
        first = names[int(np.argmax(~(error <= LARGEST_ERROR)))]
        raise ValueError(
            f"check failed: {file} differs from float32 by {error.max():.3f} of the values, allowed is "
            f"{LARGEST_ERROR:g}; the exit after layer {first} is the first to. Compare on real texts (--rows), "
            "or choose another arithmetic (--files)"
        )
    return result


def same_answers(ours: list[np.ndarray], theirs: list[np.ndarray], kind: str) -> np.ndarray:
    """Which rows, or tokens, get the same answer, (exits, rows): a class, a set of labels, a span, a vector of nearly
    the same direction; for a regression, one within a tenth of the spread between rows."""
    both = list(zip(ours, theirs, strict=True))
    if kind == QUESTIONS:
        return np.stack([(a.argmax(axis=1) == b.argmax(axis=1)).all(axis=-1) for a, b in both], axis=1)
    if kind == EMBEDDING:
        return np.stack([_cosine(a.mean(axis=1), b.mean(axis=1)) > SIMILAR for a, b in both], axis=1)
    tokens = ours[0].ndim > 2
    a, b = (np.concatenate(one, axis=1) if tokens else np.stack(one, axis=1) for one in (ours, theirs))
    if kind == MULTI_LABEL:
        return ((a > 0) == (b > 0)).all(axis=-1)
    if kind == REGRESSION:
        spread = b.std(axis=1, keepdims=True)  # between rows; of one row, or equal ones, the numbers' own size
        return (np.abs(a - b) <= 0.1 * np.where(spread > 1e-6 * np.abs(b), spread, np.abs(b))).all(axis=-1)
    return a.argmax(axis=-1) == b.argmax(axis=-1)


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(axis=-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1) + 1e-12)


def quality(session: ElasticSession, answers: Answers, labels: list[str]) -> dict[str, float | None]:
    """What a file scores on labelled rows, at full depth and as it runs by itself: accuracy, or for a regression
    Pearson's correlation."""
    said = {
        "full": np.stack([row[-1] for row in answers.exits]),
        "default": np.stack([row[0] for row in answers.default]),
    }
    if session.problem_type == SINGLE_LABEL:
        places = {label: place for place, label in enumerate(session.labels)}
        right = np.array([places[label] for label in labels])
        return {name: float((logits.argmax(axis=-1) == right).mean()) for name, logits in said.items()}
    values = np.array([float(label) for label in labels])
    return {name: _correlation(logits[:, 0], values) for name, logits in said.items()}


def _correlation(answers: np.ndarray, values: np.ndarray) -> float | None:
    """Pearson's; None where either side is the same for all rows."""
    if not (np.ptp(answers) and np.ptp(values)):
        return None
    return float(np.corrcoef(answers, values)[0, 1])


def matrix_products(model: OnnxModel) -> dict[str, Any]:
    """How many matrix products by weights are int8; those that are not are listed."""
    weights = {weight.name: weight.array.size for weight in model.weights if weight.array.ndim == 2}
    weights |= {f"{name}_float32": size for name, size in weights.items()}  # those widened when the file is loaded
    int8: list[tuple[str, int]] = []
    kept: list[tuple[str, int]] = []
    for node in _nodes(model.proto.graph):
        used = [name for name in node.input if name in weights]
        if node.op_type in INTEGER_PRODUCTS + ("MatMul", "Gemm") and used:
            (int8 if node.op_type in INTEGER_PRODUCTS else kept).append((used[0], weights[used[0]]))
    sizes = [sum(size for _, size in products) for products in (int8, kept)]
    return {
        "int8_share": sizes[0] / max(sum(sizes), 1),
        "float32_products": [*(name for name, _ in kept), "attention: queries by keys, probabilities by values"],
    }


INTEGER_PRODUCTS = ("MatMulIntegerToFloat", "DynamicQuantizeMatMul")


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
