"""`python -I loads_alone.py CHECKPOINT AUTO_CLASS OUT`: load a checkpoint as any user of the hub does.

Run as a script, in a process in which this package cannot be imported: from the folder's own code files, with
`trust_remote_code=True`. What the model answers goes to OUT, a safetensors file.
"""

import sys

import torch
import transformers
from safetensors.torch import save_file

PACKAGES = ("elastic_model", "pretrain", "finetune", "export")
TEXTS = ["A first text.", "And a second one, which is longer and is padded for nothing."]


class Blocked:
    """An import finder that finds none of our packages, wherever they are installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in PACKAGES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@torch.no_grad()
def answers(model, tokenizer) -> dict[str, torch.Tensor]:
    """Every tensor that goes into the model for TEXTS, and every one that comes out."""
    batch = dict(tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt"))
    if type(model).__name__.endswith("MultipleChoice"):
        batch = {name: tensor[None] for name, tensor in batch.items()}  # (rows, choices, tokens)
    found = {f"input.{name}": tensor for name, tensor in batch.items()}
    for field, value in model(**batch).items():
        for number, tensor in enumerate(value if isinstance(value, tuple) else [value]):
            found[f"output.{field}.{number}"] = tensor.contiguous().clone()
    return found


def main(checkpoint: str, auto_class: str, out: str) -> None:
    sys.meta_path.insert(0, Blocked())
    loader = getattr(transformers, auto_class)
    model, report = loader.from_pretrained(checkpoint, trust_remote_code=True, output_loading_info=True)
    if report["missing_keys"] or report["unexpected_keys"] or report["mismatched_keys"]:
        raise SystemExit(f"the weights do not fit the code: {report}")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
    save_file(answers(model.eval(), tokenizer), out)


if __name__ == "__main__":
    main(*sys.argv[1:])
