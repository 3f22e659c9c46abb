"""What the README shows runs: its Python on tiny folders, its commands by their options, its targets by name."""

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


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
    targets = set(re.findall(r"`make ([a-z0-9-]+)", README))
    assert len(targets) >= 5
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)


def test_links_lead_to_files():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).is_file(), link
