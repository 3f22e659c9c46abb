"""HeadPrune: heads removed by their importance after fine-tuning, without further training (Michel et al. 2019)."""

from pathlib import Path

import torch

from benchmarks.competitors.start import Start
from finetune.elue.costs import ModuleCost
from finetune.widths import importance, narrowed

KEPT = (1.0, 0.8, 0.6, 0.4, 0.2)  # shares of all heads; their figure 3 goes from 0 to 100 % in steps of 10


def head_prune(start: Start, folder: Path) -> dict[str, ModuleCost]:
    """Heads over the whole model in the order of their importance, normalised by layer; one a layer always stays."""
    scores, _ = importance(start.model, start.train_batches(epoch=0))
    scores = [score / score.norm().clamp(min=1e-12) for score in scores]
    everything = [list(range(width)) for width in start.model.config.intermediate_size_per_layer]
    modules: dict[str, ModuleCost] = {}
    for share in KEPT:
        model = narrowed(start.model, kept_heads(scores, share), everything)
        modules |= start.write(folder, f"heads_{round(100 * share)}", model)
    return modules


def kept_heads(scores: list[torch.Tensor], share: float) -> list[list[int]]:
    """The heads of each layer that are among the best `share` of all heads, and the best one of every layer."""
    ranked = torch.cat(scores).sort(descending=True).values
    limit = ranked[max(1, round(share * len(ranked))) - 1]
    return [
        [head for head in range(len(score)) if score[head] >= limit or head == int(score.argmax())] for score in scores
    ]
