"""What is checked before an artefact is kept: float32 against PyTorch at every exit, rows that leave, int8 against
float32."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from elastic_model.exit_policies import simulate
from elastic_model.session import ElasticSession, Text
from export.checkpoint import Checkpoint
from export.graph import Task

TOLERANCE = 1e-4  # of float32 logits, absolute and relative
NEAR = 1e-3  # of a threshold: rounding may decide there
LARGEST_ERROR = 0.3  # of int8 logits without rows to compare on: mean difference over root mean square
SHAPES = ((1, 3), (1, 40), (5, 24), (16, 64))  # rows and the longest of them, cut to the model's longest input
Feed = dict[str, np.ndarray]


@dataclass(frozen=True)
class Encoding:
    """Token ids and types of a row, as the tokenizer gives them."""

    ids: list[int]
    type_ids: list[int]


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


def reference_logits(checkpoint: Checkpoint, rows: list[Encoding]) -> np.ndarray:
    """PyTorch's logits of every exit, (exits, rows, labels), each row by itself: without padding."""
    logits = []
    with torch.inference_mode():
        for row in rows:
            types = {"token_type_ids": torch.tensor([row.type_ids])} if checkpoint.config.type_vocab_size > 1 else {}
            ids = torch.tensor([row.ids])
            output = checkpoint.model(input_ids=ids, **types, exit_policy={"name": "never"}, length_config=1.0)
            logits.append(torch.stack(output.exit_logits).numpy())
    return np.concatenate(logits, axis=1)


def check_float32(session: ElasticSession, checkpoint: Checkpoint, task: Task) -> dict[str, Any]:
    """The largest difference from PyTorch at each exit; ValueError where one is too large or a row leaves
    elsewhere."""
    worst = np.zeros(len(session.exit_layers))
    for rows in random_rows(checkpoint):
        expected = reference_logits(checkpoint, rows)
        found = all_exits(session, rows)
        difference = np.abs(found - expected)
        allowed = TOLERANCE * np.maximum(1, np.abs(expected))
        wrong = (difference > allowed) | ~np.isfinite(found)
        worst = np.maximum(worst, difference.max(axis=(1, 2)))
        if wrong.any():
            layer = session.exit_layers[int(wrong.any(axis=(1, 2)).argmax())]
            raise ValueError(
                f"check failed: {session.file.name} differs from PyTorch by {difference.max():.2g} on {len(rows)} "
                f"rows (allowed is {TOLERANCE:g}); the exit after layer {layer} is the first to"
            )
        _check_leaving(session, task, rows, found)
    return {"largest_difference": dict(zip(map(str, session.exit_layers), worst.tolist(), strict=True))}


def all_exits(session: ElasticSession, rows: Sequence[Any]) -> np.ndarray:
    """The graph's logits of every exit, (exits, rows, labels)."""
    return session.run(rows, session.never, session.exit_layers[-1])["exit_logits"]


def _check_leaving(session: ElasticSession, task: Task, rows: list[Encoding], logits: np.ndarray) -> None:
    """Rows leave where the policy's definition says, with the logits they have when nobody leaves."""
    if task.policy["name"] == "learned" or len(session.exit_layers) == 1:
        return  # the uncertainty is no output: its policy is compared with PyTorch in the tests
    for thresholds in (task.thresholds, *_other_thresholds(task, logits)):
        found = session.run(rows, thresholds)
        layers = [_leaves_at(task, thresholds, logits, session.exit_layers, shift) for shift in (-NEAR, 0, NEAR)]
        sure = (layers[0] == layers[1]) & (layers[1] == layers[2])
        capped = np.minimum(layers[1], task.max_layer)
        wrong = sure & (found["exit_layer"] != capped)
        places = [session.exit_layers.index(layer) for layer in found["exit_layer"]]
        expected = logits[places, np.arange(len(rows))]
        wrong |= (np.abs(found["logits"] - expected) > TOLERANCE * np.maximum(1, np.abs(expected))).any(axis=1)
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(
                f"check failed: {session.file.name}, thresholds {thresholds}: row {row} leaves after layer "
                f"{found['exit_layer'][row]} with {found['logits'][row]}, expected {capped[row]}, {expected[row]}"
            )


def _other_thresholds(task: Task, logits: np.ndarray) -> list[list[float]]:
    """Thresholds that make some rows leave early; counts are part of the policy."""
    if "threshold" not in task.policy or task.problem_type == "regression":
        return []
    return [[value] * len(logits) for value in (0.2, 0.5, 0.8, 0.95)]


def _leaves_at(
    task: Task, thresholds: Sequence[float], logits: np.ndarray, exit_layers: list[int], shift: float
) -> np.ndarray:
    policy = dict(task.policy)
    if "threshold" in policy:
        highest = np.inf if task.problem_type == "regression" else 1.0
        policy["threshold"] = [float(np.clip(value + shift, 0.0, highest)) for value in thresholds]
    _, layers = simulate(policy, logits, exit_layers, task.problem_type)
    return layers.numpy()


def check_int8(
    session: ElasticSession, float32: ElasticSession, checkpoint: Checkpoint, texts: list[Text] | None, least: float
) -> dict[str, Any]:
    """How far int8 is from float32 at each exit, at full depth and as the file runs by itself.

    ValueError where fewer than the share `least` of the texts get the same answer, at full depth or at the default;
    without texts (rows of random tokens, whose answers mean little) where the logits of an exit differ too much.
    """
    batches: list[Sequence[Any]] = [*random_rows(checkpoint)]
    if texts is not None:
        batches = [float32.tokenizer.encode_batch(texts[start : start + 32]) for start in range(0, len(texts), 32)]
    ours, theirs = (np.concatenate([all_exits(one, rows) for rows in batches], axis=1) for one in (session, float32))
    error = np.abs(ours - theirs).mean(axis=(1, 2)) / np.sqrt(np.square(theirs).mean(axis=(1, 2)))
    agreement = same_answers(ours, theirs, session.problem_type).mean(axis=1)
    result = {
        "rows": ours.shape[1],
        "real_rows": texts is not None,
        "error": dict(zip(map(str, session.exit_layers), error.tolist(), strict=True)),
        "agreement": dict(zip(map(str, session.exit_layers), agreement.tolist(), strict=True)),
        **default_agreement(session, float32, batches),
    }
    _refuse_far(session.file.name, result, least)
    return result


def _refuse_far(file: str, result: dict[str, Any], least: float) -> None:
    """A shallow exit may hover between answers: of real rows, those at full depth and at the default must agree."""
    agreement, error = result["agreement"], result["error"]
    answered = min([*agreement.values()][-1], result["default_agreement"])
    if result["real_rows"] and answered < least:
        first = next((layer for layer, share in agreement.items() if share < least), None)
        where = f"; the exit after layer {first} is the first below that" if first else " as the file runs by itself"
        raise ValueError(
            f"check failed: {file} answers {answered:.3f} of {result['rows']} rows like float32, expected {least:g}"
            f"{where}"
        )
    if not result["real_rows"] and not max(error.values()) <= LARGEST_ERROR:
        first = next(layer for layer, one in error.items() if not one <= LARGEST_ERROR)
        raise ValueError(
            f"check failed: {file} differs from float32 by {max(error.values()):.3f} of the logits, allowed is "
            f"{LARGEST_ERROR:g}; the exit after layer {first} is the first to"
        )


def default_agreement(
    session: ElasticSession, float32: ElasticSession, batches: list[Sequence[Any]]
) -> dict[str, float]:
    """Shares of rows with the same answer and with the same exit layer, as the files run by themselves."""
    ours, theirs = ([one.run(rows) for rows in batches] for one in (session, float32))
    logits, layers = (
        [np.concatenate([output[name] for output in outputs]) for outputs in (ours, theirs)]
        for name in ("logits", "exit_layer")
    )
    answers = same_answers(logits[0][None], logits[1][None], session.problem_type)
    return {"default_agreement": float(answers.mean()), "exit_layer_agreement": float((layers[0] == layers[1]).mean())}


def same_answers(ours: np.ndarray, theirs: np.ndarray, problem_type: str) -> np.ndarray:
    """Which rows get the same answer, (exits, rows); for a regression, one within a tenth of the spread between
    rows."""
    if problem_type == "multi_label_classification":
        return ((ours > 0) == (theirs > 0)).all(axis=-1)
    if problem_type == "regression":
        return (np.abs(ours - theirs) <= 0.1 * theirs.std(axis=1, keepdims=True)).all(axis=-1)
    return ours.argmax(axis=-1) == theirs.argmax(axis=-1)


def check_model_file(file: Path) -> dict[str, Any]:
    """The ONNX checker's consent, and how many matrix products by weights are int8; those that are not are listed."""
    onnx.checker.check_model(file)
    model = onnx.load(file)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    converted: list[tuple[str, int]] = []
    kept: list[tuple[str, int]] = []
    for node in _nodes(model.graph):
        used = [name for name in node.input if name in weights and len(weights[name].dims) == 2]
        if node.op_type in ("MatMul", "Gemm", "MatMulIntegerToFloat") and used:
            (converted if node.op_type == "MatMulIntegerToFloat" else kept).append(
                (used[0], math.prod(weights[used[0]].dims))
            )
    sizes = [sum(size for _, size in products) for products in (converted, kept)]
    return {
        "int8_share": sizes[0] / sum(sizes),
        "float32_products": [*(name for name, _ in kept), "attention: queries by keys, probabilities by values"],
    }


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
