"""Examples as batches: tokenised once, grouped by length, padded to the longest row of the batch."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from finetune.examples import Examples
from finetune.texts import Texts

GROUP = 50  # batches that are sorted by length together: enough to pad little, few enough to stay shuffled
TARGETS = ("labels", "start_positions", "end_positions")  # what only a loss reads, by the model's arguments
IGNORED = -100  # the label of a token that has none


@dataclass(frozen=True)
class Encoded:
    """A split as the model reads it, a mapping of token ids a row, and as metrics read it.

    targets: the model's arguments that make its loss, a value (or a list of one a token) a row; labels: the truth, an
    entry an example; cut: examples that lost tokens to the length.
    """

    rows: list[dict[str, list[int]]]
    targets: Mapping[str, Any]
    labels: np.ndarray
    cut: int

    head = "sequence"  # what `elastic_model.cost` calls the head that reads it

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        return [len(row["input_ids"]) for row in self.rows]

    @property
    def mask(self) -> np.ndarray | None:
        """Where logits are per token, their real tokens (rows, tokens); None where they are per row."""
        return None

    def size(self, max_length: int) -> str:
        """How many rows there are, and what the length did to them, in words."""
        return f"{len(self)} rows, {self.cut} of them cut to {max_length} tokens"

    def per_example(self, layers: np.ndarray) -> np.ndarray:
        """The layers, from 1, that rows (rows,) left at, as one number an example."""
        return layers


@dataclass(frozen=True)
class TokenEncoded(Encoded):
    """A split of a task whose logits are per token."""

    @property
    def mask(self) -> np.ndarray:
        """Real tokens (rows, tokens of the longest row)."""
        lengths = np.array(self.lengths)
        return np.arange(lengths.max()) < lengths[:, None]


def rows_of(encoding: Any) -> list[dict[str, list[int]]]:
    """What a tokenizer gives, a mapping a row, of what a model takes; attention masks are all ones before padding."""
    names = [name for name in encoding if name in ("input_ids", "token_type_ids")]
    return [dict(zip(names, row, strict=True)) for row in zip(*(encoding[name] for name in names), strict=True)]


def check_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError for a tokenizer that does not say where in the text its tokens lie."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"tags and questions need a fast tokenizer (of the library tokenizers), got {type(tokenizer).__name__}"
        )


def encode(
    examples: Examples | Texts, tokenizer: PreTrainedTokenizerBase, max_length: int, labels: np.ndarray | None = None
) -> Encoded:
    """Texts tokenised, with labels where there are some; a longer row is cut to `max_length` tokens (of a pair, the
    longer text first)."""
    encoding = tokenizer(examples.texts, examples.pairs, truncation=True, max_length=max_length)
    if tokenizer.is_fast:
        cut = sum(bool(row.overflowing) for row in encoding.encodings)
    else:
        whole = tokenizer(examples.texts, examples.pairs, truncation=False, verbose=False)
        cut = sum(len(ids) > max_length for ids in whole["input_ids"])
    if labels is None:
        return Encoded(rows_of(encoding), {}, np.empty((len(examples), 0)), cut)
    return Encoded(rows_of(encoding), {"labels": labels}, labels, cut)


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


def _target(values: list[Any], tokens: int) -> torch.Tensor:
    """A target of some rows; one of lists, an entry a token, is padded to (rows, tokens)."""
    if isinstance(values[0], list):
        values = [value + [IGNORED] * (tokens - len(value)) for value in values]
    return torch.from_numpy(np.array(values))


def collate(
    encoded: Encoded, rows: list[int], tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> dict[str, torch.Tensor]:
    """The rows as one batch of tensors on `device`, padded on the right to the longest: (rows, tokens)."""
    batch = tokenizer.pad([encoded.rows[row] for row in rows], return_tensors="pt", padding_side="right")
    tokens = batch["input_ids"].shape[1]
    batch |= {name: _target([values[row] for row in rows], tokens) for name, values in encoded.targets.items()}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def inputs_of(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch without its targets: what the model answers on."""
    return {name: tensor for name, tensor in batch.items() if name not in TARGETS}
