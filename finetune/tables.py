"""Tables of text: TSV, CSV and JSON lines, plain or compressed, as rows of named columns."""

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


@dataclass(frozen=True)
class Row:
    """One row: its cells by column name, and the place that an error message names."""

    cells: dict[str, Any]
    place: str

    def __getitem__(self, column: str) -> Any:
        if column not in self.cells:
            raise ValueError(f"{self.place}: there is no column {column!r}; columns: {', '.join(self.cells)}")
        return self.cells[column]


def _tab_separated(lines: IO[str]) -> Iterator[list[str]]:
    return (line.rstrip("\r\n").split("\t") for line in lines)  # no quoting: a quotation mark is a character


def _separated(cells: Iterator[list[str]], columns: tuple[str, ...] | None, file: Path) -> Iterator[Row]:
    """Rows under the file's own header, or under `columns` where it has none (further cells are then ignored)."""
    header = list(columns) if columns else next(cells, [])
    for number, row in enumerate(cells, start=1 if columns else 2):
        if not row or row == [""]:
            continue
        if len(row) < len(header) or (len(row) > len(header) and not columns):
            raise ValueError(
                f"{file}, row {number}: {len(row)} cells under {len(header)} columns ({', '.join(header)})"
            )
        yield Row(dict(zip(header, row, strict=False)), f"{file}, row {number}")


def _json_lines(lines: IO[str], file: Path) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error.msg})") from error
        if not isinstance(cells, dict):
            raise ValueError(f"{file}, line {number}: expected an object of columns, got {line.strip()[:60]!r}")
        yield Row(cells, f"{file}, line {number}")


def _rows(lines: IO[str], form: str, columns: tuple[str, ...] | None, file: Path) -> Iterator[Row]:
    if form == "jsonl":
        return _json_lines(lines, file)
    return _separated(csv.reader(lines) if form == "csv" else _tab_separated(lines), columns, file)


def read_table(file: Path, form: str | None = None, columns: tuple[str, ...] | None = None) -> list[Row]:
    """Every row of a UTF-8 table.

    file: .tsv or .txt (tabs, no quoting), .csv (quoted), .jsonl; with .gz, .xz or .bz2 behind it, compressed.
    form: tsv, csv or jsonl where the ending does not say it; columns: their names where the file has no header.
    ValueError: no rows, another ending, not UTF-8, a row with too few or too many cells.
    """
    endings = [ending.lower() for ending in file.suffixes]
    opener = OPENERS.get(endings[-1] if endings else "", open)
    ending = (endings[:-1] if opener is not open else endings)[-1:]
    form = form or {".tsv": "tsv", ".txt": "tsv", ".csv": "csv", ".jsonl": "jsonl"}.get("".join(ending))
    if form is None:
        raise ValueError(f"{file}: expected a .tsv, .csv or .jsonl file (or one of these with .gz, .xz, .bz2)")
    try:
        with opener(file, "rt", encoding="utf-8-sig", newline="" if form == "csv" else None) as lines:
            rows = list(_rows(lines, form, columns, file))
    except (UnicodeDecodeError, csv.Error, EOFError, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{file}: not a readable {form} file in UTF-8 ({error})") from error
    if not rows:
        raise ValueError(f"{file}: the file has no rows")
    return rows
