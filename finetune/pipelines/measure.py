"""What a pipeline gives: quality, size, FLOPs and milliseconds of a row, as a curve where rows may leave early.

Times are those of Xin et al. (2022): one row at a time, one thread. The thread's own time counts: on an idle machine
that is the time on the clock, and waiting for a processor that others use is left out. Without L a row has
`max_length` tokens, with L its own; without Q PyTorch runs it, with Q onnxruntime. Of some rows every exit is timed;
the time of all others follows from a straight line in their tokens, so that a curve of many thresholds costs no more
than one. Quality is read from the answers that the stages have kept: only the timed rows are run.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from elastic_model import ElasticBertConfig
from elastic_model.cost import mean_flops
from elastic_model.modeling_elasticbert import ElasticBertExitModel
from elastic_model.operating_points import checkpoint_hash
from elastic_model.session import ElasticSession
from finetune.evaluate import outcome
from finetune.pipelines.answers import Row, read_answers, rows_of
from finetune.pipelines.letters import checkpoint_of, letters_of, name_of, prefixes, stage_of
from finetune.pipelines.stages import settings_of
from finetune.pipelines.work import Work
from finetune.policies import Policy, candidates, choose, never
from finetune.prepare import load_classifier, weight_files
from finetune.prune import one_thread

REPEATS = 5  # the fastest counts: whatever else runs only adds
EVERY = 4  # of the settings of a policy a curve shows one in so many
PADDED = 10  # rows timed where all have the same number of tokens


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
    """A pipeline measured.

    checkpoint: hash of its weights; quality, ms, flops, mean_exit_layer: at its operating point; full_quality: at
    full depth; bytes: on the disk; exit_ms: mean time of leaving at each exit; doubled_ms: at full depth with rows
    padded to twice the length (None with L, or where the model has no such positions); curve: from strict to loose,
    one point where there are no exits; settings: what its operators were given.
    """

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
    doubled_ms: float | None
    curve: list[Point]
    settings: dict[str, Any]

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Measurement":
        """From what `to_dict` gives."""
        return cls(**{**content, "curve": [Point(**point) for point in content["curve"]]})

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


Timer = Callable[[Row, int], Any]  # runs one row up to the exit at that place


def _stretched(row: Row, tokens: int) -> Row:
    """The row with so many real tokens, its own over and over: what padding costs."""
    times = -(-tokens // len(row.ids))
    return Row((row.ids * times)[:tokens], (row.type_ids * times)[:tokens])


def times_of_exits(run: Timer, rows: list[Row], exits: list[int]) -> np.ndarray:
    """Milliseconds of each row up to the exit at each of some places, (exits, rows): the fastest of some runs, after
    some that are not timed."""
    spent = np.empty((REPEATS, len(exits), len(rows)))
    for row in rows[:2]:
        run(row, exits[-1])
    for place in np.ndindex(*spent.shape):
        began = time.thread_time()
        run(rows[place[2]], exits[place[1]])
        spent[place] = (time.thread_time() - began) * 1e3
    return spent.min(0)


def line_in_tokens(spent: np.ndarray, timed: list[int], tokens: list[int]) -> np.ndarray:
    """Times (exits, timed rows) of rows with so many tokens, as (exits, rows) for rows with `tokens`: least squares of
    a straight line, never below the fastest."""
    known, wanted = np.array(timed, float), np.array(tokens, float)
    centred, mean = known - known.mean(), spent.mean(1, keepdims=True)
    spread = (centred**2).sum()
    slope = (spent * centred).sum(1, keepdims=True) / spread if spread else np.zeros_like(mean)
    fitted: np.ndarray = np.maximum(mean + slope * (wanted - known.mean()), spent.min(1, keepdims=True))
    return fitted


def _torch_timer(model: ElasticBertExitModel) -> Timer:
    @torch.inference_mode()
    def run(row: Row, place: int) -> Any:
        inputs = {"input_ids": torch.tensor([row.ids])}
        if max(row.type_ids) < model.config.type_vocab_size:
            inputs["token_type_ids"] = torch.tensor([row.type_ids])
        return model(**inputs, exit_policy={"name": "constant", "layer": model.exit_layers[place]})

    return run


def _session_timer(session: ElasticSession) -> Timer:
    return lambda row, place: session.run([row], session.never, session.exit_layers[place])


def _policies(work: Work, logits: np.ndarray) -> list[Policy]:
    """The settings of a curve, strict to loose, the first of them full depth."""
    kind, largest = work.labels.problem_type, None
    full = never(work.policy, len(logits), kind)
    if len(logits) == 1:
        return [full]
    if kind == "regression":  # one grid for all seeds, so that their curves may be averaged: the labels' own spread
        largest = float(np.ptp(work.dev.labels.astype(float)))
    return [full, *candidates(work.policy, logits, kind, largest)[::EVERY]]


def _curve(
    work: Work, logits: np.ndarray, times: np.ndarray, config: ElasticBertConfig, tokens: list[int]
) -> list[Point]:
    """Every setting of the policy; times: (exits, rows)."""
    exits = list(config.exit_layers or ())
    points: list[Point] = []
    for policy in _policies(work, logits):
        one = outcome(policy, logits, exits, work.dev, work.labels)
        places = np.searchsorted(exits, one.left_at)
        setting = policy["threshold"] if "threshold" in policy else policy["patience"]
        points.append(
            Point(
                threshold=float(setting) if points else None,
                quality=one.quality[work.labels.metrics[0]],
                ms=float(times[places, np.arange(len(places))].mean()),
                flops=mean_flops(config, tokens, one.left_at.tolist(), head=work.dev.head),
                mean_exit_layer=one.mean_exit_layer,
            )
        )
    return points


def operating_point(curve: list[Point], permitted_loss: float) -> Point:
    """The loosest point before quality first falls more than permitted (a share of full depth's) below full depth."""
    full = curve[0].quality
    best = choose([point.quality for point in curve], full, abs(full) * permitted_loss + 1e-12)
    return curve[best or 0]


def measure(work: Work, letters: str) -> Measurement:
    """A pipeline whose stages are there: quality on dev, and times on this machine."""
    options, lengths = work.options, work.dev.lengths
    folder = work.folder(checkpoint_of(letters))
    model = load_classifier(folder, options.max_length)
    config, weights, run = model.config, weight_files(folder), _torch_timer(model)
    if "Q" in letters:
        session = ElasticSession.from_pretrained(work.folder(stage_of(letters)), threads=1)
        weights, run = [session.file], _session_timer(session)
    places = list(range(len(config.exit_layers or ())))
    in_order = [rows_of(work.dev)[row] for row in np.argsort(lengths, kind="stable")]
    doubled_ms = None
    with one_thread():
        if "L" in letters:
            timed, tokens = _spread(in_order, options.timed_rows), lengths
        else:
            some = _spread(in_order, min(PADDED, options.timed_rows))
            timed, tokens = [_stretched(row, options.max_length) for row in some], [options.max_length] * len(lengths)
            if 2 * options.max_length <= _positions(config):
                long = [_stretched(row, 2 * options.max_length) for row in some]
                doubled_ms = float(times_of_exits(run, long, places[-1:]).mean())
        spent = times_of_exits(run, timed, places)
    times = line_in_tokens(spent, [len(row.ids) for row in timed], tokens)
    curve = _curve(work, read_answers(work, stage_of(letters)), times, config, tokens)
    chosen = operating_point(curve, options.permitted_loss / (2 if "S" in letters else 1))
    return Measurement(
        pipeline=name_of(letters),
        seed=options.seed,
        checkpoint=checkpoint_hash(folder),
        metric=work.labels.metrics[0],
        quality=chosen.quality,
        full_quality=curve[0].quality,
        ms=chosen.ms,
        flops=chosen.flops,
        mean_exit_layer=chosen.mean_exit_layer,
        parameters=model.num_parameters(),
        bytes=sum(file.stat().st_size for file in weights),
        exit_ms=times.mean(1).tolist(),
        doubled_ms=doubled_ms,
        curve=curve,
        settings=_settings(work, letters),
    )


def _spread(rows: list[Row], count: int) -> list[Row]:
    """So many of the rows, evenly over their order."""
    return [rows[place] for place in np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)]


def _positions(config: ElasticBertConfig) -> int:
    return config.max_position_embeddings - config.position_offset


def _settings(work: Work, letters: str) -> dict[str, Any]:
    """What all the operators of a pipeline were given, without the seed."""
    stages = prefixes(stage_of(letters))
    found = {name: value for stage in stages for name, value in settings_of(work, stage).items()}
    return {name: value for name, value in found.items() if name != "seed"}


def is_current(work: Work, one: Measurement) -> bool:
    """Whether it was measured on the weights that its stage has now."""
    return one.checkpoint == checkpoint_hash(work.folder(checkpoint_of(letters_of(one.pipeline))))
