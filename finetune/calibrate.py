"""Thresholds of an exit policy, chosen on held-out rows for a permitted loss of quality."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from finetune.tasks import ProblemType

GRID = 100  # settings tried of a policy that has a threshold
Policy = dict[str, Any]


def _steps(largest: float) -> list[float]:
    """Rising to `largest`; squares, since most rows of a trained model are nearly certain."""
    return [round(largest * (step / GRID) ** 2, 6) for step in range(1, GRID + 1)]


def _patience(logits: np.ndarray, problem_type: ProblemType) -> list[Policy]:
    if problem_type != "regression":
        return [{"name": "patience", "patience": patience} for patience in range(len(logits) - 1, 0, -1)]
    largest = float(np.abs(np.diff(logits, axis=0)).max())  # the largest change of a row's value between exits
    return [{"name": "patience", "patience": 1, "threshold": step} for step in _steps(1.01 * largest)]


def _rising(name: str) -> Callable[[np.ndarray, ProblemType], list[Policy]]:
    return lambda logits, problem_type: [{"name": name, "threshold": step} for step in _steps(1.0)]


def _falling(name: str) -> Callable[[np.ndarray, ProblemType], list[Policy]]:
    return lambda logits, problem_type: [{"name": name, "threshold": round(1 - step, 6)} for step in _steps(1.0)]


# policy -> its settings, from exit logits, in an order fixed before any is tried: strict (rows stay longest) to loose
CANDIDATES: Mapping[str, Callable[[np.ndarray, ProblemType], list[Policy]]] = {
    "entropy": _rising("entropy"),
    "confidence": _falling("confidence"),
    "margin": _falling("margin"),
    "patience": _patience,
}


def policy_name(given: str | None, problem_type: ProblemType) -> str:
    """The policy to calibrate: the one given, else patience for regression and entropy for classes."""
    name = given or ("patience" if problem_type == "regression" else "entropy")
    if name not in CANDIDATES or (problem_type == "regression" and name != "patience"):
        allowed = "patience" if problem_type == "regression" else ", ".join(CANDIDATES)
        raise ValueError(f"exit policy {name!r} cannot be calibrated for {problem_type}; allowed: {allowed}")
    return name


def candidates(name: str, logits: np.ndarray, problem_type: ProblemType) -> list[Policy]:
    """The settings of a policy from strict to loose, for exit logits (exits, rows, labels)."""
    return CANDIDATES[name](logits, problem_type)


def never(name: str, exits: int, problem_type: ProblemType) -> Policy:
    """The setting of a policy at which every row goes to full depth."""
    if name != "patience":
        return {"name": name, "threshold": 0.0 if name == "entropy" else 1.0}
    return (
        {"name": name, "patience": 1, "threshold": 0.0}
        if problem_type == "regression"
        else {"name": name, "patience": exits}
    )


def thresholds(name: str, policy: Policy | None, exits: int, problem_type: ProblemType) -> list[float]:
    """A policy's threshold at each exit, as operating points hold it (class patience: a count); None: full depth."""
    settings = policy or never(name, exits, problem_type)
    return [float(settings["threshold" if "threshold" in settings else "patience"])] * exits


def choose(qualities: list[float], full: float, permitted_loss: float) -> int | None:
    """Which candidate to take, or None: the last before quality first falls below full depth by more than permitted.

    In fixed sequence, as in learn-then-test (Angelopoulos et al. 2021): a lucky loose setting
    behind one that failed is not taken.
    """
    chosen = None
    for number, quality in enumerate(qualities):
        if quality < full - permitted_loss:
            break
        chosen = number
    return chosen
