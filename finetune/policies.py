"""The settings of an exit policy from strict to loose, and which of them held-out rows permit."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from finetune.tasks import ProblemType

GRID = 100  # settings tried of a policy that has a threshold
Policy = dict[str, Any]
Candidates = Callable[[np.ndarray, ProblemType, float | None], list[Policy]]


def _steps(largest: float) -> list[float]:
    """Rising to `largest`; squares, since most rows of a trained model are nearly certain."""
    return [float(f"{largest * (step / GRID) ** 2:.6g}") for step in range(1, GRID + 1)]


def _change(logits: np.ndarray) -> float:
    """Just above the largest change of a row's value between neighbouring exits: a threshold that all rows pass."""
    return 1.01 * float(np.abs(np.diff(logits, axis=0)).max())


def _patience(logits: np.ndarray, problem_type: ProblemType, largest: float | None) -> list[Policy]:
    if problem_type != "regression":
        return [{"name": "patience", "patience": patience} for patience in range(len(logits) - 1, 0, -1)]
    steps = _steps(_change(logits) if largest is None else largest)
    return [{"name": "patience", "patience": 1, "threshold": step} for step in steps]


def _voting(logits: np.ndarray, problem_type: ProblemType, largest: float | None) -> list[Policy]:
    return [{"name": "voting", "votes": votes} for votes in range(len(logits), 0, -1)]


def _rising(name: str) -> Candidates:
    return lambda logits, problem_type, largest: [{"name": name, "threshold": step} for step in _steps(1.0)]


def _falling(name: str) -> Candidates:
    return lambda logits, problem_type, largest: [
        {"name": name, "threshold": round(1 - step, 6)} for step in _steps(1.0)
    ]


# policy -> its settings, from exit logits, in an order fixed before any is tried: strict (rows stay longest) to loose
CANDIDATES: Mapping[str, Candidates] = {
    "entropy": _rising("entropy"),
    "confidence": _falling("confidence"),
    "margin": _falling("margin"),
    "patience": _patience,
    "voting": _voting,
    "learned": _rising("learned"),
}
FOR_REGRESSION = ("patience", "learned")


def policy_name(given: str | None, problem_type: ProblemType, saved: Policy | None = None) -> str:
    """The policy to calibrate: the one given, else the checkpoint's where that has settings to choose from, else
    patience for regression and entropy for classes."""
    kept = (saved or {}).get("name")
    usual = "patience" if problem_type == "regression" else "entropy"
    name = given or (kept if kept in CANDIDATES else usual)
    allowed = FOR_REGRESSION if problem_type == "regression" else tuple(CANDIDATES)
    if name not in allowed:
        raise ValueError(
            f"exit policy {name!r} cannot be calibrated for {problem_type}; allowed: {', '.join(allowed)}"
        )
    return name


def patience_of(saved: Policy | None) -> int:
    """The steps that a regression's patience counts: those of the checkpoint's policy, which a file has built in."""
    return saved["patience"] if saved and "threshold" in saved and "patience" in saved else 1


def candidates(
    name: str, logits: np.ndarray, problem_type: ProblemType, largest: float | None = None, patience: int = 1
) -> list[Policy]:
    """The settings of a policy from strict to loose, for exit logits (exits, rows, labels).

    largest: the loosest threshold of a regression's patience, by default from the logits; a guarantee needs one that
    the rows did not choose. patience: the steps that it counts.
    """
    settings = CANDIDATES[name](logits, problem_type, largest)
    return [{**one, "patience": patience} if "threshold" in one and "patience" in one else one for one in settings]


def never(name: str, exits: int, problem_type: ProblemType, patience: int = 1) -> Policy:
    """The setting of a policy at which every row goes to full depth; patience: as of `candidates`."""
    if name == "voting":
        return {"name": name, "votes": exits}
    if name == "patience" and problem_type != "regression":
        return {"name": name, "patience": exits}
    if name == "patience":
        return {"name": name, "patience": patience, "threshold": 0.0}
    return {"name": name, "threshold": 0.0 if name in ("entropy", "learned") else 1.0}


def at_one_exit(loosest: Policy, exits: int, problem_type: ProblemType) -> list[Policy]:
    """The settings of a policy at which all rows leave at the same exit between the first and the last: its strictest
    threshold below that exit, its loosest (of `candidates`, the last) from there on; none of a policy that counts."""
    strict = never(loosest["name"], exits, problem_type, patience_of(loosest))
    if "threshold" not in strict:
        return []
    ends = strict["threshold"], loosest["threshold"]
    return [{**strict, "threshold": [ends[0]] * place + [ends[1]] * (exits - place)} for place in range(1, exits - 1)]


def thresholds(name: str, policy: Policy | None, exits: int, problem_type: ProblemType) -> list[float]:
    """A policy's threshold at each exit, as operating points hold it (class patience: a count); None: full depth."""
    settings = policy or never(name, exits, problem_type)
    value = next(settings[key] for key in ("threshold", "patience", "votes") if key in settings)
    return [float(one) for one in value] if isinstance(value, list) else [float(value)] * exits


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
