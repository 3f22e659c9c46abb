"""The wheel: what is in it, and that it works away from the checkout."""

import ast
import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("elastic_model", "pretrain", "finetune", "export")
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")


def shipped_files() -> set[str]:
    """What the packages hold in the checkout."""
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


def requirements(section: str, key: str) -> list[str]:
    return SETUP[section][key].split()


def test_the_library_requires_torch_and_transformers_only():
    names = {line.split(">=")[0] for line in requirements("options", "install_requires")}
    assert names == {"torch", "transformers", "tokenizers", "filelock"}  # the last two come with transformers
    assert {"train", "export", "serve", "deepspeed", "dev"} <= set(SETUP["options.extras_require"])


def test_what_is_pinned_satisfies_what_is_required():
    from packaging.requirements import Requirement

    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items() if not name.startswith("#")}
    extras = SETUP["options.extras_require"]
    lines = [line for key in extras for line in requirements("options.extras_require", key)]
    for requirement in map(Requirement, [*lines, *requirements("options", "install_requires")]):
        assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def imported(folder: str) -> set[str]:
    """Top-level modules that the Python files of a folder import, wherever in the file."""
    trees = [ast.parse(path.read_text()) for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("folder", [*PACKAGES, "benchmarks", "tests"])
def test_what_is_imported_is_declared(folder):
    """In setup.cfg, or required by what is declared there: a fresh environment has all of it."""
    extras = SETUP["options.extras_require"]
    lines = [*requirements("options", "install_requires"), *(line for key in extras for line in extras[key].split())]
    available = {re.split(r"[<>=~!]", line)[0].lower() for line in lines}
    for name in sorted(available):
        available |= {re.split(r"[^\w.-]", line)[0].lower() for line in metadata.requires(name) or ()}
    distributions = metadata.packages_distributions()
    for name in imported(folder) & distributions.keys() - {*PACKAGES, "pip"}:
        assert {one.lower() for one in distributions[name]} & available, f"{folder} imports {name}"


def test_console_scripts_name_functions_that_exist():
    lines = SETUP["options.entry_points"]["console_scripts"].split("\n")
    for name, target in (line.split(" = ") for line in lines if line):
        module, function = target.split(":")
        assert name == f"elastic-{module.split('.')[0]}"
        assert f"def {function}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()


def call(*command: object, cwd: Path, **kwargs) -> subprocess.CompletedProcess:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    text = [str(part) for part in command]
    return subprocess.run(text, capture_output=True, text=True, cwd=cwd, env=clean, timeout=300, **kwargs)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that no build folder appears in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    done = call(*pip, cwd=out)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A clean environment with the wheel and, by a path file, the libraries of this one but not our checkout."""
    folder = tmp_path_factory.mktemp("environment")
    assert call(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder).returncode == 0
    python = folder / "bin/python"
    site = Path(call(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).stdout.strip())
    libraries = Path(pytest.__file__).parent.parent
    (site / "libraries.pth").write_text(
        f"{libraries}\n"
    )  # its own .pth files, an editable install among them, stay unread
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    done = call(*pip, cwd=folder)
    assert done.returncode == 0, done.stderr
    return python


@pytest.mark.slow
def test_the_wheel_holds_the_packages_and_their_data_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("licenses/LICENSE")]
    assert names == shipped_files()
    assert licences


@pytest.mark.slow
def test_the_installed_library_is_the_one_of_the_wheel(installed, tmp_path):
    code = "import elastic_model; print(elastic_model.__file__); from elastic_model import ElasticBertModel"
    done = call(installed, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(installed.parent.parent))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["pretrain", "finetune", "export"])
def test_commands_answer_outside_the_checkout(installed, tmp_path, command):
    for start in ((installed, "-m", command), (installed.parent / f"elastic-{command}",)):
        done = call(*start, "--help", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "usage:" in done.stdout


@pytest.mark.slow
def test_the_wheel_pretrains_from_its_own_recipe_and_text(installed, tmp_path):
    """A recipe and the embedded text are found by the names they have in the checkout."""
    small = "--steps 2 --warmup_steps 1 --hidden_size 16 --num_attention_heads 2 --num_hidden_layers 2 --batch_size 4"
    flags = (
        f"--config pretrain/recipes/tiny.yaml --output out --cache cache {small} --evaluation_examples 8 --workers 0"
    )
    done = call(installed, "-m", "pretrain", *flags.split(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    load = (
        "from elastic_model import ElasticBertForPreTraining as M; print(M.from_pretrained('out').config.exit_layers)"
    )
    done = call(installed, "-c", load, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "[1, 2]"), done.stderr
