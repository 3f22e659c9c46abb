"""Tables as users have them, and the one line that says what is wrong with one."""

import bz2
import gzip
import lzma

import pytest

from elastic_model.tables import read_table
from export.rows import read_column, read_texts


def cells(file, **arguments):
    return [row.cells for row in read_table(file, **arguments)]


def test_tsv_has_no_quoting(tmp_path):
    file = tmp_path / "a.tsv"
    file.write_bytes('\ufefftext\tlabel\r\nsaid "no\t1\r\n\r\n"yes" he said\t0\r\n'.encode())
    assert cells(file) == [{"text": 'said "no', "label": "1"}, {"text": '"yes" he said', "label": "0"}]


def test_a_tsv_that_was_written_with_quoting_is_noted(tmp_path, recwarn):
    """Its marks went into the text without a word, from who had saved a table with pandas."""
    file = tmp_path / "a.tsv"
    file.write_text('text\tlabel\n"yes"\t1\n""\t1\n')
    assert cells(file)[0]["text"] == '"yes"' and not recwarn
    file.write_text('text\tlabel\none\t1\n"said ""no"" twice"\t0\n')
    with pytest.warns(UserWarning, match="a.tsv, row 3: a cell looks quoted, but quotation marks of a .tsv are part"):
        assert cells(file)[1]["text"] == '"said ""no"" twice"'


def test_csv_has_quoting(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text('text,label\n"one, two\nthree",1\n')
    assert cells(file) == [{"text": "one, two\nthree", "label": "1"}]


def test_jsonl_keeps_types(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one", "label": 1}\n\n{"text": "two", "label": [1, 2]}\n')
    assert [row["label"] for row in cells(file)] == [1, [1, 2]]


@pytest.mark.parametrize(("ending", "opener"), [("gz", gzip.open), ("xz", lzma.open), ("bz2", bz2.open)])
def test_compressed(tmp_path, ending, opener):
    file = tmp_path / f"a.tsv.{ending}"
    with opener(file, "wt") as stream:
        stream.write("text\tlabel\none\t1\n")
    assert cells(file) == [{"text": "one", "label": "1"}]
    whole = file.read_bytes()
    for damaged in (whole[:-6], whole[:12] + bytes(8) + whole[20:], b"not compressed"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"a.tsv.{ending}: not a readable tsv file"):
            cells(file)


def test_named_columns_leave_further_cells_out(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("x\t1.5\tone\textra\ny\t2.5\ttwo\n")
    assert cells(file, form="tsv", columns=("id", "score", "text"))[0] == {"id": "x", "score": "1.5", "text": "one"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", b"", "has no rows"),
        ("a.tsv", b"text\tlabel\n", "has no rows"),
        ("a.tsv", b"text\tlabel\none\n", r"row 2: 1 cells under 2 columns \(text, label\)"),
        ("a.tsv", b"text\tlabel\none\t1\t2\n", "row 2: 3 cells under 2 columns"),
        ("a.tsv", b"text\tlabel\n\xff\xfe\t1\n", "not a readable tsv file in UTF-8"),
        ("a.tsv.gz", b"text\tlabel\n", "not a readable tsv file"),
        ("a.tsv", b"text\ttext\tlabel\na\tb\t1\n", "the column 'text' is there twice"),
        ("a.csv", b'label,text\n0,"open\n1,two\n0,three\n', "not a readable csv file"),
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b'["one"]\n', "line 1: expected an object"),
        ("a.parquet", b"PAR1", r"expected a .txt, .tsv, .csv or .jsonl file"),
    ],
)
def test_a_bad_table_is_named_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_table(tmp_path / name)
    assert name in str(error.value)


def test_long_cells_and_words_with_a_space_that_does_not_break(tmp_path):
    (tmp_path / "a.csv").write_text(f'text,label\n"{"long " * 40_000}",1\n')
    assert len(cells(tmp_path / "a.csv")[0]["text"]) == 200_000
    (tmp_path / "a.conll").write_text("New\u00a0York B-LOC\n  is  O\n", encoding="utf-8")
    assert cells(tmp_path / "a.conll") == [{"1": ["New\u00a0York", "is"], "2": ["B-LOC", "O"]}]


def test_a_missing_column_lists_those_there(tmp_path):
    file = tmp_path / "a.tsv"
    file.write_text("text\tlabel\none\t1\n")
    with pytest.raises(ValueError, match=r"row 2: there is no column 'sentence'; columns: text, label"):
        read_table(file)[0]["sentence"]


def test_words_of_conllu_that_are_none_are_left_out(tmp_path):
    lines = ["# sent_id = 1", "1-2\tcannot\t_", "1\tcan\tAUX", "2\tnot\tPART", "2.1\tgone\t_", "", ""]
    (tmp_path / "a.conll").write_text("\n".join(lines))
    assert cells(tmp_path / "a.conll") == [{"1": ["1", "2"], "2": ["can", "not"], "3": ["AUX", "PART"]}]
    (tmp_path / "a.conll").write_text("\n".join(lines[1:]))  # not CoNLL-U: 1-2 may be a word
    assert len(cells(tmp_path / "a.conll")[0]["1"]) == 4


def test_words_that_only_look_like_numbers_of_conllu_stay(tmp_path):
    """A score and a share were left out of a file with one comment, an entity among them."""
    lines = ["# id = 5", "Arsenal\tB-ORG", "won\tO", "2-1\tO", "", "3.5\tB-NUM", "million\tO", ""]
    (tmp_path / "a.conll").write_text("\n".join(lines))
    assert [row["1"] for row in cells(tmp_path / "a.conll")] == [["Arsenal", "won", "2-1"], ["3.5", "million"]]


def test_a_sentence_is_named_by_its_first_line(tmp_path):
    lines = ["# sent_id = 1", "1-2\tcannot\t_", "1\tcan\tAUX", "2\tnot\tPART", "", "", "# sent_id = 2", "1\ta\tDET"]
    (tmp_path / "a.conll").write_text("\n".join(lines))
    places = [row.place for row in read_table(tmp_path / "a.conll")]
    assert [place.rpartition(" ")[2] for place in places] == ["2", "8"]


def test_blanks_around_a_columns_name_are_not_part_of_it(tmp_path):
    """The error said that there is no column 'text' among them: ' text'."""
    for ending, between in (("tsv", "\t"), ("csv", ",")):
        file = tmp_path / f"rows.{ending}"
        file.write_text(f" text{between}label \nthe army{between}1\n")
        (row,) = read_table(file)
        assert (row["text"], row["label"]) == ("the army", "1")
    assert read_texts(tmp_path / "rows.tsv", "text") == ["the army"]
    assert read_column(tmp_path / "rows.tsv", "label") == ["1"]
