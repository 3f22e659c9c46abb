"""A teacher: any transformers classifier of the same labels, and what it says of every row, asked once."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

import elastic_model.auto  # noqa: F401  an elastic model may teach too
from elastic_model.provenance import HUB_ID
from finetune.data import Encoded, collate, inputs_of, sorted_batches

MODELS = {
    "question_answering": AutoModelForQuestionAnswering,
    "token_classification": AutoModelForTokenClassification,
}


def check_name(name: str) -> None:
    """ValueError where `name` is neither a folder nor what a hub id looks like."""
    if not Path(name).is_dir() and not HUB_ID.fullmatch(name):
        raise ValueError(f"model {name} is neither a folder nor a hub id (organisation/name)")


def load_stock(name: str, problem_type: str) -> torch.nn.Module:
    """A fine-tuned transformers model in evaluation mode, float32; ValueError where it has no head for the task."""
    auto_class = MODELS.get(problem_type, AutoModelForSequenceClassification)
    model, loading = auto_class.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(key for key in loading["missing_keys"] if "position_ids" not in key):
        raise ValueError(f"{name} has no trained head for {problem_type}: it lacks {', '.join(missing[:3])}")
    return model.eval().requires_grad_(False)


def label_order(name: str, names: list[str], problem_type: str) -> list[int] | None:
    """Where a teacher has each of the labels `names`; None where its answers have no names to match.

    ValueError where it has other labels.
    """
    check_name(name)
    config = AutoConfig.from_pretrained(name)
    stated = getattr(config, "problem_type", None)  # of classifiers alone, and not of all
    if stated and problem_type not in MODELS and stated != problem_type:
        raise ValueError(f"teacher {name} is a model for {stated}, the task is {problem_type}")
    if problem_type == "question_answering":
        return None
    theirs = [str(config.id2label[number]) for number in range(config.num_labels)]
    if problem_type == "regression":
        if len(theirs) != 1:
            raise ValueError(
                f"teacher {name} has the labels {', '.join(theirs)}; the task is regression, of one number"
            )
        return None
    if sorted(theirs) != sorted(names):
        raise ValueError(
            f"teacher {name} has the labels {', '.join(theirs)}; the task has {', '.join(names)}: they must be the"
            " same (rename the teacher's id2label and label2id in its config.json where only the names differ)"
        )
    return [theirs.index(one) for one in names]


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError where a model that must read the same tokens cuts texts into others."""
    try:
        vocabulary = AutoTokenizer.from_pretrained(name).get_vocab()
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{name} has no tokenizer that loads ({str(error).splitlines()[0]})") from error
    if vocabulary != tokenizer.get_vocab():
        raise ValueError(
            f"{name} has another vocabulary: a student, and a teacher that answers per token, must share the tokenizer"
        )


def final_logits(output: Any) -> torch.Tensor:
    """What a model answers, (rows, labels) or (rows, tokens, labels); QA (rows, tokens, 2)."""
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], dim=-1)
    return output.logits


@torch.no_grad()
def ask(
    model: torch.nn.Module,
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    accelerator: Accelerator,
    read: Callable[[Any], torch.Tensor],
) -> list[np.ndarray]:
    """What `read` finds in a model's output, float32, for each row; of (..., tokens, labels) the real tokens alone.

    In evaluation mode, whatever mode the model is in. Each process asks for its share of the rows.
    """
    was_training = model.training
    model.eval().to(accelerator.device)
    known = inspect.signature(model.forward).parameters
    everything = {"exit_policy": {"name": "never"}, "length_config": 1.0}  # of a model that has exits
    arguments = {name: value for name, value in everything.items() if name in known}
    parts = []
    for rows in sorted_batches(encoded.lengths, batch_size)[accelerator.process_index :: accelerator.num_processes]:
        batch = inputs_of(collate(encoded, rows, tokenizer, accelerator.device))
        output = model(**{name: tensor for name, tensor in batch.items() if name in known}, **arguments)
        found = read(output).float().cpu().numpy()
        per_token = found.ndim > 2 and ("start_logits" in output or output.logits.dim() == 3)
        for row, one in zip(rows, found, strict=True):
            answer = one[..., : encoded.lengths[row], :] if per_token else one
            if not np.isfinite(answer).all():
                name = getattr(model, "name_or_path", "") or "the model"
                raise ValueError(f"{name} answers NaN or infinity to row {row + 1}: its weights are damaged")
            parts.append((row, answer))
    model.train(was_training)
    return [one for _, one in sorted(gather_object(parts), key=lambda part: part[0])]


def stacked(rows: list[np.ndarray], device: torch.device) -> torch.Tensor:
    """Logits of some rows as one tensor, (rows, labels) or, padded with zeros, (rows, tokens, labels)."""
    if rows[0].ndim == 1:
        return torch.from_numpy(np.stack(rows)).to(device)
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True).to(device)
