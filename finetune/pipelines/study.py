"""`python -m finetune study --task NAME`: the experiment of Xin et al. (2022), sections 5 and 6, on any task.

Every order of D, P and E over several seeds; how far apart the trade-off curves of two orders are, against two seeds
of one order (their table 1); L and Q on top (table 2); curves estimated from single operators against measured ones
(figure 4).
"""

import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student_t
from transformers import logging

from elastic_model.folders import check_output, claim_folder, new_file
from finetune.data import collate
from finetune.evaluate import table
from finetune.kinds import kind_of
from finetune.pipelines.config import StudyOptions
from finetune.pipelines.estimate import by_pipeline, curve_distance, errors, estimate_of, part_of
from finetune.pipelines.figures import plot_curves, plot_estimates
from finetune.pipelines.letters import NOTHING, TRAINED, name_of, parse, prefixes
from finetune.pipelines.measure import Measurement, is_current, measure
from finetune.pipelines.pipeline import MEASURED, known_measurements, write_measured
from finetune.pipelines.stages import Work, begin, carry_out, check_targets, read_record
from finetune.prepare import load_tokenizer

REPORT = "report.txt"
RESULT = "study.json"
BASES = ("", "D", "P", "DP")  # pipelines that L and Q are put on, as in table 2
PROBED = 2  # updates timed for the plan
# seconds of a stage in those of training the whole model: its own passes and those of its teacher
RELATIVE = {"": 1.0, "E": 1.1, "D": 0.5 + 0.35, "P": 0.7 + 0.35}
SMALLER = {"D": 0.5, "P": 0.65, "E": 1.1}  # what an operator leaves of the time of later stages
SECONDS_OF_EXPORT = 40.0

Measured = Mapping[str, Mapping[int, Measurement]]


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
            raise ValueError(f"orders are of D, P and E, got {one}; the study puts L and Q on top by itself")
    return list(dict.fromkeys(orders))


def stages_of(orders: list[str]) -> list[str]:
    """All stages of the study for one seed, parents first: the orders and what is met on the way, then int8 files."""
    stages = dict.fromkeys(stage for order in ["", *orders] for stage in prefixes(order))
    return [*sorted(stages, key=len), *(f"{base}Q" for base in BASES if base in stages)]


def measured_pipelines(orders: list[str]) -> list[str]:
    """What is measured for each seed."""
    stages = [stage for stage in stages_of(orders) if "Q" not in stage]
    return stages + [base + top for base in BASES if base in stages for top in ("L", "Q", "LQ")]


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


def expected_seconds(stage: str, whole: float) -> float:
    """Of one stage, where training the whole model takes `whole`."""
    if stage.endswith("Q"):
        return SECONDS_OF_EXPORT
    before = np.prod([SMALLER[letter] for letter in stage[:-1]])
    return float(whole * before * RELATIVE[stage[-1:]])


def plan(works: list[Work], stages: list[str]) -> str:
    """What is to do and how long it should take: from stages that are done, else from a few updates timed."""
    done = {(work.options.seed, stage): read_record(work, stage) for work in works for stage in stages}
    known: dict[str, list[float]] = {}
    for (_, stage), record in done.items():
        if record is not None:
            known.setdefault(stage, []).append(record["seconds"])
    options, rows = works[0].options, works[0].train_rows
    whole = 0.0
    if any(stage not in known for stage in stages):
        whole = seconds_of_update(works[0]) * -(-rows // options.batch_size) * options.epochs
    lines, left = [], 0.0
    for stage in stages:
        seconds = float(np.mean(known[stage])) if stage in known else expected_seconds(stage, whole)
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


def paired(first: Mapping[int, Measurement], second: Mapping[int, Measurement]) -> dict[str, float]:
    """Mean difference of quality, second - first, over the seeds of both; its 95 % interval (Student) from two on."""
    seeds = sorted(set(first) & set(second))
    differences = np.array([second[seed].quality - first[seed].quality for seed in seeds])
    found = {"mean": float(differences.mean()), "seeds": len(seeds)}
    if len(seeds) > 1:
        half = float(student_t.ppf(0.975, len(seeds) - 1) * differences.std(ddof=1) / len(seeds) ** 0.5)
        found |= {"low": found["mean"] - half, "high": found["mean"] + half}
    return found


def _mean(measured: Measured, name: str, field: str) -> float:
    return float(np.mean([getattr(one, field) for one in measured[name].values()]))


def savings(measured: Measured) -> dict[str, dict[str, Any]]:
    """Table 2: what L and Q give on top of O, D, P and DP, and what was estimated for both together."""
    found = {}
    for base in BASES:
        name = name_of(base)
        names = {top: base + top for top in ("Q", "L", "LQ")}
        if name not in measured or any(one not in measured for one in names.values()):
            continue
        ms, quality = _mean(measured, name, "ms"), _mean(measured, name, "quality")
        found[name] = {
            "quality": quality,
            "difference_to_O": paired(measured[NOTHING], measured[name]),
            "quality_with_Q": _mean(measured, names["Q"], "quality"),
            "difference_with_Q": paired(measured[name], measured[names["Q"]]),
            "ms": ms,
            **{f"saved_{top}": 1 - _mean(measured, one, "ms") / ms for top, one in names.items()},
            "saved_LQ_against_O": 1 - _mean(measured, names["LQ"], "ms") / _mean(measured, NOTHING, "ms"),
        }
        if all(part in measured for part in ("L", "Q", *(["PQ"] if "P" in base else []))):
            found[name]["estimated_LQ"] = 1 - float(estimate_of(f"{base}LQ", measured).curve[0, 0]) / ms
    return found


def estimates(measured: Measured) -> dict[str, dict[str, Any]]:
    """Figure 4: of every pipeline of several operators, the estimated and the measured curve, and how far apart."""
    found = {}
    for name in measured:
        letters = "" if name == NOTHING else name
        if len(letters) < 2 or letters == "PQ":
            continue
        try:
            estimated = estimate_of(letters, measured).curve
        except ValueError:
            continue  # a part is not measured yet
        actual = part_of(list(measured[name].values())).curve
        shown: dict[str, Any] = {"estimated": estimated.tolist(), "measured": actual.tolist()}
        if len(estimated) == len(actual):
            shown["median_error"] = errors(estimated, actual)
        shown["distance"] = 100 * curve_distance(estimated, actual) if "E" in letters else None
        found[name] = shown
    return found


def _spread(one: dict[str, float] | None) -> str:
    return "-" if one is None else f"{one['mean']:.2f} ± {one['std']:.2f} ({one['pairs']} pairs)"


def _interval(one: dict[str, float]) -> str:
    if "low" not in one:
        return f"{100 * one['mean']:+.2f}"
    return f"{100 * one['mean']:+.2f} ({100 * one['low']:+.2f} to {100 * one['high']:+.2f})"


def report(result: dict[str, Any]) -> str:
    """The tables as text."""
    lines = ["distance of trade-off curves, points of 100, mean and standard deviation"]
    lines.append(
        table(
            ["operators", "same order", "different order"],
            [
                [name, _spread(one.get("same")), _spread(one.get("different"))]
                for name, one in result["table_1"].items()
            ],
        )
    )
    rows = [
        [name, f"{one['quality']:.4f}", _interval(one["difference_to_O"]), _interval(one["difference_with_Q"]),
         f"{one['ms']:.3f}", *(f"{one[f'saved_{top}']:.1%}" for top in ("Q", "L", "LQ")),
         f"{one['estimated_LQ']:.1%}" if "estimated_LQ" in one else "-"]
        for name, one in result["table_2"].items()
    ]  # fmt: skip
    heads = ["pipeline", result["metric"], "points to O (95 %)", "points with Q (95 %)", "ms a row"]
    lines += ["", "L and Q on top", table([*heads, "saved Q", "saved L", "saved LQ", "estimated LQ"], rows)]
    rows = [
        [name, f"{one['median_error']['time']:.1%}", f"{100 * one['median_error']['quality']:.2f}",
         "-" if one["distance"] is None else f"{one['distance']:.2f}"]
        for name, one in result["figure_4"].items() if "median_error" in one
    ]  # fmt: skip
    lines += ["", "estimated against measured, medians over the curve"]
    lines.append(table(["pipeline", "error of time", f"error of {result['metric']}, points", "distance"], rows))
    medians = result["median_error"]
    if medians:
        lines.append(f"over all: {medians['time']:.1%} in time, {100 * medians['quality']:.2f} points")
    return "\n".join(lines)


def summarise(root: Path, works: list[Work], measurements: list[Measurement]) -> str:
    """The tables and plots of what is measured so far, written; the tables as text."""
    measured = by_pipeline(measurements)
    figure = estimates(measured)
    known = [one["median_error"] for one in figure.values() if "median_error" in one]
    result = {
        "metric": works[0].labels.metrics[0],
        "seeds": sorted({one.seed for one in measurements}),
        "rows": {"train": works[0].train_rows, "dev": len(works[0].dev)},
        "table_1": distances(measured),
        "table_2": savings(measured),
        "figure_4": figure,
        "median_error": {key: float(np.median([one[key] for one in known])) for key in ("time", "quality")}
        if known
        else None,
    }
    text = report(result)
    with new_file(root / RESULT) as file:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    with new_file(root / REPORT) as file:
        file.write_text(text + "\n", encoding="utf-8")
    curves = {name: [_values(one) for one in seeds.values()] for name, seeds in measured.items() if "E" in name}
    if curves:
        plot_curves(root / "curves.png", curves, works[0].labels.metrics[0])
    if any(len(one["estimated"]) > 1 for one in figure.values()):
        plot_estimates(root / "estimates.png", figure, works[0].labels.metrics[0])
    return text


def study(options: StudyOptions) -> int:
    """Print the plan, carry out what is missing, write tables and plots; exit code 0, or 143 after SIGTERM."""
    orders = chosen_orders(options)
    if not options.seeds or len(set(options.seeds)) != len(options.seeds):
        raise ValueError(f"seeds must be different numbers, at least one, got {options.seeds}")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    root = Path(options.output)
    check_output(root)
    check_targets(options, "DPE")
    works = [begin(replace(options, seed=seed), root / f"seed-{seed}") for seed in options.seeds]
    stages, began = stages_of(orders), time.monotonic()
    print(plan(works, stages), flush=True)
    if options.plan:
        return 0
    claim_folder(root)
    known: dict[tuple[str, int], Measurement] = {}
    for work in works:
        known |= known_measurements(work.root / MEASURED, work)
    for work in works:
        claim_folder(work.root)
        for stage in stages:
            if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
                print(f"{options.minutes:g} minutes are over; run the same again to go on")
                return 0
            if code := carry_out(work, stage):
                return code
        for letters in measured_pipelines(orders):
            key = (name_of(letters), work.options.seed)
            if key not in known or not is_current(work, known[key]):
                print(f"seed {work.options.seed}: measuring {key[0]}", flush=True)
                known[key] = measure(work, letters)
                own = [one for (_, seed), one in known.items() if seed == work.options.seed]
                write_measured(work.root / MEASURED, work, own)
    text = summarise(root, works, list(known.values()))
    with new_file(root / MEASURED) as file:
        _merge(file, works)
    print("", text, f"\n{RESULT}, {MEASURED}, tables and plots: {root}", sep="\n")
    return 0


def _merge(file: Path, works: list[Work]) -> None:
    """The measurements of all seeds as one file, for `estimate`."""
    contents = [json.loads((work.root / MEASURED).read_text(encoding="utf-8")) for work in works]
    every = [one for content in contents for one in content["measurements"]]
    file.write_text(json.dumps({**contents[0], "measurements": every}, indent=1) + "\n", encoding="utf-8")
