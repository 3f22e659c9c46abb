"""Text files as users have them: in UTF-8, with a byte order mark or without, compressed or not."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

OPENERS: dict[str, Callable[..., IO[Any]]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}


@contextmanager
def opened_text(file: Path, kind: str = "text", newline: str | None = None) -> Iterator[IO[str]]:
    """The lines of a file; ValueError where it is damaged or in another encoding. kind, newline: what an error calls
    it, and as of `open`."""
    try:
        with OPENERS.get(file.suffix.lower(), open)(file, "rt", encoding="utf-8-sig", newline=newline) as lines:
            yield lines
    except (UnicodeDecodeError, EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # of the file system; those of damage have none
            raise
        raise ValueError(f"{file}: not a readable {kind} file in UTF-8 ({error})") from error
