"""`python -m finetune elue run`: every method on every task, from fine-tuning to the leaderboard, stage by stage.

A stage that is there is not made again: checkpoints/METHOD/TASK/seed-N, submissions/METHOD/seed-N/TASK, results.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from elastic_model.folders import claim_folder
from elastic_model.provenance import file_hash
from elastic_model.subnetworks import constant_rate
from finetune.elue.config import RunOptions
from finetune.elue.costs import ModuleCost, table_of
from finetune.elue.jobs import (
    Job,
    check_jobs,
    jobs_of,
    layers_of,
    subject_of,
    train_checkpoint,
    training_of,
    words,
    write_labels,
)
from finetune.elue.methods import METHODS, Method, Setting, chosen_methods
from finetune.elue.points import Subject, choose_settings, outputs_of, write_point
from finetune.elue.results import is_made, make, publish, reference_of, result_of
from finetune.elue.scoring import Result
from finetune.elue.tasks import ELUE_TASKS
from finetune.prepare import weight_files


def _check(options: RunOptions, methods: Mapping[str, Method], jobs: list[Job]) -> None:
    """ValueError for methods that cannot be run."""
    if options.points < 1:
        raise ValueError(f"points must be at least 1, got {options.points}")
    if not options.shares or not all(0 < share <= 1 for share in options.shares):
        raise ValueError(f"shares must lie in (0, 1], got {options.shares}")
    for job in (job for job in jobs if job.checkpoint is not None):
        config = AutoConfig.from_pretrained(job.start, local_files_only=True)
        for name, method in methods.items():
            if method.depths:
                raise ValueError(f"method {name} makes models of its own: it cannot be run on --checkpoints")
            if method.policy_for(job.kind.problem_type) and len(config.exit_layers or ()) == 1:
                raise ValueError(f"method {name}: the checkpoint of {job.name} has one exit, nothing to choose from")
            if method.policy_for(job.kind.problem_type) == "learned" and not config.learned_exit_head:
                raise ValueError(f"method {name}: the checkpoint of {job.name} has no learned exit head")
    if options.model is not None and any(job.checkpoint is None for job in jobs):
        _depths(options)
        config = AutoConfig.from_pretrained(options.model, local_files_only=True)
        asked = any(one.policy_for(job.kind.problem_type) for one in methods.values() for job in jobs)
        exits = getattr(config, "exit_layers", None) or range(config.num_hidden_layers)  # a stock body gets them all
        if asked and len(exits) == 1:
            raise ValueError(f"{options.model} has one exit: a method with an exit policy has nothing to choose from")


def _depths(options: RunOptions) -> list[int]:
    """The depths of the models of `static`; by default thirds of the starting checkpoint's."""
    layers = layers_of(str(options.model))
    depths = options.depths or sorted({max(1, round(layers * share / 3)) for share in (1, 2, 3)})
    if not all(1 <= depth <= layers for depth in depths):
        raise ValueError(f"depths must be 1 to {layers}, the layers of {options.model}, got {depths}")
    return depths


def _settings(options: RunOptions, job: Job, method: Method, checkpoints: list[Path]) -> dict[str, Any]:
    """What a submission was made from: where that has changed, it is made again."""
    weights = [file_hash(file) for folder in checkpoints for file in weight_files(folder)]
    return {
        "weights": weights,
        "policy": method.policy_for(job.kind.problem_type),
        "lengths_and_depths": method.lengths_and_depths,
        "points": options.points,
        "shares": options.shares,
        "rows": {split: job.rows_hash(split) for split in ("dev", "test")},
        "max_length": job.max_length,
    }


def _submit(options: RunOptions, job: Job, method: Method, checkpoints: list[Path], folder: Path) -> None:
    """The test files of a method on a task, from its checkpoints."""

    def write(new: Path) -> dict[str, ModuleCost]:
        modules: dict[str, ModuleCost] = {}
        for checkpoint in checkpoints:
            subject, splits = subject_of(options, job, checkpoint)
            for setting, outputs in _points(options, job, method, subject, splits):
                write_point(subject, setting, outputs, splits["test"], new, job.kind.classes)
            modules |= table_of(subject.config, job.kind.outputs).modules
        return modules

    settings = _settings(options, job, method, checkpoints)
    if not is_made(folder, settings):
        make(folder, settings, write)


def _points(
    options: RunOptions, job: Job, method: Method, subject: Subject, splits: Mapping[str, Any]
) -> Iterator[tuple[Setting, Any]]:
    """The operating points of a method with what the exits say on test, a pass for every sub-network."""
    policy = method.policy_for(job.kind.problem_type)
    if method.settings is not None:
        settings = method.settings(subject.config, options)
    else:
        shares = options.shares if method.lengths_and_depths else [1.0]
        lengths = [constant_rate(share, subject.config.num_hidden_layers) for share in shares]
        settings = choose_settings(
            subject, policy or "", lengths, splits["dev"], options.points, method.lengths_and_depths
        )
    passes: dict[str, Any] = {}
    for setting in settings:
        key = json.dumps(setting.sub_network)
        if key not in passes:
            passes[key] = outputs_of(subject, splits["test"], setting)
        yield setting, passes[key]


def _result(name: str, method: Method, jobs: list[Job], folder: Path) -> Result:
    fitting = [job for job in jobs if method.fits(job.kind.problem_type)]
    return result_of(name, method.describe(any(job.trains for job in fitting)), fitting, folder)


def run(options: RunOptions) -> int:
    """Run ELUE and print the leaderboard; exit code 0, or 143 after SIGTERM (a second call goes on)."""
    methods, jobs = chosen_methods(words(options.methods)), jobs_of(options)
    check_jobs(options, jobs)
    _check(options, methods, jobs)
    reference = reference_of(options, jobs)
    folder = claim_folder(Path(options.output))
    write_labels(jobs, folder / "labels")
    for job in jobs:
        for name, method in methods.items():
            for seed in job.seeds if method.fits(job.kind.problem_type) else []:
                print(f"{ELUE_TASKS[job.name]}, seed {seed}, {name}", flush=True)
                code, checkpoints = _checkpoints(options, job, method, seed)
                if code:
                    return code
                _submit(options, job, method, checkpoints, folder / "submissions" / name / f"seed-{seed}" / job.name)
    found = [_result(name, method, jobs, folder) for name, method in methods.items()]
    publish([result for result in found if result.tasks], jobs, folder, reference)
    return 0


def _checkpoints(options: RunOptions, job: Job, method: Method, seed: int) -> tuple[int, list[Path]]:
    """The exit code of the training that was needed, and the checkpoints of a method on a task."""
    if job.checkpoint is not None:
        return 0, [Path(job.checkpoint)]
    depths = _depths(options) if method.depths else [None]
    before = None
    if method.after is not None:
        code, found = _checkpoints(options, job, METHODS[method.after], seed)
        if code:
            return code, []
        before = found[0]
    owner = next(name for name, other in METHODS.items() if other.training == method.training)  # who share it
    trainings = [training_of(options, job, method.training, owner, seed, depth, before) for depth in depths]
    for training in trainings:
        code = train_checkpoint(training)
        if code:
            return code, []
    return 0, [Path(training.output) for training in trainings]
