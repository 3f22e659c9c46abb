"""Held-out losses at every exit, beside the loss of guessing by frequency alone."""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from pretrain.data import Batch, Examples
from pretrain.masking import IGNORED


@dataclass(frozen=True)
class Evaluation:
    """Per exit layer: MLM loss (nats per masked token), SOP loss and accuracy; and what they compare with."""

    mlm_loss: dict[int, float]
    sop_loss: dict[int, float]
    sop_accuracy: dict[int, float]
    mlm_accuracy: float  # of the last exit
    unigram_loss: float  # on the same masked tokens, by their frequency in the training documents
    masked_tokens: int
    examples: int

    def table(self) -> str:
        """The evaluation as lines of text."""
        lines = ["exit   MLM loss   SOP loss   SOP accuracy"]
        for layer, loss in self.mlm_loss.items():
            lines.append(
                f"{layer:4d}   {loss:8.4f}   {self.sop_loss[layer]:8.4f}   {100 * self.sop_accuracy[layer]:10.1f} %"
            )
        lines.append(f"unigram {self.unigram_loss:7.4f}   (the same {self.masked_tokens} tokens, by frequency alone)")
        lines.append(
            f"MLM accuracy of the last exit {100 * self.mlm_accuracy:.1f} %, {self.examples} held-out examples"
        )
        return "\n".join(lines)


def unigram_losses(counts: np.ndarray) -> torch.Tensor:
    """(vocabulary,): -log of every token's share of the training text, add-one smoothed."""
    smoothed = torch.from_numpy(counts).double() + 1.0
    return -(smoothed / smoothed.sum()).log()


def _sums(output, batch: Batch, unigram: torch.Tensor) -> torch.Tensor:
    """(3 exits + 4,): per exit MLM losses, SOP losses, right orders; then right tokens, unigram loss, tokens, pairs"""
    masked = batch["labels"] != IGNORED
    targets = batch["labels"][masked]
    right = [(logits.argmax(-1) == batch["sentence_order_label"]).sum() for logits in output.exit_sop_logits]
    others = [
        (output.prediction_logits[masked].argmax(-1) == targets).sum(),
        unigram[targets].sum(),
        masked.sum(),
        (batch["sentence_order_label"] != IGNORED).sum(),
    ]
    return torch.stack([value.double() for value in (*output.mlm_losses, *output.sop_losses, *right, *others)])


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model: torch.nn.Module, examples: Examples, unigram: torch.Tensor, limit: int, rows: int
) -> Evaluation:
    """Losses on the first `limit` of the held-out examples in an order of their own, masked the same way every time.

    Each process takes its share, `rows` at a time; the sums are added up over the processes.
    """
    exit_layers = accelerator.unwrap_model(model).config.exit_layers
    chosen = np.random.default_rng(0).permutation(len(examples))[:limit]
    mine = np.sort(chosen)[accelerator.process_index :: accelerator.num_processes]
    unigram = unigram.to(accelerator.device)
    total = torch.zeros(3 * len(exit_layers) + 4, dtype=torch.float64, device=accelerator.device)
    model.eval()
    for start in range(0, len(mine), rows):
        batch = examples.collate(0, mine[start : start + rows])
        batch = {name: values.to(accelerator.device) for name, values in batch.items()}
        total += _sums(model(**batch, mlm_count=1, sop_count=1), batch, unigram)
    model.train()
    total = accelerator.reduce(total, "sum")
    return _evaluation(total, exit_layers, len(chosen))


def _evaluation(total: torch.Tensor, exit_layers: list[int], examples: int) -> Evaluation:
    right_tokens, unigram_loss, tokens, pairs = total[-4:].tolist()
    pairs = max(pairs, 1.0)
    mlm, sop, right = (values.tolist() for values in total[:-4].reshape(3, -1))
    return Evaluation(
        mlm_loss={layer: value / tokens for layer, value in zip(exit_layers, mlm, strict=True)},
        sop_loss={layer: value / pairs for layer, value in zip(exit_layers, sop, strict=True)},
        sop_accuracy={layer: value / pairs for layer, value in zip(exit_layers, right, strict=True)},
        mlm_accuracy=right_tokens / tokens,
        unigram_loss=unigram_loss / tokens,
        masked_tokens=int(tokens),
        examples=examples,
    )
