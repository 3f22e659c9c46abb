"""`python -m finetune elue run`: every method on every task, from fine-tuning to the leaderboard, stage by stage.

A stage that is there is not made again: checkpoints/METHOD/TASK/seed-N, submissions/METHOD/seed-N/TASK, results.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, logging

from elastic_model import ElasticBertModel
from elastic_model.folders import check_output, claim_folder, new_file, new_folder
from elastic_model.provenance import file_hash
from finetune.config import TaskOptions, TrainOptions
from finetune.elue.config import SIZES, RunOptions
from finetune.elue.costs import CostTable, ModuleCost, load_costs, table_of, write_table
from finetune.elue.leaderboard import leaderboard_of, text, write_board
from finetune.elue.methods import LAST_EXIT, METHODS, Method, Setting, chosen_methods, constant_share
from finetune.elue.points import Subject, choose_settings, outputs_of, write_point
from finetune.elue.score import points_of, true_labels
from finetune.elue.scoring import Result, TaskResult, read_reference, write_result
from finetune.elue.submission import MODULES_FILE, files_of
from finetune.elue.tasks import ELUE_TASKS, Answers, answers_to, task_called
from finetune.examples import Examples, read_examples
from finetune.labels import encode_labels
from finetune.prepare import (
    chosen_task,
    encode_split,
    labels_of_model,
    load_classifier,
    load_tokenizer,
    some_rows,
    weight_files,
)
from finetune.tasks import Task
from finetune.train import train

SETTINGS = "settings.json"  # what makes two stages the same


@dataclass(frozen=True)
class Job:
    """One task of a run: its sizes, its rows, and the checkpoint that is taken instead of fine-tuning, if any."""

    name: str
    task: Task
    kind: Answers
    test: Examples
    dataset: str | None
    checkpoint: str | None
    epochs: int
    train_rows: int | None
    max_length: int
    seeds: list[int]

    @property
    def sizes(self) -> str:
        """The sizes that stand beside its numbers."""
        trained = "all" if self.train_rows is None else f"at most {self.train_rows:,}"
        made = f"{trained} train rows, {self.epochs} epochs a phase" if self.checkpoint is None else self.checkpoint
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        return f"{ELUE_TASKS[self.name]}: {made}, {self.max_length} tokens, {len(self.test):,} test rows, {seeds}"


def _named(given: list[str], flag: str) -> dict[str, str]:
    """{task: value} of TASK=VALUE words."""
    named = {}
    for word in given:
        task, equals, value = word.partition("=")
        if not equals or not value:
            raise ValueError(f"--{flag}: expected TASK=FOLDER, got {word!r}")
        named[task_called(task)] = value
    return named


def _sizes(options: RunOptions, name: str) -> dict[str, str]:
    """{task: value}, from the defaults, a value for all tasks, and TASK=VALUE words."""
    given = getattr(options, name)
    for_all = [word for word in given if "=" not in word]
    if name == "seeds" and for_all:
        for_all = [",".join(for_all)]
    if len(for_all) > 1:
        raise ValueError(f"--{name.replace('_', '-')}: expected one value for all tasks, got {' '.join(for_all)}")
    default = dict.fromkeys(ELUE_TASKS, for_all[0]) if for_all else SIZES[name]
    named = _named([word for word in given if "=" in word], name.replace("_", "-"))
    return {**default, **named}


def _count(sizes: Mapping[str, str], task: str, name: str) -> int | None:
    """A whole number from 1, or None for all."""
    value = sizes.get(task, "all")
    if value == "all" and name in ("train-rows", "test-rows"):
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"--{name}: expected a whole number from 1 for {task}, got {value!r}")
    return int(value)


def _seeds(sizes: Mapping[str, str], task: str) -> list[int]:
    words = sizes[task].split(",")
    if not all(word.isdecimal() for word in words) or len(set(words)) != len(words):
        raise ValueError(f"--seeds: expected whole numbers, each once, for {task}, got {sizes[task]!r}")
    return [int(word) for word in words]


def _jobs(options: RunOptions) -> list[Job]:
    """The tasks with their rows and sizes; ValueError where something cannot be had."""
    checkpoints, data = _named(options.checkpoints, "checkpoints"), _named(options.data, "data")
    sizes = {name: _sizes(options, name) for name in SIZES}
    jobs = []
    for name in dict.fromkeys(map(task_called, options.tasks)):
        checkpoint = checkpoints.get(name)
        if checkpoint is None and options.model is None:
            raise ValueError(f"--model is required: --checkpoints has none for {name}")
        task = chosen_task(TaskOptions(model="", task=name, dataset=data.get(name)))
        test_rows = _count(sizes["test_rows"], name, "test-rows")
        jobs.append(
            Job(
                name,
                task,
                answers_to(name),
                some_rows(read_examples(task, "test"), test_rows, seed=0),
                data.get(name),
                checkpoint,
                _count(sizes["epochs"], name, "epochs") or 0,
                _count(sizes["train_rows"], name, "train-rows"),
                _count(sizes["max_length"], name, "max-length") or 0,
                _seeds(sizes["seeds"], name) if checkpoint is None else [0],
            )
        )
    if not jobs:
        raise ValueError(f"--tasks is empty; allowed: {', '.join(ELUE_TASKS)}")
    return jobs


def _check(options: RunOptions, methods: Mapping[str, Method], jobs: list[Job]) -> None:
    """ValueError for what would only fail after an hour."""
    check_output(Path(options.output))
    if options.points < 1:
        raise ValueError(f"points must be at least 1, got {options.points}")
    if not options.shares or not all(0 < share <= 1 for share in options.shares):
        raise ValueError(f"shares must lie in (0, 1], got {options.shares}")
    for job in jobs:
        if job.checkpoint is not None:
            config = load_classifier(Path(job.checkpoint), job.max_length).config
            for name, method in methods.items():
                if method.depths:
                    raise ValueError(f"method {name} makes models of its own: it cannot be run on --checkpoints")
                if method.policy_for(job.kind.problem_type) == "learned" and not config.learned_exit_head:
                    raise ValueError(f"method {name}: the checkpoint of {job.name} has no learned exit head")
    if options.model is not None and any(job.checkpoint is None for job in jobs):
        weight_files(Path(options.model))
        _depths(options)


def _layers(folder: str) -> int:
    """The layers of a checkpoint."""
    return AutoConfig.from_pretrained(folder, local_files_only=True).num_hidden_layers


def _depths(options: RunOptions) -> list[int]:
    """The depths of the models of `static`; by default thirds of the starting checkpoint's."""
    layers = _layers(str(options.model))
    depths = options.depths or sorted({max(1, round(layers * share / 3)) for share in (1, 2, 3)})
    if not all(1 <= depth <= layers for depth in depths):
        raise ValueError(f"depths must be 1 to {layers}, the layers of {options.model}, got {depths}")
    return depths


def _cut(options: RunOptions, depth: int) -> str:
    """The starting checkpoint cut to its first layers."""
    folder = Path(options.output) / "starts" / f"layers-{depth}"
    if not folder.exists():
        with new_folder(folder) as new:
            model = ElasticBertModel.from_pretrained(options.model, num_hidden_layers=depth, local_files_only=True)
            model.save_pretrained(new)
            load_tokenizer(Path(options.model or "")).save_pretrained(new)
    return str(folder)


def _training(options: RunOptions, job: Job, method: Method, seed: int, depth: int | None) -> TrainOptions:
    """How a checkpoint is made; methods with the same training share it."""
    owner = next(name for name, other in METHODS.items() if other.training == method.training)
    start = str(options.model) if depth is None else _cut(options, depth)
    changes = dict(method.training)
    if changes.get("exit_layers") == LAST_EXIT:
        changes["exit_layers"] = [_layers(start)]
    folder = Path(options.output) / "checkpoints" / owner / job.name / f"seed-{seed}"
    return TrainOptions(
        model=start,
        task=job.name,
        dataset=job.dataset,
        output=str(folder if depth is None else folder / f"layers-{depth}"),
        epochs=job.epochs,
        train_rows=job.train_rows,
        max_length=job.max_length,
        seed=seed,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        eval_batch_size=options.eval_batch_size,
        resume=True,
        **changes,
    )


def _settings(options: RunOptions, job: Job, method: Method, checkpoints: list[Path]) -> dict[str, Any]:
    """What a submission was made from: where that has changed, it is made again."""
    weights = [file_hash(file) for folder in checkpoints for file in weight_files(folder)]
    return {
        "weights": weights,
        "policy": method.policy_for(job.kind.problem_type),
        "points": options.points,
        "shares": options.shares,
        "test rows": len(job.test),
        "max_length": job.max_length,
    }


def _submit(options: RunOptions, job: Job, method: Method, checkpoints: list[Path], folder: Path) -> None:
    """The test files of a method on a task, from its checkpoints, with the table of its modules' costs."""
    settings = _settings(options, job, method, checkpoints)
    if (folder / SETTINGS).is_file() and json.loads((folder / SETTINGS).read_text()) == settings:
        return
    with new_folder(folder) as new:
        modules: dict[str, ModuleCost] = {}
        for checkpoint in checkpoints:
            subject, splits = _subject(options, job, checkpoint)
            for setting, outputs in _points(options, job, method, subject, splits):
                write_point(subject, setting, outputs, splits["test"], new, job.kind.classes)
            modules |= table_of(subject.config, job.kind.outputs).modules
        write_table(CostTable(modules), new / MODULES_FILE)
        (new / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")


def _subject(options: RunOptions, job: Job, checkpoint: Path) -> tuple[Subject, dict[str, Any]]:
    """A checkpoint with its tokenised dev and test splits."""
    model, tokenizer = load_classifier(checkpoint, job.max_length), load_tokenizer(checkpoint)
    labels = labels_of_model(TaskOptions(model=str(checkpoint), task=job.name), job.task, model.config)
    examples = {"dev": read_examples(job.task, "dev"), "test": job.test}
    splits = {
        split: encode_split(rows, split, job.task, labels, tokenizer, job.max_length)
        for split, rows in examples.items()
    }
    return Subject(model, tokenizer, labels, options.eval_batch_size), splits


def _points(
    options: RunOptions, job: Job, method: Method, subject: Subject, splits: Mapping[str, Any]
) -> Iterator[tuple[Setting, Any]]:
    """The operating points of a method with what the exits say on test, a pass for every sub-network."""
    policy = method.policy_for(job.kind.problem_type)
    if method.settings is not None:
        settings = method.settings(subject.config, options)
    else:
        shares = options.shares if method.lengths else [1.0]
        lengths = [constant_share(share, subject.config.num_hidden_layers) for share in shares]
        settings = choose_settings(subject, policy or "", lengths, splits["dev"], options.points)
    passes: dict[str, Any] = {}
    for setting in settings:
        key = json.dumps(setting.sub_network)
        if key not in passes:
            passes[key] = outputs_of(subject, splits["test"], setting)
        yield setting, passes[key]


def _write_labels(jobs: list[Job], folder: Path) -> None:
    """The true labels of the test rows, as `score --labels` reads them."""
    folder.mkdir(exist_ok=True)
    for job in jobs:
        labels = encode_labels(job.task, job.test, list(job.kind.classes), job.kind.problem_type)
        lines = [f"{index}\t{label:.6g}" for index, label in enumerate(labels.tolist())]
        with new_file(folder / f"{job.name}.tsv") as file:
            file.write_text("\n".join(["index\tlabel", *lines]) + "\n")


def _result(name: str, method: Method, jobs: list[Job], folder: Path) -> Result:
    """A method's test files read back and scored, as anybody's would be."""
    tasks = {}
    for job in jobs:
        if method.fits(job.kind.problem_type):
            seeds = []
            labels = true_labels(job.name, folder / "labels")
            for seed in job.seeds:
                submission = folder / "submissions" / name / f"seed-{seed}"
                costs = load_costs(submission / job.name / MODULES_FILE, job.kind)
                seeds.append(points_of(files_of(submission)[job.name], labels, job.kind, costs))
            tasks[job.name] = TaskResult(job.kind.metric, len(labels), seeds)
    return Result(name, tasks, method.describe(), {job.name: job.sizes for job in jobs})


def run(options: RunOptions) -> int:
    """Run ELUE and print the leaderboard; exit code 0, or 143 after SIGTERM (a second call goes on)."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    methods, jobs = chosen_methods(options.methods), _jobs(options)
    _check(options, methods, jobs)
    reference = read_reference(Path(options.reference)) if options.reference else None
    folder = claim_folder(Path(options.output))
    _write_labels(jobs, folder / "labels")
    for job in jobs:
        for name, method in methods.items():
            for seed in job.seeds if method.fits(job.kind.problem_type) else []:
                print(f"{ELUE_TASKS[job.name]}, seed {seed}, {name}", flush=True)
                code, checkpoints = _checkpoints(options, job, method, seed)
                if code:
                    return code
                _submit(options, job, method, checkpoints, folder / "submissions" / name / f"seed-{seed}" / job.name)
    results = {name: _result(name, method, jobs, folder) for name, method in methods.items()}
    results = {name: result for name, result in results.items() if result.tasks}
    (folder / "results").mkdir(exist_ok=True)
    for name, result in results.items():
        write_result(result, folder / "results" / f"{name}.json")
    own = results.get("elasticbert")
    if reference is None and own is not None:
        reference = {task: one.points for task, one in own.tasks.items()}
    against = options.reference or ("elasticbert" if own is not None else None)
    board = leaderboard_of(list(results.values()), reference or {}, against, [job.sizes for job in jobs])
    write_board(board, folder)
    print(text(board))
    return 0


def _checkpoints(options: RunOptions, job: Job, method: Method, seed: int) -> tuple[int, list[Path]]:
    """The exit code of the training that was needed, and the checkpoints of a method on a task."""
    if job.checkpoint is not None:
        return 0, [Path(job.checkpoint)]
    depths = _depths(options) if method.depths else [None]
    trainings = [_training(options, job, method, seed, depth) for depth in depths]
    for training in trainings:
        code = train(training)
        if code:
            return code, []
    return 0, [Path(training.output) for training in trainings]
