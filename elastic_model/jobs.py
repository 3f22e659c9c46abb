"""What jobs that take long share: they stop when they are asked to, log lines of JSON, and end as processes."""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .folders import write_text

INTERRUPTED = 143  # exit code after SIGTERM, 128 + 15: saved, to be resumed


@contextmanager
def sigterm() -> Iterator[threading.Event]:
    """An event that is set once SIGTERM has come."""
    asked = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def cut_log(file: Path, name: str, last: int) -> None:
    """Drop the lines of a log that a resumed run is going to write again, those whose `name` is above `last`, and half
    a line that a killed one left."""
    kept = []
    for text in file.read_text().splitlines() if file.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if name not in line:
            raise ValueError(f"{file}: a line has no {name!r}: the log of another job; choose another output")
        if line[name] <= last:
            kept.append(text + "\n")
    write_text(file, "".join(kept))


def flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Nested numbers under names like mlm_loss/4, as trackers want them; without those that are None."""
    found: dict[str, float] = {}
    for name, value in record.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}/")
        elif value is not None:
            found[f"{prefix}{name}"] = value
    return found


def quiet() -> None:
    """No warnings and progress bars of transformers: what matters of them is said by the jobs themselves."""
    from transformers.utils import logging  # here: --help must not wait for it

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def ended(code: int) -> int:
    """The code to exit with; one of several processes ends here, at once: torch's gloo threads now and then abort an
    interpreter that ends in the usual way."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        os._exit(code)
    return code
