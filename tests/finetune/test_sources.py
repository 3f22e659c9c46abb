"""Rows from data sets that `datasets` loads, and tasks that are looked for locally first, then on the hub."""

import dataclasses

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from finetune import sources
from finetune.config import TrainOptions
from finetune.examples import check_shape, find_problem_type, read_examples
from finetune.kinds import KINDS
from finetune.labels import find_labels
from finetune.prepare import chosen_task, labels_of_training
from finetune.sources import DatasetSource
from finetune.tasks import DATA_VARIABLE, TASKS, find_task


def options(**changes):
    return TrainOptions(model="m", output="o", **changes)


@pytest.fixture
def folder(tmp_path):
    """-> folder(rows, features, **splits): a data set as `save_to_disk` leaves it."""

    def save(rows, features=None, splits=("train", "validation", "test")):
        data = Dataset.from_list(rows, features=features and Features(features))
        DatasetDict(dict.fromkeys(splits, data)).save_to_disk(tmp_path / "saved")
        return str(tmp_path / "saved")

    return save


TWO = {"sentence": Value("string"), "label": ClassLabel(names=["bad", "good"])}


def test_a_saved_data_set_has_its_labels_by_name(folder):
    saved = folder([{"sentence": "a", "label": 1}, {"sentence": "b", "label": 0}], TWO)
    task = chosen_task(options(dataset=saved, text="sentence", label="label"))
    for split in ("train", "dev", "test"):
        examples = read_examples(task, split)
        assert (examples.texts, examples.labels) == (["a", "b"], ["good", "bad"])
    assert examples.places[1] == f"{saved}, test, row 2"
    assert find_labels(task, examples, find_problem_type(task, examples)) == ["bad", "good"]


def test_a_split_that_was_saved_alone_is_no_other_split(tmp_path):
    """It was read as whichever was asked for: trained on, chosen by and tested on the same rows."""
    Dataset.from_list([{"sentence": "a", "label": 1}], features=Features(TWO)).save_to_disk(tmp_path / "alone")
    task = chosen_task(options(dataset=str(tmp_path / "alone"), text="sentence", label="label"))
    assert read_examples(task, "train").texts == ["a"]
    with pytest.raises(ValueError, match="has no split validation or .*; it has: train"):
        read_examples(task, "dev")
    part = Dataset.from_list([{"sentence": "a", "label": 1}], features=Features(TWO), split="train[:5]")
    part.save_to_disk(tmp_path / "part")
    task = chosen_task(options(dataset=str(tmp_path / "part"), text="sentence", label="label"))
    assert read_examples(task, "train").texts == ["a"]


def test_a_row_without_a_label_is_no_class(folder):
    """`datasets` writes -1, which became a class of that name."""
    saved = folder([{"sentence": "a", "label": 1}, {"sentence": "b", "label": -1}], TWO)
    task = chosen_task(options(dataset=saved, text="sentence", label="label"))
    with pytest.raises(ValueError, match="row 2: the row has no label .its value: None."):
        check_shape(read_examples(task, "train"), "single_label_classification")


def test_a_folder_of_files_is_a_data_set_too(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\none,1.5\ntwo,2.5\n")
    examples = read_examples(chosen_task(options(dataset=str(tmp_path), text="text", label="label")), "train")
    assert examples.labels == [1.5, 2.5] and examples.texts == ["one", "two"]


def test_words_with_class_tags_are_token_tagging(folder):
    tags = List(ClassLabel(names=["O", "B-x"]))
    saved = folder([{"words": ["a", "b"], "tags": [0, 1]}], {"words": List(Value("string")), "tags": tags})
    task = chosen_task(options(dataset=saved, text="words", label="tags"))
    examples = read_examples(task, "dev")
    assert examples.labels == [["O", "B-x"]] and find_problem_type(task, examples) == "token_classification"


def test_answers_as_the_hub_has_them_are_question_answering(folder, tiny_tokenizer):
    answers = {"text": ["schools"], "answer_start": [4]}
    saved = folder([{"question": "what ?", "context": "our schools", "answers": answers}])
    task = chosen_task(options(dataset=saved, text="question", pair="context", label="answers"))
    examples = read_examples(task, "train")
    assert find_problem_type(task, examples) == "question_answering" and examples.labels == [answers]


def test_splits_by_other_names(folder):
    saved = folder([{"sentence": "a", "label": 1}], TWO, splits=("train", "matched"))
    task = chosen_task(options(dataset=saved, text="sentence", label="label", dev="matched"))
    assert len(read_examples(task, "dev")) == 1
    with pytest.raises(ValueError, match="has no split test; it has: train, matched"):
        read_examples(task, "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "a", "task": "sst2"}, "--task sst2 has its own files and columns; --text is for your own data"),
        ({"dataset": "d", "task": "era"}, "--dataset d: task era is no data set of the hub; its files are its own"),
        ({"dataset": "d", "text": "sentence"}, "need --text and --label"),
        ({}, "give --task NAME, or your own files with --train, --dev, --text and --label, or --dataset"),
    ],
)
def test_options_that_contradict_each_other_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        chosen_task(options(**changes))


def test_a_wrong_column_of_a_data_set_lists_those_there(folder):
    saved = folder([{"sentence": "a", "label": 1}], TWO)
    with pytest.raises(ValueError, match="there is no column 'text'; columns: sentence, label"):
        read_examples(chosen_task(options(dataset=saved, text="text", label="label")), "train")


def test_what_is_no_data_set_is_named(tmp_path):
    task = chosen_task(options(dataset=str(tmp_path), text="text", label="label"))
    with pytest.raises(ValueError, match=f"{tmp_path}: this folder cannot be loaded"):
        read_examples(task, "train")


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.hub])
def test_a_task_of_the_hub_reads_its_columns(name, folder, monkeypatch):
    """The hub's data set as its page describes it, from a local folder under the hub's name."""
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    task = find_task(name)
    columns = [column for column in (task.text, task.pair) if column]
    rows, feature = (
        [{"label": 0}, {"label": 1}, {"label": -1}],
        ClassLabel(names=list((task.labels or {}).values()) or ["x"]),
    )
    if name == "stsb":
        rows, feature = [{"label": 3.8}, {"label": 2.0}], Value("float32")
    if name == "scitail":
        rows, feature = [{"label": "neutral"}, {"label": "entails"}], Value("string")
    rows = [{**dict.fromkeys(columns, "a text"), **row} for row in rows if row["label"] != -1 or name == "snli"]
    names = sorted({source.splits[0] for source in task.splits.values()})
    saved = folder(rows, {**dict.fromkeys(columns, Value("string")), "label": feature}, splits=names)
    asked = []
    load = sources._load

    def local(source):
        asked.append((source.dataset, source.config))
        return load(dataclasses.replace(source, dataset=saved))

    monkeypatch.setattr(sources, "_load", local)
    for split in task.splits:
        examples = read_examples(task, split)
        assert len(examples) == 2  # SNLI's rows without a label are left out
        problem_type = find_problem_type(task, examples)
        labels = KINDS[problem_type].names(task, examples, problem_type)
        assert problem_type == "regression" or set(examples.labels) <= set(labels)
    assert set(asked) == {(task.hub.dataset, task.hub.config)}


def test_offline_the_error_names_the_folder_and_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    with pytest.raises(ValueError) as error:
        read_examples(find_task("rte"), "train")
    assert "nyu-mll/glue: this data set of the hub cannot be loaded" in str(error.value)
    assert f"task rte is read below ${DATA_VARIABLE}, else from the hub" in str(error.value)


def test_the_local_folder_comes_first(monkeypatch, tmp_path):
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    assert isinstance(find_task("sst2").splits["train"], DatasetSource)
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2/dev.tsv").write_text("sentence\tlabel\na\t0\n")
    assert read_examples(find_task("sst2"), "dev").texts == ["a"]


def test_provenance_names_the_hub_and_no_path_of_a_folder(tmp_path):
    described = DatasetSource("nyu-mll/glue", ("train",), "rte").describe(tmp_path, "rte", "train", "0" * 64)
    assert (described.hub_id, described.split) == ("nyu-mll/glue", "train")
    described = DatasetSource(str(tmp_path), ("train",)).describe(tmp_path, "own", "train", "0" * 64)
    assert described.hub_id is None and described.name == tmp_path.name


def test_a_copy_of_the_data_set_elsewhere(folder):
    saved = folder(
        [{"sentence": "a", "label": 1}], {"sentence": Value("string"), "label": ClassLabel(names=["0", "1"])}
    )
    task = chosen_task(options(task="sst2", dataset=saved))
    assert read_examples(task, "dev").labels == ["1"] and task.labels == {"0": "negative", "1": "positive"}


def test_a_file_of_columns_takes_their_numbers(tmp_path):
    (tmp_path / "a.conll").write_text("EU NNP B-ORG\nrejects VBZ O\n")
    examples = read_examples(chosen_task(options(train=str(tmp_path / "a.conll"), label="2")), "train")
    assert (examples.texts, examples.labels) == ([["EU", "rejects"]], [["NNP", "VBZ"]])


@pytest.mark.parametrize(
    ("architecture", "names", "message"),
    [
        ("BertForTokenClassification", ["x"], "has a head for token_classification, the task is single_label"),
        ("BertForQuestionAnswering", ["x"], "has a head for question_answering, the task is single_label"),
        ("BertForSequenceClassification", ["x", "y"], "is a classifier of other labels: x, y; the task has bad, good"),
    ],
)
def test_a_stock_checkpoint_of_another_head_is_named(architecture, names, message, folder, tmp_path):
    from transformers import BertConfig

    config = BertConfig(architectures=[architecture], id2label=dict(enumerate(names)))
    config.save_pretrained(tmp_path / "model")
    saved = folder([{"sentence": "a", "label": 1}, {"sentence": "b", "label": 0}], TWO)
    own = TrainOptions(model=str(tmp_path / "model"), output="o", dataset=saved, text="sentence", label="label")
    task = chosen_task(own)
    with pytest.raises(ValueError, match=message):
        labels_of_training(own, task, read_examples(task, "train"))
