"""The layout that everything relies on: who imports whom, what loads when, what travels to the hub."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "elastic_model": set(),
    "pretrain": {"elastic_model"},
    "export": {"elastic_model"},
    "finetune": {"elastic_model", "export"},  # export: for pipelines, whose last stages are files
}
TRAVELLING = ROOT / "elastic_model/modeling_elasticbert.py"


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def absolute_imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Top-level names of the modules that a file imports, wherever in the file or only when it is loaded itself."""
    tree = ast.parse(path.read_text())
    nodes = ast.iter_child_nodes(tree) if top_level_only else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
    return names


def third_party(names: set[str]) -> set[str]:
    return {name for name in names if name not in sys.stdlib_module_names} - ALLOWED.keys()


def run(code: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_downwards(package):
    for path in sources(package):
        ours = absolute_imports(path) & (ALLOWED.keys() | {"benchmarks", "tests"})
        assert ours <= ALLOWED[package] | {package}, path


def test_the_library_needs_torch_and_transformers_only():
    """At import; the client of exported files, what parses options and what jobs train with load what they need and
    say so in the extras."""
    clients = {
        "session.py": {"numpy", "onnxruntime", "tokenizers"},
        "arguments.py": {"yaml"},
        "distributed.py": {"accelerate"},
    }
    brought_by_transformers = {"huggingface_hub", "safetensors", "numpy", "filelock"}
    for path in sources("elastic_model"):
        allowed = {"torch", "transformers"} | brought_by_transformers | clients.get(path.name, set())
        assert third_party(absolute_imports(path, top_level_only=True)) <= allowed, path


def test_a_bare_import_loads_nothing_heavy():
    code = "import sys, elastic_model; print(*{'torch', 'transformers', 'numpy', 'onnxruntime'} & sys.modules.keys())"
    done = run(code)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_every_public_name_loads():
    done = run("import elastic_model\nfor name in elastic_model.__all__: getattr(elastic_model, name)")
    assert done.returncode == 0, done.stderr


def test_the_session_loads_no_torch():
    blocked = "import sys\nfor name in ('torch', 'transformers'): sys.modules[name] = None\n"
    done = run(blocked + "from elastic_model import ElasticSession, OperatingPoints")
    assert done.returncode == 0, done.stderr


def relative_imports(path: Path) -> list[str]:
    return [node.module or "" for node in ast.walk(ast.parse(path.read_text())) if getattr(node, "level", 0)]


def test_what_travels_to_the_hub():
    """A stray import here would break every user's from_pretrained: flat files, `from .name import`, two libraries."""
    from transformers.dynamic_module_utils import get_relative_import_files

    found = {Path(file) for file in get_relative_import_files(TRAVELLING)} | {TRAVELLING}
    assert all(file.parent == TRAVELLING.parent for file in found)
    assert ROOT / "elastic_model/configuration_elasticbert.py" in found
    for path in found:
        text = path.read_text()
        assert third_party(absolute_imports(path)) <= {"torch", "transformers", "huggingface_hub", "safetensors"}, path
        assert not absolute_imports(path) & ALLOWED.keys(), f"{path}: use `from .name import`"
        assert "from __future__ import annotations" not in text, path
        reached = {path.parent / f"{name}.py" for name in relative_imports(path)}
        assert reached <= found, f"{path}: `from .name import` only"
        literal = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE))
        assert literal == set(relative_imports(path)), f"{path}: transformers reads import lines inside strings too"


@pytest.mark.parametrize("command", ["pretrain", "finetune", "export"])
def test_help_answers_at_once(command):
    """Options are parsed before torch or a model file is imported."""
    code = f"""
import runpy, sys
sys.argv = ["{command}", "--help"]
try:
    runpy.run_module("{command}", run_name="__main__", alter_sys=True)
except SystemExit as exit:
    heavy = {{"torch", "accelerate", "onnxruntime", "elastic_model.modeling_elasticbert"}}
    print("loaded:", *heavy & sys.modules.keys())
    raise
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout
    assert done.stdout.splitlines()[-1].strip() == "loaded:"


def test_functions_stay_short():
    """Above sixty lines there is a noun hiding inside."""
    long = []
    for path in [file for package in (*ALLOWED, "benchmarks") for file in sources(package)]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 60:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert not long
