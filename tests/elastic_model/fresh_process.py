"""Run as a script where `elastic_model` cannot be imported: loads checkpoints as any user of the hub does.

`fresh_process.py IN OUT AGAIN`: every folder IN/CLASS is loaded by the Auto class of its name with
`trust_remote_code=True`; its answers go to OUT/CLASS.safetensors, and it is saved again as OUT/CLASS. Then the same
from OUT to AGAIN.
"""

import importlib
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

PACKAGES = ("elastic_model", "pretrain", "finetune", "export")
AUTO_CLASSES = {
    "AutoModel": "ElasticBertModel",
    "AutoModelForPreTraining": "ElasticBertForPreTraining",
    "AutoModelForMaskedLM": "ElasticBertForMaskedLM",
    "AutoModelForSequenceClassification": "ElasticBertForSequenceClassification",
    "AutoModelForTokenClassification": "ElasticBertForTokenClassification",
    "AutoModelForQuestionAnswering": "ElasticBertForQuestionAnswering",
    "AutoModelForMultipleChoice": "ElasticBertForMultipleChoice",
}
WITH_POLICY = {name for name in AUTO_CLASSES if name.startswith("AutoModelFor")} - {
    "AutoModelForPreTraining",
    "AutoModelForMaskedLM",
}
LENGTHS = [1.0, 0.7, 0.5, 0.5]
BLOCK = f"""
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {PACKAGES}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""


def run(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """Python code in a process that sees neither the package nor this checkout, with its own HF_HOME below `cwd`."""
    needed = {
        "HF_HOME": str(cwd / "hf_home"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PATH": "/usr/bin:/bin",
    }
    command = [sys.executable, "-I", "-c", BLOCK + code]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=needed | environment, timeout=300)


def run_here(folders: list[Path], cwd: Path) -> subprocess.CompletedProcess:
    """This file as a script in such a process, offline."""
    arguments = [__file__, *map(str, folders)]
    code = f"sys.argv = {arguments}\nrunpy.run_path({__file__!r}, run_name='__main__')"
    return run(code, cwd, HF_HUB_OFFLINE="1")


def answers(model: torch.nn.Module, auto_class: str) -> dict[str, torch.Tensor]:
    """All tensors of all outputs: plain, at a length configuration, without a layer, and under exit policies."""
    generator = torch.Generator().manual_seed(3)
    shape = (3, 2, 11) if auto_class == "AutoModelForMultipleChoice" else (3, 11)
    ids = torch.randint(5, 200, shape, generator=generator)
    mask = (torch.arange(11) < torch.tensor([11, 7, 4])[:, None]).long()
    mask = mask[:, None].expand(shape) if len(shape) == 3 else mask
    arguments = {
        "plain": {},
        "lengths": {"length_config": LENGTHS},
        "layers": {"layer_config": [1, 3, 4]},
    }
    if auto_class in WITH_POLICY:
        for threshold in (0.5, 0.8, 0.9, 0.98):
            arguments[f"entropy_{threshold}"] = {"exit_policy": {"name": "entropy", "threshold": threshold}}
        arguments["patience"] = {"exit_policy": {"name": "patience", "patience": 1}, "length_config": LENGTHS}
    found = {}
    with torch.no_grad():
        for name, argument in arguments.items():
            for field, value in model(input_ids=ids, attention_mask=mask, **argument).items():
                for number, tensor in enumerate(value if isinstance(value, tuple) else [value]):
                    found[f"{name}.{field}.{number}"] = tensor.contiguous().clone()
    return found


def check_alone() -> None:
    """Exits if anything of the project can be imported."""
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError:
            continue
        raise SystemExit(f"{package} can be imported: this process proves nothing")


def reload(folder: Path, out: Path) -> None:
    """Every checkpoint of `folder`: loaded, its answers written, saved again."""
    for auto_class in AUTO_CLASSES:
        config = transformers.AutoConfig.from_pretrained(folder / auto_class, trust_remote_code=True)
        loader = getattr(transformers, auto_class)
        model, info = loader.from_pretrained(folder / auto_class, trust_remote_code=True, output_loading_info=True)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        assert config.model_type == "elasticbert" and config.exit_layers == model.config.exit_layers
        save_file(answers(model.eval(), auto_class), out / f"{auto_class}.safetensors")
        model.save_pretrained(out / auto_class)


if __name__ == "__main__":
    check_alone()
    first, second, third = map(Path, sys.argv[1:])
    reload(first, second)
    reload(second, third)
