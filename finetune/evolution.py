"""The search as generations: candidates, their quality and cost, successive halving, and the journal they are kept in.

The first generation are constant-ratio length configurations; each further one mutations and crossovers of the front
of quality against cost (Kim and Cho 2021, section 3.3). A configuration is passed through the model once; from the
logits of its exits every setting of the exit policy is evaluated, so that a configuration brings as many candidates as
there are settings.
"""

import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from elastic_model.cost import exit_flops, mean_flops
from elastic_model.exit_policies import sweep
from elastic_model.folders import write_text
from elastic_model.front import area_under_front, pareto_front
from elastic_model.modeling_elasticbert import ElasticBertExitModel
from elastic_model.session import ElasticSession
from finetune.candidates import STEPS, Lengths, initial, offspring, shares
from finetune.config import SearchOptions
from finetune.data import Encoded
from finetune.examples import Examples
from finetune.explore import Observed, explore, explore_graph
from finetune.kinds import answers_of
from finetune.labels import Labels
from finetune.latency import Served
from finetune.metrics import metric
from finetune.policies import Policy

JOURNAL = "journal.jsonl"


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
    served: Served | None = None
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
        return mean_flops(config, tokens, None, shares(lengths), head)

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
            noted = [name for name in settings if name in record or name != "policy"]  # noted only since
            other = [name for name in noted if record.get(name) != settings[name]]
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
        write_text(folder / JOURNAL, "".join(json.dumps(record) + "\n" for record in records))
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
