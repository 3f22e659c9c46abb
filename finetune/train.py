"""The fine-tuning loop: batches -> losses of the recipe -> update -> dev -> state; then the checkpoint."""

import hashlib
import json
import math
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import logging

from elastic_model.folders import claim_folder, is_ours
from finetune.checkpoint import REPORT, is_finished, write_checkpoint
from finetune.config import TrainOptions
from finetune.data import collate
from finetune.evaluate import answers_of, exit_logits, quality
from finetune.recipe import Phase, Update
from finetune.run import METRICS, Plan, Run, prepare
from finetune.state import Progress, copy_weights, load_optimizer, load_progress, load_weights, save_state

INTERRUPTED = 143  # exit code after SIGTERM: 128 + 15


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
        draw = random.Random(f"{run.options.seed} {update}")  # of sub-networks: the same in every process and part
        losses = phase.objective(model, run.model.config, batch, Update(update, draw))
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
    answers = [answers_of(one, run.labels.problem_type) for one in logits]
    exits = {layer: quality(one, dev, run.labels) for layer, one in zip(run.exit_layers, answers, strict=True)}
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


def start_accelerator(options: TrainOptions) -> Accelerator:
    """The accelerator; ValueError where a launcher started several processes that would each train alone."""
    accelerator, launched = Accelerator(mixed_precision=options.mixed_precision), int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched, but accelerate runs {accelerator.num_processes}; "
            "on CPUs set ACCELERATE_USE_CPU=true"
        )
    return accelerator


def train(options: TrainOptions) -> int:
    """Fine-tune, choose an exit policy, write the checkpoint; exit code 0, or 143 after SIGTERM (state saved)."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    accelerator = start_accelerator(options)
    run = prepare(options, accelerator)
    run.model.to(accelerator.device)
    if options.resume and is_finished(run):
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
    write_checkpoint(run, progress.best_weights, progress.best_update)
    return 0
