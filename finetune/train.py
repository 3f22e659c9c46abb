"""The fine-tuning loop: batches -> losses of the recipe -> update -> dev -> state; then the checkpoint."""

import hashlib
import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, logging

from elastic_model import ElasticBertForSequenceClassification
from elastic_model.arguments import to_yaml
from elastic_model.folders import check_output, claim_folder, is_ours, new_folder
from finetune.calibrate import candidates, choose, policy_name
from finetune.config import TrainOptions
from finetune.data import Encoded, collate, shuffled_batches
from finetune.evaluate import Outcome, exit_logits, exit_table, outcome, outcome_table, policy_text, quality, scores
from finetune.prepare import (
    Labels,
    chosen_task,
    encode_split,
    labels_of_training,
    load_for_training,
    load_tokenizer,
    settings_of,
    some_rows,
)
from finetune.recipe import Phase, find_recipe
from finetune.state import (
    Progress,
    copy_weights,
    load_optimizer,
    load_progress,
    load_weights,
    save_state,
)
from finetune.tasks import read_examples

INTERRUPTED = 143  # exit code after SIGTERM: 128 + 15
SETTINGS = "finetune.json"  # in the checkpoint: what made it
METRICS = "metrics.jsonl"
REPORT = "report.txt"


@dataclass(frozen=True)
class Plan:
    """Which rows each update sees: a function of (seed, update) alone, so that a run can be resumed anywhere."""

    lengths: tuple[int, ...]
    batch_size: int
    epochs: int
    seed: int

    @property
    def updates_per_epoch(self) -> int:
        """The last batch of an epoch may be smaller."""
        return math.ceil(len(self.lengths) / self.batch_size)

    @property
    def updates_per_phase(self) -> int:
        """Every phase of a recipe has as many epochs."""
        return self.epochs * self.updates_per_epoch

    def rows(self, update: int) -> list[int]:
        """The rows of an update; updates are counted over the whole run."""
        epoch, batch = divmod(update, self.updates_per_epoch)
        return _epoch(self, epoch)[batch]


@lru_cache(maxsize=1)
def _epoch(plan: Plan, epoch: int) -> list[list[int]]:
    return shuffled_batches(list(plan.lengths), plan.batch_size, plan.seed, epoch)


@dataclass(frozen=True)
class Run:
    """What a run works on; `folder` holds its log and state until the checkpoint is written."""

    options: TrainOptions
    accelerator: Accelerator
    model: ElasticBertForSequenceClassification
    tokenizer: PreTrainedTokenizerBase
    labels: Labels
    splits: dict[str, Encoded]
    phases: tuple[Phase, ...]
    settings: dict[str, Any]
    folder: Path

    @property
    def plan(self) -> Plan:
        """The order of the rows."""
        options = self.options
        return Plan(tuple(self.splits["train"].lengths), options.batch_size, options.epochs, options.seed)

    @property
    def state(self) -> Path:
        """Where an interrupted run continues from."""
        return self.folder / "state"

    def log(self, record: dict[str, Any]) -> None:
        """Add a line to the run's metrics."""
        if self.accelerator.is_main_process:
            with (self.folder / METRICS).open("a") as lines:
                lines.write(json.dumps(record) + "\n")


def _check_numbers(options: TrainOptions) -> None:
    for name in ("epochs", "batch_size", "save_steps", "log_steps", "eval_batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    for name in ("micro_batch_size", "eval_steps", "train_rows"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1 or none, got {getattr(options, name)}")
    if not 0 <= options.warmup <= 1:
        raise ValueError(f"warmup is a share of the updates, from 0 to 1, got {options.warmup}")
    if not options.learning_rate > 0:
        raise ValueError(f"learning_rate must be above 0, got {options.learning_rate}")


def prepare(options: TrainOptions, accelerator: Accelerator) -> Run:
    """Everything read and checked; nothing is written yet."""
    _check_numbers(options)
    phases = find_recipe(options.recipe)
    check_output(Path(options.output))
    task, tokenizer = chosen_task(options), load_tokenizer(Path(options.model))
    train = some_rows(read_examples(task, "train"), options.train_rows, options.seed)
    if len(train) < options.batch_size:
        raise ValueError(f"the train split has {len(train)} rows, fewer than a batch ({options.batch_size})")
    labels = labels_of_training(options, task, train)
    policy_name(options.exit_policy, labels.problem_type)
    others = [split for split in ("dev", "test") if split == "dev" or options.test]
    examples = {"train": train, **{split: read_examples(task, split) for split in others}}
    model = load_for_training(options, labels)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {options.model} has {len(tokenizer)} tokens, its model {model.config.vocab_size}"
        )
    splits = {
        split: encode_split(rows, split, task, labels, tokenizer, options.max_length)
        for split, rows in examples.items()
    }
    folder = Path(options.output).with_name(f"{Path(options.output).name}.run")
    settings = settings_of(options, splits)
    return Run(options, accelerator, model, tokenizer, labels, splits, phases, settings, folder)


def learning_rate(update: int, updates: int, peak: float, warmup: float) -> float:
    """Linear rise to the peak over the warm-up, linear fall to 0 at the end (BERT's schedule)."""
    rising = max(1, round(warmup * updates))
    return peak * min((update + 1) / rising, (updates - update) / max(1, updates - rising))


def make_optimizer(model: torch.nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """AdamW over what the phase trains, without decay on biases and norms."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim > 1]
    other = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": other, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.learning_rate)


def _seed_update(seed: int, update: int, process: int) -> None:
    """Dropout as a function of (seed, update), so that a resumed run draws what an uninterrupted one would."""
    digest = hashlib.sha256(f"{seed} {update} {process}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:7]))


def _parts(rows: list[int], run: Run) -> list[tuple[list[int], float]]:
    """This process's rows of an update as micro-batches, each with its weight in the mean over all processes' rows.

    Every process gets as many; one that has run out of rows takes part with weight 0.
    """
    processes = run.accelerator.num_processes
    own = rows[run.accelerator.process_index :: processes]
    size = run.options.micro_batch_size or len(rows)
    cuts = [own[first : first + size] for first in range(0, math.ceil(len(rows) / processes), size)]
    return [(cut or rows[:1], len(cut) * processes / len(rows)) for cut in cuts]


def backward(run: Run, phase: Phase, model: torch.nn.Module, update: int) -> float:
    """Add up the gradients of an update; gradients are exchanged between processes once, in the last backward pass."""
    accelerator, total = run.accelerator, 0.0
    parts = _parts(run.plan.rows(update), run)
    for part, (rows, weight) in enumerate(parts, start=1):
        batch = collate(run.splits["train"], rows, run.tokenizer, accelerator.device)
        losses = phase.objective(model, run.model.config, batch, update)
        for number in range(1, phase.passes + 1):
            is_last = part == len(parts) and number == phase.passes
            with nullcontext() if is_last else accelerator.no_sync(model):
                with accelerator.autocast():
                    loss = next(losses) * weight
                accelerator.backward(loss)
            total += loss.item()
    if not math.isfinite(total):
        raise ValueError(f"the loss of update {update + 1} is {total}; a lower learning_rate may help")
    return total


def _evaluate(run: Run, progress: Progress) -> None:
    """Quality at every exit on dev; keeps the weights where they are the best so far (the later ones of equal)."""
    dev = run.splits["dev"]
    logits = exit_logits(run.model, dev, run.tokenizer, run.options.eval_batch_size, run.accelerator)
    exits = {
        layer: quality(one, dev, run.labels) for layer, one in zip(run.model.config.exit_layers, logits, strict=True)
    }
    deciding = [values[run.labels.metrics[0]] for values in exits.values()]
    value = deciding[-1] if run.options.best_exit == "last" else float(np.mean(deciding))
    run.log({"update": progress.update, "dev": exits})
    shown = "  ".join(f"{layer}: {one:.4f}" for layer, one in zip(exits, deciding, strict=True))
    run.accelerator.print(f"update {progress.update}: dev {run.labels.metrics[0]} by exit layer  {shown}")
    if progress.best_quality is None or value >= progress.best_quality:
        progress.best_quality, progress.best_update = value, progress.update
        progress.best_weights = copy_weights(run.model)


@contextmanager
def sigterm() -> Iterator[threading.Event]:
    """An event that is set once SIGTERM has come."""
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _anyone(asked: bool, accelerator: Accelerator) -> bool:
    """Whether any process was asked: they must stop after the same update."""
    if accelerator.num_processes == 1:
        return asked
    return bool(accelerator.reduce(torch.tensor(float(asked), device=accelerator.device)).item())


def _is_due(update: int, every: int | None, plan: Plan) -> bool:
    return update % (every or plan.updates_per_epoch) == 0 or update % plan.updates_per_phase == 0


def fit_phase(run: Run, number: int, progress: Progress, asked: threading.Event, bar: tqdm) -> bool:
    """Train one phase from where `progress` is; False where the run was asked to stop (its state is then saved)."""
    phase, plan, options, accelerator = run.phases[number], run.plan, run.options, run.accelerator
    start, stop = number * plan.updates_per_phase, (number + 1) * plan.updates_per_phase
    for name, parameter in run.model.named_parameters():
        parameter.requires_grad_(phase.trains(name, run.model.config))
    model, optimizer = accelerator.prepare(run.model, make_optimizer(run.model, options))
    if progress.update == start:
        progress.best_quality = None  # the checkpoint kept is one of the last phase
    else:
        load_optimizer(run.state, optimizer)
    since, losses = time.monotonic(), []
    for update in range(progress.update, stop):
        model.train()
        _seed_update(options.seed, update, accelerator.process_index)
        rate = learning_rate(update - start, stop - start, options.learning_rate, options.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses.append(backward(run, phase, model, update))
        accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        progress.update = update + 1
        bar.update()
        if _is_due(progress.update, options.log_steps, plan):
            run.log({"update": progress.update, "loss": float(np.mean(losses)), "learning_rate": rate,
                     "updates_per_second": len(losses) / (time.monotonic() - since)})  # fmt: skip
            since, losses = time.monotonic(), []
        if _is_due(progress.update, options.eval_steps, plan):
            _evaluate(run, progress)
        stopping = _anyone(asked.is_set(), accelerator)
        if (stopping or _is_due(progress.update, options.save_steps, plan)) and accelerator.is_main_process:
            save_state(run.state, run.model, optimizer, progress, run.settings)
        if stopping:
            return False
    return True


def fit(run: Run, progress: Progress) -> bool:
    """Train the phases of the recipe that are left; False where the run was asked to stop."""
    total = len(run.phases) * run.plan.updates_per_phase
    hidden = None if run.accelerator.is_main_process else True  # None: hidden where there is no terminal
    with sigterm() as asked, tqdm(total=total, initial=progress.update, unit="update", disable=hidden) as bar:
        for number in range(progress.update // run.plan.updates_per_phase, len(run.phases)):
            if not fit_phase(run, number, progress, asked, bar):
                return False
    return True


def start(run: Run) -> Progress:
    """From the saved state with --resume, else from nothing; the log is cut to the same update."""
    progress = Progress()
    if run.options.resume and is_ours(run.state):
        progress = load_progress(run.state, run.settings)
        load_weights(run.state, run.model)
        run.accelerator.print(f"resuming at update {progress.update}")
    if run.accelerator.is_main_process:
        log = claim_folder(run.folder) / METRICS
        lines = log.read_text().splitlines() if log.exists() else []
        kept = [line for line in lines if json.loads(line)["update"] <= progress.update]
        log.write_text("".join(line + "\n" for line in kept))
        if not progress.update:
            shutil.rmtree(run.state, ignore_errors=True)
    run.accelerator.wait_for_everyone()
    return progress


def calibrate(run: Run, logits: np.ndarray) -> tuple[Outcome, Outcome]:
    """Full depth, and the loosest exit policy that keeps the deciding metric on dev within the permitted loss."""
    dev, config, options = run.splits["dev"], run.model.config, run.options
    full = outcome(None, logits, config.exit_layers, dev, run.labels)
    name = policy_name(options.exit_policy, run.labels.problem_type)
    policies = candidates(name, logits, run.labels.problem_type) if len(config.exit_layers) > 1 else []
    outcomes = [outcome(policy, logits, config.exit_layers, dev, run.labels) for policy in policies]
    deciding = run.labels.metrics[0]
    best = choose([one.quality[deciding] for one in outcomes], full.quality[deciding], options.permitted_loss)
    return full, full if best is None else outcomes[best]


def report(run: Run, full: Outcome, chosen: Outcome, logits: dict[str, np.ndarray]) -> str:
    """The text that ends a run: quality by exit on dev (and on test, where that was given), the exit policy chosen."""
    lines, layers = [], run.model.config.exit_layers
    for split, values in logits.items():
        rows = run.splits[split]
        scored = (scores(one, rows, run.labels, run.options.seed) for one in values)
        lines += [f"{split}: {len(rows)} rows, {rows.cut} of them cut to {run.options.max_length} tokens"]
        lines += [exit_table(dict(zip(layers, scored, strict=True))), ""]
    deciding, permitted = run.labels.metrics[0], run.options.permitted_loss
    lines += [
        f"exit policy, chosen on dev: {policy_text(chosen.policy)}",
        f"(the loosest setting before {deciding} on dev first falls more than {permitted} below full depth)",
    ]
    outcomes = {"dev, full depth": full, "dev, with exits": chosen}
    if "test" in logits:
        outcomes["test, with exits"] = outcome(chosen.policy, logits["test"], layers, run.splits["test"], run.labels)
    return "\n".join([*lines, outcome_table(outcomes)])


def finish(run: Run, progress: Progress) -> None:
    """The best weights with their exit policy as a checkpoint, what made it, and the report."""
    run.model.load_state_dict(progress.best_weights)
    logits = {
        split: exit_logits(run.model, rows, run.tokenizer, run.options.eval_batch_size, run.accelerator)
        for split, rows in run.splits.items()
        if split != "train"
    }
    if not run.accelerator.is_main_process:
        return
    full, chosen = calibrate(run, logits["dev"])
    run.model.config.exit_policy = chosen.policy
    text = report(run, full, chosen, logits)
    with new_folder(Path(run.options.output)) as folder:
        run.model.save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)
        (folder / SETTINGS).write_text(json.dumps(run.settings, indent=1))
        (folder / "finetune.yaml").write_text(to_yaml(run.options))
        (folder / REPORT).write_text(text + "\n")
        shutil.copy(run.folder / METRICS, folder)
    shutil.rmtree(run.folder)
    print(text, f"checkpoint of update {progress.best_update}: {run.options.output}", sep="\n\n")


def _is_finished(run: Run) -> bool:
    """Whether the output already holds the checkpoint of a run with the same settings."""
    saved = Path(run.options.output) / SETTINGS
    return saved.is_file() and json.loads(saved.read_text()) == run.settings


def train(options: TrainOptions) -> int:
    """Fine-tune, choose an exit policy, write the checkpoint; exit code 0, or 143 after SIGTERM (state saved)."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    run = prepare(options, accelerator)
    run.model.to(accelerator.device)
    if options.resume and _is_finished(run):
        accelerator.print(f"{options.output} is finished already:\n\n{(Path(options.output) / REPORT).read_text()}")
        return 0
    accelerator.print(
        f"{', '.join(f'{split}: {len(rows)} rows' for split, rows in run.splits.items())}; {run.labels.problem_type}"
        f" ({', '.join(run.labels.names)}); recipe {options.recipe}"
    )
    progress = start(run)
    if not fit(run, progress):
        accelerator.print(f"stopped at update {progress.update}, the state is saved; continue with --resume")
        return INTERRUPTED
    finish(run, progress)
    return 0
