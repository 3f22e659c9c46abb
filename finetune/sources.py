"""Where the rows of a split come from: a file, or a split of a data set that `datasets` loads."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_model.provenance import Data, describe_data
from elastic_model.tables import Row, form_of, read_table


@dataclass(frozen=True)
class Source:
    """The rows of one split: a file below the task's folder, and which of its rows (from `first` to before `end`)."""

    file: str
    first: int | None = None
    end: int | None = None
    form: str | None = None
    columns: tuple[str, ...] | None = None

    def rows(self, folder: Path) -> list[Row]:
        """The rows; ValueError where the file cannot be read as a table."""
        return read_table(folder / self.file, self.form, self.columns)[self.first : self.end]

    def describe(self, folder: Path, task: str, split: str, sha256: str) -> Data:
        """What provenance records of it; sha256: of the rows as they were read."""
        return describe_data(folder / self.file, task, split, sha256)

    @property
    def kind(self) -> str:
        """tsv, csv, jsonl, conll or squad."""
        return self.form or form_of(Path(self.file))


@dataclass(frozen=True)
class DatasetSource:
    """The rows of one split of a data set: a folder of `save_to_disk`, a folder of files, or an id of the hub.

    splits: names of the split, the first one that is there counts. missing: a label that stands for none (SNLI's -1);
    such rows are left out.
    """

    dataset: str
    splits: tuple[str, ...]
    config: str | None = None
    missing: tuple[str, ...] = ()
    label: str | None = None

    def rows(self, folder: Path) -> list[Row]:
        """The rows, labels by their names; ValueError where the data set or the split cannot be had."""
        rows = list(_dataset_rows(self))
        if self.label is None or not self.missing:
            return rows
        return [row for row in rows if row[self.label] is not None and str(row[self.label]) not in self.missing]

    def describe(self, folder: Path, task: str, split: str, sha256: str) -> Data:
        """What provenance records of it; sha256: of the rows as they were read."""
        hub_id = None if Path(self.dataset).exists() else self.dataset
        return Data(name=hub_id or Path(self.dataset).name, split=split, sha256=sha256, hub_id=hub_id)

    @property
    def kind(self) -> str:
        """How own columns are found by default: as in a table."""
        return "dataset"


def _load(source: DatasetSource) -> Any:
    """All splits of a data set, as `datasets` holds them; ValueError where it cannot be had."""
    from datasets import DatasetDict, disable_progress_bars, load_dataset, load_from_disk

    disable_progress_bars()
    folder = Path(source.dataset)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = load_from_disk(str(folder))
            if isinstance(loaded, DatasetDict):
                return loaded
            return DatasetDict({str(loaded.split or "train").split("[")[0]: loaded})  # a split alone is no other one
        return load_dataset(source.dataset, source.config)
    except Exception as error:  # `datasets` raises whatever its readers and the network raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "folder" if folder.exists() else "data set of the hub"
        raise ValueError(f"{source.dataset}: this {where} cannot be loaded ({reason})") from error


def _names(feature: Any) -> Any:
    """What turns a column's values into labels by name (below 0: no label); None where they are none."""
    from datasets import ClassLabel

    if isinstance(feature, ClassLabel):
        return lambda value: None if value is None or value < 0 else feature.int2str(value)
    inner = getattr(feature, "feature", None)
    if isinstance(inner, ClassLabel):
        return lambda values: None if values is None else [inner.int2str(value) for value in values]
    return None


def _dataset_rows(source: DatasetSource) -> Iterator[Row]:
    splits = _load(source)
    name = next((name for name in source.splits if name in splits), None)
    if name is None:
        raise ValueError(f"{source.dataset} has no split {' or '.join(source.splits)}; it has: {', '.join(splits)}")
    split = splits[name]
    named = {column: names for column, feature in split.features.items() if (names := _names(feature))}
    for number, cells in enumerate(split):
        yield Row(
            {**cells, **{column: names(cells[column]) for column, names in named.items()}},
            f"{source.dataset}, {name}, row {number + 1}",
        )
