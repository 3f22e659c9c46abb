import json
import os

import datasets
import pytest

from pretrain.config import Source
from pretrain.sources import TextFile, parts_of

ROWS = ["One. Two.\nThree.", "", None, "  \n Four,\tfive. "]
DOCUMENTS = [["One. Two.", "Three."], ["Four,\tfive."]]


@pytest.fixture(autouse=True)
def quiet_datasets(tmp_path, monkeypatch):
    """No bars, and nothing kept outside of the test."""
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    yield
    datasets.enable_progress_bars()


@pytest.fixture
def folders(tmp_path):
    """The same rows in a folder of each kind."""
    rows = datasets.Dataset.from_dict({"text": ROWS, "number": range(4)})
    (tmp_path / "parquet").mkdir()
    for part in range(2):  # the order of the files is the order of the rows
        rows.select(range(2 * part, 2 * part + 2)).to_parquet(tmp_path / "parquet" / f"train-{part}.parquet")
    rows.to_json(tmp_path / "rows.jsonl")
    rows.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=rows, test=rows.select([3])).save_to_disk(tmp_path / "splits")
    return tmp_path


def read(folder, **options):
    (part,) = parts_of(Source(dataset=str(folder), **options))
    return list(part.documents(lambda position: None))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["parquet", "rows.jsonl", "saved", "splits"])
def test_a_row_is_a_document_and_empty_ones_are_left_out(folders, kind, streaming):
    assert read(folders / kind, streaming=streaming) == DOCUMENTS


def test_a_split_and_a_slice_of_one_can_be_chosen(folders):
    assert read(folders / "splits", dataset_split="test") == DOCUMENTS[1:]
    assert read(folders / "rows.jsonl", dataset_split="train[:25%]") == DOCUMENTS[:1]


def test_what_a_dataset_is_does_not_depend_on_how_it_is_read_but_on_its_bytes_and_options(folders):
    def key(**options):
        return parts_of(Source(dataset=str(folders / "rows.jsonl"), **options))[0].key

    first = key()
    assert key(streaming=True) == first
    assert len({first, key(dataset_split="train[:25%]"), key(text_column="other")}) == 3
    file = folders / "rows.jsonl"
    file.write_text(file.read_text().replace("Four", "Nine"))
    os.utime(file, (0, 0))
    assert key() != first


def test_progress_is_told_in_rows(folders):
    (part,) = parts_of(Source(dataset=str(folders / "saved")))
    told = []
    list(part.documents(told.append))
    assert told == [4] and part.size == 4


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("parquet", {"text_column": "body"}, "no column 'body'; text_column must be one of text, number"),
        ("parquet", {"text_column": "number"}, "column 'number' holds a int in row 1, not text"),
        ("parquet", {"text_column": "number", "streaming": True}, "column 'number' holds a int in row 1, not text"),
        ("parquet", {"dataset_split": "dev"}, 'Unknown split "dev". Should be one of'),
        ("splits", {"dataset_split": "dev"}, "no split 'dev'; dataset_split must be one of train, test"),
        ("parquet", {"dataset_config": "en"}, "'en' not found. Available: ['default']"),
        ("nowhere", {}, "Couldn't find any data file"),
        ("bad.jsonl", {}, "JSON parse error"),
        ("bad.jsonl", {"streaming": True}, "JSON parse error"),
    ],
)
def test_a_dataset_that_cannot_be_read_is_named(folders, kind, options, named):
    (folders / "bad.jsonl").write_text('{"text": "One."}\n{"text": \n')
    with pytest.raises(ValueError) as raised:
        read(folders / kind, **options)
    assert named in str(raised.value) and str(raised.value).startswith(f"dataset {folders / kind}: ")


def test_a_part_that_is_written_to_is_known_as_changed(folders):
    for part in (*parts_of(Source(dataset=str(folders / "parquet"))), TextFile(folders / "rows.jsonl")):
        assert not part.changed
        path = folders / "parquet" / "train-1.parquet" if part.kind == "dataset" else part.path
        path.write_bytes(path.read_bytes() + b"\n")
        assert part.changed


def test_configurations_of_one_folder_are_different_texts(tmp_path):
    for names in (("a.jsonl", "b.jsonl"), ("a.jsonl", "a.jsonl")):
        for name in names:
            (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
        files = "".join(f"- config_name: {one}\n  data_files: {file}\n" for one, file in zip("ab", names, strict=True))
        (tmp_path / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
        keys = {parts_of(Source(dataset=str(tmp_path), dataset_config=name))[0].key for name in "ab"}
        assert len(keys) == 2


def test_a_file_that_was_written_since_has_changed(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("One.")
    os.utime(file, (0, 0))
    part = TextFile(file)
    assert not part.changed
    file.write_text("Two.")
    assert part.changed


def test_a_saved_dataset_is_known_by_its_rows(folders):
    """Else the tokens that were prepared from others would be taken for its own."""
    (before,) = parts_of(Source(dataset=str(folders / "saved")))
    arrow = next((folders / "saved").glob("*.arrow"))
    known = before.key
    arrow.write_bytes(arrow.read_bytes().replace(b"Four", b"Nine"))
    (after,) = parts_of(Source(dataset=str(folders / "saved")))
    assert after.key != known


def test_a_file_that_moves_to_another_split_or_is_read_otherwise_is_another_text(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "One."}\n')
    (folder / "validation.jsonl").write_text('{"text": "Two."}\n{"text": "Three."}\n')
    (before,) = parts_of(Source(dataset=str(folder)))
    first = before.key
    (folder / "train.jsonl").rename(folder / "test.jsonl")
    (folder / "validation.jsonl").rename(folder / "train.jsonl")
    (after,) = parts_of(Source(dataset=str(folder)))
    assert after.key != first and read(folder) == [["Two."], ["Three."]]
    (tmp_path / "rows.txt").write_text('{"text": "One."}\n')
    (as_text,) = parts_of(Source(dataset=str(tmp_path / "rows.txt")))
    first = as_text.key
    (tmp_path / "rows.txt").rename(tmp_path / "rows.jsonl")
    (as_json,) = parts_of(Source(dataset=str(tmp_path / "rows.jsonl")))
    assert as_json.key != first
