"""A JSON file that says what a run is continued from, and by which damage to it and to the files beside it shows."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .provenance import file_hash


def write_sealed(file: Path, content: dict[str, Any], beside: Sequence[str]) -> None:
    """Write `content` with the SHA-256 of itself and of the files `beside`."""
    content = json.loads(json.dumps(content))
    digests = {name: file_hash(file.parent / name) for name in beside} | {file.name: _digest(content)}
    file.write_text(json.dumps({**content, "sha256": digests}, indent=2) + "\n")


def read_sealed(file: Path, beside: Sequence[str]) -> dict[str, Any]:
    """What `write_sealed` was given; ValueError that names what is damaged or missing."""
    try:
        content = json.loads(file.read_text())
        digests = content.pop("sha256")
        found = {name: file_hash(file.parent / name) for name in beside} | {file.name: _digest(content)}
        damaged = [name for name, digest in found.items() if digests[name] != digest]
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
        raise ValueError(f"{file.parent} is damaged ({file.name}: {error})") from None
    if damaged:
        raise ValueError(f"{file.parent} is damaged ({', '.join(damaged)}: wrong sha256)")
    return dict(content)


def _digest(content: dict[str, Any]) -> str:
    """SHA-256 of what the file says, whatever its layout."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
