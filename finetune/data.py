"""Examples as batches: tokenised once, grouped by length, padded to the longest row of the batch."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from finetune.tasks import Examples

GROUP = 50  # batches that are sorted by length together: enough to pad little, few enough to stay shuffled


@dataclass(frozen=True)
class Encoded:
    """A split as token ids, a mapping a row; `labels` as `encode_labels` gives them; `cut`: rows cut to the length."""

    rows: list[dict[str, list[int]]]
    labels: np.ndarray
    cut: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        return [len(row["input_ids"]) for row in self.rows]


def encode(examples: Examples, labels: np.ndarray, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Encoded:
    """The examples tokenised; a longer row is cut to `max_length` tokens (of a pair, the longer text first)."""
    encoding = tokenizer(examples.texts, examples.pairs, truncation=True, max_length=max_length)
    names = [name for name in encoding if name != "attention_mask"]  # all ones before padding
    rows = [dict(zip(names, row, strict=True)) for row in zip(*(encoding[name] for name in names), strict=True)]
    cut = sum(bool(row.overflowing) for row in encoding.encodings)
    return Encoded(rows, labels, cut)


def shuffled_batches(lengths: list[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch as row numbers: a function of (seed, epoch), each batch of rows of similar length."""
    draw = random.Random(f"{seed} {epoch}")
    order = draw.sample(range(len(lengths)), len(lengths))
    batches = []
    for start in range(0, len(order), batch_size * GROUP):
        group = sorted(order[start : start + batch_size * GROUP], key=lengths.__getitem__, reverse=True)
        batches += [group[first : first + batch_size] for first in range(0, len(group), batch_size)]
    draw.shuffle(batches)
    return batches


def sorted_batches(lengths: list[int], batch_size: int) -> list[list[int]]:
    """All rows, the longest first, so that batches are padded least and the largest one comes first."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def collate(
    encoded: Encoded, rows: list[int], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> dict[str, torch.Tensor]:
    """The rows as one batch of tensors on `device`, padded to the longest: (rows, tokens), and their labels."""
    batch = tokenizer.pad([encoded.rows[row] for row in rows], return_tensors="pt")
    batch["labels"] = torch.from_numpy(encoded.labels[rows])
    return {name: tensor.to(device) for name, tensor in batch.items()}
