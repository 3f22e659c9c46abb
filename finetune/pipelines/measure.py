"""What a pipeline gives: quality, size, FLOPs and milliseconds of a row, as a curve where rows may leave early.

Times are those of Xin et al. (2022): one row at a time, one thread. Without L a row has `max_length` tokens, with L
its own; without Q PyTorch runs it, with Q onnxruntime. Of some rows every exit is timed; the time of all others
follows from a straight line in their tokens, so that a curve of a hundred thresholds costs no more than one.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from elastic_model import ElasticBertConfig
from elastic_model.cost import mean_flops
from elastic_model.operating_points import checkpoint_hash
from elastic_model.session import ElasticSession, exit_values
from finetune.data import Encoded, sorted_batches
from finetune.evaluate import Outcome, exit_logits, outcome
from finetune.pipelines.letters import NOTHING, name_of, weights_of
from finetune.pipelines.stages import Work
from finetune.policies import Policy, candidates, never
from finetune.prepare import load_classifier, load_tokenizer, weight_files
from finetune.prune import one_thread

REPEATS = 3  # the fastest counts: whatever else runs only adds
EVERY = 4  # settings of a policy that a curve leaves out between two


@dataclass(frozen=True)
class Row:
    """A row as a session takes it."""

    ids: list[int]
    type_ids: list[int]


@dataclass(frozen=True)
class Point:
    """A setting of the exit policy: `threshold` (None: full depth), and what it gives."""

    threshold: float | None
    quality: float
    ms: float
    flops: float
    mean_exit_layer: float


@dataclass(frozen=True)
class Measurement:
    """A pipeline measured: `quality` and `ms` at its operating point, `curve` from strict to loose (one point where
    there are no exits), `exit_ms` the mean time of leaving at each exit; `bytes` on the disk."""

    pipeline: str
    seed: int
    checkpoint: str
    metric: str
    quality: float
    full_quality: float
    ms: float
    flops: float
    mean_exit_layer: float
    parameters: int
    bytes: int
    exit_ms: list[float]
    curve: list[Point]

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Measurement":
        """From what `asdict` gives."""
        return cls(**{**content, "curve": [Point(**point) for point in content["curve"]]})


Timer = Callable[[Row, int], Any]  # runs one row up to the exit at that place


def _rows(encoded: Encoded) -> list[Row]:
    return [Row(row["input_ids"], row.get("token_type_ids", [0] * len(row["input_ids"]))) for row in encoded.rows]


def _stretched(row: Row, tokens: int) -> Row:
    """The row with so many real tokens, its own over and over: what padding costs."""
    times = -(-tokens // len(row.ids))
    return Row((row.ids * times)[:tokens], (row.type_ids * times)[:tokens])


def times_of_exits(run: Timer, rows: list[Row], exits: int) -> np.ndarray:
    """Milliseconds of each row up to each exit, (exits, rows): the fastest of some runs, after one not timed."""
    spent = np.empty((REPEATS, exits, len(rows)))
    for row in rows[:2]:
        run(row, exits - 1)
    for place in np.ndindex(*spent.shape):
        began = time.perf_counter()
        run(rows[place[2]], place[1])
        spent[place] = (time.perf_counter() - began) * 1e3
    return spent.min(0)


def line_in_tokens(spent: np.ndarray, timed: list[int], tokens: list[int]) -> np.ndarray:
    """Times (exits, timed rows) of rows with so many tokens, as (exits, rows) for rows with `tokens`; least squares
    of a straight line."""
    known, wanted = np.array(timed, float), np.array(tokens, float)
    centred, mean = known - known.mean(), spent.mean(1, keepdims=True)
    spread = (centred**2).sum()
    slope = (spent * centred).sum(1, keepdims=True) / spread if spread else np.zeros_like(mean)
    fitted: np.ndarray = np.maximum(mean + slope * (wanted - known.mean()), spent.min(1, keepdims=True))
    return fitted


def _torch(folder: Path, work: Work, accelerator: Accelerator) -> tuple[np.ndarray, Timer, ElasticBertConfig, int]:
    """The logits of every exit on dev, how to run one row, and the model's configuration and parameters."""
    model = load_classifier(folder, work.options.max_length).to(accelerator.device)
    logits = exit_logits(model, work.dev, load_tokenizer(folder), work.options.eval_batch_size, accelerator)

    @torch.inference_mode()
    def run(row: Row, place: int) -> Any:
        ids = {"input_ids": row.ids, "token_type_ids": row.type_ids}
        if not model.config.type_vocab_size or max(row.type_ids) >= model.config.type_vocab_size:
            del ids["token_type_ids"]
        inputs = {name: torch.tensor([one], device=accelerator.device) for name, one in ids.items()}
        return model(**inputs, exit_policy={"name": "constant", "layer": model.exit_layers[place]})

    return logits, run, model.config, model.num_parameters()


def _onnx(session: ElasticSession, work: Work) -> tuple[np.ndarray, Timer]:
    """The same of an exported file."""
    rows, parts = _rows(work.dev), []
    for batch in sorted_batches(work.dev.lengths, work.options.eval_batch_size):
        outputs = session.run([rows[row] for row in batch], session.never, session.exit_layers[-1])
        parts.append((batch, np.nan_to_num(exit_values(outputs))))
    *tokens, labels = parts[0][1].shape[2:]
    tokens = [max(work.dev.lengths)] if tokens else []
    logits = np.zeros((len(session.exit_layers), len(rows), *tokens, labels), np.float32)
    for batch, part in parts:
        place: tuple = (slice(None), batch, *map(slice, part.shape[2:-1]))
        logits[place] = part

    def run(row: Row, place: int) -> Any:
        return session.run([row], session.never, session.exit_layers[place])

    return logits, run


def _policies(work: Work, logits: np.ndarray) -> list[Policy]:
    """The settings of a curve, strict to loose, the first of them full depth."""
    kind = work.labels.problem_type
    settings = [never(work.policy, len(logits), kind)]
    if len(logits) == 1:
        return settings
    if kind == "regression":  # one grid for all seeds, so that their curves may be averaged: labels' own spread
        largest = float(np.abs(np.ptp(work.dev.labels.astype(float))))
        return settings + candidates(work.policy, logits, kind, largest)[::EVERY]
    return settings + candidates(work.policy, logits, kind)[::EVERY]


def operating_point(curve: list[Point], permitted_loss: float) -> Point:
    """The loosest point before quality first falls more than permitted (a share of full depth's) below full depth."""
    chosen = curve[0]
    for point in curve:
        if point.quality < curve[0].quality * (1 - permitted_loss) - 1e-12:
            break
        chosen = point
    return chosen


def measure(work: Work, letters: str) -> Measurement:
    """Quality on dev and times on this machine of a pipeline whose stages are there."""
    options, accelerator = work.options, Accelerator(cpu=True)
    stage = weights_of(letters)
    checkpoint = work.folder(stage.replace("Q", ""))
    logits, run, config, parameters = _torch(checkpoint, work, accelerator)
    weights = weight_files(checkpoint)
    if "Q" in letters:
        session = ElasticSession.from_pretrained(work.folder(stage), threads=1)
        logits, run = _onnx(session, work)
        weights = [session.file]
    exits, rows = list(config.exit_layers or ()), _rows(work.dev)
    spread = np.linspace(0, len(rows) - 1, min(options.timed_rows, len(rows))).astype(int)
    in_order = np.argsort(work.dev.lengths, kind="stable")
    timed = [rows[in_order[place]] for place in spread]
    tokens = work.dev.lengths if "L" in letters else [options.max_length] * len(rows)
    if "L" not in letters:
        timed = [_stretched(row, options.max_length) for row in timed[:: max(1, len(timed) // 10)]]
    with one_thread():
        spent = times_of_exits(run, timed, len(exits))
    every = line_in_tokens(spent, [len(row.ids) for row in timed], tokens)
    curve = []
    for policy in _policies(work, logits):
        one = outcome(policy, logits, exits, work.dev, work.labels)
        curve.append(_point(one, every, exits, config, tokens, work))
    curve[0] = replace(curve[0], threshold=None)
    loss = options.permitted_loss / (2 if "S" in letters else 1)
    chosen = operating_point(curve, loss)
    return Measurement(
        pipeline=name_of(letters),
        seed=options.seed,
        checkpoint=checkpoint_hash(checkpoint),
        metric=work.labels.metrics[0],
        quality=chosen.quality,
        full_quality=curve[0].quality,
        ms=chosen.ms,
        flops=chosen.flops,
        mean_exit_layer=chosen.mean_exit_layer,
        parameters=parameters,
        bytes=sum(file.stat().st_size for file in weights),
        exit_ms=every.mean(1).tolist(),
        curve=curve,
    )


def _point(
    one: Outcome, every: np.ndarray, exits: list[int], config: ElasticBertConfig, tokens: list[int], work: Work
) -> Point:
    places = np.searchsorted(exits, one.left_at)
    settings = one.policy or {}
    threshold = next((settings[name] for name in ("threshold", "patience") if name in settings), None)
    return Point(
        threshold=None if threshold is None else float(threshold),
        quality=one.quality[work.labels.metrics[0]],
        ms=float(every[places, np.arange(len(places))].mean()),
        flops=mean_flops(config, tokens, one.left_at.tolist(), head=work.dev.head),
        mean_exit_layer=one.mean_exit_layer,
    )


def is_current(work: Work, one: Measurement) -> bool:
    """Whether it was measured on the weights that its stage has now."""
    stage = one.pipeline.replace(NOTHING, "").replace("Q", "")
    return one.checkpoint == checkpoint_hash(work.folder(weights_of(stage)))


def as_record(one: Measurement) -> dict[str, Any]:
    """A measurement as JSON holds it."""
    return asdict(one)
