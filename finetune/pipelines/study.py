"""`python -m finetune study --task NAME`: the experiment of Xin et al. (2022), sections 5 and 6, on any task.

Every order of D, P and E over several seeds; how far apart the trade-off curves of two orders are, against two seeds
of one order (their table 1); L and Q on top (table 2), also together with E and S; curves estimated from single
operators against measured ones (figure 4). Times are measured last, those of a seed in turns, when nothing is trained
any more.
"""

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student_t

from elastic_model.folders import check_no_checkpoint, check_output, working_in, write_text
from finetune.data import collate
from finetune.evaluate import table
from finetune.figures import plot_curves, plot_estimates
from finetune.kinds import kind_of
from finetune.pipelines.config import StudyOptions
from finetune.pipelines.estimate import (
    Measured,
    by_pipeline,
    curve_distance,
    errors,
    estimate_of,
    part_of,
    parts_needed,
)
from finetune.pipelines.letters import NOTHING, TRAINED, letters_of, name_of, parse, prefixes, stage_of
from finetune.pipelines.measure import Measurement
from finetune.pipelines.pipeline import MEASURED, Known, known_measurements, measured_together, write_measured
from finetune.pipelines.stages import RECORD, carry_out, read_record
from finetune.pipelines.work import Work, begin
from finetune.prepare import load_tokenizer

REPORT = "report.txt"
RESULT = "study.json"
BASES = ("", "D", "P", "DP")  # pipelines that L and Q are put on, as in table 2
DYNAMIC = "ESLQ"  # rows leave early, lose tokens, are not padded, run as int8
PROBED = 2  # updates timed for the plan
# seconds of a stage in those of training the whole model: its own passes and those of its teacher
RELATIVE = {"": 1.0, "E": 1.1, "D": 0.5 + 0.35, "P": 0.7 + 0.35, "S": 4.0}
SMALLER = {"D": 0.5, "P": 0.65, "E": 1.1, "S": 1.0}  # what an operator leaves of the time of later stages
SECONDS_OF_EXPORT = 40.0


def all_orders() -> list[str]:
    """Every pipeline of one to three of D, P and E, in every order that there is."""
    found = []
    for count in range(1, len(TRAINED) + 1):
        for letters in map("".join, itertools.permutations(TRAINED, count)):
            try:
                found.append(parse(letters))
            except ValueError:
                continue
    return found


def chosen_orders(options: StudyOptions) -> list[str]:
    """The orders to run; ValueError for one that has other letters than D, P and E."""
    orders = [parse(text) for text in options.orders] if options.orders else all_orders()
    for one in orders:
        if set(one) - set(TRAINED):
            raise ValueError(f"orders are of D, P and E, got {one}; the study puts L, Q and S on top by itself")
    return list(dict.fromkeys(orders))


def measured_pipelines(orders: list[str]) -> list[str]:
    """What is measured for each seed: the orders and what is met on the way, L and Q on top, exits with lengths."""
    trained = sorted(dict.fromkeys(stage for order in ["", *orders] for stage in prefixes(order)), key=len)
    tops = [base + top for base in BASES if base in trained for top in ("L", "Q", "LQ")]
    return [*trained, *tops, *([DYNAMIC] if "E" in trained else [])]


def stages_of(orders: list[str]) -> list[str]:
    """All stages of the study for one seed, parents first."""
    ends = [stage_of(letters) for letters in measured_pipelines(orders)]
    return sorted(dict.fromkeys(stage for end in ends for stage in prefixes(end)), key=len)


def seconds_of_update(work: Work) -> float:
    """Of one update of the whole model, timed; rows of the middle length."""
    options = work.options
    model = kind_of(work.labels).model.from_pretrained(
        options.model, local_files_only=True, dtype=torch.float32, exit_policy=None, num_labels=len(work.labels.names)
    )
    order = np.argsort(work.dev.lengths)
    first = max(0, len(order) // 2 - options.batch_size // 2)
    rows = [int(row) for row in order[first : first + options.batch_size]]
    batch = collate(work.dev, rows, load_tokenizer(Path(options.model)), torch.device("cpu"))
    spent = []
    for _ in range(PROBED):
        began = time.perf_counter()
        model.train()(**batch).loss.backward()
        spent.append(time.perf_counter() - began)
    return min(spent)


def expected_seconds(stage: str, whole: float, measuring: float) -> float:
    """Of one stage, where training the whole model takes `whole`, and measuring what matters in it `measuring`."""
    if stage.endswith("Q"):
        return SECONDS_OF_EXPORT
    before = np.prod([SMALLER[letter] for letter in stage[:-1]])
    return float(before * (whole * RELATIVE[stage[-1:]] + (measuring * SMALLER["P"] if stage.endswith("P") else 0)))


def plan(works: list[Work], stages: list[str]) -> str:
    """What is to do and how long it should take: from stages that are done, else from a few updates timed."""
    done = {(work.options.seed, stage): read_record(work, stage) for work in works for stage in stages}
    known: dict[str, list[float]] = {}
    for (_, stage), record in done.items():
        if record is not None:
            known.setdefault(stage, []).append(record["seconds"])
    options, rows = works[0].options, works[0].train_rows
    whole = measuring = 0.0
    if any(stage not in known for stage in stages):
        row = seconds_of_update(works[0]) / options.batch_size
        whole, measuring = row * rows * options.epochs, row * min(rows, options.importance_rows) * options.rounds
    lines, left = [], 0.0
    for stage in stages:
        seconds = float(np.mean(known[stage])) if stage in known else expected_seconds(stage, whole, measuring)
        missing = sum(done[work.options.seed, stage] is None for work in works)
        left += missing * seconds
        how = "as measured" if stage in known else "expected"
        lines.append([name_of(stage), f"{len(works) - missing} of {len(works)}", f"{seconds / 60:.1f}", how])
    head = table(["stage", "done", "minutes each", ""], lines)
    return f"{head}\n{rows} rows, {options.epochs} epochs a stage; about {left / 3600:.1f} h are left, measuring aside"


def _values(one: Measurement) -> np.ndarray:
    return np.array([(point.ms, point.quality) for point in one.curve])


def distances(measured: Measured) -> dict[str, dict[str, Any]]:
    """Table 1: distances of curves, in points of 100, between seeds of the same order and between different orders."""
    groups: dict[str, list[str]] = {}
    for name in measured:
        if "E" in name and len(name) > 1 and not set(name) - set(TRAINED):
            groups.setdefault("+".join(sorted(name, key=TRAINED.index)), []).append(name)
    found: dict[str, dict[str, Any]] = {}
    for group, orders in groups.items():
        curves = [(order, _values(one)) for order in orders for one in measured[order].values()]
        lists: dict[str, list[float]] = {"same": [], "different": []}
        for (first, one), (second, other) in itertools.combinations(curves, 2):
            lists["same" if first == second else "different"].append(100 * curve_distance(one, other))
        found[group] = {"orders": orders}
        for name, values in lists.items():
            known = [value for value in values if not np.isnan(value)]
            if known:
                found[group][name] = {"mean": float(np.mean(known)), "std": float(np.std(known)), "pairs": len(known)}
    return found


def interval(differences: Sequence[float]) -> dict[str, float]:
    """The mean of differences, one a seed, and from two seeds on its 95 % interval (Student)."""
    count, mean = len(differences), float(np.mean(differences))
    if count < 2:
        return {"mean": mean, "seeds": count}
    half = float(student_t.ppf(0.975, count - 1) * np.std(differences, ddof=1) / count**0.5)
    return {"mean": mean, "seeds": count, "low": mean - half, "high": mean + half}


def paired(first: Mapping[int, Measurement], second: Mapping[int, Measurement]) -> dict[str, float]:
    """Of quality, second - first, over the seeds of both."""
    return interval([second[seed].quality - first[seed].quality for seed in sorted(set(first) & set(second))])


def _mean(measured: Measured, name: str, field: str) -> float:
    return float(np.mean([getattr(one, field) for one in measured[name].values()]))


def _against_nothing(measured: Measured, name: str) -> dict[str, Any]:
    """A pipeline beside O: the difference of quality, the share of time saved, also of O's with rows padded to twice
    the length."""
    ms, nothing = _mean(measured, name, "ms"), _mean(measured, NOTHING, "ms")
    found: dict[str, Any] = {"quality": _mean(measured, name, "quality"), "ms": ms, "saved": 1 - ms / nothing}
    found["difference_to_O"] = paired(measured[NOTHING], measured[name])
    if all(one.doubled_ms is not None for one in measured[NOTHING].values()):
        found["saved_of_doubled"] = 1 - ms / _mean(measured, NOTHING, "doubled_ms")
    return found


def savings(measured: Measured) -> dict[str, dict[str, Any]]:
    """Table 2: what L and Q save on top of O, D, P and DP, of the time of each, and what was estimated for both."""
    found = {}
    for base in BASES:
        name, names = name_of(base), {top: base + top for top in ("Q", "L", "LQ")}
        if name not in measured or any(one not in measured for one in names.values()):
            continue
        ms, quality, with_q = (
            _mean(measured, *of) for of in ((name, "ms"), (name, "quality"), (names["Q"], "quality"))
        )
        found[name] = {
            "quality": quality,
            "difference_to_O": paired(measured[NOTHING], measured[name]),
            "quality_with_Q": with_q,
            "relative_change_with_Q": (with_q - quality) / abs(quality) if quality else None,
            "difference_with_Q": paired(measured[name], measured[names["Q"]]),
            "ms": ms,
            **{f"saved_{top}": 1 - _mean(measured, one, "ms") / ms for top, one in names.items()},
            "estimated_LQ": 1 - float(estimate_of(names["LQ"], measured).curve[0, 0]) / ms
            if all(part in measured for part in parts_needed(names["LQ"]))
            else None,
        }
    return found


def estimates(measured: Measured) -> dict[str, dict[str, Any]]:
    """Figure 4: of every pipeline of several operators, the estimated and the measured curve, and how far apart."""
    found = {}
    for name in measured:
        letters = letters_of(name)
        parts = parts_needed(letters)
        if name in parts or any(part not in measured for part in parts):
            continue
        estimated = estimate_of(letters, measured).curve
        actual = part_of(list(measured[name].values())).curve
        shown: dict[str, Any] = {"estimated": estimated.tolist(), "measured": actual.tolist()}
        if len(estimated) == len(actual):
            shown["median_error"] = errors(estimated, actual)
        if "E" in letters:
            shown["distance"] = 100 * curve_distance(estimated, actual)
        found[name] = shown
    return found


def _median(values: list[float]) -> float | None:
    return float(np.median(values)) if values else None


def answers(measured: Measured) -> dict[str, Any]:
    """All that the study says, from measurements: {pipeline: {seed: measurement}}."""
    table_1, figure = distances(measured), estimates(measured)
    known = {name: one["median_error"] for name, one in figure.items() if "median_error" in one}
    # L answers as what it follows does: an estimate with it is off by no more and no less
    of_quality = {name: error["quality"] for name, error in known.items() if "L" not in name}
    ratios = [one["different"]["mean"] / one["same"]["mean"] for one in table_1.values()
              if "same" in one and "different" in one and one["same"]["mean"]]  # fmt: skip
    return {
        "table_1": table_1,
        "commutative": {"different_to_same": float(np.mean(ratios))} if ratios else None,
        "table_2": savings(measured),
        "against_O": {name: _against_nothing(measured, name) for name in ("LQ", DYNAMIC) if name in measured},
        "figure_4": figure,
        "cumulative": {
            "time": _median([error["time"] for error in known.values()]),
            "quality": _median(list(of_quality.values())),
            "quality_with_E": _median([error for name, error in of_quality.items() if "E" in name]),
        }
        if of_quality
        else None,
    }


def _spread(one: dict[str, float] | None) -> str:
    return "-" if one is None else f"{one['mean']:.2f} ± {one['std']:.2f} ({one['pairs']} pairs)"


def _interval(one: dict[str, float]) -> str:
    if "low" not in one:
        return f"{100 * one['mean']:+.2f}"
    return f"{100 * one['mean']:+.2f} ({100 * one['low']:+.2f} to {100 * one['high']:+.2f})"


def _percent(one: Mapping[str, Any], name: str) -> str:
    return f"{one[name]:.1%}" if one.get(name) is not None else "-"


def report(result: Mapping[str, Any]) -> str:
    """The tables as text."""
    metric, lines = result["metric"], []

    def add(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        if rows:
            lines.extend([title, table(heads, rows), ""])

    add(
        "distance of trade-off curves, points of 100, mean and standard deviation",
        ["operators", "same order", "different order"],
        [[name, _spread(one.get("same")), _spread(one.get("different"))] for name, one in result["table_1"].items()],
    )
    if result["commutative"]:
        ratio = result["commutative"]["different_to_same"]
        lines.extend([f"commutative: two orders are {ratio:.2f} times as far apart as two seeds of one order", ""])
    add(
        "L and Q on top: share of the time of the pipeline alone that they save",
        ["pipeline", metric, "points to O (95 %)", "points with Q (95 %)", "ms a row",
         "saved Q", "saved L", "saved LQ", "estimated LQ"],
        [[name, f"{one['quality']:.4f}", _interval(one["difference_to_O"]), _interval(one["difference_with_Q"]),
          f"{one['ms']:.3f}", *(_percent(one, key) for key in ("saved_Q", "saved_L", "saved_LQ", "estimated_LQ"))]
         for name, one in result["table_2"].items()],
    )  # fmt: skip
    padded = result["padded_to"]
    add(
        "against O, every row of it padded",
        ["pipeline", metric, "points to O (95 %)", "ms a row", f"saved (to {padded})", f"saved (to {2 * padded})"],
        [[name, f"{one['quality']:.4f}", _interval(one["difference_to_O"]), f"{one['ms']:.3f}",
          _percent(one, "saved"), _percent(one, "saved_of_doubled")] for name, one in result["against_O"].items()],
    )  # fmt: skip
    add(
        "estimated against measured, medians over the curve",
        ["pipeline", "error of time", f"error of {metric}, points", "distance"],
        [[name, f"{one['median_error']['time']:.1%}", f"{100 * one['median_error']['quality']:.2f}",
          f"{one['distance']:.2f}" if "distance" in one else "-"]
         for name, one in result["figure_4"].items() if "median_error" in one],
    )  # fmt: skip
    if result["cumulative"]:
        found = result["cumulative"]
        with_e = found["quality_with_E"]
        exits = "" if with_e is None else f", {100 * with_e:.2f} of those with E"
        lines.append(
            f"cumulative: estimates are off by {found['time']:.1%} in time, {100 * found['quality']:.2f} points "
            f"(without L, which changes no answer){exits}; medians"
        )
    return "\n".join(lines).rstrip()


def summarise(root: Path, about: Mapping[str, Any], measurements: Sequence[Measurement]) -> str:
    """The tables and plots of what is measured, written; the tables as text. about: task, rows, padded_to."""
    measured, metric = by_pipeline(measurements), measurements[0].metric
    seeds = sorted({one.seed for one in measurements})
    result = {**about, "metric": metric, "seeds": seeds, **answers(measured)}
    text = report(result)
    for name, content in ((RESULT, json.dumps(result, indent=1)), (REPORT, text)):
        write_text(root / name, content + "\n")
    curves = {name: [_values(one) for one in seeds.values()] for name, seeds in measured.items()
              if "E" in name and not set(name) - set(TRAINED)}  # fmt: skip
    if curves:
        plot_curves(root / "curves.png", curves, metric)
    if any(len(one["estimated"]) > 1 for one in result["figure_4"].values()):
        plot_estimates(root / "estimates.png", result["figure_4"], metric)
    return text


def study(options: StudyOptions) -> int:
    """Print the plan, carry out what is missing, measure, write tables; exit code 0, or 143 after SIGTERM."""
    orders = chosen_orders(options)
    if not options.seeds or len(set(options.seeds)) != len(options.seeds):
        raise ValueError(f"seeds must be different numbers, at least one, got {options.seeds}")
    if options.minutes is not None and not options.minutes >= 0:  # which NaN is not either
        raise ValueError(f"minutes must be at least 0, got {options.minutes:g}")
    root = Path(options.output)
    check_output(root)
    check_no_checkpoint(root)
    if options.seed != StudyOptions.seed:
        raise ValueError(f"seed {options.seed} would do nothing: a study has --seeds")
    if there := next(root.glob(f"*/{RECORD}"), None):
        raise ValueError(f"output {root} has the stages of a pipeline ({there.parent.name}); choose another output")
    stages, began = stages_of(orders), time.monotonic()
    letters = "".join(dict.fromkeys("".join(stages)))
    works = [begin(replace(options, seed=seed), root / f"seed-{seed}", letters) for seed in options.seeds]
    known: Known = {}
    for work in works:
        known |= known_measurements(work.root / MEASURED, work)
    print(plan(works, stages), flush=True)
    if options.plan:
        return 0
    with ExitStack() as folders:
        for folder in (root, *(work.root for work in works)):
            folders.enter_context(working_in(folder))
        for work in works:
            for stage in stages:
                if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
                    print(f"{options.minutes:g} minutes are over; run the same again to go on")
                    return 0
                if code := carry_out(work, stage):
                    return code
        if options.measure:
            _measure(options, works, orders, known)
    return 0


def _measure(options: StudyOptions, works: list[Work], orders: list[str], known: Known) -> None:
    """What is missing of the measurements; tables and plots of all."""
    root, wanted = Path(options.output), measured_pipelines(orders)
    shown = [one for work in works for one in measured_together(work, wanted, known, work.root / MEASURED)]
    write_measured(root / MEASURED, works[0], shown)
    rows = {"train": works[0].train_rows, "dev": len(works[0].dev)}
    about = {"task": options.task, "rows": rows, "padded_to": options.max_length}
    print("", summarise(root, about, shown), f"\n{RESULT}, {MEASURED}, tables and plots: {root}", sep="\n")
