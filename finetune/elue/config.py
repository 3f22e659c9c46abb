"""Options of the commands of ELUE, one dataclass each; the only place where a default of theirs stands."""

from dataclasses import dataclass

from elastic_model.arguments import option

REFERENCE_HELP = (
    "curve that scores are against: scores.json of any submission (or its folder), or a TSV of task, flops, quality"
    " (in percent)"
)


@dataclass(kw_only=True)
class ScoreOptions:
    """Score a submission in ELUE's format: its points, its Pareto front, its distance from a reference curve."""

    submission: str = option(
        help="the test files: a folder of TASK.tsv, or of TASK/POINT.tsv for several operating points; or one TASK.tsv"
    )
    model_file: str | None = option(
        None,
        help="what the modules cost: a table (.tsv, .json), a config.json, a checkpoint folder, a folder with "
        "TASK.tsv or TASK.json a task, or a model.py (default: TASK/modules.tsv or modules.tsv in the submission)",
    )
    trust_model_code: bool = option(
        False, help="run the Python code of a model.py, which can do anything that you can do; only for code you trust"
    )
    labels: str | None = option(
        None,
        help="the true labels: a file with the columns index and label, or a folder of TASK.tsv (default: the task's "
        "test split)",
    )
    reference: str | None = option(None, help=REFERENCE_HELP)
    name: str | None = option(None, help="what the submission is called (default: its folder)")
    output: str | None = option(None, help="folder for scores.json and leaderboard.txt, .json and .html")


@dataclass(kw_only=True)
class LeaderboardOptions:
    """Put scored submissions side by side, against one reference."""

    results: list[str] = option([], help="scores.json of each submission, or their folders")
    reference: str | None = option(None, help=REFERENCE_HELP)
    output: str | None = option(None, help="folder for leaderboard.txt, .json and .html")


# Sizes of a run: what two CPU cores does in an hour; --train-rows all and the like make it larger
SIZES: dict[str, dict[str, str]] = {
    "epochs": {"sst2": "2", "imdb": "2", "snli": "2", "scitail": "2", "mrpc": "3", "stsb": "3"},
    "train_rows": {"sst2": "10000", "imdb": "2000", "snli": "10000", "scitail": "10000"},
    "test_rows": {"imdb": "1000"},
    "max_length": {"sst2": "64", "imdb": "256", "snli": "128", "scitail": "128", "mrpc": "128", "stsb": "128"},
    "learning_rate": dict.fromkeys(("sst2", "imdb", "snli", "scitail", "mrpc", "stsb"), "5e-5"),
    "seeds": {"sst2": "0", "imdb": "0", "snli": "0", "scitail": "0", "mrpc": "0,1,2", "stsb": "0,1,2"},
}


def _per_task(name: str, what: str) -> list[str]:
    default = " ".join(f"{task}={value}" for task, value in SIZES[name].items())
    return option([], help=f"{what}: one for all tasks, or TASK=VALUE for some (default: {default})")


LAST_EXIT = "last exit only"  # in the training of a method, for `exit_layers`: whatever the depth of the model


@dataclass(kw_only=True)
class SizeOptions:
    """What is run on: starting checkpoint, tasks, how many rows, epochs and seeds; and what is scored against."""

    model: str | None = option(
        None,
        help="starting checkpoint, elastic or stock (not needed where --checkpoints has all)",
        positional=True,
    )
    output: str = option(help="folder of the run; a run that was interrupted goes on where it stopped")
    tasks: list[str] = option(
        ["sst2", "imdb", "mrpc", "stsb"],
        help="sst2, imdb, snli, scitail, mrpc, stsb; or joined by commas",
    )
    checkpoints: list[str] = option([], help="TASK=FOLDER: a task checkpoint to take instead of fine-tuning")
    data: list[str] = option(
        [], help="TASK=FOLDER: read snli or scitail (or GLUE's) there: a folder of files or of datasets' save_to_disk"
    )
    epochs: list[str] = _per_task("epochs", "passes over the train split, in each phase of a recipe")
    train_rows: list[str] = _per_task("train_rows", "rows of the train split, drawn by the seed, or all")
    test_rows: list[str] = _per_task("test_rows", "rows of the test split, drawn once, or all")
    max_length: list[str] = _per_task("max_length", "tokens of a row, at most")
    seeds: list[str] = _per_task("seeds", "seeds, joined by commas")
    batch_size: int = option(32, help="rows of one update")
    learning_rate: list[str] = _per_task("learning_rate", "peak learning rate of AdamW")
    eval_batch_size: int = option(64, help="rows in one forward pass of an evaluation")
    reference: str | None = option(None, help=f"{REFERENCE_HELP} (default: the elasticbert of the folder, else none)")


@dataclass(kw_only=True)
class RunOptions(SizeOptions):
    """Run ELUE: fine-tune (or take checkpoints), sweep exits or policies, write test files, count FLOPs, score."""

    methods: list[str] = option(
        ["elasticbert", "elasticbert-entropy", "elasticbert-patience"],
        help="what to compare, by name: a recipe and a policy each (finetune/elue/methods.py has the table), or all",
    )
    points: int = option(8, help="operating points of a method with a policy, chosen on dev")
    depths: list[int] = option([], help="layers of the models of `static` (default: thirds of the model's)")
    shares: list[float] = option(
        [1.0, 0.95, 0.9, 0.8, 0.7], help="lengths tried: the share of its tokens that every layer passes on"
    )
