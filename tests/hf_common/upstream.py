"""transformers' own tests, fetched: `python tests/hf_common/upstream.py` puts them into build/hf_common.

The wheel holds no tests; the source distribution of the same version on the package index does. Nothing of it is kept
in this repository. The few test files that the distribution leaves out too are replaced by ours, in stubs/.
"""

import subprocess
import sys
import tarfile
import tempfile
import types
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
CACHE = HERE.parents[1] / "build" / "hf_common"
PACKAGE = "transformers_tests"


class DownloadError(OSError):
    """The package index did not give the source distribution."""


def fetch() -> Path:
    """The folder with the tests of the installed transformers; DownloadError if they cannot be had."""
    installed = version("transformers")
    folder = CACHE / installed / "tests"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        with tarfile.open(_download(installed, temporary)) as archive:
            inside = f"transformers-{installed}/tests/"
            archive.extractall(temporary, [m for m in archive if m.name.startswith(inside)], filter="data")
        (Path(temporary) / inside / "__init__.py").touch()  # one of their modules looks for it beside itself
        folder.parent.mkdir(exist_ok=True)
        (Path(temporary) / inside).rename(folder)
    return folder


def _download(installed: str, folder: str) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        "transformers",
        "-d",
        folder,
    ]
    done = subprocess.run([*command, f"transformers=={installed}"], capture_output=True, text=True)
    archives = list(Path(folder).glob("transformers-*.tar.gz"))
    if done.returncode or not archives:
        last = done.stderr.strip().splitlines()[-1:] or ["no archive came"]
        raise DownloadError(f"the source distribution of transformers {installed} could not be downloaded: {last[0]}")
    return archives[0]


def install() -> None:
    """Make them importable as the package `transformers_tests`, our stubs before them."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(HERE / "stubs"), str(fetch())]
    sys.modules[PACKAGE] = package


if __name__ == "__main__":
    try:
        print(fetch())
    except DownloadError as error:
        sys.exit(f"error: {error}")
