"""Tasks as a table: where the rows of each split are, which columns they have, how they are scored."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from finetune.sources import DatasetSource, Source

DATA_VARIABLE = "ELASTIC_MODEL_DATA"  # the environment variable that names the folder of local data sets
EMBEDDED = Path(__file__).parent / "data"
SPLITS = ("train", "dev", "test")
# what splits are called in data sets, the first that is there counts
SPLIT_NAMES = {"train": ("train",), "dev": ("validation", "dev", "valid"), "test": ("test",)}

ProblemType = Literal[
    "single_label_classification",
    "multi_label_classification",
    "regression",
    "token_classification",
    "question_answering",
]
SQUAD_COLUMNS = {"text": "question", "pair": "context", "label": "answers"}


@dataclass(frozen=True)
class Hub:
    """A task as a data set of the hub: its columns, and the names of its splits where they are not the usual ones."""

    dataset: str
    config: str | None
    text: str
    pair: str | None = None
    label: str = "label"
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "dev": "validation"})
    missing: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """One task. `labels`: what the file says -> the label's name, in the classes' order; None: read from train.

    text, pair, label: names of the columns (label None: the last one). `hub`: where its rows are looked for when the
    folder of local data sets has none.
    """

    name: str
    splits: Mapping[str, Source | DatasetSource]
    text: str
    label: str | None
    pair: str | None = None
    labels: Mapping[str, str] | None = None
    problem_type: ProblemType | None = "single_label_classification"
    metrics: tuple[str, ...] = ()
    folder: Callable[[], Path] = field(default=lambda: data_folder())
    hub: Hub | None = None


def data_folder() -> Path:
    """The folder of local data sets; ValueError where the environment does not name one."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        raise ValueError(f"{DATA_VARIABLE} is not set; set it to the folder of local data sets that this task reads")
    return Path(folder)


def _no_yes(no: str, yes: str) -> dict[str, str]:
    return {"0": no, "1": yes}


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


def _glue(config: str, text: str = "sentence", pair: str | None = None, **splits: str) -> Hub:
    """A task of GLUE; the labels of its test splits are not public."""
    return Hub("nyu-mll/glue", config, text, pair, splits={"train": "train", **(splits or {"dev": "validation"})})


def _from_hub(name: str, hub: Hub, labels: Mapping[str, str], metrics: tuple[str, ...] = ()) -> Task:
    """A classification task that has no local form."""
    return Task(name, {}, hub.text, hub.label, hub.pair, labels, metrics=metrics, hub=hub)


STSB_COLUMNS = ("genre", "file", "year", "id", "score", "sentence1", "sentence2")
COLA_COLUMNS = ("source", "label", "mark", "sentence")
ALL_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
NLI_LABELS = _same("entailment", "neutral", "contradiction")
MLQA_DEV = 148  # questions

TASKS = {
    task.name: task
    for task in (
        Task(
            "era",
            {split: Source(f"era/{split}.tsv.xz") for split in SPLITS},
            text="text",
            label="label",
            folder=lambda: EMBEDDED,
        ),
        Task(
            "sst2",
            {"train": Source("sst2/train.tsv.gz"), "dev": Source("sst2/dev.tsv"), "test": Source("sst2/test.tsv")},
            text="sentence",
            label="label",
            labels=_no_yes("negative", "positive"),
            metrics=("accuracy", "f1"),
            hub=_glue("sst2"),
        ),
        Task(
            "imdb",  # it has no dev split: the last 1,000 train rows (the file is shuffled)
            {
                "train": Source("imdb/train.jsonl.xz", end=-1000),
                "dev": Source("imdb/train.jsonl.xz", first=-1000),
                "test": Source("imdb/test.jsonl.xz"),
            },
            text="text",
            label="label",
            labels=_no_yes("negative", "positive"),
            metrics=("accuracy", "f1"),
        ),
        Task(
            "mrpc",  # it has no dev split: the last 408 train rows, GLUE's number
            {
                "train": Source("mrpc/msr_paraphrase_train.txt", end=-408),
                "dev": Source("mrpc/msr_paraphrase_train.txt", first=-408),
                "test": Source("mrpc/msr_paraphrase_test.txt"),
            },
            text="#1 String",
            pair="#2 String",
            label="Quality",
            labels=_no_yes("not_equivalent", "equivalent"),
            metrics=("accuracy+f1", "accuracy", "f1"),
            hub=_glue("mrpc", "sentence1", "sentence2"),
        ),
        Task(
            "stsb",
            {split: Source(f"stsb/sts-{split}.csv", form="tsv", columns=STSB_COLUMNS) for split in SPLITS},
            text="sentence1",
            pair="sentence2",
            label="score",
            problem_type="regression",
            hub=_glue("stsb", "sentence1", "sentence2"),
        ),
        Task(
            "rte",
            {split: Source(f"rte/{split}.tsv") for split in ("train", "dev")},
            text="sentence1",
            pair="sentence2",
            label="label",
            labels=_same("entailment", "not_entailment"),
            hub=_glue("rte", "sentence1", "sentence2"),
        ),
        Task(
            "cola",
            {split: Source(f"cola/{split}.tsv", columns=COLA_COLUMNS) for split in ("train", "dev")},
            text="sentence",
            label="label",
            labels=_no_yes("unacceptable", "acceptable"),
            metrics=("matthews", "accuracy"),
            hub=_glue("cola"),
        ),
        Task(
            "sick",
            {
                split: Source(f"sick/SICK_{name}.txt")
                for split, name in (("train", "train"), ("dev", "trial"), ("test", "test_annotated"))
            },
            text="sentence_A",
            pair="sentence_B",
            label="entailment_judgment",
            labels={"ENTAILMENT": "entailment", "NEUTRAL": "neutral", "CONTRADICTION": "contradiction"},
        ),
        Task(
            "wnut17",  # the corrected annotation of the test split, as the shared task's paper scores it
            {
                "train": Source("wnut17/wnut17train.conll"),
                "dev": Source("wnut17/emerging.dev.conll"),
                "test": Source("wnut17/emerging.test.annotated", form="conll"),
            },
            text="1",
            label=None,
            problem_type="token_classification",
        ),
        Task(
            "mlqa",  # English MLQA's dev split for training and dev; XQuAD, of SQuAD's dev split, for test
            {
                "train": Source("mlqa/dev-context-en-question-en.json", end=-MLQA_DEV),
                "dev": Source("mlqa/dev-context-en-question-en.json", first=-MLQA_DEV),
                "test": Source("xquad/xquad.en.json"),
            },
            text=SQUAD_COLUMNS["text"],
            pair=SQUAD_COLUMNS["pair"],
            label=SQUAD_COLUMNS["label"],
            problem_type="question_answering",
        ),
        _from_hub("qnli", _glue("qnli", "question", "sentence"), _same("entailment", "not_entailment"), ("accuracy",)),
        _from_hub(
            "qqp",
            _glue("qqp", "question1", "question2"),
            _same("not_duplicate", "duplicate"),
            ("accuracy+f1", "accuracy", "f1"),
        ),
        _from_hub(  # test: the mismatched half of the public labels
            "mnli",
            _glue("mnli", "premise", "hypothesis", dev="validation_matched", test="validation_mismatched"),
            NLI_LABELS,
            ("accuracy",),
        ),
        _from_hub(
            "wnli", _glue("wnli", "sentence1", "sentence2"), _same("not_entailment", "entailment"), ("accuracy",)
        ),
        _from_hub(  # -1: the annotators did not agree
            "snli",
            Hub("stanfordnlp/snli", None, "premise", "hypothesis", splits=ALL_SPLITS, missing=("-1",)),
            NLI_LABELS,
            ("accuracy",),
        ),
        _from_hub(
            "scitail",
            Hub("allenai/scitail", "tsv_format", "premise", "hypothesis", splits=ALL_SPLITS),
            {"entails": "entails", "neutral": "neutral"},
            ("accuracy",),
        ),
    )
}


def find_task(name: str, dataset: str | None = None) -> Task:
    """The task of the table, from the local folder or from the hub, or from a copy of its data set elsewhere.

    ValueError: no such task (the table is listed), or a task that has no local form and no hub; whether its data can
    be had is seen when they are read.
    """
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown; allowed: {', '.join(TASKS)}, or --train, --dev, --text, --label")
    task = TASKS[name]
    if task.hub is None and dataset:
        raise ValueError(f"--dataset {dataset}: task {name} is no data set of the hub; its files are its own")
    if task.hub is None or (dataset is None and _is_local(task)):
        return task
    splits = {
        split: DatasetSource(
            dataset or task.hub.dataset,
            (theirs,) if dataset is None else (theirs, *SPLIT_NAMES[split]),
            None if dataset else task.hub.config,
            task.hub.missing,
            task.hub.label,
        )
        for split, theirs in task.hub.splits.items()
    }
    return replace(task, splits=splits, text=task.hub.text, pair=task.hub.pair, label=task.hub.label, folder=Path)


def _is_local(task: Task) -> bool:
    folder = Path(os.environ.get(DATA_VARIABLE) or os.devnull)
    return any((folder / source.file).exists() for source in task.splits.values() if isinstance(source, Source))


def own_task(files: Mapping[str, str], columns: Mapping[str, str | None], problem_type: ProblemType | None) -> Task:
    """The task of the user's own files: {split: file}, {"text" | "pair" | "label": column}.

    SQuAD's JSON needs no columns; of CoNLL columns the first is the text and the last the label unless said otherwise.
    """
    splits = {split: Source(file) for split, file in files.items()}
    kinds = {source.kind for source in splits.values()}
    defaults: Mapping[str, str | None] = {}
    if kinds == {"squad"}:
        defaults = SQUAD_COLUMNS
    elif kinds == {"conll"}:
        defaults = {"text": "1"}
    return _own("own files", splits, {**defaults, **_given(columns)}, problem_type, "conll" in kinds)


def dataset_task(
    dataset: str,
    config: str | None,
    splits: Mapping[str, str],
    columns: Mapping[str, str | None],
    problem_type: ProblemType | None,
) -> Task:
    """The task of a data set that `datasets` loads; splits: {split: its name there} where it is not the usual one."""
    label = columns.get("label")
    sources = {
        split: DatasetSource(dataset, (splits[split],) if split in splits else usual, config, label=label)
        for split, usual in SPLIT_NAMES.items()
    }
    return _own(Path(dataset).name, sources, _given(columns), problem_type, False)


def _given(columns: Mapping[str, str | None]) -> dict[str, str]:
    return {name: column for name, column in columns.items() if column}


def _own(
    name: str,
    splits: Mapping[str, Source | DatasetSource],
    columns: Mapping[str, str | None],
    problem_type: ProblemType | None,
    last_is_label: bool,
) -> Task:
    text, label = columns.get("text"), columns.get("label")
    if not text or not (label or last_is_label):
        raise ValueError("your own files need --text and --label, the names of their columns (and --pair for pairs)")
    return Task(name, splits, text, label, columns.get("pair"), None, problem_type, folder=Path)
