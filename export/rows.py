"""Texts of a file, as fine-tuning reads them: a .txt has one a line, the other forms have columns."""

from pathlib import Path

from elastic_model.folders import shipped
from elastic_model.session import Text
from elastic_model.tables import Row, read_table
from elastic_model.text_files import ending_of, opened_text


def read_texts(file: Path, text: str, pair: str | None = None, limit: int | None = None) -> list[Text]:
    """The texts of a file, pairs of them where `pair` names a column; at most `limit`.

    Raises ValueError for a missing column, a row without a text, text that is not UTF-8, or a file without texts.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"at least 1 row must be read, got max_rows {limit}")
    if ending_of(file) == ".txt":
        return _lines(file, text, pair)[:limit]
    rows = _rows(file, limit)
    texts = [row.text(text) for row in rows]
    return texts if pair is None else [*zip(texts, (row.text(pair) for row in rows), strict=True)]


def read_column(file: Path, name: str, limit: int | None = None) -> list[str]:
    """One column of a table; at most `limit` cells."""
    if ending_of(file) == ".txt":
        raise ValueError(f"{file}: a column {name!r} needs a table, as .tsv, .csv or .jsonl")
    return [str(row[name]).strip() for row in _rows(file, limit)]


def _rows(file: Path, limit: int | None) -> list[Row]:
    return read_table(shipped(file), gaps=False)[:limit]


def _lines(file: Path, text: str, pair: str | None) -> list[Text]:
    with opened_text(shipped(file), newline="\n") as content:
        lines = [line.rstrip("\r\n") for line in content]
    if len(lines) == 1 and "\r" in lines[0]:
        raise ValueError(f"{file}: its lines end in CR alone, which would make it one text; save it with LF line ends")
    header = lines[0].split("\t") if lines else []
    if pair is not None or (len(header) > 1 and text in header):
        raise ValueError(f"{file}: a .txt is read as a text a line, this looks like a table; name it .tsv")
    while lines and not lines[-1]:  # what editors leave at a file's end
        lines.pop()
    if not lines:
        raise ValueError(f"{file} has no texts")
    for number, line in enumerate(lines, start=1):
        if not line.strip():  # answers are in the order of the lines
            raise ValueError(f"{file}, line {number}: an empty text; leave such lines out")
    return list(lines)
