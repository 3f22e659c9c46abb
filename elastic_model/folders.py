"""Output folders: written beside, then renamed, and never in the place of something that is not ours."""

import ctypes
import glob
import json
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from filelock import FileLock, Timeout

MARKER = ".elastic-model"  # the file that says: this folder was made by us and may be replaced by us
MARKER_TEXT = "This folder was written by elastic-model, which may replace it. Delete this file to protect it.\n"
PARTS = (
    *("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors", "operating_points.json"),
    *("provenance.json", "export_report.json", "README.md"),
)  # files of a folder of ours that others are read with
TRAINER_STATE = "trainer_state.json"  # of a checkpoint from which pre-training continues
LOCK = ".lock"  # held by the job that is adding files to a folder
PACKAGES = ("elastic_model", "pretrain", "finetune", "export")
RENAME_EXCHANGE = 2  # linux/fs.h
AT_FDCWD = -100  # fcntl.h


def shipped(path: Path) -> Path:
    """`path` as given if it exists, else the file of that name inside the installed packages.

    So `pretrain/recipes/tiny.yaml` means the same in a checkout and, anywhere else, in an installed wheel.
    """
    path = Path(path)
    if path.exists() or path.is_absolute() or path.parts[:1] not in {(package,) for package in PACKAGES}:
        return path
    installed = Path(__file__).parents[1] / path
    return installed if installed.exists() else path


def is_ours(path: Path) -> bool:
    """Whether the folder carries the marker that `new_folder` and `claim_folder` write."""
    return (Path(path) / MARKER).is_file()


def check_output(path: Path) -> None:
    """ValueError unless `path` is free: absent, an empty folder, or a folder of ours."""
    path = Path(path)
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_dir():
        raise ValueError(f"output {path} exists and is not a folder; choose another output")
    if not is_ours(path) and any(path.iterdir()):
        raise ValueError(f"output folder {path} exists and was not made by elastic-model; choose another output")


def check_replaceable(path: Path, *read: Path | str | None) -> None:
    """As `check_output`, of what `new_folder` will replace: ValueError also for a folder of ours that holds the
    folders of other jobs, what this one reads, or the state that a pre-training run continues from."""
    path = Path(path)
    for source in (Path(one) for one in read if one is not None):
        if source.exists() and path.resolve() in (source.resolve(), *source.resolve().parents):
            raise ValueError(f"output {path} would replace {source}, which is read; choose another output")
    if is_ours(path) and (path / TRAINER_STATE).is_file():
        raise ValueError(f"output {path} would replace the state of a pre-training run; choose another output")
    _check_alone(path)


def _check_alone(path: Path) -> None:
    """ValueError where the working folder or another job's folder would go with the folder `path`."""
    if Path.cwd().is_relative_to(path.resolve()):
        raise ValueError(f"output {path} is the working folder, or holds it, and cannot be replaced; name one in it")
    check_output(path)
    inner = next((one.parent for one in sorted(path.rglob(MARKER)) if one.parent != path), None)
    if inner is not None:
        raise ValueError(f"output {path} would replace what other jobs made there, as {inner}; choose another output")


def check_no_checkpoint(path: Path) -> None:
    """ValueError where a folder to which jobs add folders of their own is a checkpoint or an export."""
    if (Path(path) / "config.json").is_file():
        raise ValueError(f"output {path} is a checkpoint; choose another output")


def check_writable(folder: Path) -> None:
    """ValueError where nothing can be put into a folder, to which the result of a long job will be added."""
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written to ({error}); work on a copy of it") from error


def check_file(path: Path, *read: Path | str | None) -> None:
    """ValueError unless a file can be written at `path`: not over a folder, a file that the job reads or a part of a
    checkpoint or an export, nor into a folder that is not there."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"output {path} is a folder; give a file")
    if not path.resolve().parent.is_dir():
        raise ValueError(f"output {path}: there is no folder {path.parent}; make it, or choose another output")
    checkpoint = is_ours(path.parent) or (path.parent / "config.json").is_file()
    parts = path.exists() and checkpoint and path.name in PARTS
    if parts or path.resolve() in [Path(source).resolve() for source in read if source is not None]:
        raise ValueError(f"output {path} would replace that file, which is read; choose another output")


def claim_folder(path: Path) -> Path:
    """The folder `path`, made or already ours, to which a job adds files over time (a training run)."""
    path = Path(path)
    check_output(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / MARKER).write_text(MARKER_TEXT)
    return path


@contextmanager
def working_in(path: Path) -> Iterator[Path]:
    """The folder `path`, claimed, for this process alone until the block ends; ValueError where another process is
    at work there. A process that is killed holds nothing any more."""
    path = claim_folder(path)
    lock = FileLock(path / LOCK, timeout=0, is_singleton=True)  # a job within a job of this process may have it too
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"another process is working in {path}; wait until it has ended, or choose another output"
        ) from error
    except NotImplementedError:  # a file system without locks, as some of clusters: nothing to be had there
        yield path
        return
    try:
        yield path
    finally:
        lock.release()


def empty_folder(path: Path) -> None:
    """Remove what a folder of ours holds beside the marker and the lock."""
    for inner in Path(path).iterdir():
        if inner.is_dir() and not inner.is_symlink():
            shutil.rmtree(inner)
        elif inner.name not in (MARKER, LOCK):
            inner.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends: all of it or nothing.

    On success every file is fsynced and the folder renamed; a folder of ours already there is exchanged for it in one
    step and removed. A folder that is not ours, or holds other jobs' folders: ValueError, before anything is written.
    On an error inside the block the temporary folder is removed and `path` stays as it was.
    """
    target = Path(os.path.realpath(path))  # of a link, what it leads to
    _check_alone(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(target)
    temporary.mkdir()
    try:
        yield temporary
        (temporary / MARKER).write_text(MARKER_TEXT)
        sync_tree(temporary)
        check_output(target)  # somebody else may have written there meanwhile
        _replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_path(target.parent)


def _descriptor(path: Path) -> int | None:
    """Of /dev/stdout and its like, the number of the open file; None of other paths."""
    number = re.fullmatch(r"/(?:dev|proc/self)/fd/(\d+)", str(path))
    return int(number[1]) if number else {"/dev/stdout": 1, "/dev/stderr": 2}.get(str(path))


def is_file(path: Path | str) -> bool:
    """Whether a file is there or may be: False of /dev/null, a pipe, or /dev/stdout, wherever that leads."""
    path = Path(path)
    return _descriptor(path) is None and (path.is_file() or not path.exists())


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block ends: fsynced, then renamed over what was there, of a link
    over what it leads to. What is no file, as /dev/null or a pipe, is written to instead."""
    path = Path(path)
    if not is_file(path):
        with TemporaryDirectory() as folder:
            yield Path(folder) / path.name
            sys.stdout.flush()
            descriptor = _descriptor(path)  # a file that the shell opened, where its own place in it is
            target = path if descriptor is None else os.dup(descriptor)
            with (Path(folder) / path.name).open("rb") as written, open(target, "wb") as opened:
                shutil.copyfileobj(written, opened)
        return
    path = Path(os.path.realpath(path))
    temporary = _beside(path)
    try:
        yield temporary
        sync_path(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)  # a write to a full disk names none
        raise
    finally:
        temporary.unlink(missing_ok=True)
    sync_path(path.parent)


def write_text(path: Path, text: str) -> None:
    """A file of this text, as `new_file` makes it."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """A file of this content as JSON, as `new_file` makes it."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, and `folder` itself."""
    for path in [*folder.rglob("*"), folder]:
        sync_path(path)


def sync_path(path: Path) -> None:
    """fsync one file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace_folder(new: Path, target: Path) -> None:
    """Rename `new` to `target`; a folder of ours there ends up in the place of `new`."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(new, target)
        return
    if not _exchange(new, target):  # without renameat2 there is a moment in which `target` does not exist
        old = new.with_suffix(".old")
        os.replace(target, old)
        os.replace(new, target)
        os.replace(old, new)


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two folders in one atomic step (Linux renameat2); False where that is not to be had."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    return renameat2(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0


def _beside(target: Path) -> Path:
    """A free name beside `target` to write under; what killed processes of this machine left there is removed."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.{socket.gethostname()}.*.new"):
        process = path.name.split(".")[-3]
        if not process.isdigit() or _alive(int(process)):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.new")


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
