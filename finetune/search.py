"""`python -m finetune search`: the evolutionary search of Kim and Cho (2021), section 3.3, over lengths and exits.

The first generation are constant-ratio length configurations; each further one mutations and crossovers of the front
of quality against cost. A configuration is passed through the model once; from the logits of its exits every setting
of the exit policy is evaluated, so that a configuration brings as many candidates as there are settings.
"""

import hashlib
import json
import math
import os
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, logging

from elastic_model.checks import LengthConfig
from elastic_model.cost import exit_flops
from elastic_model.exit_policies import sweep
from elastic_model.folders import check_output, claim_folder, is_ours, new_file
from elastic_model.front import area_under_front, pareto_front
from elastic_model.modeling_elasticbert import ElasticBertExitModel
from elastic_model.operating_points import FILE, OperatingPoint, OperatingPoints, checkpoint_hash
from elastic_model.session import ElasticSession
from finetune.by_row import FIT_ROWS, by_row, explore_by_row, fit_share
from finetune.candidates import STEPS, Lengths, initial, offspring, shares
from finetune.config import SearchOptions
from finetune.data import Encoded
from finetune.evaluate import check_learned, score_of, table
from finetune.examples import Examples, read_examples
from finetune.explore import Observed, explore, explore_graph
from finetune.figures import plot_areas, plot_front, plot_points
from finetune.kinds import answers_of
from finetune.labels import Labels
from finetune.latency import Latency, latency_of_point, measure_latency
from finetune.metrics import metric
from finetune.policies import Policy, candidates, never, policy_name, thresholds
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

JOURNAL = "journal.jsonl"
RESULT = "search.json"
LIKE_FULL = 1e-9  # qualities this close are equal
FEWEST = 16  # rows on a rung


@dataclass(frozen=True)
class Found:
    """A candidate that no setting of its configuration beats: `setting` is a place among the policies tried."""

    lengths: Lengths
    setting: int
    quality: float
    cost: float
    flops: float
    padded_flops: float
    mean_exit_layer: float

    @staticmethod
    def area(found: "list[Found]", full: float) -> float:
        """Mean quality over all budgets up to the cost `full`."""
        return area_under_front([one.cost for one in found], [one.quality for one in found], full)


@dataclass
class Served:
    """The exported graph whose latency is the cost: its session, the rows that are timed, and what they showed."""

    session: ElasticSession
    encodings: list[Any]
    latency: Latency

    def time(self, limits: list[float], lengths: LengthConfig) -> dict[str, Any]:
        """What an operating point records of these thresholds and shares."""
        return latency_of_point(self.session, self.encodings, self.latency.batch, limits, lengths)


@dataclass
class Search:
    """What a search works on, and what it has found.

    rungs: ever more of the rows, the last all of them. generations: configurations in the order they were tried;
    found: of each the candidates on every rung that it has reached; only what was measured on all rows counts.
    """

    options: SearchOptions
    model: ElasticBertExitModel
    tokenizer: PreTrainedTokenizerBase
    examples: Examples
    rungs: list[Encoded]
    labels: Labels
    policies: list[Policy]
    settings: dict[str, Any]
    graph: ElasticSession | None = None
    served: "Served | None" = None
    generations: list[list[Lengths]] = field(default_factory=list)
    found: dict[Lengths, list[list[Found]]] = field(default_factory=dict)
    seconds: dict[Lengths, float] = field(default_factory=dict)

    @property
    def encoded(self) -> Encoded:
        """All rows that are searched on."""
        return self.rungs[-1]

    @property
    def layers(self) -> int:
        """How many layers the model has."""
        return int(self.model.config.num_hidden_layers)

    @property
    def whole(self) -> Lengths:
        """The configuration that keeps every token."""
        return (STEPS,) * self.layers

    def explore(self, encoded: Encoded, lengths: list[Lengths], some: range | None = None) -> dict[Lengths, Observed]:
        """What every exit says of rows under each of the configurations, of the graph where there is one."""
        batch = self.options.eval_batch_size
        if self.graph is not None:
            return explore_graph(self.graph, encoded, batch, lengths, some)
        return explore(self.model, encoded, self.tokenizer, batch, lengths, some)

    def candidates(self) -> list[Found]:
        """Every candidate measured on all rows, in the order it was."""
        return [one for generation in self.generations for lengths in generation for one in self.measured(lengths)]

    def measured(self, lengths: Lengths) -> list[Found]:
        """The candidates of a configuration on all rows; none where it did not get there."""
        return self.found[lengths][-1] if len(self.found[lengths]) == len(self.rungs) else []

    def full(self, rung: int = -1) -> Found:
        """Full length and full depth."""
        return max(self.found[self.whole][rung], key=lambda one: one.cost)

    def front(self) -> list[Found]:
        """What nothing found beats, the cheapest first."""
        every = self.candidates()
        return [every[place] for place in pareto_front([one.cost for one in every], [one.quality for one in every])]

    def area(self) -> float:
        """Mean quality over all budgets up to the full cost."""
        return Found.area(self.candidates(), self.full().cost)

    def promising(self, generation: list[Lengths], rung: int) -> set[Lengths]:
        """The 1/`halving` of a generation that adds most area to the front on the rows of a rung."""
        parents = dict.fromkeys(one.lengths for one in self.front())
        known = [one for lengths in parents for one in self.found[lengths][rung]]
        full = self.full(rung).cost
        here = [lengths for lengths in generation if len(self.found[lengths]) > rung]
        areas = {lengths: Found.area(known + self.found[lengths][rung], full) for lengths in here}
        ranked = sorted(here, key=lambda lengths: (-areas[lengths], lengths))
        return set(ranked[: math.ceil(len(here) / self.options.halving)])


def measure(search: Search, lengths: Lengths, observed: Observed, encoded: Encoded) -> list[Found]:
    """The candidates of a configuration that its others do not beat, from what the exits said of the rows."""
    config, labels, score = search.model.config, search.labels, metric(search.labels.metrics[0])
    exits, mask, logits = search.model.exit_layers, encoded.mask, observed.logits
    if mask is not None:
        logits = logits[:, :, : mask.shape[1]]  # as long as the longest of these rows
    places = sweep(search.policies, logits, exits, labels.problem_type, mask, observed.uncertainty)
    costs = exit_flops(config, encoded.lengths, shares(lengths), encoded.head).double().numpy()
    padded = exit_flops(config, [search.options.max_length], shares(lengths), encoded.head).double().numpy()[:, 0]
    rows, layers, seen, tried = np.arange(costs.shape[1]), np.array(exits), set(), []
    for setting, left in enumerate(places.numpy()):
        if left.tobytes() in seen:  # of equal settings the strictest
            continue
        seen.add(left.tobytes())
        answers = answers_of(logits[left, rows], encoded, labels)
        flops = float(costs[left, rows].mean())
        quality = float(score(answers, encoded.labels))
        means = float(padded[left].mean()), float(layers[left].mean())
        cost = flops if search.served is None else search.served.latency.of_rows(layers[left], costs[left, rows])
        tried.append(Found(lengths, setting, quality, cost, flops, *means))
    kept = pareto_front([one.cost for one in tried], [one.quality for one in tried])
    return [one for place, one in enumerate(tried) if place in kept or not place]  # and full depth, where it stands


def evaluate(search: Search, generation: list[Lengths], accelerator: Accelerator) -> None:
    """Pass what is new in a generation through the model, by successive halving (Jamieson and Talwalkar 2016).

    All see the first rung's rows, the most promising the next one's, and so on; the first generation goes all the way.
    Each process takes neighbours, which share most.
    """
    began, count = time.process_time(), accelerator.num_processes
    new = sorted(one for one in generation if one not in search.found)
    start, stop = (len(new) * (accelerator.process_index + one) // count for one in (0, 1))
    observed: dict[Lengths, Observed] = {}
    device = accelerator.device.type
    going, done = new[start:stop], 0
    for rung, encoded in enumerate(search.rungs):
        with torch.autocast(device, torch.bfloat16, enabled=search.options.precision == "bf16"):
            more = search.explore(search.encoded, going, range(done, len(encoded)))
        observed = {one: observed[one].followed_by(more[one]) if rung else more[one] for one in going}
        for one, found in gather_object([(one, measure(search, one, observed[one], encoded)) for one in going]):
            search.found.setdefault(one, []).append(found)
        done = len(encoded)
        if search.generations and rung + 1 < len(search.rungs):
            kept = search.promising(generation, rung)
            going = [one for one in going if one in kept]
    spent = sum(gather_object([time.process_time() - began]))
    search.seconds |= dict.fromkeys(new, spent / max(len(new), 1))


def first_generation(search: Search) -> list[Lengths]:
    """Constant-ratio configurations; of a search over exits alone, full length."""
    if search.options.axes == "exits":
        return [search.whole]
    config, head, tokens = search.model.config, search.encoded.head, search.encoded.lengths

    def cost(lengths: Lengths) -> float:
        return exit_flops(config, tokens, shares(lengths), head)[-1].double().mean().item()

    return initial(search.layers, search.options.first, search.options.smallest_ratio, cost)


def next_generation(search: Search, number: int) -> list[Lengths]:
    """Children of the front: a function of the seed, the generation's number and what was found before it."""
    options, draw = search.options, random.Random(f"{search.options.seed} {number}")
    parents = list(dict.fromkeys(one.lengths for one in search.front()))
    known = {lengths for generation in search.generations for lengths in generation}
    return offspring(parents, known, options.mutations, options.crossovers, options.mutation_probability, draw)


def read_journal(folder: Path, settings: dict[str, Any]) -> dict[Lengths, tuple[list[list[Found]], float]]:
    """What a search found before it was killed, and the CPU seconds of each configuration.

    A line cut short is left out. ValueError for other settings.
    """
    file = folder / JOURNAL
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    found: dict[Lengths, tuple[list[list[Found]], float]] = {}
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines) - 1:
                break
            raise ValueError(f"{file}, line {number + 1}: damaged; search anew without --resume") from None
        if not number:
            other = [name for name in settings if record.get(name) != settings[name]]
            if other:
                raise ValueError(
                    f"{folder} holds a search with {other[0]} = {record.get(other[0])!r}, not {settings[other[0]]!r}; "
                    "resume it with its own settings, or search anew without --resume"
                )
            continue
        lengths = tuple(record["lengths"])
        rungs = [[Found(**{**one, "lengths": lengths}) for one in rung] for rung in record["rungs"]]
        found[lengths] = rungs, record["seconds"]
    return found


def add_to_journal(folder: Path, records: list[dict[str, Any]]) -> None:
    """Add lines; they are on the disk when it returns."""
    with (folder / JOURNAL).open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(record) + "\n" for record in records)
        lines.flush()
        os.fsync(lines.fileno())


def record_of(search: Search, lengths: Lengths) -> dict[str, Any]:
    """A configuration with its candidates on every rung, as the journal holds it."""
    rungs = [[asdict(one) for one in rung] for rung in search.found[lengths]]
    return {"lengths": list(lengths), "seconds": search.seconds[lengths], "rungs": rungs}


def evolve(search: Search, folder: Path, accelerator: Accelerator) -> Iterator[dict[str, Any]]:
    """Generation after generation; yields what each gave. What the journal holds is not computed again."""
    known = read_journal(folder, search.settings) if search.options.resume else {}
    search.found |= {one: found for one, (found, _) in known.items()}
    search.seconds |= {one: seconds for one, (_, seconds) in known.items()}
    if accelerator.is_main_process:  # whole lines only, the settings first
        records = [search.settings, *(record_of(search, one) for one in known)]
        with new_file(folder / JOURNAL) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    accelerator.wait_for_everyone()
    last = 0 if search.options.axes == "exits" else search.options.iterations
    for number in range(last + 1):
        lengths = next_generation(search, number) if number else first_generation(search)
        evaluate(search, lengths, accelerator)
        search.generations.append(lengths)
        if accelerator.is_main_process:
            add_to_journal(folder, [record_of(search, one) for one in lengths if one not in known])
        yield {
            "iteration": number,
            "configurations": sum(map(len, search.generations)),
            "on_all_rows": sum(bool(search.measured(one)) for group in search.generations for one in group),
            "area": search.area(),
            "front": len(search.front()),
            "seconds": sum(search.seconds[one] for one in lengths),
        }


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
        named.setdefault(f"speedup-{full.cost / one.cost:.2f}", one)
    unique: dict[tuple[Lengths, int], str] = {}
    for name, one in named.items():
        unique.setdefault((one.lengths, one.setting), name)
    return {name: named[name] for name in unique.values()}


def operating_points(search: Search, encoded: Encoded, weights: str) -> OperatingPoints:
    """The chosen candidates measured on all rows of the split."""
    named, config, options = chosen(search), search.model.config, search.options
    observed = search.explore(encoded, sorted({one.lengths for one in named.values()}))
    points = []
    for name, one in named.items():
        seen, lengths, served = observed[one.lengths], shares(one.lengths), search.served
        flops = exit_flops(config, encoded.lengths, lengths, encoded.head)
        point, left = measured_point(search, encoded, name, one.setting, seen, flops)
        padded = exit_flops(config, [options.max_length], lengths, encoded.head).double().numpy()[:, 0]
        latency = None if served is None else served.time(point.thresholds, lengths)
        padded_flops = float(padded[left].mean())
        points.append(replace(point, length_config=lengths, latency_ms=latency, padded_flops=padded_flops))
    if options.by_row:
        points += points_by_row(search, encoded, named)
    lossless = named.get("lossless", named["full"])
    policy = search.policies[lossless.setting]
    return OperatingPoints(weights, policy, points + guaranteed(Path(options.model), policy["name"]))


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


def points_by_row(search: Search, encoded: Encoded, named: dict[str, Found]) -> list[OperatingPoint]:
    """Beside each candidate that drops tokens, what rows give that choose their own lengths, at the cost of its."""
    how = (search.model, search.encoded, search.tokenizer, search.options.eval_batch_size)
    known: dict[float, float] = {}
    seen: dict[Lengths, tuple[dict[str, list[float]], Observed, torch.Tensor]] = {}
    points = []
    for name, one in named.items():
        if one.lengths == search.whole:
            continue
        if one.lengths not in seen:
            tokens = search.encoded.lengths[:FIT_ROWS]
            cost = exit_flops(search.model.config, tokens, shares(one.lengths), encoded.head)[-1].double().mean()
            lengths = by_row(search.model, fit_share(*how, cost.item(), known))
            observed, kept = explore_by_row(search.model, encoded, search.tokenizer, how[-1], lengths)
            seen[one.lengths] = lengths, observed, torch.from_numpy(kept)
        lengths, observed, counts = seen[one.lengths]
        flops = exit_flops(search.model.config, encoded.lengths, head=encoded.head, kept=counts)
        point, _ = measured_point(search, encoded, f"{name}-by-row", one.setting, observed, flops)
        latency = None if search.served is None else search.served.time(point.thresholds, lengths)
        points.append(replace(point, length_config=lengths, latency_ms=latency))
    return points


def guaranteed(folder: Path, policy: str) -> list[OperatingPoint]:
    """The points there are that `calibrate` gave a guarantee: a search does not know better."""
    if not (folder / FILE).is_file():
        return []
    known = OperatingPoints.load(folder)
    return [one for one in known.points if one.calibration and known.policy["name"] == policy]


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


def prepare(options: SearchOptions) -> tuple[Search, Encoded]:
    """What the search works on, read and checked, and all rows of the split."""
    for name in (
        "rows",
        "halving",
        "first",
        "points",
        "eval_batch_size",
        "latency_batch",
        "latency_threads",
        "latency_rows",
    ):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    for name in ("iterations", "mutations", "crossovers"):
        if getattr(options, name) < 0:
            raise ValueError(f"{name} must be at least 0, got {getattr(options, name)}")
    if not 0 <= options.mutation_probability <= 1 or not 0 < options.smallest_ratio < 1:
        raise ValueError(
            "mutation_probability lies from 0 to 1 and smallest_ratio between 0 and 1, got "
            f"{options.mutation_probability} and {options.smallest_ratio}"
        )
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
    name = policy_name(options.exit_policy or (model.config.exit_policy or {}).get("name"), labels.problem_type)
    policies = [never(name, len(model.exit_layers), labels.problem_type)]
    check_learned(policies[0], model.config)
    free = ("output", "resume", "model", "points", "by_row", "iterations", "eval_batch_size")
    settings = {name: value for name, value in vars(options).items() if name not in free}
    settings |= {"checkpoint": checkpoint_hash(folder), "rows_hash": rows_hash(encoded)}
    work = Search(options, model, tokenizer, some, rungs, labels, policies, settings)
    if options.graph is not None:
        if name == "learned":
            raise ValueError("an exported graph does not tell its learned head's uncertainty: leave --graph away")
        work.graph = open_graph(Path(options.graph), work, None)
        with work.graph.file.open("rb") as content:
            settings["graph"] = hashlib.file_digest(content, "sha256").hexdigest()
    if options.axes != "lengths" and len(model.exit_layers) > 1:
        policies += candidates(name, work.explore(encoded, [work.whole])[work.whole].logits, labels.problem_type)
    return work, every


def open_graph(exported: Path, search: Search, threads: int | None) -> ElasticSession:
    """The session of an exported folder; ValueError where it is not an export of the checkpoint that is searched, or
    cannot do what the search needs."""
    session = ElasticSession.from_pretrained(exported, threads=threads)
    policy = search.policies[0]["name"]
    if checkpoint_hash(exported) != search.settings["checkpoint"]:
        raise ValueError(
            f"{exported} is not an export of {search.options.model}: its weights are others; export it again"
        )
    if "length_config" not in session.inputs or (session.policy or {}).get("name") != policy:
        raise ValueError(
            f"{session.file} must have length_config as an input and the exit policy {policy!r}, "
            f"it has {sorted(session.inputs)} and {session.policy}; export the checkpoint again"
        )
    return session


def load_served(options: SearchOptions, search: Search, folder: Path) -> Served:
    """The exported graph, timed; or, of a search that is resumed, as it was timed when the search began."""
    session = open_graph(Path(str(options.latency)), search, options.latency_threads)
    texts = search.examples.select(list(range(min(options.latency_rows, len(search.examples)))))
    rows = list(zip(texts.texts, texts.pairs, strict=True)) if texts.pairs else texts.texts
    encodings = session.tokenizer.encode_batch(rows)
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
    with new_file(folder / RESULT) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot_areas(folder / "area.png", [one["area"] for one in history])
    lines = {name: [(one["cost"], one["quality"]) for one in result[name]] for name in ("constant_ratio", "front")}
    plot_front(folder / "front.png", lines, result["full"]["cost"], result["metric"])
    plot_points(folder / "points.png", points)
    points.save(Path(search.options.model))
    if search.options.latency is not None:
        points.save(Path(search.options.latency))


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
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = Path(options.output or f"{options.model.rstrip('/')}.search")
    check_output(folder)
    accelerator = start_processes()
    work, every = prepare(options)
    work.model.to(accelerator.device)
    if options.latency is not None:
        work.served = load_served(options, work, folder)
        (work.served.latency,) = broadcast_object_list([work.served.latency])  # one for all processes
        work.settings["measured"] = asdict(work.served.latency)
        accelerator.print(f"latency: {work.served.latency}")
    if accelerator.is_main_process:
        if not options.resume and is_ours(folder):
            shutil.rmtree(folder)
        claim_folder(folder)
    accelerator.wait_for_everyone()
    history, hidden = [], None if accelerator.is_main_process else True  # None: hidden where there is no terminal
    for one in tqdm(evolve(work, folder, accelerator), unit="generation", disable=hidden):
        history.append(one)
        accelerator.print(
            f"iteration {one['iteration']}: {one['configurations']} configurations, {one['on_all_rows']} on all rows, "
            f"{one['front']} candidates on the front, area {one['area']:.5f}, {one['seconds']:.1f} CPU s"
        )
    if accelerator.is_main_process:
        points = operating_points(work, every, checkpoint_hash(options.model))
        write(work, folder, history, points)
        print("", f"on the {len(work.examples)} rows searched:", show_two_points(work), sep="\n")
        print("", f"measured on all {len(every)} rows of {options.split}:", show(points), sep="\n")
        print(f"\nwritten to {Path(options.model) / FILE}; curves and figures in {folder}")
