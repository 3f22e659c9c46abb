"""Operating points: the measured trade-offs of a checkpoint, and which of them fits a budget. Loads no torch."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from numbers import Real
from pathlib import Path
from typing import Any

from elastic_model.checks import POLICY_SETTINGS, LengthConfig, check_exit_policy, check_length_config
from elastic_model.folders import write_text

FILE = "operating_points.json"
FORMAT = 1
FULL = "full"  # the point at which every row goes through every layer, with all its tokens
DECIDING = [name for name in POLICY_SETTINGS if name not in ("never", "constant")]  # by what the exits say
BUDGETS = ("speedup", "latency_ms", "flops", "max_drop")


@dataclass(frozen=True)
class OperatingPoint:
    """One trade-off: `thresholds`, one per exit (the last is never asked; counts for patience, voting) and its
    measurements.

    quality: {"metric", "value", "low", "high", "split"}, value and interval as fractions of 1. latency_ms: {"value",
    "batch", "threads", "machine"}. flops: mean FLOPs per row on its real tokens, a multiply-add counted as two;
    padded_flops: were every row padded to the maximum length, as Kim and Cho (2021) count. length_config: a share per
    layer, {"mass": [...]} where rows choose themselves, None = all tokens. calibration: what a calibrated point
    promises (`finetune.calibrate` writes it), and `full_quality`, full depth's on the rows that it was measured on.
    """

    name: str
    thresholds: list[float]
    mean_exit_layer: float
    length_config: LengthConfig | None = None
    flops: float | None = None
    quality: dict[str, Any] | None = None
    latency_ms: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    padded_flops: float | None = None

    def __post_init__(self) -> None:
        values = [*self.thresholds, self.mean_exit_layer, self.flops or 0.0, self.padded_flops or 0.0]
        if not self.thresholds or not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            raise ValueError(
                f"operating point {self.name!r}: thresholds, mean_exit_layer and flops must be finite, got {values}"
            )
        full = (self.calibration or {}).get("full_quality")
        compared = {"value": full} if full is not None else None
        for name, measured in (
            ("quality", self.quality),
            ("latency_ms", self.latency_ms),
            ("calibration's full_quality", compared),
        ):
            if measured is None:
                continue
            interval = [measured[key] for key in ("low", "high") if measured.get(key) is not None]
            numbers = [measured.get("value"), *interval]
            if not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
                raise ValueError(f"operating point {self.name!r}: {name} must be finite, with a value, got {measured}")
        if self.length_config is not None:
            shares = self.length_config
            given = shares.get("mass") if isinstance(shares, dict) else shares
            if not isinstance(given, list | tuple) or not given:
                raise ValueError(
                    f'operating point {self.name!r}: length_config must be a list with a share per layer, {{"mass": '
                    f"such a list}} or null, got {shares!r}"
                )
            check_length_config(shares, len(given))


@dataclass(frozen=True)
class ChosenPoint(OperatingPoint):
    """A point as a model takes it; `policy, lengths = points.at(speedup=4)` unpacks what `forward` wants."""

    policy: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.policy, self.length_config))


@dataclass(frozen=True)
class OperatingPoints:
    """The operating points of one checkpoint (`checkpoint`: sha256 of its weights) under one exit policy."""

    checkpoint: str
    policy: dict[str, Any]
    points: list[OperatingPoint] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = [point.name for point in self.points]
        if len(set(names)) != len(names):
            raise ValueError(f"operating points must have names of their own, got {names}")
        if len({len(point.thresholds) for point in self.points}) > 1:
            raise ValueError("operating points must all have one threshold per exit, got lists of different lengths")

    def check_policy(self) -> None:
        """ValueError where the policy is not one by which rows leave, or a point's thresholds are none of it."""
        name = self.policy.get("name") if isinstance(self.policy, dict) else None
        if name not in DECIDING:
            raise ValueError(
                f"the policy of operating points must be a mapping whose name is one of {', '.join(DECIDING)}, got "
                f"{self.policy!r}"
            )
        for point in self.points:
            try:
                check_exit_policy(self.policy_of(point), len(point.thresholds))
            except ValueError as error:
                raise ValueError(f"operating point {point.name!r}: {error}") from None

    @classmethod
    def read(cls, folder: Path | str) -> "OperatingPoints":
        """`operating_points.json` of a folder, of whatever weights; ValueError where it is damaged."""
        file = Path(folder) / FILE
        try:
            return cls.from_dict(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file}: not a table of operating points: {error}") from error

    @classmethod
    def load(cls, folder: Path | str) -> "OperatingPoints":
        """As `read`; ValueError also where the points are of other weights than those that lie beside them."""
        points = cls.read(folder)
        if any(Path(folder).glob("*.safetensors")) and (found := checkpoint_hash(folder)) != points.checkpoint:
            raise ValueError(
                f"{Path(folder) / FILE} belongs to another checkpoint (weights {points.checkpoint[:12]}..., here "
                f"{found[:12]}...); search or calibrate this one, or delete the file"
            )
        return points

    @classmethod
    def find(cls, folder: Path | str) -> "OperatingPoints | None":
        """Those of the weights that lie beside them; None where there are none, or they are of other weights: whoever
        measures new ones replaces them."""
        if not (Path(folder) / FILE).is_file():
            return None
        points = cls.read(folder)
        beside = any(Path(folder).glob("*.safetensors"))
        return points if not beside or points.checkpoint == checkpoint_hash(folder) else None

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "OperatingPoints":
        """From what `to_dict` gives."""
        if content.get("format") != FORMAT:
            raise ValueError(f"format {content.get('format')!r}, this version reads format {FORMAT}")
        known = {one.name for one in fields(OperatingPoint)}
        points = [OperatingPoint(**{key: point[key] for key in point if key in known}) for point in content["points"]]
        table = cls(content["checkpoint"], content["policy"], points)
        table.check_policy()
        return table

    def to_dict(self) -> dict[str, Any]:
        """As the file holds it."""
        points = [asdict(point) for point in self.points]
        for point in points:
            for name in ("calibration", "padded_flops"):  # of those who measure them alone
                if point[name] is None:
                    del point[name]
        return {"format": FORMAT, "checkpoint": self.checkpoint, "policy": self.policy, "points": points}

    def save(self, folder: Path | str) -> None:
        """As `operating_points.json` in a folder."""
        write_text(Path(folder) / FILE, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    def full(self) -> OperatingPoint:
        """What speed-ups and losses are counted against: the point named "full", else the most expensive one (of those
        measured on the rows of the others: a calibrated one has rows of its own, where there are others)."""
        if not self.points:
            raise ValueError("there are no operating points; measure some first (python -m finetune search)")
        named = [point for point in self.points if point.name == FULL]
        others = named or [point for point in self.points if point.calibration is None] or self.points
        return max(others, key=lambda point: (point.flops or 0.0, point.mean_exit_layer))

    def at(self, budget: "str | dict[str, float] | None" = None, **limit: float) -> ChosenPoint:
        """The point of that name, or the best within {"speedup" | "latency_ms" | "flops" | "max_drop": x} (also as
        keywords: `at(speedup=4)`).

        Within a cost the best quality wins, within a permitted loss (in points of 100) the lowest cost. ValueError
        where nothing measured fits.
        """
        if (budget is None) == (not limit):
            raise ValueError(
                f"give one budget: a point's name or one of {', '.join(BUDGETS)}, got {budget!r}, {limit}"
            )
        point = self._point(limit if budget is None else budget)
        return ChosenPoint(**{**vars(point), "policy": self.policy_of(point)})

    def policy_of(self, point: OperatingPoint) -> dict[str, Any]:
        """The exit policy of a point, as a model's `forward` takes it."""
        name = self.policy.get("name")
        if name == "voting" or name == "patience" and "threshold" not in self.policy:
            return {"name": name, {"voting": "votes"}.get(name, name): int(point.thresholds[0])}
        return {**self.policy, "threshold": list(point.thresholds)}

    def _point(self, budget: "str | dict[str, float]") -> OperatingPoint:
        if isinstance(budget, str):
            return self._named(budget)
        name, limit = self._checked(budget)
        if name == "max_drop":
            measured = self._measured("quality")
            if self.full().quality is None:
                raise ValueError(
                    f"budget max_drop: the quality of {self.full().name!r}, which a drop is counted from, was not "
                    "measured; measure it on labelled rows (python -m finetune search)"
                )
            least = self._quality(self.full()) - limit / 100
            fitting = [point for point in measured if self._quality(point) >= least - 1e-9]
            return min(
                fitting,
                key=lambda point: (
                    math.inf if point.flops is None else point.flops,
                    point.mean_exit_layer,
                    -self._quality(point),
                ),
            )
        if name == "latency_ms":
            cost = {point.name: float(point.latency_ms["value"]) for point in self._measured(name) if point.latency_ms}
        else:
            cost = {point.name: float(point.flops) for point in self._measured("flops") if point.flops is not None}
        most = float(self.full().flops or 0.0) / limit if name == "speedup" else limit
        fitting = [point for point in self.points if cost.get(point.name, math.inf) <= most * (1 + 1e-9)]
        if not fitting:
            full = float(self.full().flops or 0.0)
            shown = {point: full / value for point, value in cost.items()} if name == "speedup" else cost
            offered = ", ".join(f"{point} {value:.4g}" for point, value in shown.items())
            raise ValueError(f"no operating point within {name} {limit:g}; measured are: {offered}")
        return max(fitting, key=lambda point: (self._quality(point), -cost[point.name]))

    def _named(self, name: str) -> OperatingPoint:
        for point in self.points:
            if point.name == name:
                return point
        allowed = ", ".join(point.name for point in self.points) or "none are measured"
        raise ValueError(f"no operating point named {name!r}; the names are: {allowed}")

    def _checked(self, budget: dict[str, float]) -> tuple[str, float]:
        if not isinstance(budget, dict) or len(budget) != 1 or next(iter(budget)) not in BUDGETS:
            raise ValueError(
                f"a budget is a point's name or a mapping with one of {', '.join(BUDGETS)}, got {budget!r}"
            )
        name, limit = next(iter(budget.items()))
        if (
            not isinstance(limit, Real)
            or isinstance(limit, bool)
            or not math.isfinite(limit)
            or limit < 0
            or (name == "speedup" and limit == 0)
        ):
            raise ValueError(f"budget {name}: expected a positive number, got {limit!r}")
        return name, float(limit)

    def _measured(self, name: str) -> list[OperatingPoint]:
        points = [point for point in self.points if getattr(point, name) is not None]
        if not points:
            raise ValueError(
                f"no operating point has a measured {name}; points: {[point.name for point in self.points]}"
            )
        return points

    def _quality(self, point: OperatingPoint) -> float:
        """As far below the table's full depth as it was below full depth on its own rows."""
        if not point.quality:
            return -math.inf
        here, there = self.full().quality, (point.calibration or {}).get("full_quality")
        other = float(here["value"]) - there if here and there is not None and point is not self.full() else 0.0
        return float(point.quality["value"]) + other


def checkpoint_hash(folder: Path | str) -> str:
    """sha256 over the safetensors files of a checkpoint folder, in the order of their names; of a stock one that has
    none, over its `pytorch_model*.bin`."""
    digest = hashlib.sha256()
    for file in sorted(Path(folder).glob("*.safetensors")) or sorted(Path(folder).glob("pytorch_model*.bin")):
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
