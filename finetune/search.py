"""`python -m finetune search`: search lengths and exits together, keep the best of every cost with the checkpoint."""

import itertools
import json
import os
import random
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from elastic_model.arguments import check_at_least
from elastic_model.checks import policy_kind
from elastic_model.cost import exit_flops, mean_flops
from elastic_model.distributed import working_together_in
from elastic_model.exit_policies import sweep
from elastic_model.folders import LOCK, MARKER, check_replaceable, check_writable, empty_folder, write_json
from elastic_model.operating_points import FILE, FULL, OperatingPoint, OperatingPoints, checkpoint_hash
from elastic_model.provenance import file_hash
from elastic_model.session import ElasticSession
from finetune.by_row import FIT_ROWS, by_row, explore_by_row, fit_share
from finetune.candidates import Lengths, shares
from finetune.config import SearchOptions
from finetune.data import Encoded
from finetune.evaluate import check_learned, score_of, table
from finetune.evolution import JOURNAL, Found, Search, evolve
from finetune.examples import Examples, read_examples
from finetune.explore import Observed
from finetune.figures import plot_areas, plot_front, plot_points
from finetune.kinds import answers_of
from finetune.labels import Labels
from finetune.latency import Latency, Served, measure_latency
from finetune.policies import CANDIDATES, at_one_exit, candidates, never, patience_of, policy_name, thresholds
from finetune.prepare import (
    chosen_task,
    encode_split,
    labels_of_model,
    load_classifier,
    load_tokenizer,
    rows_hash,
    some_rows,
)
from finetune.tasks import Task

RESULT = "search.json"
LIKE_FULL = 1e-9  # qualities this close are equal
FEWEST = 16  # rows on a rung
SPEEDUP = "speedup-"  # begins the name of a point that stands for its cost
BY_ROW = "-by-row"  # ends the name of a point whose rows choose their own lengths


def two_points(search: Search) -> dict[str, Found]:
    """What Kim and Cho (2021) report of a front: the best quality, and the lowest cost at no loss against full."""
    front, full = search.front(), search.full()
    lossless = next((one for one in front if one.quality >= full.quality - LIKE_FULL), full)
    return {"best": front[-1], "lossless": lossless}


def chosen(search: Search) -> dict[str, Found]:
    """Named candidates of the front: full, the best quality, the cheapest at no loss, and others spread over cost."""
    front, full = search.front(), search.full()
    named = {"full": full, **two_points(search)}
    count = max(2, search.options.points - len(named))
    costs = np.log([one.cost for one in front])
    for target in np.linspace(costs[0], costs[-1], count):
        one = front[int(np.abs(costs - target).argmin())]
        named.setdefault(f"{SPEEDUP}{full.cost / one.cost:.2f}", one)
    unique: dict[tuple[Lengths, int], str] = {}
    for name, one in named.items():
        unique.setdefault((one.lengths, one.setting), name)
    return {name: named[name] for name in unique.values()}


def by_lengths(named: tuple[str, Found]) -> Lengths:
    """The lengths of a named candidate."""
    return named[1].lengths


def operating_points(search: Search, encoded: Encoded, weights: str) -> OperatingPoints:
    """The chosen candidates measured on all rows of the split, with `by_row` as points of such rows too."""
    named, served = chosen(search), search.served
    config, options = search.model.config, search.options
    points: list[OperatingPoint] = []
    known: dict[float, float] = {}  # of `fit_share`
    # one configuration at a time: what every exit says of every token of a whole split takes gigabytes
    for steps, some in itertools.groupby(sorted(named.items(), key=by_lengths), key=by_lengths):
        group, lengths = list(some), shares(steps)
        seen = search.explore(encoded, [steps])[steps]
        flops = exit_flops(config, encoded.lengths, lengths, encoded.head)
        padded = exit_flops(config, [options.max_length], lengths, encoded.head).double().numpy()[:, 0]
        for name, one in group:
            point, left = measured_point(search, encoded, name, one.setting, seen, flops)
            latency = None if served is None else served.time(point.thresholds, lengths)
            padded_flops = float(padded[left].mean())
            points.append(replace(point, length_config=lengths, latency_ms=latency, padded_flops=padded_flops))
        if options.by_row and steps != search.whole:
            points += points_by_row(search, encoded, steps, group, known)
    order = [*named, *(f"{name}{BY_ROW}" for name in named)]
    points.sort(key=lambda point: order.index(point.name))
    points = named_as_measured(points)
    policy = search.policies[named.get("lossless", named["full"]).setting]
    return OperatingPoints(weights, policy, points)


def named_as_measured(points: list[OperatingPoint]) -> list[OperatingPoint]:
    """The speed-ups in names are those that were measured, no longer those that chose; in milliseconds where every
    point has them. A point whose rows choose their lengths keeps the name of the one that it stands beside."""

    def cost(point: OperatingPoint) -> float:
        return float(point.latency_ms["value"] if point.latency_ms else point.flops or 0.0)

    full = next(point for point in points if point.name == FULL)
    names: dict[str, str] = {}
    for point in points:
        if point.name.startswith(SPEEDUP) and not point.name.endswith(BY_ROW):
            name = f"{SPEEDUP}{cost(full) / cost(point):.2f}"
            others = [one for one in names.values() if one.partition("#")[0] == name]
            names[point.name] = f"{name}#{len(others) + 1}" if others else name
    found = [(point, point.name.removesuffix(BY_ROW)) for point in points]
    return [replace(point, name=point.name.replace(name, names.get(name, name))) for point, name in found]


def measured_point(
    search: Search, encoded: Encoded, name: str, setting: int, seen: Observed, flops: torch.Tensor
) -> tuple[OperatingPoint, np.ndarray]:
    """What a setting of the exit policy gives on rows whose exits have been seen, without its lengths; and the places
    among the exits that rows leave at. flops (exits, rows): of leaving there."""
    exits, labels, options = search.model.exit_layers, search.labels, search.options
    policy = search.policies[setting]
    (left,) = sweep([policy], seen.logits, exits, labels.problem_type, encoded.mask, seen.uncertainty).numpy()
    rows = np.arange(len(left))
    answers = answers_of(seen.logits[left, rows], encoded, labels)
    point = OperatingPoint(
        name,
        thresholds(policy["name"], policy, len(exits), labels.problem_type),
        float(np.array(exits)[left].mean()),
        flops=float(flops.double().numpy()[left, rows].mean()),
        quality={**asdict(score_of(answers, encoded, labels, options.seed)), "split": options.split},
    )
    return point, left


def points_by_row(
    search: Search, encoded: Encoded, steps: Lengths, group: list[tuple[str, Found]], known: dict[float, float]
) -> list[OperatingPoint]:
    """Beside each named candidate of lengths that drop tokens, what rows give that choose their own, at its cost.
    known: of `fit_share`."""
    how = (search.model, search.encoded, search.tokenizer, search.options.eval_batch_size)
    cost = mean_flops(search.model.config, search.encoded.lengths[:FIT_ROWS], None, shares(steps), encoded.head)
    lengths = by_row(search.model, fit_share(*how, cost, known))
    observed, kept = explore_by_row(search.model, encoded, search.tokenizer, how[-1], lengths)
    flops = exit_flops(search.model.config, encoded.lengths, head=encoded.head, kept=kept)
    points = []
    for name, one in group:
        point, _ = measured_point(search, encoded, f"{name}{BY_ROW}", one.setting, observed, flops)
        latency = None if search.served is None else search.served.time(point.thresholds, lengths)
        points.append(replace(point, length_config=lengths, latency_ms=latency))
    return points


def guaranteed(folder: Path, points: OperatingPoints) -> list[OperatingPoint]:
    """The points there are that `calibrate` gave a guarantee: a search does not know better. Their costs are brought
    to those of `points`: of full depth they cost the share that they did.
    """
    known = OperatingPoints.find(folder)
    found = [one for one in known.points if one.calibration] if known is not None else []
    if known is None or not found:
        return []
    if policy_kind(known.policy) != policy_kind(points.policy):
        print(f"{folder / FILE}: its calibrated point is of the policy {known.policy['name']!r}, and left out")
        return []
    before, now = known.full(), points.full().flops
    whole = before.flops if before not in found else None
    return [replace(one, flops=one.flops * now / whole if one.flops and now and whole else None) for one in found]


def ladder(
    some: Examples, task: Task, labels: Labels, tokenizer: PreTrainedTokenizerBase, options: SearchOptions
) -> list[Encoded]:
    """The rows encoded, each rung `halving` times as many as the one before; the last holds all."""
    how = (options.split, task, labels, tokenizer, options.max_length)
    rungs, count = [encode_split(some, *how)], len(some) // max(options.halving, 2)
    while options.halving > 1 and count >= FEWEST:
        try:
            rungs.insert(0, encode_split(some.select(list(range(count))), *how))
        except ValueError:  # one class only: all were read before
            break
        count //= options.halving
    return rungs


def _check_unread(options: SearchOptions) -> None:
    """ValueError for an option that was given though nothing reads it."""
    defaults = {one.name: one.default for one in fields(options)}
    timing = ("latency_batch", "latency_threads", "latency_rows") if not options.latency else ()
    for name in (*(["precision"] if options.graph else []), *timing):
        if (given := getattr(options, name)) != defaults[name]:
            why = "the exported file computes as it was written" if name == "precision" else "no --latency is given"
            raise ValueError(f"--{name} {given} would do nothing: {why}")


def prepare(options: SearchOptions) -> tuple[Search, Encoded]:
    """What the search works on, read and checked, and all rows of the split."""
    check_at_least(1, options, "rows", "halving", "first", "points", "eval_batch_size")
    check_at_least(1, options, "latency_batch", "latency_threads", "latency_rows")
    check_at_least(0, options, "iterations", "mutations", "crossovers")
    if not 0 <= options.mutation_probability <= 1 or not 0 < options.smallest_ratio < 1:
        raise ValueError(
            "mutation_probability lies from 0 to 1 and smallest_ratio between 0 and 1, got "
            f"{options.mutation_probability} and {options.smallest_ratio}"
        )
    _check_unread(options)
    folder = Path(options.model)
    model, tokenizer, task = load_classifier(folder, options.max_length), load_tokenizer(folder), chosen_task(options)
    if options.by_row and options.axes == "exits":
        raise ValueError("by_row sets lengths that rows choose against searched ones: leave it away with --axes exits")
    if options.by_row and options.graph:
        raise ValueError("--by_row fits lengths to PyTorch's costs: leave it or --graph away")
    labels, examples = labels_of_model(options, task, model.config), read_examples(task, options.split)
    every = encode_split(examples, options.split, task, labels, tokenizer, options.max_length)
    some = some_rows(examples, options.rows, options.seed)
    some = some.select(random.Random(options.seed).sample(range(len(some)), len(some)))  # any first few are a sample
    rungs = ladder(some, task, labels, tokenizer, options)
    encoded = rungs[-1]
    saved = model.config.exit_policy
    if (saved or {}).get("name") not in CANDIDATES and (known := OperatingPoints.find(folder)):
        saved = known.policy  # which an export has, too
    name, patience = policy_name(options.exit_policy, labels.problem_type, saved), patience_of(saved)
    policies = [never(name, len(model.exit_layers), labels.problem_type, patience)]
    check_learned(policies[0], model.config)
    free = ("output", "resume", "model", "points", "by_row", "iterations", "eval_batch_size", "train", "dev", "test")
    settings = {name: value for name, value in vars(options).items() if name not in free}
    settings |= {"checkpoint": checkpoint_hash(folder), "rows_hash": rows_hash(encoded)}
    work = Search(options, model, tokenizer, some, rungs, labels, policies, settings)
    if options.graph is not None:
        if name == "learned":
            raise ValueError("an exported graph does not tell its learned head's uncertainty: leave --graph away")
        work.graph = open_graph(Path(options.graph), work, None)
        settings["graph"] = file_hash(work.graph.file)
    if options.axes != "lengths" and len(model.exit_layers) > 1:
        logits = work.explore(encoded, [work.whole])[work.whole].logits
        policies += candidates(name, logits, labels.problem_type, patience=patience)
        policies += at_one_exit(policies[-1], len(model.exit_layers), labels.problem_type)
    settings["policy"] = policies[0]  # the checkpoint's own, where --exit_policy names none
    return work, every


def open_graph(exported: Path, search: Search, threads: int | None) -> ElasticSession:
    """The session of an exported folder; ValueError where it is not an export of the checkpoint that is searched, or
    cannot do what the search needs."""
    session = ElasticSession.from_pretrained(exported, threads=threads)
    policy = search.policies[0]
    if checkpoint_hash(exported) != search.settings["checkpoint"]:
        raise ValueError(
            f"{exported} is not an export of {search.options.model}: its weights are others; export it again"
        )
    if "length_config" not in session.inputs or policy_kind(session.policy or {}) != policy_kind(policy):
        raise ValueError(
            f"{session.file} must have length_config as an input and an exit policy such as {policy}, it has "
            f"{sorted(session.inputs)} and {session.policy}; search with its policy (--exit_policy), or export the "
            "checkpoint again"
        )
    return session


def load_served(options: SearchOptions, search: Search, folder: Path) -> Served:
    """The exported graph, timed; or, of a search that is resumed, as it was timed when the search began."""
    session = open_graph(Path(str(options.latency)), search, options.latency_threads)
    texts = search.examples.select(list(range(min(options.latency_rows, len(search.examples)))))
    rows = list(zip(texts.texts, texts.pairs, strict=True)) if texts.pairs else texts.texts
    encodings = session.encode(rows)
    for one in encodings:  # timed as they are measured; the file itself reads up to its own length
        one.truncate(options.max_length)
    begun = folder / JOURNAL
    if options.resume and begun.is_file():
        known = json.loads(begun.read_text(encoding="utf-8").splitlines()[0]).get("measured")
        if known:
            return Served(session, encodings, Latency(**known))
    head, batch = search.encoded.head, options.latency_batch
    return Served(session, encodings, measure_latency(session, search.model.config, encodings, batch, head))


def result_of(search: Search, history: list[dict[str, Any]], points: OperatingPoints) -> dict[str, Any]:
    """The search as JSON: areas by iteration, the front, the constant-ratio curve, the points."""
    curve = [max(search.measured(one), key=lambda found: found.cost) for one in search.generations[0]]
    return {
        "metric": search.labels.metrics[0],
        "rows": len(search.encoded),
        "settings_of_the_exit_policy": len(search.policies),
        "iterations": history,
        "cost": "FLOPs of a row, on its real tokens" if search.served is None else "milliseconds of a batch",
        "latency": search.settings.get("measured"),
        "full": asdict(search.full()),
        "front": [{**asdict(one), "policy": search.policies[one.setting]} for one in search.front()],
        **{name: {**asdict(one), "policy": search.policies[one.setting]} for name, one in two_points(search).items()},
        "constant_ratio": [asdict(one) for one in curve],
        "points": [asdict(point) for point in points.points],
    }


def write(search: Search, folder: Path, history: list[dict[str, Any]], points: OperatingPoints) -> None:
    """The points beside the weights; the curves and figures in the folder of the search."""
    result = result_of(search, history, points)
    write_json(folder / RESULT, result)
    plot_areas(folder / "area.png", [one["area"] for one in history])
    lines = {name: [(one["cost"], one["quality"]) for one in result[name]] for name in ("constant_ratio", "front")}
    plot_front(folder / "front.png", lines, result["full"]["cost"], result["metric"])
    plot_points(folder / "points.png", points)
    for place in served_places(search.options):  # a guarantee is of what was calibrated there: PyTorch or the file
        kept = points.points + guaranteed(Path(place), points)
        replace(points, points=kept).save(Path(place))


def served_places(options: SearchOptions) -> list[str]:
    """The folders that get the points: the checkpoint's, and those of exported files that were searched or timed."""
    return list(dict.fromkeys(filter(None, (options.model, options.latency, options.graph))))


def show_two_points(search: Search) -> str:
    """The paper's two points as a table, on the rows that were searched on; speed-ups against full."""
    full = search.full()
    rows = [
        [
            {"best": "best quality", "lossless": "lowest cost at no loss"}.get(name, name),
            f"{one.quality:.4f}",
            f"{full.flops / one.flops:.2f}",
            f"{full.padded_flops / one.padded_flops:.2f}",
            f"{one.mean_exit_layer:.2f}",
        ]
        for name, one in {"full": full, **two_points(search)}.items()
    ]
    return table(["of the front", "quality", "fewer FLOPs", "padded to the maximum", "mean exit layer"], rows)


def lengths_text(lengths: list[float] | dict[str, list[float]] | None) -> str:
    """Shares in a line; of rows that choose themselves, the mass that each layer covers."""
    if isinstance(lengths, dict):
        return "mass " + lengths_text(lengths["mass"])
    return " ".join(f"{share:.4g}" for share in lengths or [])


def show(points: OperatingPoints) -> str:
    """The operating points as a table."""
    full = points.at("full").flops or 1.0
    rows = [
        [
            one.name,
            f"{full / (one.flops or full):.2f}",
            f"{(one.flops or 0) / 1e6:.4g}",
            f"{one.mean_exit_layer:.2f}",
            f"{(one.quality or {})['value']:.4f} ({(one.quality or {})['low']:.4f}-{(one.quality or {})['high']:.4f})",
            lengths_text(one.length_config),
        ]
        for one in points.points
    ]
    return table(["point", "speed-up", "MFLOPs a row", "mean exit layer", "quality (95 % interval)", "lengths"], rows)


def start_processes() -> Accelerator:
    """The accelerator; ValueError where a launcher started several processes that would each search alone."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    on_cpus = launched > 1 and not torch.cuda.is_available()
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if on_cpus else [])
    if accelerator.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched, but accelerate runs {accelerator.num_processes}; "
            "on CPUs set ACCELERATE_USE_CPU=true"
        )
    return accelerator


def search(options: SearchOptions) -> None:
    """Search, measure the points of the front on the whole split, keep them with the checkpoint."""
    folder = Path(options.output or f"{options.model.rstrip('/')}.search")
    check_replaceable(folder, *options.sources, options.latency, options.graph)
    if (
        folder.is_dir()
        and {one.name for one in folder.iterdir()} - {MARKER, LOCK}
        and not (folder / JOURNAL).is_file()
    ):
        raise ValueError(f"output {folder} holds what is not a search; choose another output")
    accelerator = start_processes()
    work, every = prepare(options)
    check_writable(Path(options.model))
    work.model.to(accelerator.device)
    if options.latency is not None:
        work.served = load_served(options, work, folder)
        (work.served.latency,) = broadcast_object_list([work.served.latency])  # one for all processes
        work.settings["measured"] = asdict(work.served.latency)
        accelerator.print(f"latency: {work.served.latency}")
    with working_together_in(folder, accelerator):
        if accelerator.is_main_process and not options.resume:
            empty_folder(folder)
        accelerator.wait_for_everyone()
        history, hidden = [], None if accelerator.is_main_process else True  # None: hidden where there is no terminal
        for one in tqdm(evolve(work, folder, accelerator), unit="generation", disable=hidden):
            history.append(one)
            accelerator.print(
                f"iteration {one['iteration']}: {one['configurations']} configurations, {one['on_all_rows']} on all "
                f"rows, {one['front']} candidates on the front, area {one['area']:.5f}, {one['seconds']:.1f} CPU s"
            )
        if accelerator.is_main_process:
            points = operating_points(work, every, checkpoint_hash(options.model))
            write(work, folder, history, points)
    if accelerator.is_main_process:
        print("", f"on the {len(work.examples)} rows searched:", show_two_points(work), sep="\n")
        print("", f"measured on all {len(every)} rows of {options.split}:", show(points), sep="\n")
        places = ", ".join(str(Path(place) / FILE) for place in served_places(options))
        print(f"\nwritten to {places}; curves and figures in {folder}")
