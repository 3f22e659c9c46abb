"""What a checkpoint was made of: a record beside it, to which every stage of its life adds an entry."""

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError

from elastic_model.operating_points import checkpoint_hash

FILE = "provenance.json"
FORMAT = 1
CARD = "README.md"
DATA_CARD = "PROVENANCE.md"  # beside data files: its front matter states their licence and language
# what a parent's card states that holds for its children too, or that a card of theirs must name
CARD_FIELDS = ("license", "license_name", "license_link", "base_model", "datasets", "language")
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
PACKAGES = ("elastic-model", "torch", "transformers", "accelerate", "onnx", "onnxruntime")

logger = logging.getLogger(__name__)


@strict  # checks every assignment; a frozen dataclass makes none that it could see
@dataclass
class Data:
    """A source of data. `hub_id`: only where it is a data set of the hub; what is not known stays None."""

    name: str
    split: str | None = None
    sha256: str | None = None
    license: str | None = None
    hub_id: str | None = None
    language: str | None = None


@strict
@dataclass
class Metric:
    """A figure measured on a split of `data`; `metric` as the hub calls it, `exit_layer` None where rows leave at
    exits of their own; `low` and `high` bound its confidence interval."""

    metric: str
    value: float | int
    data: str
    split: str
    exit_layer: int | None = None
    low: float | int | None = None
    high: float | int | None = None


@strict
@dataclass
class Parent:
    """The checkpoint that a stage began with. `hub_id` and `revision` (commit): only where it came from the hub;
    `card`: the fields of CARD_FIELDS that its card states."""

    name: str
    hub_id: str | None = None
    revision: str | None = None
    sha256: str | None = None
    card: dict[str, Any] = field(default_factory=dict)


@strict
@dataclass
class Stage:
    """One stage: what it began with (`parent` None: random weights), read, was set to and measured; `checkpoint` is
    the sha256 of the weights it left (None: it left none), `license` the one its author stated for them."""

    stage: str
    checkpoint: str | None = None
    parent: Parent | None = None
    data: list[Data] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    license: str | None = None
    versions: dict[str, str] = field(default_factory=dict)


def read_provenance(folder: Path | str) -> list[Stage]:
    """The stages of a checkpoint, oldest first; none where it has no record; ValueError where that is damaged."""
    file = Path(folder) / FILE
    if not file.is_file():
        return []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, this version reads format {FORMAT}")
        return [_stage(stage) for stage in content["stages"]]
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file}: not a record of provenance ({reason}); restore it or delete it") from error


def append_stage(
    folder: Path | str,
    stage: str,
    *,
    parent: Path | str | None = None,
    revision: str | None = None,
    data: Iterable[Data] = (),
    metrics: Iterable[Metric] = (),
    settings: Mapping[str, Any] | None = None,
    seed: int | None = None,
    license: str | None = None,
) -> list[Stage]:
    """Write the record of `folder`: the parent's stages (without a parent the folder's own) and this one.

    Call it when the weights are in the folder. `parent` is a checkpoint folder or a hub id, `settings` the options
    of the job; of paths only the last part is recorded, since the record is published. `license`: only where the
    author states one. Returns all stages.
    """
    folder = Path(folder)
    before = read_provenance(folder)
    origin = None
    if parent is not None:
        origin, before = describe_parent(parent, revision), parent_provenance(parent, revision)
    added = Stage(
        stage=stage,
        checkpoint=weights_hash(folder),
        parent=origin,
        data=list(data),
        metrics=list(metrics),
        settings={name: _publishable(value) for name, value in (settings or {}).items()},
        seed=seed,
        license=license,
        versions=versions(),
    )
    write_provenance(folder, [*before, added])
    return [*before, added]


def write_provenance(folder: Path | str, stages: list[Stage]) -> None:
    """The record of `folder`, in the place of the one before."""
    content = {"format": FORMAT, "stages": [dataclasses.asdict(stage) for stage in stages]}
    (Path(folder) / FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def describe_data(file: Path | str, name: str, split: str | None = None, sha256: str | None = None) -> Data:
    """A data file, with what the PROVENANCE.md beside it states in its front matter: `license`, `language`."""
    stated = _card_fields(Path(file).parent / DATA_CARD)
    terms = {field: str(stated[field]) for field in ("license", "language") if field in stated}
    return Data(name=name, split=split, sha256=sha256 or file_hash(file), **terms)


def describe_parent(name: Path | str, revision: str | None = None) -> Parent:
    """Where a checkpoint came from and what its card states; ValueError for neither a folder nor a hub id."""
    folder = Path(name)
    if folder.is_dir():
        card = _card_fields(folder / CARD)
        return Parent(name=folder.resolve().name, sha256=weights_hash(folder), card=card)
    config = hub_file(str(name), "config.json", revision)
    if config is None:  # nothing says that there is such a repository: its name is no base model
        return Parent(name=Path(name).name)
    return Parent(
        name=str(name),
        hub_id=str(name),
        revision=config.parent.name,
        sha256=weights_hash(config.parent),
        card=_card_fields(hub_file(str(name), CARD, revision)),
    )


def parent_provenance(name: Path | str, revision: str | None = None) -> list[Stage]:
    """The stages of a checkpoint folder or of a checkpoint on the hub."""
    if Path(name).is_dir():
        return read_provenance(name)
    file = hub_file(str(name), FILE, revision)
    return read_provenance(file.parent) if file else []


def hub_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a repository on the hub, from the cache where it is there; None where there is no such file, or no
    way to get it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if not HUB_ID.fullmatch(name):
        raise ValueError(f"checkpoint {name} is neither a folder nor a hub id (organisation/name)")
    try:
        return Path(hf_hub_download(name, file, revision=revision))
    except (HfHubHTTPError, LocalEntryNotFoundError):
        return None


def license_of(stages: list[Stage]) -> dict[str, Any]:
    """The licence that the last stage to say something states: its own, or that of its parent's card."""
    for stage in reversed(stages):
        if stage.license:
            return {"license": stage.license}
        stated = _parent_card(stage)
        if stated.get("license"):
            return {name: stated[name] for name in ("license", "license_name", "license_link") if name in stated}
    return {}


def base_model_of(stages: list[Stage]) -> Any:
    """The hub id of the last parent that came from the hub, or what the card of a local parent names."""
    for stage in reversed(stages):
        if stage.parent and (stage.parent.hub_id or stage.parent.card.get("base_model")):
            return stage.parent.hub_id or stage.parent.card["base_model"]
    return None


def datasets_of(stages: list[Stage]) -> list[str]:
    """The hub's data sets that the stages read, or that the cards of their parents name."""
    return _union(
        [*listed(_parent_card(stage).get("datasets")), *(one.hub_id for one in stage.data)] for stage in stages
    )


def languages_of(stages: list[Stage]) -> list[str]:
    """The languages of the data, where they are known."""
    return _union(
        [*listed(_parent_card(stage).get("language")), *(one.language for one in stage.data)] for stage in stages
    )


def listed(value: Any) -> list[str]:
    """The values of a card's field, which may hold none, one or a list of them."""
    return [str(one) for one in (value if isinstance(value, list) else [value]) if one]


def weights_hash(folder: Path) -> str | None:
    """sha256 of a checkpoint's safetensors files, None where it has none."""
    return checkpoint_hash(folder) if any(folder.glob("*.safetensors")) else None


def file_hash(path: Path | str) -> str:
    """sha256 of one file, for `Data`."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _stage(content: dict[str, Any]) -> Stage:
    parts = {
        "parent": content["parent"] and Parent(**content["parent"]),
        "data": [Data(**one) for one in content["data"]],
        "metrics": [Metric(**one) for one in content["metrics"]],
    }
    return Stage(**{**content, **parts})


def _parent_card(stage: Stage) -> dict[str, Any]:
    return stage.parent.card if stage.parent else {}


def _union(lists: Iterable[Iterable[str | None]]) -> list[str]:
    return list(dict.fromkeys(one for part in lists for one in part if one))


def _card_fields(file: Path | None) -> dict[str, Any]:
    """What a card states of CARD_FIELDS; nothing where there is no card, or one that cannot be read (with a warning:
    training that has ended must not be lost over it)."""
    from huggingface_hub.repocard import metadata_load

    if file is None or not file.is_file():
        return {}
    try:
        stated = metadata_load(file) or {}
    except Exception as error:  # PyYAML's errors have no base in common with the others
        logger.warning("%s cannot be read as a model card, what it states is left out: %s", file, error)
        return {}
    return {name: stated[name] for name in CARD_FIELDS if stated.get(name)}


def _publishable(value: Any) -> Any:
    """As JSON can hold it; an absolute path is cut to its last part."""
    if isinstance(value, Mapping):
        return {str(key): _publishable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_publishable(one) for one in value]
    if isinstance(value, Path) or isinstance(value, str) and value.startswith(("/", "~")):
        return Path(value).name
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def versions() -> dict[str, str]:
    """Of the packages that a stage depends on, those that are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
