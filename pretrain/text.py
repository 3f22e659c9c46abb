"""Text files to documents of sentences, as a stream."""

import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import IO, Any

from elastic_model.folders import shipped

# a full stop after these is no end of a sentence; a single capital before one is an initial
ABBREVIATIONS = frozenset(
    "Mr Mrs Ms Dr Prof Rev Hon Gen Col Capt Lt Sgt Gov Sen Rep St Jr Sr No Nos Art Sec vs cf".split()
)
SENTENCE_END = re.compile(r"""[.!?]["')\]\u2019\u201d]*\s+(?=["'(\[\u2018\u201c]*[A-Z0-9])""")
LAST_WORD = re.compile(r"([^\W\d_]+)\.$")


def find_files(patterns: list[str]) -> list[Path]:
    """The files that the names and globs stand for, in order, each once; ValueError where one stands for none."""
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = shipped(Path(pattern))
        found = [path] if path.exists() else sorted(Path(name) for name in glob(str(pattern), recursive=True))
        found = [path for path in found if not path.is_dir()]
        if not found:
            raise ValueError(f"text: no file {pattern!r}; give files or globs (.txt, .gz, .xz, .zst)")
        files |= dict.fromkeys(path.resolve() for path in found)
    return list(files)


def documents(file: Path) -> Iterator[list[str]]:
    """The paragraphs of one document after another: a paragraph a line, a blank line between documents.

    ValueError for a file that is not UTF-8 text or a damaged archive, with the place where it breaks.
    """
    paragraphs: list[str] = []
    with _open(file) as lines:
        for number, line in enumerate(_numbered_errors(file, lines), start=1):
            paragraph = _decode(file, number, line)
            if paragraph:
                paragraphs.append(paragraph)
            elif paragraphs:
                yield paragraphs
                paragraphs = []
    if paragraphs:
        yield paragraphs


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph; nothing of the text is lost but the white space between them."""
    found = []
    start = 0
    for match in SENTENCE_END.finditer(paragraph):
        sentence = paragraph[start : match.end()].strip()
        if not _ends_in_abbreviation(sentence):
            found.append(sentence)
            start = match.end()
    rest = paragraph[start:].strip()
    return [*found, rest] if rest else found


def _ends_in_abbreviation(sentence: str) -> bool:
    match = LAST_WORD.search(sentence)
    if match is None:
        return False
    return match[1] in ABBREVIATIONS or len(match[1]) == 1 and match[1].isupper() and match[1] != "I"


@contextmanager
def _open(file: Path) -> Iterator[IO[bytes]]:
    if file.suffix == ".zst":
        with _open_zst(file) as stream:
            yield stream
        return
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    with openers.get(file.suffix, open)(file, "rb") as stream:
        yield stream


def _open_zst(file: Path) -> IO[bytes]:
    try:
        import zstandard
    except ImportError:
        raise ValueError(f"{file}: reading .zst needs the package zstandard: pip install zstandard") from None
    return io.BufferedReader(zstandard.open(file, "rb"))  # its reader knows no lines


def _numbered_errors(file: Path, lines: IO[bytes]) -> Iterator[bytes]:
    """The lines; a damaged or truncated archive becomes a ValueError that names the file."""
    try:
        yield from lines
    except (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{file}: damaged or truncated {file.suffix} archive: {error}") from error
    except Exception as error:
        if type(error).__module__.startswith("zstandard"):
            raise ValueError(f"{file}: damaged or truncated {file.suffix} archive: {error}") from error
        raise


def _decode(file: Path, number: int, line: bytes) -> str:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
        reason = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise ValueError(f"{file}: line {number} is not UTF-8 text ({reason}); convert the file to UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{file}: line {number} holds a NUL byte: this is a binary file, not text")
    return text
