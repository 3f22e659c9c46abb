"""DynaBERT's adaptive width: nested heads and FFN neurons, trained by distillation from the full width (Hou et al.
2020)."""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.functional import mse_loss

from benchmarks.competitors.start import Batch, Start
from elastic_model.losses import inplace_distillation
from finetune.data import inputs_of
from finetune.elue.costs import ModuleCost
from finetune.widths import Gates, gated, importance, narrowed

WIDTHS = (1.0, 0.75, 0.5, 0.25)  # section 3.1


def widths_of(scores: Gates, width: float) -> list[list[int]]:
    """The most important share of each layer's heads or neurons: those of a narrower model are among them."""
    ordered = [score.argsort(descending=True).tolist() for score in scores]
    return [sorted(order[: max(1, round(width * len(order)))]) for order in ordered]


def _masks(scores: Gates, kept: list[list[int]]) -> Gates:
    masks = [torch.zeros(len(score), device=score.device) for score in scores]  # float32, whatever they are summed in
    for mask, indices in zip(masks, kept, strict=True):
        mask[indices] = 1.0
    return masks


def dynabert(start: Start, folder: Path) -> dict[str, ModuleCost]:
    """Section 2.1: all widths learn the logits and the hidden states of the fine-tuned model, in every update."""
    heads, neurons = importance(start.model, start.train_batches(epoch=0))
    nested = {width: (widths_of(heads, width), widths_of(neurons, width)) for width in WIDTHS}
    teacher, model = start.model, copy.deepcopy(start.model)
    whole = {"exit_policy": {"name": "never"}, "length_config": 1.0, "output_hidden_states": True}

    def losses(batch: Batch) -> Iterator[torch.Tensor]:
        inputs = inputs_of(batch)
        with torch.no_grad():
            taught = teacher(**inputs, **whole)
        for kept_heads, kept_neurons in nested.values():
            with gated(model, _masks(heads, kept_heads), _masks(neurons, kept_neurons)):
                output = model(**inputs, **whole)
            logits = inplace_distillation(output.logits, taught.logits, start.problem_type)
            real = batch["attention_mask"].bool()
            states = zip(output.hidden_states, taught.hidden_states, strict=True)
            hidden = torch.stack([mse_loss(mine[real], theirs[real]) for mine, theirs in states]).mean()
            yield logits + hidden

    start.fit(model, losses)
    modules: dict[str, ModuleCost] = {}
    for width, (kept_heads, kept_neurons) in nested.items():
        narrow = narrowed(model, kept_heads, kept_neurons)
        modules |= start.write(folder, f"width_{round(100 * width)}", narrow)
    return modules
