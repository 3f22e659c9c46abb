"""Files of text as rows of named columns: TSV, CSV, JSON lines, CoNLL columns, SQuAD's JSON; plain or compressed."""

import csv
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from elastic_model.text_files import ending_of, opened_text

FORMS = {".tsv": "tsv", ".txt": "tsv", ".csv": "csv", ".jsonl": "jsonl", ".json": "squad"}
FORMS |= dict.fromkeys((".conll", ".iob", ".iob2", ".bio"), "conll")
NEWLINES = {"tsv": "\n", "csv": ""}  # a carriage return within a cell is part of its text
csv.field_size_limit(2**31 - 1)  # a cell may be a whole book, as in the other forms
COMMENT = re.compile(r"# (\S+ = |new(doc|par)\b)")  # of CoNLL-U
CONLLU_PART = re.compile(r"\d+[-.]\d+")  # the number of a word that is no word by itself
BLANKS = re.compile(" +")  # between columns; a no-break space is part of a word


@dataclass(frozen=True)
class Row:
    """One row: its cells by column name, and the place that an error message names."""

    cells: dict[str, Any]
    place: str

    def __getitem__(self, column: str) -> Any:
        if column not in self.cells:
            raise ValueError(f"{self.place}: there is no column {column!r}; columns: {', '.join(self.cells)}")
        return self.cells[column]

    def text(self, column: str) -> Any:
        """The text in a column, or the list of its words; ValueError where there is nothing, or something else."""
        text = self[column]
        words = text if isinstance(text, list) else [text]
        if not words or not all(isinstance(word, str) and word.strip() for word in words):
            raise ValueError(f"{self.place}: column {column!r} has no text (its value: {text!r:.80}); remove the row")
        return text


def _tab_separated(lines: IO[str]) -> Iterator[list[str]]:
    return (line.rstrip("\r\n").split("\t") for line in lines)  # no quoting: a quotation mark is a character


def _separated(cells: Iterator[list[str]], columns: tuple[str, ...] | None, file: Path, gaps: bool) -> Iterator[Row]:
    """Rows under the file's own header, or under `columns` where it has none (further cells are then ignored)."""
    header = list(columns) if columns else [name.strip() for name in next(cells, [])]
    if any("\r" in name for name in header):
        raise ValueError(f"{file}: its lines end in a carriage return alone; save it with line feeds")
    doubled = next((name for name in header if header.count(name) > 1), None)
    if doubled is not None:
        raise ValueError(f"{file}: the column {doubled!r} is there twice ({', '.join(header)}); name each once")
    blank = None
    for number, row in enumerate(cells, start=1 if columns else 2):
        if not row or row == [""]:
            blank = blank or number
            continue
        if blank is not None and not gaps:
            raise ValueError(f"{file}, row {blank}: a blank line between rows; leave such lines out")
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


def _conll(lines: IO[str], file: Path) -> Iterator[Row]:
    """A row a sentence: columns 1, 2, ... hold one cell a word. A blank line or -DOCSTART- ends a sentence."""
    words: list[list[str]] = []
    commented, first = False, 0
    for number, line in enumerate([*lines, ""], start=1):
        cells = [cell.strip() for cell in line.split("\t")] if "\t" in line else BLANKS.split(line.strip(" \r\n"))
        comment = not words and COMMENT.match(line)
        commented = commented or bool(comment)
        if not any(cells) or cells[0] == "-DOCSTART-" or comment:
            if words:
                written = enumerate(zip(*(_of_conllu(words) if commented else words), strict=True), start=1)
                yield Row(
                    {str(column): list(cells) for column, cells in written}, f"{file}, sentence from line {first}"
                )
            words = []
        elif len(cells) < 2 or (words and len(cells) != len(words[0])):
            expected = len(words[0]) if words else "at least 2"
            raise ValueError(
                f"{file}, line {number}: {len(cells)} columns, expected {expected}: {line.strip()[:60]!r}"
            )
        else:
            first = first if words else number
            words.append(cells)


def _of_conllu(words: list[list[str]]) -> list[list[str]]:
    """Where words are numbered, without those written together, whose parts follow (3-4), or not written (5.1)."""
    numbered = [cells for cells in words if not CONLLU_PART.fullmatch(cells[0])]
    return numbered if numbered and all(cells[0].isdecimal() for cells in numbered) else words


def _answers(question: dict[str, Any]) -> dict[str, list[Any]]:
    """As data sets of the hub hold them: {"text": [...], "answer_start": [...]}, both empty without an answer."""
    answers = [] if question.get("is_impossible") else question["answers"]
    return {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}


def _squad(lines: IO[str], file: Path) -> Iterator[Row]:
    """A row a question, of SQuAD v1.1 or v2: id, question, context, answers."""
    try:
        for article in json.load(lines)["data"]:
            for paragraph in article["paragraphs"]:
                for one in paragraph["qas"]:
                    cells = {"id": str(one["id"]), "question": one["question"], "context": paragraph["context"]}
                    yield Row({**cells, "answers": _answers(one)}, f"{file}, question {one['id']}")
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, line {error.lineno}: not JSON ({error.msg}); JSON lines end in .jsonl") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: not SQuAD's JSON (data > paragraphs > context, qas > id, question, answers > text, "
            f"answer_start): {type(error).__name__} at {error}; rows of columns are one object a line in a .jsonl"
        ) from error


WHOLE: dict[str, Callable[[IO[str], Path], Iterator[Row]]] = {
    "jsonl": _json_lines,
    "conll": _conll,
    "squad": _squad,
}


def _rows(lines: IO[str], form: str, columns: tuple[str, ...] | None, file: Path, gaps: bool) -> Iterator[Row]:
    if form in WHOLE:
        return WHOLE[form](lines, file)
    return _separated(csv.reader(lines, strict=True) if form == "csv" else _tab_separated(lines), columns, file, gaps)


def form_of(file: Path) -> str:
    """The form that a file's ending says (before .gz, .xz or .bz2); ValueError for another ending."""
    form = FORMS.get(ending_of(file))
    if form is None:
        raise ValueError(
            f"{file}: expected a .txt, .tsv, .csv or .jsonl file, .conll for tags, .json for SQuAD "
            "(or one of these with .gz, .xz, .bz2)"
        )
    return form


def read_table(
    file: Path, form: str | None = None, columns: tuple[str, ...] | None = None, *, gaps: bool = True
) -> list[Row]:
    """Every row of a UTF-8 file.

    file: .tsv or .txt (tabs, no quoting), .csv (quoted), .jsonl, .conll (a row a sentence, columns 1, 2, ... of one
    cell a word), .json (SQuAD, a row a question); with .gz, .xz or .bz2 behind it, compressed.
    form: tsv, csv, jsonl, conll or squad where the ending does not say it; columns: their names where a tsv or csv
    file has no header; gaps: whether blank lines between the rows of such a file are skipped, or an error where what
    is made of the rows must line up with the file. ValueError: no rows, another ending, not UTF-8, a row with too few
    or too many cells.
    """
    form = form or form_of(file)
    with opened_text(file, form, NEWLINES.get(form)) as lines:
        try:
            rows = list(_rows(lines, form, columns, file, gaps))
        except csv.Error as error:
            raise ValueError(f"{file}: not a readable csv file ({error})") from error
    if not rows:
        raise ValueError(f"{file}: the file has no rows")
    if form == "tsv" and (quoted := next((row for row in rows if any(map(_is_quoted, row.cells.values()))), None)):
        warnings.warn(
            f"{quoted.place}: a cell looks quoted, but quotation marks of a .tsv are part of its text; "
            "save it as .csv if they are not",
            stacklevel=2,
        )
    return rows


def _is_quoted(cell: str) -> bool:
    return len(cell) > 2 and cell[0] == cell[-1] == '"' and '""' in cell[1:-1]
