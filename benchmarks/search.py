"""What a search finds and what it costs: `python -m benchmarks.search CHECKPOINT --task sst2 --output FILE.json`.

Joint against lengths alone, exits alone and the constant-ratio curve, by area under the front on dev and, for the
points chosen there, on test; CPU time of a configuration against evaluating it naively; with --exported, latency
against FLOPs. What is begun continues: the journals lie beside the output.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from elastic_model.arguments import run
from elastic_model.cost import exit_flops
from elastic_model.folders import claim_folder, new_file
from elastic_model.front import area_under_front
from elastic_model.operating_points import OperatingPoints, checkpoint_hash
from elastic_model.session import ElasticSession
from finetune.candidates import STEPS, initial, shares
from finetune.config import SearchOptions
from finetune.data import collate, inputs_of
from finetune.examples import read_examples
from finetune.explore import explore
from finetune.latency import time_batches
from finetune.prepare import chosen_task, encode_split, some_rows
from finetune.search import Search, evolve, measure, operating_points, prepare

NAIVE_BATCH = 32  # rows, in the order of the file, padded to the longest
SAMPLED = 6  # configurations that are evaluated naively
CURVE = 60  # constant-ratio configurations
BATCHES = (1, 4, 16, 64)  # figure 3 of Kim and Cho (2021)


def searched(options: SearchOptions) -> tuple[Search, list[dict[str, Any]]]:
    """A search from its journal on, to its end; the checkpoint's own operating points are left alone."""
    work, _ = prepare(options)
    folder, history = claim_folder(Path(str(options.output))), []
    for one in evolve(work, folder, Accelerator()):
        history.append(one)
        print(f"{options.axes}: {one}", flush=True)
    return work, history


@torch.inference_mode()
def naive_seconds(work: Search, options: SearchOptions) -> float:
    """CPU seconds of one candidate where each is a full forward pass of its own, float32, rows in their order."""
    drawn = random.Random(options.seed).sample([one for group in work.generations for one in group], SAMPLED)
    rows = range(len(work.encoded))
    spent = []
    for lengths in drawn:
        began = time.process_time()
        for start in range(0, len(rows), NAIVE_BATCH):
            batch = collate(work.encoded, list(rows[start : start + NAIVE_BATCH]), work.tokenizer, torch.device("cpu"))
            work.model(**inputs_of(batch), length_config=shares(lengths), exit_policy={"name": "never"})
        spent.append(time.process_time() - began)
    return float(np.mean(spent))


def curve(work: Search) -> float:
    """The area under the constant-ratio curve."""
    config, head, tokens = work.model.config, work.encoded.head, work.encoded.lengths

    def cost(lengths: tuple[int, ...]) -> float:
        return exit_flops(config, tokens, shares(lengths), head)[-1].double().mean().item()

    lengths = initial(work.layers, CURVE, work.options.smallest_ratio, cost)
    seen = explore(work.model, work.encoded, work.tokenizer, work.options.eval_batch_size, lengths)
    alone = replace(work, policies=work.policies[:1])
    points = [measure(alone, one, observed, work.encoded)[0] for one, observed in seen.items()]
    return area_under_front([one.cost for one in points], [one.quality for one in points], work.full().cost)


def area_of(points: OperatingPoints) -> float:
    """The area under what was measured of some points, on whatever rows."""
    flops = [one.flops or 0.0 for one in points.points]
    return area_under_front(
        flops, [(one.quality or {})["value"] for one in points.points], points.at("full").flops or 1
    )


def padded_share(work: Search, lengths: list[float] | None) -> float:
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
    found: dict[str, Any] = {}
    for batch in BATCHES:
        points = []
        for one in lengths:
            flops = exit_flops(work.model.config, tokens, shares(one), work.encoded.head)[-1].double().mean().item()
            spent = time_batches(session, rows, batch, shares(one), thresholds=session.never)
            points.append((flops / 1e6, float(spent.sum()) / len(rows)))
        correlation = float(np.corrcoef(np.array(points).T)[0, 1]) if len(points) > 2 else None
        found[str(batch)] = {"mflops_and_ms": points, "correlation": correlation}
    return found


def on_test(arguments: argparse.Namespace, fronts: dict[str, Search]) -> dict[str, Any]:
    """What the points chosen on dev give on test: the areas, and the joint search's points one by one."""
    joint = fronts["joint"]
    task = chosen_task(joint.options)
    examples = some_rows(read_examples(task, "test"), arguments.test_rows, 0)
    rows = encode_split(examples, "test", task, joint.labels, joint.tokenizer, arguments.max_length)
    tested = {
        axes: operating_points(replace(work, options=replace(work.options, split="test")), rows, "")
        for axes, work in fronts.items()
    }
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
    return {"test_rows": len(rows), "area_test": areas, "points": points}


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that is reported."""
    output, fronts, areas = Path(arguments.output), {}, {}
    common = {"model": arguments.checkpoint, "task": arguments.task, "max_length": arguments.max_length}
    common |= {"rows": arguments.rows, "iterations": arguments.iterations, "resume": True}
    for axes in ("joint", "lengths", "exits"):
        options = SearchOptions(**common, axes=axes, output=str(output.with_suffix(f".{axes}")))
        fronts[axes], history = searched(options)
        areas[axes] = fronts[axes].area()
        if axes == "joint":
            joint, seconds = fronts[axes], sum(one["seconds"] for one in history)
    configurations, naive = len(joint.found), naive_seconds(joint, joint.options)
    areas["constant ratio"] = curve(joint)
    result: dict[str, Any] = {
        "checkpoint": checkpoint_hash(arguments.checkpoint),
        "task": arguments.task,
        "rows": len(joint.encoded),
        "iterations": arguments.iterations,
        "threads": torch.get_num_threads(),
        "area_dev": areas,
        "cpu_seconds": seconds,
        "configurations_on_all_rows": sum(bool(joint.measured(one)) for one in joint.found),
        "configurations": configurations,
        "candidates": configurations * len(joint.policies),
        "naive_cpu_seconds_a_candidate": naive,
        "share_of_naive_per_configuration": seconds / (naive * configurations),
        "share_of_naive_per_candidate": seconds / (naive * configurations * len(joint.policies)),
    }
    if "test" in chosen_task(joint.options).splits:
        result |= on_test(arguments, fronts)
    if arguments.exported:
        result["latency_against_flops"] = latency_against_flops(fronts["lengths"], Path(arguments.exported))
    return result


def main() -> None:
    """Run, print and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--task", required=True)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--test-rows", type=int, default=None)
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--exported", help="an export of the checkpoint, for latency against FLOPs")
    parser.add_argument("--output", required=True, help="JSON file; the searches' folders lie beside it")
    arguments = parser.parse_args()
    result = benchmark(arguments)
    with new_file(Path(arguments.output)) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(run(main))
