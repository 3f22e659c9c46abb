"""A folder of submissions: each made once, read back, kept task by task in results/NAME.json, put on a leaderboard."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from elastic_model.folders import new_folder
from finetune.elue.config import SizeOptions
from finetune.elue.costs import CostTable, ModuleCost, load_costs, write_table
from finetune.elue.jobs import Job
from finetune.elue.leaderboard import leaderboard_of, text, write_board
from finetune.elue.score import points_of, true_labels
from finetune.elue.scoring import Point, Result, TaskResult, read_reference, read_result, write_result
from finetune.elue.submission import MODULES_FILE, files_of
from finetune.elue.tasks import ELUE_TASKS

RESULTS = "results"
SETTINGS = "settings.json"  # what makes two submissions the same
Reference = tuple[str, dict[str, list[Point]]]  # name, {task: curve}
REFERENCE = "elasticbert"  # the method whose curve the others are scored against, where no other is given


def reference_of(options: SizeOptions, jobs: list[Job]) -> Reference | None:
    """What `--reference` names, read; None where the exits of `elasticbert` are the reference."""
    if options.reference is None:
        return None
    rows = {job.name: len(job.test) for job in jobs}
    for file in sorted((Path(options.output) / RESULTS).glob("*.json")):  # which the leaderboard will score as well
        rows = {task: one.rows for task, one in read_result(file).tasks.items()} | rows
    curves = read_reference(Path(options.reference), rows)
    own = [job.name for job in jobs]
    if not curves.keys() & set(own):
        raise ValueError(f"reference {options.reference} has {', '.join(curves)}, none of {', '.join(own)}")
    return options.reference, curves


def is_made(submission: Path, settings: Mapping[str, Any]) -> bool:
    """Whether it is there, from the same settings: else it is made (again)."""
    file = submission / SETTINGS
    return file.is_file() and json.loads(file.read_text()) == settings


def make(submission: Path, settings: Mapping[str, Any], write: Callable[[Path], Mapping[str, ModuleCost]]) -> None:
    """The test files of a method on a task with the table of what their modules cost: `write` puts them into a folder
    and returns the costs."""
    with new_folder(submission) as new:
        write_table(CostTable(write(new)), new / MODULES_FILE)
        (new / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")


def result_of(name: str, note: str, jobs: list[Job], folder: Path) -> Result:
    """A method's test files in submissions/NAME/seed-N/TASK, scored as anybody's would be."""
    tasks = {}
    for job in jobs:
        seeds = []
        labels = true_labels(job.name, folder / "labels")
        for seed in job.seeds:
            submission = folder / "submissions" / name / f"seed-{seed}"
            costs = load_costs(submission / job.name / MODULES_FILE, job.kind)
            seeds.append(points_of(files_of(submission)[job.name], labels, job.kind, costs))
        tasks[job.name] = TaskResult(job.kind.metric, len(labels), seeds)
    return Result(name, tasks, note, {job.name: job.sizes for job in jobs})


def _beside_earlier(results: Mapping[str, Result], jobs: list[Job], folder: Path) -> dict[str, Result]:
    """The results of this run and, of other tasks and methods, those of earlier runs into the same folder; what an
    earlier one says of a task of this run at other sizes is left out, and said."""
    sizes = {job.name: job.sizes for job in jobs}
    found = dict(results)
    for file in sorted(folder.glob("*.json")):
        earlier = read_result(file)
        own = found.get(earlier.name, Result(earlier.name, {}, earlier.note))
        kept = {}
        for task, one in earlier.tasks.items():
            if task not in sizes or earlier.settings.get(task, sizes[task]) == sizes[task]:
                kept[task] = one
            elif task not in own.tasks:
                print(f"{file}: {ELUE_TASKS[task]} was run at other sizes ({earlier.settings[task]}); left out")
        settings = {task: size for task, size in earlier.settings.items() if task in kept}
        found[earlier.name] = replace(own, tasks={**kept, **own.tasks}, settings={**settings, **own.settings})
    return {name: result for name, result in found.items() if result.tasks}


def publish(own: list[Result], jobs: list[Job], folder: Path, reference: Reference | None) -> None:
    """Keep the results of a run, and write and print the leaderboard of all that the folder holds, against the
    reference given, else the exits of `elasticbert`, where the folder has them.

    Runs that end together in one folder take turns: each adds to the files that the other has read.
    """
    kept = folder / RESULTS
    kept.mkdir(exist_ok=True)
    with FileLock(folder / ".lock"):
        results = _beside_earlier({result.name: result for result in own}, jobs, kept)
        for result in own:  # what others found stays as it is, also at other sizes
            write_result(results[result.name], kept / f"{result.name}.json")
        if reference is None and REFERENCE in results:
            reference = REFERENCE, {task: one.reference for task, one in results[REFERENCE].tasks.items()}
        name, curves = reference or (None, {})
        board = leaderboard_of(list(results.values()), curves, name)
        write_board(board, folder)
    print(text(board))
