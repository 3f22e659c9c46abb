"""Texts of a file: a .txt has one a line, a .tsv or .csv has columns under a header; each may be compressed."""

import csv
from pathlib import Path

from elastic_model.folders import shipped
from elastic_model.session import Text
from elastic_model.text_files import ending_of, opened_text

TABLES = (".tsv", ".csv")
csv.field_size_limit(2**31 - 1)  # a cell may be a whole book


def read_texts(file: Path, text: str, pair: str | None = None, limit: int | None = None) -> list[Text]:
    """The texts of a file, pairs of them where `pair` names a column; at most `limit`.

    Raises ValueError for a missing column, a line with too few cells, text that is not UTF-8, or a file without texts.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"at least 1 row must be read, got max_rows {limit}")
    kind = ending_of(file)
    if kind not in (".txt", *TABLES):
        raise ValueError(
            f"{file}: a .txt (a text a line), a .tsv or a .csv (columns under a header) is read, not this kind"
        )
    texts = _texts(file, text, pair) if kind == ".txt" else _columns(file, text, pair)
    if not texts:
        raise ValueError(f"{file} has no texts")
    return texts[:limit]


def read_column(file: Path, name: str, limit: int | None = None) -> list[str]:
    """One column of a table; at most `limit` cells."""
    if ending_of(file) not in TABLES:
        raise ValueError(f"{file}: a column {name!r} needs a .tsv or .csv file with a header")
    return [str(cell).strip() for cell in _columns(file, name, None)][:limit]


def _texts(file: Path, text: str, pair: str | None) -> list[Text]:
    with opened_text(shipped(file), newline="\n") as content:
        lines = [line.rstrip("\r\n") for line in content]
    header = lines[0].split("\t") if lines else []
    if pair is not None or (len(header) > 1 and text in header):
        raise ValueError(f"{file}: a .txt is read as a text a line, this looks like a table; name it .tsv")
    while lines and not lines[-1]:  # what editors leave at a file's end
        lines.pop()
    for number, line in enumerate(lines, start=1):
        if not line.strip():  # answers are in the order of the lines
            raise ValueError(f"{file}, line {number}: an empty text; leave such lines out")
    return list(lines)


def _table(file: Path) -> list[tuple[int, list[str]]]:
    """The rows of a table, the header first: the number of the line that each ends in, and its cells."""
    if ending_of(file) == ".tsv":  # without quoting, as fine-tuning reads it
        with opened_text(shipped(file), newline="\n") as content:
            rows = [(number, line.rstrip("\r\n").split("\t")) for number, line in enumerate(content, start=1)]
    else:
        with opened_text(shipped(file), newline="") as content:
            reader = csv.reader(content)
            rows = [(reader.line_num, row) for row in reader]
    while rows and rows[-1][1] in ([], [""]):  # what editors leave at a file's end
        rows.pop()
    return rows


def _columns(file: Path, text: str, pair: str | None) -> list[Text]:
    (_, header), *rows = _table(file) or [(1, [])]
    header = [name.strip() for name in header]
    for name in (text, pair):
        if name is not None and header.count(name) != 1:
            wrong = "is there twice" if name in header else "is missing"
            raise ValueError(f"{file}: the column {name!r} {wrong}; its columns are {', '.join(header) or 'none'}")
    texts: list[Text] = []
    for number, cells in rows:
        if len(cells) != len(header):
            raise ValueError(f"{file}, line {number}: {len(cells)} cells under {len(header)} columns")
        found = [cells[header.index(name)] for name in (text, pair) if name is not None]
        for name, cell in zip((text, pair), found, strict=False):
            if not cell.strip():
                raise ValueError(f"{file}, line {number}: nothing in the column {name!r}; leave such lines out")
        texts.append(found[0] if pair is None else (found[0], found[1]))
    return texts
