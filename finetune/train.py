"""The fine-tuning loop: batches -> losses of the recipe -> update -> dev -> state; then the checkpoint."""

import hashlib
import math
import random
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from tqdm import tqdm

from elastic_model.distributed import Engine, adamw, on_main_process, start_engine, working_together_in
from elastic_model.folders import is_ours
from elastic_model.jobs import INTERRUPTED, cut_log, sigterm
from finetune.checkpoint import REPORT, is_finished, write_checkpoint
from finetune.config import TrainOptions
from finetune.data import collate
from finetune.recipe import Phase, Update, backbone_and_last_exit
from finetune.run import METRICS, TRACKED, Plan, Run, prepare, start_accelerator
from finetune.state import Progress, copy_weights, load_optimizer_tensors, load_progress, load_weights, save_state
from finetune.teacher import stacked

AnyRun = TypeVar("AnyRun", bound=Run)


def learning_rate(update: int, updates: int, peak: float, warmup: float) -> float:
    """Linear rise to the peak over the warm-up, linear fall to 0 at the end (BERT's schedule)."""
    rising = max(1, round(warmup * updates))
    return peak * min((update + 1) / rising, (updates - update) / max(1, updates - rising))


def engine_of(run: Run) -> Engine:
    """What trains the run's model: those of its parameters that require a gradient."""
    optimizer = partial(adamw, rate=run.options.learning_rate, weight_decay=run.options.weight_decay)
    return start_engine(run.accelerator, run.model, optimizer, run.options.max_grad_norm)


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


def backward(run: Run, phase: Phase, engine: Engine, number: int) -> float:
    """Add up the gradients of an update; gradients are exchanged between processes once, in the last backward pass."""
    accelerator, options, total = run.accelerator, run.options, 0.0
    parts, passes = _parts(run.plan.rows(number), run), phase.passes(options)
    for part, (rows, weight) in enumerate(parts, start=1):
        batch = collate(run.splits["train"], rows, run.tokenizer, accelerator.device)
        draw = random.Random(f"{options.seed} {number}")  # of sub-networks: the same in every process and part
        teacher = None if run.teacher is None else stacked([run.teacher[row] for row in rows], accelerator.device)
        losses = phase.objective(engine.model, run.model.config, batch, Update(number, draw, options, teacher))
        for done in range(1, passes + 1):
            with engine.micro_batch(last=part == len(parts) and done == passes):
                with accelerator.autocast():
                    loss = next(losses) * weight
                engine.backward(loss)
            total += loss.item()
    if not math.isfinite(total):
        raise ValueError(f"the loss of update {number + 1} is {total}; a lower learning_rate may help")
    return total


def _evaluate(run: Run, engine: Engine, progress: Progress) -> None:
    """Quality at every exit on dev; keeps the weights where they are the best so far (the later ones of equal)."""
    exits = run.measure(run)
    deciding = [values[run.metric] for values in exits.values()]
    config, parameters = run.model.config, run.model.named_parameters()
    trained = any(one.requires_grad and backbone_and_last_exit(name, config) for name, one in parameters)
    last = run.options.best_exit == "last" and trained  # where the last exit is frozen, it decides nothing
    value = deciding[-1] if last else float(np.mean(deciding))
    run.log({"update": progress.update, "dev": exits})
    shown = "  ".join(f"{layer}: {one:.4f}" for layer, one in zip(exits, deciding, strict=True))
    run.accelerator.print(f"update {progress.update}: dev {run.metric} by exit layer  {shown}")
    improved = progress.best_quality is None or value > progress.best_quality
    progress.stale = 0 if improved else progress.stale + 1
    if improved or value == progress.best_quality:
        progress.best_quality, progress.best_update = value, progress.update
        progress.best_weights = engine.weights(everywhere=True)


def _anyone(asked: bool, accelerator: Accelerator) -> bool:
    """Whether any process was asked: they must stop after the same update."""
    if accelerator.num_processes == 1:
        return asked
    return bool(accelerator.reduce(torch.tensor(float(asked), device=accelerator.device)).item())


def _mean(losses: list[float], accelerator: Accelerator) -> float:
    """The mean loss of some updates, over all processes' rows."""
    mean = float(np.mean(losses))
    if accelerator.num_processes == 1:
        return mean
    return float(accelerator.reduce(torch.tensor(mean, device=accelerator.device), "mean"))


def _is_due(update: int, every: int | None, plan: Plan) -> bool:
    return update % (every or plan.updates_per_epoch) == 0 or update in plan.ends


def _save(run: Run, progress: Progress, engine: Engine | None = None) -> None:
    """The state that the run continues from; of a phase that is over there is no engine any more."""
    weights = engine.weights() if engine else copy_weights(run.model)  # all processes take part
    optimizer = engine.optimizer_tensors() if engine else {}
    on_main_process(run.accelerator, lambda: save_state(run.state, weights, optimizer, progress, run.settings))


def fit_phase(run: Run, number: int, progress: Progress, asked: threading.Event, bar: tqdm) -> bool:
    """Train one phase from where `progress` is; False where the run was asked to stop. Its state is saved."""
    phase, plan, options, accelerator = run.phases[number], run.plan, run.options, run.accelerator
    start, stop = [0, *plan.ends][number], plan.ends[number]
    for name, parameter in run.model.named_parameters():
        parameter.requires_grad_(phase.trains(name, run.model.config))
    engine = engine_of(run)
    if progress.update == start:
        progress.best_quality, progress.stale = None, 0  # the checkpoint kept is one of the last phase
    else:
        engine.load_optimizer(load_optimizer_tensors(run.state))
    since, losses, stopping, early = time.monotonic(), [], False, False
    while progress.update < stop and not stopping and not early:
        engine.model.train()
        _seed_update(options.seed, progress.update, accelerator.process_index)
        peak = options.learning_rate if phase.learning_rate is None else phase.learning_rate
        rate = learning_rate(progress.update - start, stop - start, peak, options.warmup)
        losses.append(backward(run, phase, engine, progress.update))
        _step(engine, rate, progress)
        bar.update()
        if _is_due(progress.update, options.log_steps, plan):
            run.log({"update": progress.update, "loss": _mean(losses, accelerator), "learning_rate": rate,
                     "updates_per_second": len(losses) / (time.monotonic() - since)})  # fmt: skip
            since, losses = time.monotonic(), []
        if _is_due(progress.update, options.eval_steps, plan):
            _evaluate(run, engine, progress)
            early = progress.update < stop and 0 < (options.patience or 0) <= progress.stale
        stopping = _anyone(asked.is_set(), accelerator)
        if progress.update < stop and not early and (stopping or _is_due(progress.update, options.save_steps, plan)):
            _save(run, progress, engine)
    if progress.update == stop or early:
        weights = progress.best_weights if early else engine.weights(everywhere=True)
        engine.close()
        run.model.load_state_dict(weights)
        _end(run, progress, stop, bar)
    return not stopping


def _step(engine: Engine, rate: float, progress: Progress) -> None:
    """The optimizer's step of an update; ValueError where the gradient is not finite."""
    norm = engine.step(rate)
    if not math.isfinite(norm):
        raise ValueError(f"the gradient of update {progress.update + 1} is {norm}; a lower learning_rate may help")
    progress.update += 1


def _end(run: Run, progress: Progress, stop: int, bar: tqdm) -> None:
    """The phase is over: saved; updates that are left out, with its best weights then, are counted as done."""
    if progress.update < stop:
        run.accelerator.print(
            f"update {progress.update}: no better for {progress.stale} evaluations; back to update "
            f"{progress.best_update}"
        )
        bar.update(stop - progress.update)
        progress.update = stop
    _save(run, progress)


def fit(run: Run, progress: Progress) -> bool:
    """Train the phases of the recipe that are left; False where the run was asked to stop."""
    ends = run.plan.ends
    hidden = None if run.accelerator.is_main_process else True  # None: hidden where there is no terminal
    with sigterm() as asked, tqdm(total=ends[-1], initial=progress.update, unit="update", disable=hidden) as bar:
        for number, end in enumerate(ends):
            if progress.update < end and not fit_phase(run, number, progress, asked, bar):
                return False
        return not _anyone(asked.is_set(), run.accelerator)  # asked while the last phase was saved: all is kept


def start(run: Run) -> Progress:
    """From the saved state with --resume, else from nothing; the log is cut to the same update."""
    progress = Progress()
    if run.options.resume and is_ours(run.state):
        progress = load_progress(run.state, run.settings)
        load_weights(run.state, run.model)
        run.accelerator.print(f"resuming at update {progress.update}")
    if run.accelerator.is_main_process:
        cut_log(run.folder / METRICS, "update", progress.update)
        if not progress.update:
            for folder in (run.state, run.folder / TRACKED):
                shutil.rmtree(folder, ignore_errors=True)
    run.accelerator.wait_for_everyone()
    return progress


def run_to_the_end(run: AnyRun, write: Callable[[AnyRun, Progress], None]) -> int:
    """Train, from the saved state with --resume, then `write` the checkpoint; exit code 0, or 143 after SIGTERM."""
    run.model.to(run.accelerator.device)
    with working_together_in(run.folder, run.accelerator):
        progress = start(run)
        if run.options.tracker:
            settings = {name: str(value) for name, value in vars(run.options).items()}
            run.accelerator.init_trackers(TRACKED, config=settings)
        finished = fit(run, progress)
        while run.accelerator.trackers:  # their files are whole before they are copied
            run.accelerator.trackers.pop().finish()
        if finished:
            write(run, progress)
        else:
            run.accelerator.print(f"stopped at update {progress.update}, the state is saved; continue with --resume")
    run.accelerator.end_training()
    return 0 if finished else INTERRUPTED


def was_finished(run: Run) -> bool:
    """Whether a run that is to be resumed is done already; then its report is printed."""
    finished = run.options.resume and is_finished(run)
    if finished:
        folder = Path(run.options.output)
        run.accelerator.print(f"{folder} is finished already:\n\n{(folder / REPORT).read_text()}")
    return finished


def train(options: TrainOptions) -> int:
    """Fine-tune, choose an exit policy, write the checkpoint; exit code 0, or 143 after SIGTERM (state saved)."""
    accelerator = start_accelerator(options)
    run = prepare(options, accelerator)
    if was_finished(run):
        return 0
    accelerator.print(
        f"{', '.join(f'{split}: {len(rows)} rows' for split, rows in run.splits.items())}; {run.labels.problem_type}"
        f" ({', '.join(run.labels.names)}); recipe {options.recipe}"
    )
    return run_to_the_end(run, write_checkpoint)
