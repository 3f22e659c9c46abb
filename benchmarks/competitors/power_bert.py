"""PoWER-BERT: how many word vectors each layer keeps is learned, then fixed (Goyal et al. 2020)."""

import copy
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from benchmarks.competitors.start import Batch, Start
from elastic_model.encoder import Exit, Flow
from elastic_model.losses import exit_task_loss
from elastic_model.modeling_elasticbert import ElasticBertExitModel
from finetune.elue.costs import ModuleCost

WEIGHTS = (1e-4, 3e-4, 1e-3, 3e-3)  # lambda: section 4.1 tunes it within 1e-4 to 1e-3; one operating point each
RETENTION_RATE = 1e-2  # learning rate of the retention parameters, which start at 1 (section 4.1: 1e-4 to 1e-2)
RETENTION_PATH = 1.5  # how far they can move in a run, at least


def retention_rate(updates: int) -> float:
    """The paper's rate; in fewer updates than it takes a retention parameter there from 1 to 0, a higher one.

    AdamW moves a parameter by its rate an update at most, and the schedule's mean is half of its peak.
    """
    return max(RETENTION_RATE, 2 * RETENTION_PATH / updates)


def soft_extract(model: ElasticBertExitModel, batch: Batch, retention: torch.Tensor) -> torch.Tensor:
    """Logits (rows, labels) where layer l multiplies the word vector of rank k by retention[l, k] (section 3.3).

    retention (layers, tokens) within 0 and 1; ranks by significance, [CLS] first.
    """
    bert, real = model.elasticbert, batch["attention_mask"].bool()
    hidden = bert.embeddings(batch["input_ids"], batch.get("token_type_ids"))
    for layer, kept in zip(bert.encoder.layer, retention, strict=True):
        hidden, scores = layer.attention(hidden, real=real)
        scores = scores.detach().masked_fill(~real, -torch.inf)
        scores[:, 0] = torch.inf
        ranks = scores.argsort(dim=1, descending=True).argsort(dim=1)
        hidden = hidden * kept[ranks][..., None]
        hidden = layer.output(layer.intermediate(hidden), hidden)
    layers, flow = model.config.num_hidden_layers, Flow(hidden, real)
    logits, _ = model.head(Exit(layers, len(model.config.exit_layers) - 1, True, flow, flow))
    return logits


def configuration_of(retention: torch.Tensor) -> list[int]:
    """Word vectors that each layer keeps: the mass of its retention parameters, rounded up; never rising, at least
    2."""
    masses = retention.sum(dim=1).ceil().int().tolist()
    kept: list[int] = []
    for mass in masses:
        kept.append(max(2, min([mass, *kept[-1:]])))
    return kept


def _search(start: Start, weight: float) -> tuple[list[int], ElasticBertExitModel]:
    """The configuration search of section 3.4: L(theta, r) + lambda sum_l l mass_l over both; what it found, and the
    model that it trained."""
    model = copy.deepcopy(start.model)
    layers = model.config.num_hidden_layers
    retention = nn.Parameter(torch.ones(layers, start.job.max_length, device=model.device))
    depth = torch.arange(1, layers + 1, dtype=torch.float32, device=model.device)

    def losses(batch: Batch) -> Iterator[torch.Tensor]:
        loss = exit_task_loss(soft_extract(model, batch, retention), batch["labels"], start.problem_type)
        yield loss + weight * (depth * retention.sum(dim=1)).sum()

    start.fit(model, losses, [retention], retention_rate(start.updates))
    return configuration_of(retention.detach()), model


def power_bert(start: Start, folder: Path) -> dict[str, ModuleCost]:
    """Fine-tuning (done), configuration search, and re-training of the model that it left with the configuration
    fixed (section 3.4)."""
    modules: dict[str, ModuleCost] = {}
    for weight in WEIGHTS:
        lengths, model = _search(start, weight)
        start.fit(model, lambda batch, model=model, lengths=lengths: [model(**batch, length_config=lengths).loss])
        modules |= start.write(folder, f"lambda_{weight:g}", model, lengths)
        print(f"lambda {weight:g}: layers keep {', '.join(map(str, lengths))} word vectors", flush=True)
    return modules
