"""Texts of a file: a .txt has one a line, a .tsv has columns under a header; either may be compressed."""

from pathlib import Path

from elastic_model.folders import shipped
from elastic_model.session import Text
from elastic_model.text_files import ending_of, opened_text


def read_texts(file: Path, text: str, pair: str | None = None, limit: int | None = None) -> list[Text]:
    """The texts of a file, pairs of them where `pair` names a column; at most `limit`.

    Raises ValueError for a missing column, a line with too few cells, text that is not UTF-8, or a file without texts.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"at least 1 row must be read, got max_rows {limit}")
    kind = ending_of(file)
    if kind not in (".txt", ".tsv"):
        raise ValueError(f"{file}: a .txt (a text a line) or a .tsv (columns under a header) is read, not this kind")
    lines = _lines(file)
    header = lines[0].split("\t") if lines else []
    if kind == ".txt" and (pair is not None or (len(header) > 1 and text in header)):
        raise ValueError(f"{file}: a .txt is read as a text a line, this looks like a table; name it .tsv")
    texts: list[Text] = list(lines) if kind == ".txt" else _columns(file, lines, text, pair)
    for number, line in enumerate(lines, start=1):
        if kind == ".txt" and not line.strip():  # answers are in the order of the lines
            raise ValueError(f"{file}, line {number}: an empty text; leave such lines out")
    if not texts:
        raise ValueError(f"{file} has no texts")
    return texts[:limit]


def read_column(file: Path, name: str, limit: int | None = None) -> list[str]:
    """One column of a .tsv file; at most `limit` cells."""
    if ending_of(file) != ".tsv":
        raise ValueError(f"{file}: a column {name!r} needs a .tsv file with a header")
    return [str(cell).strip() for cell in _columns(file, _lines(file), name, None)][:limit]


def _lines(file: Path) -> list[str]:
    with opened_text(shipped(file), newline="\n") as content:
        lines = [line.rstrip("\r\n") for line in content]
    while lines and not lines[-1]:  # what editors leave at a file's end
        lines.pop()
    return lines


def _columns(file: Path, lines: list[str], text: str, pair: str | None) -> list[Text]:
    header = [name.strip() for name in lines[0].split("\t")] if lines else []
    for name in (text, pair):
        if name is not None and header.count(name) != 1:
            wrong = "is there twice" if name in header else "is missing"
            raise ValueError(f"{file}: the column {name!r} {wrong}; its columns are {', '.join(header) or 'none'}")
    texts: list[Text] = []
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split("\t")
        if len(cells) != len(header):
            raise ValueError(f"{file}, line {number}: {len(cells)} cells under {len(header)} columns")
        found = [cells[header.index(name)] for name in (text, pair) if name is not None]
        for name, cell in zip((text, pair), found, strict=False):
            if not cell.strip():
                raise ValueError(f"{file}, line {number}: nothing in the column {name!r}; leave such lines out")
        texts.append(found[0] if pair is None else (found[0], found[1]))
    return texts
