"""Texts of a file: a .txt has one a line, a .tsv has columns under a header; either may be compressed."""

import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from elastic_model.folders import shipped
from elastic_model.session import Text

OTHERS = {".csv", ".json", ".jsonl", ".parquet", ".xlsx"}  # tables whose lines are no texts
OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open}


def read_texts(file: Path, text: str, pair: str | None = None, limit: int | None = None) -> list[Text]:
    """The texts of a file, pairs of them where `pair` names a column; at most `limit`.

    Raises ValueError for a missing column, a line with too few cells, text that is not UTF-8, or a file without texts.
    """
    if OTHERS & set(file.suffixes):
        raise ValueError(f"{file}: a .txt (a text a line) or a .tsv (columns under a header) is read, not this kind")
    lines = _lines(file)
    plain = ".tsv" not in file.suffixes
    texts: list[Text] = [line for line in lines if line.strip()] if plain else _columns(file, lines, text, pair)
    if not texts:
        raise ValueError(f"{file} has no texts")
    return texts[:limit]


def read_column(file: Path, name: str, limit: int | None = None) -> list[str]:
    """One column of a .tsv file; at most `limit` cells."""
    if ".tsv" not in file.suffixes:
        raise ValueError(f"{file}: a column {name!r} needs a .tsv file with a header")
    return [str(cell) for cell in _columns(file, _lines(file), name, None)][:limit]


def _lines(file: Path) -> list[str]:
    try:
        with OPENERS.get(file.suffix, open)(shipped(file), "rt", encoding="utf-8", newline="\n") as content:
            return [line.rstrip("\r\n") for line in content]
    except (UnicodeDecodeError, lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file}: not readable as UTF-8 text: {error}") from error


def _columns(file: Path, lines: list[str], text: str, pair: str | None) -> list[Text]:
    header = lines[0].split("\t") if lines else []
    for name in (text, pair):
        if name is not None and name not in header:
            raise ValueError(f"{file}: no column {name!r}; its columns are {', '.join(header) or 'none'}")
    texts: list[Text] = []
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split("\t")
        if len(cells) != len(header):
            raise ValueError(f"{file}, line {number}: {len(cells)} cells under {len(header)} columns")
        found = [cells[header.index(name)] for name in (text, pair) if name is not None]
        if not all(cell.strip() for cell in found):
            raise ValueError(f"{file}, line {number}: an empty text; leave such lines out")
        texts.append(found[0] if pair is None else (found[0], found[1]))
    return texts
