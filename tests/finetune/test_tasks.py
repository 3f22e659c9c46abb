"""The table of tasks, labels as names, and what is wrong with a label."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finetune.examples import Examples, check_shape, find_problem_type, read_examples
from finetune.kinds import KINDS
from finetune.labels import Labels, check_labels, encode_labels, find_labels
from finetune.tasks import DATA_VARIABLE, TASKS, find_task, own_task

# rows that the public splits have; dev of mrpc and imdb is cut from train
ROWS = {
    "era": {"train": 3200, "dev": 480, "test": 1200},
    "sst2": {"train": 67349, "dev": 872, "test": 1821},
    "imdb": {"train": 24000, "dev": 1000, "test": 12500},
    "mrpc": {"train": 3668, "dev": 408, "test": 1725},
    "stsb": {"train": 5749, "dev": 1500, "test": 1379},
    "rte": {"train": 2490, "dev": 277},
    "cola": {"train": 7250, "dev": 1043},  # GLUE has 8,551 train rows, the local copy fewer
    "sick": {"train": 4500, "dev": 500, "test": 4927},
    "wnut17": {"train": 3394, "dev": 1009, "test": 1287},
    "mlqa": {"train": 1000, "dev": 148, "test": 1190},
}


def table(tmp_path, *rows, columns="text\tlabel", name="train.tsv"):
    file = tmp_path / name
    file.write_text("\n".join([columns, *rows]) + "\n")
    return str(file)


def examples_of(tmp_path, *rows, problem_type=None, **columns):
    task = own_task({"train": table(tmp_path, *rows)}, {"text": "text", "label": "label", **columns}, problem_type)
    return task, read_examples(task, "train")


@pytest.mark.parametrize("name", ROWS)
def test_every_local_task_of_the_table_reads(name, tiny_tokenizer):
    if name != "era" and not os.environ.get(DATA_VARIABLE):
        pytest.skip(f"{DATA_VARIABLE} is not set")
    task = find_task(name)
    train = read_examples(task, "train")
    problem_type = find_problem_type(task, train)
    kind = KINDS[problem_type]
    labels = Labels(problem_type, kind.names(task, train, problem_type), kind.default)
    for split, rows in ROWS[name].items():
        examples = read_examples(task, split)
        assert len(examples) == rows
        some = examples.select(list(range(0, rows, max(1, rows // 60))))
        encoded = kind.encode(task, some, split, labels, tiny_tokenizer, 64)
        assert len(encoded.labels) == len(some)
        if problem_type == "single_label_classification":
            assert set(encoded.labels) == set(range(len(labels.names)))  # of three classes and more also in a part


def test_the_embedded_task_needs_no_data_folder(monkeypatch):
    monkeypatch.delenv(DATA_VARIABLE, raising=False)
    assert len(read_examples(TASKS["era"], "dev")) == ROWS["era"]["dev"]
    with pytest.raises(ValueError, match=f"{DATA_VARIABLE} is not set"):
        read_examples(TASKS["sst2"], "dev")


def test_a_folder_without_the_task_names_the_file(monkeypatch, tmp_path):
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match="sst2/dev.tsv"):
        read_examples(TASKS["sst2"], "dev")


def test_an_unknown_task_lists_the_table():
    with pytest.raises(ValueError, match="task 'sst' is unknown; allowed: era, sst2"):
        find_task("sst")


def test_classes_are_sorted_as_numbers_where_they_are_numbers(tmp_path):
    task, examples = examples_of(tmp_path, "a\t10", "b\t9", "c\t9", "d\t1")
    problem_type = find_problem_type(task, examples)
    names = find_labels(task, examples, problem_type)
    assert (problem_type, names) == ("single_label_classification", ["1", "9", "10"])
    assert encode_labels(task, examples, names, problem_type).tolist() == [2, 1, 1, 0]


def test_fractional_labels_are_regression(tmp_path):
    task, examples = examples_of(tmp_path, "a\t1.5", "b\t2", "c\t2.25")
    assert find_problem_type(task, examples) == "regression"
    assert encode_labels(task, examples, ["score"], "regression").tolist() == [1.5, 2.0, 2.25]


def test_several_labels_in_a_cell(tmp_path):
    task, examples = examples_of(tmp_path, "a\tx|y", "b\t", "c\ty", problem_type="multi_label_classification")
    names = find_labels(task, examples, "multi_label_classification")
    encoded = encode_labels(task, examples, names, "multi_label_classification")
    assert encoded.tolist() == [[1, 1], [0, 0], [0, 1]]


def test_labels_joined_in_cells_are_several(tmp_path):
    """As the README says; they were a class of their own each."""
    _, examples = examples_of(tmp_path, "a\tx|y", "b\ty", "c\tx")
    assert find_problem_type(_, examples) == "multi_label_classification"
    check_shape(replace(examples, labels=["x|y", "", "x"]), "multi_label_classification")  # a row may have none
    _, names_with_bars = examples_of(tmp_path, "a\tx|y", "b\tz", "c\tx|y")
    assert find_problem_type(_, names_with_bars) == "single_label_classification"
    rare = [*(f"{number}\t{label}" for number, label in enumerate(["x|y", "x|z", "y|z", "x", "y", "z"])), "7\tx|new"]
    assert (
        find_problem_type(*examples_of(tmp_path, *rare)) == "multi_label_classification"
    )  # a rare one changes nothing


def test_blanks_around_a_label_are_none_of_its_name(tmp_path):
    task, several = examples_of(tmp_path, "a\tx | y", "b\ty", "c\t x")
    kind = find_problem_type(task, several)
    assert kind == "multi_label_classification" and find_labels(task, several, kind) == ["x", "y"]
    assert encode_labels(task, several, ["x", "y"], kind).tolist() == [[1, 1], [0, 1], [1, 0]]
    task, one = examples_of(tmp_path, "a\tpos", "b\tpos ", "c\tneg")
    assert find_labels(task, one, "single_label_classification") == ["neg", "pos"]
    assert encode_labels(task, one, ["neg", "pos"], "single_label_classification").tolist() == [1, 1, 0]


@pytest.mark.parametrize("value", ["nan", "inf", "", "high"])
def test_a_regression_label_that_is_no_number_is_named_with_its_row(tmp_path, value):
    task, examples = examples_of(tmp_path, "a\t1.5", f"b\t{value}", problem_type="regression")
    with pytest.raises(ValueError, match=f"row 3: a regression label must be a finite number .*, got '{value}'"):
        encode_labels(task, examples, ["score"], "regression")


def test_a_label_unseen_in_training_is_named_with_those_allowed(tmp_path):
    task, examples = examples_of(tmp_path, "a\tred", "b\tblue")
    with pytest.raises(ValueError, match="row 3: label 'blue' is not among the labels of the model: red, green"):
        encode_labels(task, examples, ["red", "green"], "single_label_classification")


def test_an_empty_text_is_named_with_its_row(tmp_path):
    with pytest.raises(ValueError, match=r"row 3: column 'text' has no text"):
        examples_of(tmp_path, "a\t1", " \t0")


@pytest.mark.parametrize("label", [None, "", " ", float("nan"), "NaN"])
def test_a_row_without_a_class_is_named(label):
    with pytest.raises(ValueError, match="row 2: the row has no label"):
        check_shape(Examples(["a", "b"], None, ["1", label], ["row 1", "row 2"]), "single_label_classification")


def test_own_files_need_their_columns(tmp_path):
    with pytest.raises(ValueError, match="need --text and --label"):
        own_task({"train": "a.tsv"}, {"text": "text"}, None)
    with pytest.raises(ValueError, match=r"there is no column 'second'; columns: text, label"):
        examples_of(tmp_path, "a\t1", pair="second")


def test_a_split_that_is_not_there_lists_those_that_are():
    with pytest.raises(ValueError, match="task 'own files' has no test split; it has: dev"):
        read_examples(own_task({"dev": "a.tsv"}, {"text": "text", "label": "label"}, None), "test")


def test_one_class_is_an_error():
    with pytest.raises(ValueError, match="the dev split has one class only"):
        check_labels(np.zeros(5, dtype=int), "dev", "single_label_classification")


def test_rows_that_all_have_the_same_labels_are_an_error():
    """As 0 and 1 for each of two labels are, where no row has none or both."""
    rows = Examples(["a", "b"], None, [[1, 0], [0, 1]], ["row 1", "row 2"])
    task = own_task({"train": "a.tsv"}, {"text": "t", "label": "l"}, None)
    encoded = encode_labels(task, rows, ["0", "1"], "multi_label_classification")
    with pytest.raises(ValueError, match="the train split has the same labels in all of its 2 rows"):
        check_labels(encoded, "train", "multi_label_classification")
    check_labels(np.array([[1, 1], [1, 0]]), "train", "multi_label_classification")


def test_no_speaker_is_on_two_sides():
    folder = Path(TASKS["era"].folder())
    from elastic_model.tables import read_table

    presidents = [
        {row["president"] for row in read_table(folder / f"era/{s}.tsv.xz")} for s in ("train", "dev", "test")
    ]
    assert not (presidents[0] & presidents[1] or presidents[0] & presidents[2] or presidents[1] & presidents[2])


@pytest.mark.parametrize(
    ("column", "cell", "problem_type", "says"),
    [
        ("texts", ["one sentence", "two"], "single_label_classification", "row 2: .* needs texts, got lists of words"),
        ("pairs", ["one", "two"], "single_label_classification", "row 2: the second text must be a text, got a list"),
        ("labels", {"a": 1}, "single_label_classification", "row 2: .* needs labels, got {'a': 1}"),
        ("labels", ["x"], "single_label_classification", "row 2: a row has one label"),
        ("labels", [None], "multi_label_classification", "row 2: the labels of a row must be names"),
        ("labels", [float("nan"), "x"], "multi_label_classification", "row 2: the labels of a row must be names"),
        ("labels", [["x"]], "multi_label_classification", "row 2: the labels of a row must be names"),
        ("labels", [{"text": "x"}], "multi_label_classification", "row 2: .* needs labels"),
        ("labels", [1, 0, 0], "multi_label_classification", "row 2: label '0' stands twice .* not a 0 or 1 for each"),
        ("labels", "x|y| x", "multi_label_classification", "row 2: label 'x' stands twice in a row: 'x.y. x'"),
    ],
)
def test_every_row_is_of_the_form_of_the_first(column, cell, problem_type, says):
    columns = {"texts": ["a", "b", "c"], "pairs": ["d", "e", "f"], "labels": ["x", "y", "x"]}
    columns[column][1] = cell
    examples = Examples(**columns, places=["row 1", "row 2", "row 3"])
    with pytest.raises(ValueError, match=says):
        check_shape(examples, problem_type)


def test_one_label_as_text_and_several_as_a_list_are_labels_of_one_task(tmp_path):
    rows = ['{"t": "some words", "l": "a"}', '{"t": "more words", "l": ["b", "a"]}', '{"t": "words", "l": ["b"]}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    task = own_task({"train": str(tmp_path / "rows.jsonl")}, {"text": "t", "label": "l"}, None)
    examples = read_examples(task, "train")
    assert find_problem_type(task, examples) == "multi_label_classification"
    names = find_labels(task, examples, "multi_label_classification")
    encoded = encode_labels(task, examples, names, "multi_label_classification")
    assert names == ["a", "b"] and encoded.tolist() == [[1, 0], [1, 1], [0, 1]]


def test_a_number_that_float32_does_not_hold_is_no_label():
    examples = Examples(["a", "b"], None, [1.0, 1e39], ["row 1", "row 2"])
    with pytest.raises(
        ValueError, match="row 2: a regression label must be a finite number .at most 3.4e.38., got 1e.39"
    ):
        encode_labels(None, examples, ["score"], "regression")


def test_labels_that_are_numbers_are_not_places():
    """Of a task whose file says 1 for its first class."""
    task = replace(TASKS["sst2"], labels={"1": "first", "0": "second"})
    examples = Examples(["a", "b"], None, ["0", "1"], ["", ""])
    assert encode_labels(task, examples, ["first", "second"], "single_label_classification").tolist() == [1, 0]
    named = replace(task, labels={"entailment": "yes", "neutral": "no"})
    assert encode_labels(named, examples, ["yes", "no"], "single_label_classification").tolist() == [0, 1]
