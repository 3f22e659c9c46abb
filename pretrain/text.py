"""Text files to documents of sentences, as a stream."""

import re
from collections.abc import Callable, Iterator
from glob import glob
from pathlib import Path
from typing import IO, Any

from elastic_model.folders import shipped
from elastic_model.text_files import DAMAGED, opened_bytes

# a full stop after these is no end of a sentence; a single capital before one is an initial
ABBREVIATIONS = frozenset(
    "Mr Mrs Ms Dr Prof Rev Hon Gen Col Capt Lt Sgt Gov Sen Rep St Jr Sr No Nos Art Sec vs cf".split()
)
CAPITALS = "".join(filter(str.isupper, map(chr, range(0x10000))))
SENTENCE_END = re.compile(rf"""[.!?]["')\]\u2019\u201d]*\s+(?=["'(\[\u2018\u201c]*[{CAPITALS}0-9])""")
LAST_WORD = re.compile(r"[^\W\d_]+$")
LAST_WORD_CHARACTERS = 1 + max(map(len, ABBREVIATIONS))  # that are looked at: a longer word is no abbreviation
LONGEST_SENTENCE = 20_000  # characters; examples are far shorter, and the tokenizer's memory follows the longest


def find_files(patterns: list[str]) -> list[Path]:
    """The files that the names and globs stand for, in order, each once; ValueError where one stands for none."""
    files: dict[Path, Path] = {}  # by where it really lies: a link's own name says how the file is packed
    for pattern in patterns:
        path = shipped(Path(pattern))
        found = [path] if path.exists() else sorted(Path(name) for name in glob(str(pattern), recursive=True))
        found = [path for path in found if not path.is_dir()]
        if not found:
            raise ValueError(
                f"text: {pattern!r} is a folder; give its files, as in '{pattern}/*.txt'"
                if path.is_dir()
                else f"text: no file {pattern!r}; give files or globs (.txt, .gz, .xz, .zst)"
            )
        for path in found:
            files.setdefault(path.resolve(), path)
    return list(files.values())


def documents(file: Path, progress: Callable[[int], Any] = lambda position: None) -> Iterator[list[str]]:
    """The paragraphs of one document after another: a paragraph a line, a blank line between documents.

    `progress` is told, document by document, how many bytes of the file have been read. ValueError for a file that is
    not UTF-8 text or a damaged archive, with the place where it breaks.
    """
    paragraphs: list[str] = []
    with opened_bytes(file) as (raw, lines):
        for number, line in enumerate(_numbered_errors(file, lines), start=1):
            paragraph = _decode(file, number, line)
            if paragraph:
                paragraphs.append(paragraph)
            elif paragraphs:
                yield paragraphs
                progress(raw.tell())
                paragraphs = []
    if paragraphs:
        yield paragraphs


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph; nothing of the text is lost but the white space between them.

    What has no end for 20,000 characters is cut there, at a space if there is one.
    """
    found = []
    start = 0
    for match in SENTENCE_END.finditer(paragraph):
        if match[0].rstrip() == "." and _is_abbreviation(
            paragraph[max(start, match.start() - LAST_WORD_CHARACTERS) : match.start()]
        ):
            continue
        found += _cut(paragraph, start, match.end())
        start = match.end()
    return found + _cut(paragraph, start, len(paragraph))


def _is_abbreviation(end: str) -> bool:
    match = LAST_WORD.search(end)
    if match is None:
        return False
    return match[0] in ABBREVIATIONS or len(match[0]) == 1 and match[0].isupper() and match[0] != "I"


def _cut(paragraph: str, start: int, stop: int) -> list[str]:
    pieces = []
    while stop - start > LONGEST_SENTENCE:
        end = paragraph.rfind(" ", start + 1, start + LONGEST_SENTENCE)
        end = end if end > 0 else start + LONGEST_SENTENCE
        pieces.append(paragraph[start:end].strip())
        start = end
    pieces.append(paragraph[start:stop].strip())
    return [piece for piece in pieces if piece]


def _numbered_errors(file: Path, lines: IO[bytes]) -> Iterator[bytes]:
    """The lines; a damaged or truncated archive becomes a ValueError that names the file."""
    try:
        yield from lines
    except DAMAGED as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{file}: damaged or truncated {file.suffix} archive: {error}") from error


def _decode(file: Path, number: int, line: bytes) -> str:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        reason = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise ValueError(f"{file}: line {number} is not UTF-8 text ({reason}); convert the file to UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{file}: line {number} holds a NUL byte: this is a binary file, not text")
    return text
