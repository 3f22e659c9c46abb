"""Unlabelled texts: one a line, or the columns of a table."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_model.tables import form_of, read_table
from elastic_model.text_files import ending_of, opened_text


@dataclass(frozen=True)
class Texts:
    """Unlabelled rows."""

    texts: list[str]
    pairs: list[str] | None

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: list[int]) -> "Texts":
        """The texts at `rows`."""
        return Texts([self.texts[row] for row in rows], [self.pairs[row] for row in rows] if self.pairs else None)


def _lines(file: Path) -> list[str]:
    with opened_text(file) as lines:
        return [line.strip() for line in lines if line.strip()]


def _text(value: Any, place: str) -> str:
    """A cell as text; words that stand apart, as taggers are trained on, with spaces between."""
    if isinstance(value, list) and all(isinstance(word, str) for word in value):
        return " ".join(value).strip()
    if isinstance(value, list | dict):
        raise ValueError(f"{place}: a text is needed, got {value!r:.80}")
    return str(value or "").strip()


def read_texts(file: Path, text: str | None, pair: str | None) -> Texts:
    """The texts of a file, one a line, or of a table's columns; ValueError where there are none."""
    if text is None:
        if pair is not None:
            raise ValueError("--pair is a column of a table: give the column of the first text with --text")
        if ending_of(file) != ".txt":
            form_of(file)  # names the forms there are
            raise ValueError(f"{file} is a table: name the column of its text with --text")
        found = Texts(_lines(file), None)
    else:
        rows = read_table(file)
        cells = {column: [_text(row[column], row.place) for row in rows] for column in (text, pair) if column}
        empty = [row.place for number, row in enumerate(rows) if not all(cell[number] for cell in cells.values())]
        if empty:
            raise ValueError(f"{empty[0]}: there is no text in it ({len(empty)} such rows); remove them")
        found = Texts(cells[text], cells[pair] if pair else None)
    if not len(found):
        raise ValueError(f"{file}: there are no texts in it")
    return found
