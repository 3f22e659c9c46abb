"""What a pipeline gives: quality, size, FLOPs and milliseconds of a row, as a curve where rows may leave early.

Times are those of Xin et al. (2022): one row at a time, one thread. The thread's own time counts: on an idle machine
that is the time on the clock, and waiting for a processor that others use is left out. All pipelines of a seed are
timed in turns: a machine shared with others changes its speed by half within minutes, and savings are ratios. Without
L a row has `max_length` tokens, with L its own; without Q PyTorch runs it, with Q onnxruntime. Of some rows every exit
is timed; the time of all others follows from a straight line in their tokens, so that a curve of many thresholds costs
no more than one. Quality is read from the answers that the stages have kept: only the timed rows are run.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elastic_model import ElasticBertConfig
from elastic_model.cost import mean_flops
from elastic_model.modeling_elasticbert import ElasticBertExitModel
from elastic_model.session import ElasticSession, Encoding
from finetune.evaluate import outcome
from finetune.explore import encodings_of
from finetune.pipelines.letters import checkpoint_of, letters_of, name_of, parse, prefixes, stage_of
from finetune.pipelines.stages import RECORD, read_answers, settings_of, stage_hash
from finetune.pipelines.work import Work
from finetune.policies import Policy, candidates, choose, never
from finetune.prepare import load_classifier, weight_files
from finetune.prune import one_thread

TURNS = 5  # the fastest counts: whatever else runs only adds
EVERY = 4  # of the settings of a policy a curve shows one in so many
SLACK = 1.01  # of times that are means of others
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

    checkpoint: its `stage_hash`; quality, ms, flops, mean_exit_layer: at its operating point; full_quality: at
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
        """From what `to_dict` gives; ValueError where it is no measurement."""
        one = cls(**{**content, "curve": [Point(**point) for point in content["curve"]]})
        parse(one.pipeline)
        times = [one.ms, *one.exit_ms, *(point.ms for point in one.curve)]
        shares = [one.quality, one.full_quality, *(point.quality for point in one.curve)]
        numbers = all(
            isinstance(value, int | float) and math.isfinite(value) for value in (*times, *shares, one.flops)
        )
        if not numbers or min(times) <= 0 or not all(-1 <= value <= 1 for value in shares):
            raise ValueError(f"{one.pipeline}: times must be above 0 and qualities shares of 1, got {times}, {shares}")
        limits = [point.threshold for point in one.curve if point.threshold is not None]
        if not all(isinstance(limit, int | float) and math.isfinite(limit) for limit in limits):
            raise ValueError(f"{one.pipeline}: thresholds must be numbers, or null at full depth, got {limits}")
        if one.exit_ms and one.curve and one.exit_ms[0] > SLACK * min(point.ms for point in one.curve):
            raise ValueError(
                f"{one.pipeline}: leaving at the first exit takes {one.exit_ms[0]} ms, more than a point of its curve"
            )
        if not one.exit_ms or not one.curve or not isinstance(one.seed, int) or not isinstance(one.settings, dict):
            raise ValueError(f"{one.pipeline}: exit_ms and curve must hold points, seed a number, settings names")
        return one

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


Timer = Callable[[Encoding, int], Any]  # runs one row up to the exit at that place


def _stretched(row: Encoding, tokens: int) -> Encoding:
    """The row with so many real tokens, its own over and over: what padding costs."""
    times = -(-tokens // len(row.ids))
    return Encoding((row.ids * times)[:tokens], (row.type_ids * times)[:tokens])


@dataclass(frozen=True)
class Trial:
    """What is timed: calls of a timer, each a row and the place of the exit that it leaves at."""

    run: Timer
    calls: list[tuple[Encoding, int]]


def times_in_turns(trials: Sequence[Trial]) -> list[np.ndarray]:
    """Milliseconds of every call of each trial: the fastest of some turns. Each begins with a call that is not timed,
    since the trial before has left nothing of this one's weights in the caches."""
    fastest = [np.full(len(trial.calls), np.inf) for trial in trials]
    for _ in range(TURNS):
        for trial, spent in zip(trials, fastest, strict=True):
            trial.run(*trial.calls[0])
            for place, call in enumerate(trial.calls):
                began = time.thread_time()
                trial.run(*call)
                spent[place] = min(spent[place], (time.thread_time() - began) * 1e3)
    return fastest


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
    def run(row: Encoding, place: int) -> Any:
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
        one = outcome(policy, logits, exits, work.dev, work.labels_of(config.no_answer_threshold))
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


@dataclass(frozen=True)
class Subject:
    """A pipeline that is to be measured: what runs it, the rows that are timed at every exit, those of twice the
    length that are timed at the last one."""

    letters: str
    config: ElasticBertConfig
    parameters: int
    weights: list[Path]
    run: Timer
    timed: list[Encoding]
    tokens: list[int]
    doubled: list[Encoding]

    @property
    def trial(self) -> Trial:
        """Its calls: exit by exit, then the rows of twice the length."""
        last = len(self.config.exit_layers or ()) - 1
        calls = [(row, place) for place in range(last + 1) for row in self.timed]
        return Trial(self.run, calls + [(row, last) for row in self.doubled])


def _subject(work: Work, letters: str, in_order: list[Encoding]) -> Subject:
    options, folder = work.options, work.folder(checkpoint_of(letters))
    model = load_classifier(folder, options.max_length)
    config, parameters, weights, run = model.config, model.num_parameters(), weight_files(folder), _torch_timer(model)
    if "Q" in letters:
        session = ElasticSession.from_pretrained(work.folder(stage_of(letters)), threads=1)
        weights, run = [session.file], _session_timer(session)
    if "L" in letters:
        timed = _spread(in_order, options.timed_rows)
        return Subject(letters, config, parameters, weights, run, timed, work.dev.lengths, [])
    some, length = _spread(in_order, min(PADDED, options.timed_rows)), options.max_length
    timed, tokens = [_stretched(row, length) for row in some], [length] * len(work.dev)
    doubled = [_stretched(row, 2 * length) for row in some] if 2 * length <= _positions(config) else []
    return Subject(letters, config, parameters, weights, run, timed, tokens, doubled)


def measure(work: Work, pipelines: Sequence[str]) -> list[Measurement]:
    """Pipelines whose stages are there: quality on dev, and times on this machine, in turns."""
    rows = encodings_of(work.dev)
    in_order = [rows[row] for row in np.argsort(work.dev.lengths, kind="stable")]
    subjects = [_subject(work, letters, in_order) for letters in pipelines]
    with one_thread():
        spent = times_in_turns([subject.trial for subject in subjects])
    return [_measurement(work, subject, one) for subject, one in zip(subjects, spent, strict=True)]


def _measurement(work: Work, subject: Subject, spent: np.ndarray) -> Measurement:
    """spent: milliseconds of the calls of its trial."""
    letters, config, timed = subject.letters, subject.config, subject.timed
    exits = len(config.exit_layers or ())
    of_exits, doubled = spent[: exits * len(timed)].reshape(exits, len(timed)), spent[exits * len(timed) :]
    times = line_in_tokens(of_exits, [len(row.ids) for row in timed], subject.tokens)
    curve = _curve(work, read_answers(work, stage_of(letters)), times, config, subject.tokens)
    chosen = operating_point(curve, work.options.permitted_loss / (2 if "S" in letters else 1))
    return Measurement(
        pipeline=name_of(letters),
        seed=work.options.seed,
        checkpoint=stage_hash(work.folder(checkpoint_of(letters))),
        metric=work.labels.metrics[0],
        quality=chosen.quality,
        full_quality=curve[0].quality,
        ms=chosen.ms,
        flops=chosen.flops,
        mean_exit_layer=chosen.mean_exit_layer,
        parameters=subject.parameters,
        bytes=sum(file.stat().st_size for file in subject.weights),
        exit_ms=times.mean(1).tolist(),
        doubled_ms=float(doubled.mean()) if len(doubled) else None,
        curve=curve,
        settings=_settings(work, letters),
    )


def _spread(rows: list[Encoding], count: int) -> list[Encoding]:
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
    letters = letters_of(one.pipeline)
    folder = work.folder(checkpoint_of(letters))
    there = (work.folder(stage) / RECORD for stage in (checkpoint_of(letters), stage_of(letters)))
    return all(file.is_file() for file in there) and one.checkpoint == stage_hash(folder)
