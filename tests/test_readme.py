"""What the README and the page of measurements show runs: Python on tiny folders, commands by their options, targets
by name; and their links lead somewhere."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "benchmarks/README.md")}


def blocks(language: str) -> list[str]:
    pattern = rf"^```{language}\n(.*?)^```"
    return [block for page in PAGES.values() for block in re.findall(pattern, page, flags=re.MULTILINE | re.DOTALL)]


def anchors(page: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_python_blocks_run(tiny_checkpoint, tmp_path, capsys):
    from elastic_model.operating_points import OperatingPoint, OperatingPoints, checkpoint_hash
    from export.config import ExportOptions
    from export.write import export_checkpoint

    points = [OperatingPoint("full", [0.0] * 4, 4.0), OperatingPoint("calibrated", [0.9] * 4, 2.0)]
    policy = {"name": "entropy", "threshold": 0.9}
    OperatingPoints(checkpoint_hash(tiny_checkpoint), policy, points).save(tiny_checkpoint)
    export_checkpoint(ExportOptions(checkpoint=tiny_checkpoint, output=tmp_path / "exported"))
    code = "\n".join(blocks("python"))
    assert code.count("demo/exported") == 1 and code.count("demo/era") == 2
    code = code.replace("demo/exported", str(tmp_path / "exported")).replace("demo/era", str(tiny_checkpoint))
    exec(code, {})
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4
    assert all("'exit_layer': " in line for line in printed[:3])
    assert "'exit_layer': 4, 'point': 'full'" in printed[1]
    assert "tensor([" in printed[3]


def commands() -> list[list[str]]:
    return [shlex.split(line) for line in "\n".join(blocks("sh")).splitlines() if line.startswith("python -m")]


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_commands_parse(command):
    from elastic_model.arguments import parse
    from export.config import ExportOptions, PredictOptions
    from finetune.__main__ import COMMANDS
    from pretrain.config import EvaluateConfig, PretrainConfig

    options = {"pretrain": PretrainConfig, "pretrain evaluate": EvaluateConfig, "export predict": PredictOptions}
    options |= {f"finetune {name}": kind for name, (kind, _) in COMMANDS.items()}
    package, *rest = command[2:]
    words = next((words for words in (2, 1) if " ".join([package, *rest[:words]]) in options), 0)
    kind, flags = options.get(" ".join([package, *rest[:words]]), ExportOptions), rest[words:]
    parsed = parse(kind, flags)
    named = [word for word in flags if word.startswith(("pretrain/", "finetune/"))]
    assert all((ROOT / path).is_file() for path in named)
    assert any(str(value).startswith(("demo/", "your-org/")) for value in vars(parsed).values())


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`make ([a-z0-9-]+)", "".join(PAGES.values())))
    assert len(targets) >= 5
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files_and_headings(name):
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[name]):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link
