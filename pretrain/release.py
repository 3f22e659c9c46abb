"""A checkpoint as a complete hub folder, checked where this package is not installed, and uploaded only on request."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from huggingface_hub import HfApi
from safetensors.torch import load_file

import elastic_model.auto  # noqa: F401 - registers our classes with the Auto classes
from elastic_model.card import CARD, is_ours, read_facts, statements, write_card
from elastic_model.folders import MARKER, check_replaceable, new_folder
from elastic_model.hub import carry_records
from elastic_model.provenance import file_hash
from pretrain import loads_alone
from pretrain.config import ReleaseConfig

SUMS = "SHA256SUMS"
# what a checkpoint may hold beside weights, tokenizer, card and records that its users want to have
EXTRAS = ("onnx", "export_report.json", "evaluation.json", "report.txt", "losses.png", "LICENSE")
TOLERANCE = 1e-5  # of what a model answers in another process: it is the same code and the same weights


def release(config: ReleaseConfig) -> int:
    """Write `config.output`, or nothing where the checkpoint is not complete; upload it with `config.push` only."""
    check_replaceable(config.output, config.model)
    facts = read_facts(config.model)
    if not facts.has_tokenizer:
        raise ValueError(f"{config.model} holds no tokenizer; save it there first (tokenizer.save_pretrained)")
    loader = getattr(transformers, facts.task.auto_class)
    model, report = loader.from_pretrained(config.model, output_loading_info=True)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"{config.model} lacks weights of a {type(model).__name__}: {', '.join(missing)}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    with new_folder(config.output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _copy_others(config, folder)
        _check_alone(folder, facts.task.auto_class, loads_alone.answers(model.eval(), tokenizer))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        lines = [f"{file_hash(path)}  {path.relative_to(folder)}\n" for path in files]
        (folder / SUMS).write_text("".join(lines))
    print(f"{config.output}: {len(files)} files; loads without this package and answers the same")
    print(statements(read_facts(config.output)))
    if config.push:
        _push(config.output, config.push, config.private)
    return 0


def _copy_others(config: ReleaseConfig, folder: Path) -> None:
    """Records, extras and the card: a new one, or the one that somebody wrote for this checkpoint."""
    for name in EXTRAS:
        source = config.model / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        elif source.is_file():
            shutil.copyfile(source, folder / name)
    carry_records(folder, str(config.model), None)
    card = config.model / CARD
    if card.is_file() and not is_ours(card):
        shutil.copyfile(card, folder / CARD)
    else:
        write_card(folder, config.push, name=config.output.resolve().name)


def _check_alone(folder: Path, auto_class: str, expected: dict[str, torch.Tensor]) -> None:
    """ValueError unless a fresh process without this package loads the folder and answers the same."""
    with TemporaryDirectory() as name:
        checkpoint, out = Path(name) / "checkpoint", Path(name) / "answers.safetensors"
        checkpoint.symlink_to(folder)
        environment = {**os.environ, "HF_HOME": str(Path(name) / "home"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-I", loads_alone.__file__, str(checkpoint), auto_class, str(out)]
        done = subprocess.run(command, cwd=name, env=environment, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"the release does not load where this package is not installed: {last}")
        found = load_file(out)
    for key, tensor in expected.items():
        if key not in found or not torch.allclose(tensor, found[key], rtol=0, atol=TOLERANCE, equal_nan=True):
            raise ValueError(f"the release answers something else where this package is not installed: {key}")


def _push(folder: Path, repo_id: str, private: bool) -> None:
    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=[MARKER], commit_message="Release")
    print(f"pushed: {commit.commit_url}")
