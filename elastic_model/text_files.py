"""Text files as users have them: in UTF-8, with a byte order mark or without, compressed or not."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def _open_zst(raw: IO[bytes]) -> IO[bytes]:
    import pyarrow  # comes with datasets; the package zstandard takes a truncated file for a whole one

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))


OPENERS: dict[str, Callable[[IO[bytes]], Any]] = {
    ".gz": gzip.open,
    ".xz": lzma.open,
    ".bz2": bz2.open,
    ".zst": _open_zst,
}
DAMAGED = (lzma.LZMAError, zlib.error, EOFError, OSError)  # an OSError with a number is the disk's, not the archive's


@contextmanager
def opened_bytes(file: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The file as it lies there, which tells how much has been read, and what is in it."""
    opener = OPENERS.get(file.suffix.lower())
    with open(file, "rb") as raw:
        if opener is None:
            yield raw, raw
        else:
            with opener(raw) as content:
                yield raw, content


def ending_of(file: Path) -> str:
    """The ending of a file in lower case, before that of its compression."""
    endings = [ending.lower() for ending in file.suffixes]
    return "".join((endings[:-1] if endings and endings[-1] in OPENERS else endings)[-1:])


@contextmanager
def opened_text(file: Path, kind: str = "text", newline: str | None = None) -> Iterator[IO[str]]:
    """The lines of a file; ValueError where it is damaged or in another encoding. kind, newline: what an error calls
    it, and as of `open`."""
    try:
        with opened_bytes(file) as (_, content):
            with io.TextIOWrapper(content, encoding="utf-8-sig", newline=newline) as lines:
                yield lines
    except (UnicodeDecodeError, *DAMAGED) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{file}: not a readable {kind} file in UTF-8 ({error})") from error
