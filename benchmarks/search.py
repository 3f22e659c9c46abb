"""What a search finds and what it costs: `python -m benchmarks.search CHECKPOINT --task sst2 --output FILE.json`.

Joint against lengths alone, exits alone and the constant-ratio curve, by area under the front on dev and, for the
points chosen there, on test; lengths that rows choose themselves against searched ones at the same cost; CPU time of a
configuration against evaluating it naively; how often a calibrated threshold breaks its promise; with --exported,
latency against FLOPs. The searches run side by side, a thread each. What is begun continues: the journals lie beside
the output, and so does a plot of the fronts, of figure 4 and of figure 3 of Kim and Cho (2021).
"""

import argparse
import itertools
import json
import math
import multiprocessing
import random
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from benchmarks.demo import commit, machine
from elastic_model.arguments import run
from elastic_model.calibration import fixed_sequence, rows_needed
from elastic_model.cost import exit_flops
from elastic_model.exit_policies import sweep
from elastic_model.folders import claim_folder, write_json
from elastic_model.front import area_under_front
from elastic_model.operating_points import OperatingPoints, checkpoint_hash
from elastic_model.session import ElasticSession
from finetune.candidates import STEPS, shares
from finetune.config import SearchOptions
from finetune.data import Encoded, collate, inputs_of
from finetune.evolution import Found, Search, evolve, measure
from finetune.examples import read_examples
from finetune.explore import explore
from finetune.figures import panels
from finetune.kinds import answers_of
from finetune.latency import time_batches
from finetune.prepare import chosen_task, encode_split, some_rows
from finetune.search import LIKE_FULL, chosen, operating_points, prepare

NAIVE_BATCH = 32  # rows, in the order of the file, padded to the longest
SAMPLED = 6  # configurations that are evaluated naively
CURVE = 3  # one in so many constant-ratio configurations is measured on test
SETS, EPSILONS, CONFIDENCE = 200, (0.01, 0.05, 0.1), 0.95  # calibration sets, disagreements bounded, how surely
BATCHES = (1, 4, 16, 64)  # figure 3 of Kim and Cho (2021)
TURNS = 4  # all configurations are timed so often, one after another: the machine's noise is shared


def searched(options: SearchOptions) -> tuple[Search, list[dict[str, Any]]]:
    """A search from its journal on, to its end; the checkpoint's own operating points are left alone."""
    work, _ = prepare(options)
    folder, history = claim_folder(Path(str(options.output))), []
    for one in evolve(work, folder, Accelerator()):
        history.append(one)
        print(f"{options.axes}: {one}", flush=True)
    return work, history


def timed(options: SearchOptions) -> tuple[float, float | None]:
    """CPU seconds of a search and, of the joint one, of one candidate of it evaluated naively, in one process."""
    torch.set_num_threads(1)
    work, history = searched(options)
    return sum(one["seconds"] for one in history), naive_seconds(work) if options.axes == "joint" else None


@torch.inference_mode()
def naive_seconds(work: Search) -> float:
    """CPU seconds of one candidate where each is a full forward pass of its own, float32, rows in their order."""
    tried = [one for group in work.generations for one in group]
    drawn = random.Random(work.options.seed).sample(tried, min(SAMPLED, len(tried)))
    rows = range(len(work.encoded))
    spent = []
    for lengths in drawn:
        began = time.process_time()
        for start in range(0, len(rows), NAIVE_BATCH):
            batch = collate(work.encoded, list(rows[start : start + NAIVE_BATCH]), work.tokenizer, torch.device("cpu"))
            work.model(**inputs_of(batch), length_config=shares(lengths), exit_policy={"name": "never"})
        spent.append(time.process_time() - began)
    return float(np.mean(spent))


def curve(work: Search, rows: Encoded, every: int) -> list[Found]:
    """The constant-ratio curve of the first generation at full depth, one in `every` of it."""
    lengths = sorted({*work.generations[0][::every], work.whole})
    seen = explore(work.model, rows, work.tokenizer, work.options.eval_batch_size, lengths)
    alone = replace(work, policies=work.policies[:1])
    return [measure(alone, one, observed, rows)[0] for one, observed in seen.items()]


def area_of_curve(points: list[Found]) -> float:
    """The area under a constant-ratio curve."""
    return Found.area(points, max(one.cost for one in points))


def as_line(found: list[Found]) -> list[tuple[float, float]]:
    """MFLOPs a row and quality of candidates, the cheapest first."""
    return sorted((one.flops / 1e6, one.quality) for one in found)


def area_of(points: OperatingPoints) -> float:
    """The area under what was measured of some points, on whatever rows."""
    flops = [one.flops or 0.0 for one in points.points]
    return area_under_front(
        flops, [(one.quality or {})["value"] for one in points.points], points.at("full").flops or 1
    )


def kept_order(work: Search, points: OperatingPoints) -> float | None:
    """Of the pairs of chosen points that differ on the rows searched, the share that does not turn round."""
    tested = [(one.quality or {})["value"] for one in without_rows(points).points]
    both = zip([one.quality for one in chosen(work).values()], tested, strict=True)
    pairs = [
        (first[0] - second[0]) * (first[1] - second[1])
        for first, second in itertools.combinations(both, 2)
        if abs(first[0] - second[0]) > LIKE_FULL
    ]
    return float(np.mean([product >= 0 for product in pairs])) if pairs else None


def without_rows(points: OperatingPoints) -> OperatingPoints:
    """Those whose lengths were searched, not chosen by the row."""
    return replace(points, points=[one for one in points.points if not isinstance(one.length_config, dict)])


def rows_against_search(points: OperatingPoints) -> dict[str, Any]:
    """Lengths that rows choose themselves against searched ones, fitted to the same mean cost, at full depth."""
    known = {one.name: one for one in points.points}
    pairs, differences = [], []
    for own in points.points:
        if isinstance(own.length_config, dict):
            searched = known[own.name.removesuffix("-by-row")]
            quality = [(one.quality or {})["value"] for one in (searched, own)]
            mflops = [(one.flops or 0) / 1e6 for one in (searched, own)]
            mass = own.length_config["mass"][0]
            pairs.append({"lengths": searched.length_config, "mass": mass, "mflops": mflops, "quality": quality})
            differences.append(quality[1] - quality[0])
    rows = [one for one in points.points if one.name == "full" or isinstance(one.length_config, dict)]
    fronts = {"searched": without_rows(points), "by row": replace(points, points=rows)}
    return {
        "searched_and_by_row": pairs,
        "mean_difference": float(np.mean(differences)) if pairs else None,
        "area": {name: area_of(found) for name, found in fronts.items()},
    }


def padded_share(work: Search, lengths: Any) -> float:
    """FLOPs at full depth as a share of full length, all rows padded to the maximum: as the paper counts."""
    tokens, head = [work.options.max_length], work.encoded.head
    parts = [exit_flops(work.model.config, tokens, one, head)[-1].item() for one in (lengths, 1.0)]
    return parts[0] / parts[1]


def latency_against_flops(work: Search, folder: Path) -> dict[str, Any]:
    """Milliseconds a row and MFLOPs of configurations of the front at full depth, by batch size; their correlation."""
    session = ElasticSession.from_pretrained(folder, threads=1)
    texts = work.examples.texts[: max(BATCHES)]
    pairs = work.examples.pairs
    rows = session.tokenizer.encode_batch(list(zip(texts, pairs, strict=False)) if pairs else texts)
    tokens = [len(one.ids) for one in rows]
    lengths = sorted({one.lengths for one in work.front()} | {(STEPS,) * work.layers})[
        :: max(1, len(work.front()) // 10)
    ]
    costs = [exit_flops(work.model.config, tokens, shares(one), work.encoded.head)[-1].double() for one in lengths]
    found: dict[str, Any] = {}
    for batch in BATCHES:
        turns = [
            [time_batches(session, rows, batch, shares(one), thresholds=session.never) for one in lengths]
            for _ in range(TURNS)
        ]
        spent = np.array(turns).min(0).sum(1) / len(rows)
        points = [(cost.mean().item() / 1e6, float(one)) for cost, one in zip(costs, spent, strict=True)]
        correlation = float(np.corrcoef(np.array(points).T)[0, 1]) if len(points) > 2 else None
        found[str(batch)] = {"mflops_and_ms": points, "correlation": correlation}
    return found


def held_out(arguments: argparse.Namespace, work: Search) -> Encoded:
    """The rows of test; where a task has none with labels, those of dev."""
    task = chosen_task(work.options)
    split = "test" if "test" in task.splits else "dev"
    examples = some_rows(read_examples(task, split), arguments.test_rows, 0)
    return encode_split(examples, split, task, work.labels, work.tokenizer, arguments.max_length)


def broken_promises(work: Search, pool: Encoded) -> dict[str, dict[str, Any]]:
    """By permitted disagreement: of the calibration sets drawn with replacement from a pool, the share whose certified
    threshold disagrees with full depth on more of the pool; and how many that may be."""
    seen = explore(work.model, pool, work.tokenizer, work.options.eval_batch_size, [work.whole])[work.whole]
    labels, rows = work.labels, np.arange(len(pool))
    places = sweep(work.policies, seen.logits, work.model.exit_layers, labels.problem_type).numpy()
    full = answers_of(seen.logits[-1], pool, labels)
    failing = np.stack([answers_of(seen.logits[one, rows], pool, labels) != full for one in places])
    drawn = np.random.default_rng(work.options.seed).integers(0, len(rows), (SETS, len(rows)))
    delta, found = 1 - CONFIDENCE, {}
    for epsilon in EPSILONS:
        if len(rows) < rows_needed(epsilon, CONFIDENCE):
            continue  # what `calibrate` refuses
        settings = [fixed_sequence(failing[:, one].sum(1), len(rows), epsilon, CONFIDENCE) for one in drawn]
        broken = [setting is not None and failing[setting].mean() > epsilon for setting in settings]
        most = delta + 2 * math.sqrt(delta * CONFIDENCE / SETS)
        found[str(epsilon)] = {"rows": len(rows), "broken": float(np.mean(broken)), "at_most": most}
    return found


def on_test(fronts: dict[str, Search], rows: Encoded) -> dict[str, Any]:
    """What the points chosen on dev give on test: the areas, and the joint search's points one by one."""
    joint, tested = fronts["joint"], {}
    for axes, work in fronts.items():
        options = replace(work.options, split="test", by_row=axes == "lengths")
        tested[axes] = operating_points(replace(work, options=options), rows, "")
    choosing = rows_against_search(tested["lengths"])
    tested["lengths"] = without_rows(tested["lengths"])
    full = tested["joint"].at("full").flops or 0.0
    points = [
        {
            "name": one.name,
            "lengths": one.length_config,
            "speedup": full / (one.flops or 1.0),
            "padded_share_of_full_length": padded_share(joint, one.length_config),
            "mean_exit_layer": one.mean_exit_layer,
            "test": one.quality,
        }
        for one in tested["joint"].points
    ]
    areas = {axes: area_of(found) for axes, found in tested.items()}
    areas["constant ratio"] = area_of_curve(curve(joint, rows, CURVE))
    return {
        "test_rows": len(rows),
        "area_test": areas,
        "points": points,
        "pairs_in_the_order_of_dev": kept_order(joint, tested["joint"]),
        "rows_choose_their_lengths": choosing,
    }


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is reported."""
    output, fronts, areas, histories = Path(arguments.output), {}, {}, {}
    common = {"model": arguments.checkpoint, "task": arguments.task, "max_length": arguments.max_length}
    common |= {"rows": arguments.rows, "iterations": arguments.iterations, "resume": True}
    runs = {
        axes: SearchOptions(**common, axes=axes, output=str(output.with_suffix(f".{axes}")))
        for axes in ("joint", "lengths", "exits")
    }
    if arguments.workers == 1:
        spent = list(map(timed, runs.values()))
    else:
        with ProcessPoolExecutor(arguments.workers, multiprocessing.get_context("spawn")) as pool:
            spent = list(pool.map(timed, runs.values()))
    times = dict(zip(runs, spent, strict=True))
    for axes, options in runs.items():
        fronts[axes], histories[axes] = searched(options)  # from its journal
        areas[axes] = fronts[axes].area()
    joint, (seconds, naive) = fronts["joint"], times["joint"]
    configurations = len(joint.found)
    constant = curve(joint, joint.encoded, 1)
    areas["constant ratio"] = area_of_curve(constant)
    lines = {axes: as_line(work.front()) for axes, work in fronts.items()} | {"constant ratio": as_line(constant)}
    result: dict[str, Any] = {
        "checkpoint": checkpoint_hash(arguments.checkpoint),
        "machine": machine(1),
        "commit": commit(),
        "task": arguments.task,
        "rows": len(joint.encoded),
        "iterations": arguments.iterations,
        "halving": joint.options.halving,
        "area_dev": areas,
        "area_by_iteration": {axes: [one["area"] for one in history] for axes, history in histories.items()},
        "mflops_and_quality_dev": lines,
        "cpu_seconds": seconds,
        "configurations_on_all_rows": sum(bool(joint.measured(one)) for one in joint.found),
        "configurations": configurations,
        "candidates": configurations * len(joint.policies),
        "naive_cpu_seconds_a_candidate": naive,
        "configurations_per_cpu_second": {"searched": configurations / seconds, "naive": 1 / naive},
        "share_of_naive_per_configuration": seconds / (naive * configurations),
        "share_of_naive_per_candidate": seconds / (naive * configurations * len(joint.policies)),
        "cpu_seconds_of_the_searches": {axes: searching for axes, (searching, _) in times.items()},
    }
    rows = held_out(arguments, joint)
    if "test" in chosen_task(joint.options).splits:
        result |= on_test(fronts, rows)
    if joint.labels.problem_type == "single_label_classification":
        result["calibration"] = broken_promises(joint, rows)
    if arguments.exported:
        result["latency_against_flops"] = latency_against_flops(fronts["lengths"], Path(arguments.exported))
    result["bars"] = bars(result)
    return result


def plot(result: dict[str, Any], image: Path) -> None:
    """The fronts on dev, the area under them by iteration, and latency against FLOPs where it was measured."""
    latency = result.get("latency_against_flops", {})
    with panels(image, 3 if latency else 2, size=(5.5, 4.5)) as axes:
        for name, line in result["mflops_and_quality_dev"].items():
            axes[0, 0].plot(*zip(*line, strict=True), ".-", label=name)
        axes[0, 0].set(xlabel="MFLOPs a row", ylabel="quality", title=f"{result['task']}: dev, {result['rows']} rows")
        for name, found in result["area_by_iteration"].items():
            axes[0, 1].plot(found, ".-", label=name)
        axes[0, 1].axhline(result["area_dev"]["constant ratio"], color="grey", linestyle=":", label="constant ratio")
        axes[0, 1].set(xlabel="iteration", ylabel="area under the front", title="figure 4 of Kim and Cho (2021)")
        for batch, found in latency.items():
            known = found["correlation"]
            label = f"batch {batch}" + ("" if known is None else f", r = {known:.3f}")
            axes[0, 2].plot(*zip(*sorted(found["mflops_and_ms"]), strict=True), "o-", markersize=3, label=label)
        if latency:
            axes[0, 2].set(xlabel="MFLOPs a row", ylabel="ms a row, one thread, full depth", title="figure 3")


def bars(result: dict[str, Any]) -> dict[str, bool]:
    """What is asked of a search, and whether it is so here."""
    areas = [result[name] for name in ("area_dev", "area_test") if name in result]
    return {
        "lengths above the constant ratio": all(one["lengths"] > one["constant ratio"] for one in areas),
        "joint above lengths and exits": all(one["joint"] > max(one["lengths"], one["exits"]) for one in areas),
        "at most a tenth of naive, per configuration": result["share_of_naive_per_configuration"] <= 0.1,
        "at most a tenth of naive, per candidate": result["share_of_naive_per_candidate"] <= 0.1,
        "calibration keeps its promise": all(
            one["broken"] <= one["at_most"] for one in result.get("calibration", {}).values()
        ),
    }


def main() -> None:
    """Run, print and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--task", required=True)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--test-rows", type=int, default=None)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--workers", type=int, default=2, help="searches side by side, a thread each")
    parser.add_argument("--exported", help="an export of the checkpoint, for latency against FLOPs")
    parser.add_argument("--output", required=True, help="JSON file; the searches' folders lie beside it")
    arguments = parser.parse_args()
    result = benchmark(arguments)
    write_json(Path(arguments.output), result)
    plot(result, Path(arguments.output).with_suffix(".png"))
    print(json.dumps({name: one for name, one in result.items() if name != "mflops_and_quality_dev"}, indent=1))


if __name__ == "__main__":
    sys.exit(run(main))
