"""`python -m finetune prune MODEL --heads 8 --intermediate 768`: heads and FFN neurons removed, really, for good.

The importance of a head or neuron is the gradient of a gate of ones on it, absolute, summed over batches of training
rows (Xin et al. 2022, section 3.1); removed in several rounds, then trained by distillation from the unpruned model.
"""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from tqdm import tqdm

from elastic_model import ElasticBertConfig
from elastic_model.arguments import check_at_least
from elastic_model.distributed import on_main_process, working_together_in
from elastic_model.folders import is_ours, write_json
from elastic_model.losses import weighted_loss
from elastic_model.modeling_elasticbert import ElasticBertExitModel
from finetune.config import PruneOptions
from finetune.data import collate, inputs_of, sorted_batches
from finetune.distill import (
    check_distillation,
    load_teacher,
    settings_of_student,
    shallower,
    taught_by,
    write_student,
)
from finetune.recipe import NEVER, OF_DISTILLATION, exits_of
from finetune.run import TaskRun, prepare, start_accelerator
from finetune.state import copy_weights, load_progress
from finetune.train import run_to_the_end, start, was_finished
from finetune.widths import Gates, Loss, importance, loss_on_labels, narrowed

RESULT = "pruning.json"
REPEATS = 5  # of a timing; the fastest counts


@dataclass(frozen=True)
class Widths:
    """How many heads and FFN neurons each layer keeps; of layers that share them by importance the sums count."""

    heads: tuple[int, ...]
    neurons: tuple[int, ...]

    @classmethod
    def of(cls, config: ElasticBertConfig) -> "Widths":
        """A model's own."""
        return cls(tuple(config.num_attention_heads_per_layer or ()), tuple(config.intermediate_size_per_layer or ()))

    def __str__(self) -> str:
        heads, neurons = (one[0] if len(set(one)) == 1 else list(one) for one in (self.heads, self.neurons))
        return f"{heads} heads and {neurons} FFN neurons a layer"


@dataclass(frozen=True)
class Kept:
    """Which heads and FFN neurons of the unpruned model are left, by layer."""

    heads: list[list[int]]
    neurons: list[list[int]]

    @classmethod
    def everything(cls, config: ElasticBertConfig) -> "Kept":
        """Nothing pruned yet."""
        own = Widths.of(config)
        return cls(*([list(range(count)) for count in one] for one in (own.heads, own.neurons)))

    def of(self, heads: list[list[int]], neurons: list[list[int]]) -> "Kept":
        """What is left when those places of what was left are kept."""
        pairs = ((self.heads, heads), (self.neurons, neurons))
        return Kept(*([[old[i] for i in new] for old, new in zip(olds, news, strict=True)] for olds, news in pairs))


def _probe(logits: torch.Tensor, problem_type: str, mask: torch.Tensor | None, draw: torch.Generator) -> torch.Tensor:
    """sum of v sqrt(p) log p over answers, random signs v: its squared gradient is, in expectation, the Fisher
    information; logits as `inplace_distillation` reads them."""
    logits = logits.float()
    if problem_type == "regression":
        weighed, count = logits, len(logits)  # a Gaussian of unit variance: log p = -(y - mean)^2 / 2
    else:
        if problem_type == "multi_label_classification":
            logits = torch.stack([torch.zeros_like(logits), logits], dim=-1)
        elif problem_type == "question_answering" and mask is not None:
            logits = logits.masked_fill(~mask[..., None], torch.finfo(logits.dtype).min).transpose(1, 2)
        elif mask is not None:
            logits = logits[mask]
        surprise = logits.log_softmax(-1)
        weighed, count = (surprise / 2).exp().detach() * surprise, surprise[..., 0].numel()
    signs = torch.randint(0, 2, weighed.shape, generator=draw).to(weighed) * 2 - 1
    return (signs * weighed).sum() / count


def loss_without_labels(model: ElasticBertExitModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The probe of how far a gate moves the model from its own predictions, over all exits.

    KL(model || model with gates g) is (g - 1)' F (g - 1) / 2 near g = 1, F the Fisher information: the divergence
    itself has no gradient there, so what is measured is that of `_probe`. The signs depend on the batch alone.
    """
    ids = batch["input_ids"].cpu().numpy().tobytes()
    draw = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(ids).digest()[:7]))
    output = model(**inputs_of(batch), exit_policy=NEVER, length_config=1.0)
    answers = exits_of(output, model.config, batch, model.exit_layers)
    probes = {
        layer: _probe(logits, answers.problem_type, answers.mask, draw) for layer, logits in answers.logits.items()
    }
    return weighted_loss(probes, model.config.exit_loss)


def _blocks(scores: Gates, size: int) -> list[tuple[float, int, list[int]]]:
    """Every layer's places in blocks of `size`, the most important first: (importance, layer, places). The least
    important ones that fill no block are in none.

    Scores are normalised by layer (Molchanov et al. 2017): gradients of different layers have different scales.
    """
    blocks = []
    for layer, score in enumerate(scores):
        normal = (score / score.norm().clamp(min=1e-30)).tolist()
        order = sorted(range(len(normal)), key=lambda place: (-normal[place], place))
        for first in range(0, len(order) - size + 1, size):
            places = order[first : first + size]
            blocks.append((sum(normal[place] for place in places) / len(places), layer, places))
    return blocks


def best(scores: Gates, counts: Sequence[int], uneven: bool, multiple_of: int = 1) -> list[list[int]]:
    """The places kept of each layer, in rising order: its `counts` best; uneven: as many as these are together, the
    best of all, but at least one block of `multiple_of` a layer."""
    own = [len(score) for score in scores]
    if not uneven or sum(counts) >= sum(own):
        pairs = zip(scores, own if uneven else counts, strict=True)
        return [sorted(score.argsort(descending=True, stable=True)[:count].tolist()) for score, count in pairs]
    blocks = sorted(_blocks(scores, multiple_of), key=lambda block: -block[0])
    first = {layer: next(block for block in blocks if block[1] == layer) for layer in range(len(scores))}
    kept, left = list(first.values()), sum(counts) - sum(len(block[2]) for block in first.values())
    for block in blocks:
        if block is not first[block[1]] and len(block[2]) <= left:
            kept.append(block)
            left -= len(block[2])
    return [
        sorted(place for _, layer, places in kept if layer == one for place in places) for one in range(len(scores))
    ]


def _down_to(multiple: int, count: float) -> int:
    """The largest multiple up to `count`, but at least one."""
    return max(multiple, int(count + 1e-9) // multiple * multiple)


def schedule(before: Widths, after: Widths, rounds: int, multiple_of: int) -> list[Widths]:
    """The widths after each round, falling evenly; rounds that would remove nothing are left out."""
    steps = []
    for number in range(1, rounds):
        heads, neurons = (
            [(now + (then - now) * number / rounds, then) for now, then in zip(*both, strict=True)]
            for both in ((before.heads, after.heads), (before.neurons, after.neurons))
        )
        whole = tuple(max(then, round(count)) for count, then in heads)
        steps.append(Widths(whole, tuple(max(then, _down_to(multiple_of, count)) for count, then in neurons)))
    return list(dict.fromkeys(one for one in [*steps, after] if one != before))


def _spread(total: int, own: Sequence[int]) -> tuple[int, ...]:
    """So many over the layers, in the proportions that they have."""
    ends = [round(total * upto / sum(own)) for upto in accumulate(own)]
    return tuple(end - begin for begin, end in pairwise([0, *ends]))


def _at_share(share: float, before: Widths, multiple_of: int) -> Widths:
    return Widths(
        tuple(max(1, round(share * own)) for own in before.heads),
        tuple(_down_to(multiple_of, share * own) for own in before.neurons),
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread, as latencies are stated."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def milliseconds_at(model: ElasticBertExitModel, widths: Widths, tokens: int) -> float:
    """Of one row of `tokens` tokens at full depth, on one thread, were the model that wide."""
    heads, neurons = ([list(range(count)) for count in one] for one in (widths.heads, widths.neurons))
    thin = narrowed(model, heads, neurons)
    row = torch.full((1, tokens), model.config.vocab_size - 1, device=model.device)
    spent = []
    with one_thread():
        for _ in range(REPEATS + 1):
            began = time.perf_counter()
            thin(input_ids=row, exit_policy=NEVER, length_config=1.0)
            spent.append((time.perf_counter() - began) * 1e3)
    return min(spent[1:])


def _at_latency(model: ElasticBertExitModel, options: PruneOptions, before: Widths) -> Widths:
    """The widest that takes at most `latency_ms`, of shares in steps of one head; ValueError where none does."""
    limit, low, most = float(options.latency_ms or 0), 1, max(before.heads)
    high, measured = most, dict[int, float]()

    def fits(heads: int) -> bool:
        widths = _at_share(heads / most, before, options.multiple_of)
        measured[heads] = milliseconds_at(model, widths, options.max_length)
        return measured[heads] <= limit

    if not fits(low):
        raise ValueError(
            f"latency_ms {limit:g}: with one head a layer a row of {options.max_length} tokens still takes "
            f"{measured[low]:.2f} ms; fewer layers (distill) or a smaller max_length go further"
        )
    if fits(high):
        raise ValueError(f"latency_ms {limit:g}: the model is as fast already ({measured[high]:.2f} ms)")
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return _at_share(low / most, before, options.multiple_of)


def _at_counts(options: PruneOptions, before: Widths) -> Widths:
    """What --heads and --intermediate leave: of each layer at most so many, or so many on average; a kind that is not
    named stays."""
    left = {"heads": before.heads, "intermediate": before.neurons}
    for name, own in left.items():
        count, multiple = getattr(options, name), options.multiple_of if name == "intermediate" else 1
        if count is None:
            continue
        most = sum(own) // len(own) if options.uneven else max(own)
        if not 1 <= count <= most:
            of = "on average" if options.uneven else "at most"
            raise ValueError(f"{name} must be 1 to {most}, what a layer of the model has {of}, got {count}")
        if count % multiple:
            raise ValueError(f"{name} must be a multiple of multiple_of {multiple}, got {count}")
        even = tuple(_down_to(multiple, min(count, one)) for one in own)
        left[name] = _spread(count * len(own), own) if options.uneven else even
    return Widths(left["heads"], left["intermediate"])


def target(options: PruneOptions, before: Widths, model: ElasticBertExitModel | None = None) -> Widths:
    """The widths asked for of a model with those; ValueError where they are none, larger, or not what a layer can be.

    A latency is measured on `model`; without one only the limit is checked, and what there is stays.
    """
    counts = [one for one in (options.heads, options.intermediate) if one is not None]
    given = bool(counts) + (options.share is not None) + (options.latency_ms is not None)
    if given != 1:
        raise ValueError("give one target: --heads and --intermediate (or one of them), --share, or --latency_ms")
    check_at_least(1, options, "rounds", "multiple_of", "importance_rows")
    narrowest = min(before.neurons)
    if options.multiple_of > narrowest:
        raise ValueError(
            f"multiple_of must be at most {narrowest}, the FFN neurons of a layer, got {options.multiple_of}"
        )
    if options.latency_ms is not None:
        if not 0 < options.latency_ms < math.inf:
            raise ValueError(f"latency_ms must be above 0, got {options.latency_ms:g}")
        return before if model is None else _at_latency(model, options, before)
    if options.share is not None and not 0 < options.share < 1:
        raise ValueError(f"share must be above 0 and below 1, got {options.share}")
    share = options.share
    left = _at_counts(options, before) if share is None else _at_share(share, before, options.multiple_of)
    if left == before:
        asked = "the target" if share is None else f"share {share:g}"
        raise ValueError(f"{asked} leaves all that the model has: {before}")
    return left


def remove(run: TaskRun, model: ElasticBertExitModel, to: Widths) -> tuple[ElasticBertExitModel, Kept, list[Any]]:
    """The model pruned to these widths, what is left of it, and what each round did."""
    options, encoded = run.options, run.splits["train"]
    assert isinstance(options, PruneOptions)
    loss: Loss = loss_without_labels if options.label_free else loss_on_labels
    rows = sorted_batches(encoded.lengths, options.batch_size)
    if options.importance_rows is not None:  # batches spread over the lengths
        wanted = min(len(rows), -(-options.importance_rows // options.batch_size))
        rows = [rows[number * len(rows) // wanted] for number in range(wanted)]
    kept, history = Kept.everything(model.config), []
    for step in tqdm(
        schedule(Widths.of(model.config), to, options.rounds, options.multiple_of), unit="round", disable=None
    ):
        batches = (collate(encoded, one, run.tokenizer, model.device) for one in rows)
        heads, neurons = importance(model, batches, loss)
        own = (
            best(heads, step.heads, options.uneven),
            best(neurons, step.neurons, options.uneven, options.multiple_of),
        )
        left = broadcast_object_list([own])[0]  # importances may round differently in other processes
        model, kept = narrowed(model, *left), kept.of(*left)
        history.append({"heads": [len(one) for one in left[0]], "intermediate": [len(one) for one in left[1]]})
    return model, kept, history


def prepare_pruning(options: PruneOptions, accelerator: Accelerator) -> tuple[TaskRun, ElasticBertExitModel]:
    """The run with a copy of the model, and the model itself; nothing is written yet."""
    given = [name for name in OF_DISTILLATION if getattr(options, name) != getattr(PruneOptions, name)]
    if given and not options.distill:
        raise ValueError(f"{given[0]} {getattr(options, given[0])} would do nothing: --distill false trains nothing")
    check_distillation(options)
    unpruned = load_teacher(options)
    target(options, Widths.of(unpruned.config))

    def copy(_: Any, labels: Any) -> ElasticBertExitModel:
        settings = settings_of_student(options, labels, unpruned.exit_layers)
        return shallower(unpruned, unpruned.config.num_hidden_layers, settings)

    run = prepare(options, accelerator, copy)
    run.model.to(accelerator.device)
    return run, unpruned


def _begun(run: TaskRun) -> dict[str, Any] | None:
    """The notes of the run to be resumed, what it left among them: a latency would not be measured twice alike.
    ValueError where it had other settings."""
    file = run.folder / RESULT
    if not (run.options.resume and is_ours(run.state) and file.is_file()):
        return None
    load_progress(run.state, run.settings)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def prune(options: PruneOptions) -> int:
    """Remove, distil, choose an exit policy, write; exit code 0, or 143 after SIGTERM (state saved)."""
    accelerator = start_accelerator(options)
    run, unpruned = prepare_pruning(options, accelerator)
    if was_finished(run):
        return 0
    begun = on_main_process(accelerator, lambda: _begun(run))
    if begun is not None:
        kept, history = Kept(**begun["kept"]), begun["rounds"]
        model, asked = narrowed(run.model, kept.heads, kept.neurons), begun["target"]
    else:
        to = on_main_process(accelerator, lambda: target(options, Widths.of(unpruned.config), unpruned))
        model, kept, history = remove(run, run.model, to)
        asked = vars(to)
    counts = {"before": unpruned.num_parameters(), "after": model.num_parameters()}
    accelerator.print(
        f"pruned in {len(history)} rounds to heads {history[-1]['heads']}, FFN {history[-1]['intermediate']}: "
        f"{counts['after'] / counts['before']:.0%} of the parameters"
    )
    run = replace(run, notes=(RESULT,))
    result = {"target": asked, "kept": vars(kept), "rounds": history, "parameters": counts}
    result |= {"importance": "the model's own predictions" if options.label_free else "labels"}
    with working_together_in(run.folder, accelerator):
        if accelerator.is_main_process:
            if not options.resume:  # killed from here on, these notes must not meet the state of a run before
                shutil.rmtree(run.state, ignore_errors=True)
            write_json(run.folder / RESULT, result, indent=None)
        if options.distill:
            return run_to_the_end(taught_by(run, model, unpruned), write_student)
        run = replace(run, model=model)
        write_student(run, replace(start(run), best_weights=copy_weights(model)))
        return 0
