"""Where documents come from: the parts of a source, text files or a dataset, each read as a stream."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from elastic_model.provenance import file_hash
from pretrain.config import Source
from pretrain.text import documents, find_files

ROWS_AT_ONCE = 100  # of a dataset: bounds the memory

Progress = Callable[[int], Any]  # is told how much of a part has been read, in the unit of its size


def parts_of(source: Source) -> list["TextFile | DatasetRows"]:
    """The parts of a source, in the order of their documents; ValueError where there is nothing to read."""
    if source.dataset is None:
        return [TextFile(file) for file in find_files(source.text)]
    return [DatasetRows(source)]


class TextFile:
    """The documents of one text file."""

    kind = "file"
    unit = "B"

    def __init__(self, path: Path):
        self.path = path
        self.name = path.name
        self.size = path.stat().st_size
        self.state = _state([path])

    @cached_property
    def key(self) -> str:
        """sha256 of its bytes."""
        return file_hash(self.path)

    @property
    def changed(self) -> bool:
        """Whether it was written to since it was found."""
        return _state([self.path]) != self.state

    def documents(self, progress: Progress) -> Iterator[list[str]]:
        """The paragraphs of one document after another."""
        return documents(self.path, progress)


class DatasetRows:
    """The documents of one split of a dataset, a row each; empty rows are left out.

    What it is, is known before a row is read: by the bytes of local files, by the revision of a repository on the hub.
    """

    kind = "dataset"
    unit = " rows"

    def __init__(self, source: Source):
        self.source = source
        self.name = str(source.dataset)
        self.path = Path(self.name)  # where a licence may be stated
        self.saved = (self.path / "state.json").is_file() or (self.path / "dataset_dict.json").is_file()
        if self.saved:
            paths = [path for path in sorted(self.path.rglob("*")) if path.is_file()]
            self.files = [(path, path.relative_to(self.path).as_posix()) for path in paths]
            self.revision: list[str] = []
        else:
            self.files, self.revision = self._resolve()
        self._paths = [path for path, _ in self.files]
        self.state = _state(self._paths)

    def _resolve(self) -> tuple[list[tuple[Path, str]], list[str]]:
        """The local data files, each with the split that it belongs to and what reads it; URLs of the others, and what
        says which version of them is meant."""
        import datasets

        with _named_errors(self.name):
            builder = datasets.load_dataset_builder(**self._arguments())
        found = builder.config.data_files or {}
        if not found:  # from the cache, without the hub: the folder there is named by the revision
            return [], [str(builder.cache_dir)]
        files = [(file, f"{split} {builder.name}") for split in sorted(found) for file in found[split]]
        versions = [str(found[split].origin_metadata) for split in sorted(found) if "://" in found[split][0]]
        remote = [file for file, _ in files if "://" in file]
        return [(Path(file), role) for file, role in files if "://" not in file], [*versions, *remote]

    def _arguments(self) -> dict[str, Any]:
        place = {"path": self.name}
        if self.path.is_file():
            place = {"path": str(self.path.resolve().parent), "data_files": self.path.name}
        return {**place, "name": self.source.dataset_config}

    @cached_property
    def key(self) -> str:
        """sha256 of what decides its rows."""
        source = self.source
        chosen = [str(source.dataset_config), source.dataset_split, source.text_column]
        files = [f"{role} {file_hash(file)}" for file, role in self.files]
        return hashlib.sha256("\n".join([*chosen, *self.revision, *files]).encode()).hexdigest()

    @property
    def changed(self) -> bool:
        """Whether its local files were written to since they were found."""
        return _state(self._paths) != self.state

    @cached_property
    def rows(self) -> Any:
        """The split, with no column but the text's, as a Dataset or, streaming, as an IterableDataset."""
        import datasets

        column, streaming = self.source.text_column, self.source.streaming
        with _named_errors(self.name):
            if self.saved:
                rows = self._saved_split(datasets.load_from_disk(self.name))
                rows = rows.to_iterable_dataset() if streaming else rows
            else:
                rows = datasets.load_dataset(**self._arguments(), split=self.source.dataset_split, streaming=streaming)
            columns: Iterable[str] = rows.column_names or next(iter(rows), {column: None})
            if column not in columns:
                raise ValueError(f"no column {column!r}; text_column must be one of {', '.join(columns)}")
            return rows.select_columns([column])

    def _saved_split(self, saved: Any) -> Any:
        import datasets

        if isinstance(saved, datasets.Dataset):
            saved = {str(saved.split or "train"): saved}
        if self.source.dataset_split not in saved:
            raise ValueError(
                f"no split {self.source.dataset_split!r}; dataset_split must be one of {', '.join(saved)}"
            )
        return saved[self.source.dataset_split]

    @property
    def size(self) -> int | None:
        """Rows, where it is known."""
        return None if self.source.streaming else len(self.rows)

    def documents(self, progress: Progress) -> Iterator[list[str]]:
        """The paragraphs of one document after another; ValueError where the column holds no text."""
        read = 0
        batches = self.rows.iter(batch_size=ROWS_AT_ONCE)
        with _named_errors(self.name):
            for batch in batches:
                for text in batch[self.source.text_column]:
                    read += 1
                    if paragraphs := self._paragraphs(text, read):
                        yield paragraphs
                progress(read)

    def _paragraphs(self, text: Any, row: int) -> list[str]:
        if not isinstance(text, str | None):
            raise ValueError(
                f"column {self.source.text_column!r} holds a {type(text).__name__} in row {row}, not text"
            )
        return [paragraph for line in (text or "").split("\n") if (paragraph := line.strip())]


@contextmanager
def _named_errors(name: str) -> Iterator[None]:
    """Errors of `datasets`, and ours, become a ValueError that names the dataset."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (DatasetsError, ValueError, OSError) as error:
        reason = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        raise ValueError(f"dataset {name}: {reason}") from error


def _state(files: list[Path]) -> list[tuple[int, int]]:
    return [(state.st_size, state.st_mtime_ns) for state in (file.stat() for file in files)]
