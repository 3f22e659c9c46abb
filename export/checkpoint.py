"""The checkpoint to export: one of ours with a head that has a graph, complete."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import elastic_model
from elastic_model import ElasticBertConfig
from export.task import HEADS

# what travels into the artefact as it is; nothing else of a training folder does
CARRIED = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*.py",
    "provenance.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "merges.txt",
)


@dataclass(frozen=True)
class Checkpoint:
    """A folder, its configuration, the PyTorch model, and that model's tensors as arrays (no copies), all under the
    names that they have below a task's head."""

    folder: Path
    config: ElasticBertConfig
    model: PreTrainedModel
    tensors: dict[str, np.ndarray]

    @property
    def architecture(self) -> str:
        """The name of the model's class."""
        return type(self.model).__name__

    @property
    def max_tokens(self) -> int:
        """The longest input, in tokens: what the position table and the tokenizer's own settings allow."""
        positions = self.config.max_position_embeddings - self.config.position_offset
        longest = self._tokenizer_settings().get("model_max_length")
        return min(positions, int(longest)) if longest else positions

    @property
    def truncation_side(self) -> str:
        """Where the tokenizer cuts what is longer."""
        return self._tokenizer_settings().get("truncation_side", "right")

    def _tokenizer_settings(self) -> dict[str, Any]:
        settings = self.folder / "tokenizer_config.json"
        return json.loads(settings.read_text(encoding="utf-8")) if settings.exists() else {}

    def files(self) -> list[Path]:
        """The files that travel into the artefact."""
        return sorted({file for pattern in CARRIED for file in self.folder.glob(pattern) if file.is_file()})


def load_checkpoint(folder: Path) -> Checkpoint:
    """A checkpoint with its tokenizer; ValueError where the folder is not one, or a weight is missing from
    it."""
    if not folder.is_dir():
        raise ValueError(f"checkpoint {folder} is not a folder")
    kind = _architecture(folder)
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"checkpoint {folder} has no weights: expected model.safetensors (save_pretrained writes it)")
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"checkpoint {folder} has no tokenizer.json: save the tokenizer beside the weights")
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what is missing is an error below, not a warning
    transformers_logging.disable_progress_bar()
    try:
        model, found = getattr(elastic_model, kind).from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # safetensors and transformers raise errors of many classes for a damaged file
        raise ValueError(f"checkpoint {folder} cannot be loaded: {error}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
    if found["missing_keys"]:
        raise ValueError(
            f"checkpoint {folder} lacks weights: {', '.join(sorted(found['missing_keys'])[:5])}; fine-tune it first"
        )
    prefix = "elasticbert." if kind == "ElasticBertModel" else ""
    tensors = {f"{prefix}{name}": tensor.numpy() for name, tensor in model.eval().state_dict().items()}
    broken = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"checkpoint {folder}: weights that are not finite: {', '.join(broken[:5])}")
    return Checkpoint(folder, model.config, model, tensors)


def _architecture(folder: Path) -> str:
    """The class that the folder's configuration names, one of HEADS."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"checkpoint {folder} has no config.json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    kind, architectures = content.get("model_type"), content.get("architectures") or []
    if kind != "elasticbert":
        raise ValueError(
            f"checkpoint {folder}: model_type {kind!r} is not exported, only elasticbert; fine-tune one first"
        )
    known = [name for name in architectures if name in HEADS]
    if not known:
        raise ValueError(
            f"checkpoint {folder}: {', '.join(architectures) or 'no architecture'} is not exported, only "
            f"{', '.join(HEADS)}"
        )
    return known[0]
