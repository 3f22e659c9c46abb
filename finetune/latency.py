"""Latency on this machine: measured with the exported graph, and predicted for candidates from such measurements.

A batch takes a constant, a part for each layer that is run for it, and a part for its FLOPs; the three are fitted by
non-negative least squares on batches timed at several lengths and depths. Predictions make a search deterministic once
the three are known; what is kept in the end is timed itself.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from elastic_model.checks import LengthConfig
from elastic_model.cost import exit_flops
from elastic_model.processor import cpu_name
from elastic_model.session import ElasticSession
from finetune.candidates import constant_ratio, shares

RATIOS = (1.0, 0.9, 0.7)  # of the tokens kept from layer to layer, timed at every exit
REPEATS = 3  # the fastest counts: whatever else runs only adds


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a batch: `constant` + `layer` x layers run + `gigaflop` x GFLOPs; `fit`: R^2 on the timings."""

    constant: float
    layer: float
    gigaflop: float
    fit: float
    batch: int
    threads: int

    def of_rows(self, layers: np.ndarray, flops: np.ndarray) -> float:
        """Mean milliseconds of a batch; rows in their order left at `layers` and cost `flops`, each (rows,)."""
        deepest, total = _batches(layers, flops, self.batch)
        return float((self.constant + self.layer * deepest + self.gigaflop * total / 1e9).mean())


def _batches(layers: np.ndarray, flops: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    starts = np.arange(0, len(layers), batch)
    return np.maximum.reduceat(layers, starts).astype(float), np.add.reduceat(flops, starts)


def time_batches(
    session: ElasticSession, encodings: Sequence[Any], batch: int, lengths: LengthConfig, **how: Any
) -> np.ndarray:
    """Milliseconds of each batch, the fastest of some runs, after one that is not timed."""
    batches = [encodings[start : start + batch] for start in range(0, len(encodings), batch)]
    spent = np.empty((REPEATS + 1, len(batches)))
    for run in range(REPEATS + 1):
        for place, one in enumerate(batches):
            began = time.perf_counter()
            session.run(one, length_config=lengths, **how)
            spent[run, place] = (time.perf_counter() - began) * 1e3
    return spent[1:].min(0)


def measure_latency(session: ElasticSession, config: Any, encodings: Sequence[Any], batch: int, head: str) -> Latency:
    """The three numbers, from batches timed at constant-ratio lengths, leaving at each exit."""
    tokens = [len(one.ids) for one in encodings]
    features, times = [], []
    for ratio in RATIOS:
        lengths = shares(constant_ratio(config.num_hidden_layers, ratio))
        costs = exit_flops(config, tokens, lengths, head).double().numpy()
        for place, layer in enumerate(session.exit_layers):
            spent = time_batches(session, encodings, batch, lengths, thresholds=session.never, max_layer=layer)
            deepest, total = _batches(np.full(len(tokens), layer), costs[place], batch)
            features.append(np.stack([np.ones(len(deepest)), deepest, total / 1e9], axis=1))
            times.append(spent)
    design, measured = np.concatenate(features), np.concatenate(times)
    fitted, _ = nnls(design, measured)
    left, spread = measured - design @ fitted, measured - measured.mean()
    fit = 1 - float((left**2).sum() / (spread**2).sum())
    return Latency(float(fitted[0]), float(fitted[1]), float(fitted[2]), fit, batch, session.threads)


@dataclass
class Served:
    """The exported graph whose latency is the cost: its session, the rows that are timed, and what they showed."""

    session: ElasticSession
    encodings: list[Any]
    latency: Latency

    def time(self, limits: list[float], lengths: LengthConfig) -> dict[str, Any]:
        """What an operating point of these thresholds and shares records: the median batch, timed, and where."""
        batch, session = self.latency.batch, self.session
        how = {"thresholds": limits, "max_layer": session.exit_layers[-1]}  # the file's own may lie lower
        spent = time_batches(session, self.encodings, batch, lengths, **how)
        machine = f"{cpu_name()}, {session.file.stem}"
        return {"value": float(np.median(spent)), "batch": batch, "threads": session.threads, "machine": machine}
