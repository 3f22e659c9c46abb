"""Token shards to global batches of masked segment pairs, each a function of (seed, epoch, example)."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import ArrayLike

from pretrain.config import PretrainConfig
from pretrain.masking import IGNORED, mask_tokens
from pretrain.prepare import Corpus
from pretrain.tokenizer import word_starts

SPECIAL_TOKENS_OF_A_PAIR = 3  # [CLS] first [SEP] second [SEP]
HELD_OUT_MASKING = 0.15  # whatever the training masks, so that held-out losses of different runs can be compared

Batch = dict[str, torch.Tensor]


def split_documents(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """(documents,): true where a document is held out: a share of them, at least one, by the hash of their text.

    Copies of a document have one hash, so they are on one side.
    """
    held_out = hashes <= np.sort(hashes)[max(1, round(fraction * len(hashes))) - 1]
    if held_out.all():
        raise ValueError(f"text: all {len(hashes)} documents are the same; at least 2 different ones are needed")
    return held_out


def passages(
    boundaries: list[int], longest: int, short: float, generator: np.random.Generator
) -> Iterator[tuple[int, int]]:
    """Consecutive sentences of one document packed up to `longest` tokens: (start, stop) offsets, nothing left out.

    boundaries: the sentences' offsets, rising. A share `short` of the passages is packed to a random shorter length
    (Devlin et al. 2019, appendix A.2). A sentence longer than its passage may be is cut.
    """
    start, stop = boundaries[0], boundaries[-1]
    while start < stop:
        allowed = longest if generator.random() >= short else int(generator.integers(2, longest + 1))
        end = boundaries[bisect_right(boundaries, start + allowed) - 1]
        if end <= start:
            end = min(start + allowed, stop)
        yield start, end
        start = end


class Examples:
    """The passages of one side of the split (of every document if `held_out` is None), as masked, maybe swapped,
    segment pairs."""

    def __init__(self, corpus: Corpus, config: PretrainConfig, held_out: bool | None):
        self.corpus = corpus
        self.config = config
        self.held_out = held_out
        self.mask_probability = config.mask_probability if held_out is False else HELD_OUT_MASKING
        self.table = self._table()  # (examples, 3): shard, start, stop
        tokenizer = corpus.tokenizer
        self.cls, self.sep, self.mask = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id
        self.pad = tokenizer.pad_token_id
        self.starts = np.array(word_starts(tokenizer))
        self.replacements = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)

    def _chosen(self, hashes: np.ndarray) -> np.ndarray:
        """(documents,): true for those of this side"""
        if self.held_out is None:
            return np.ones(len(hashes), dtype=bool)
        if len(hashes) < 2:
            raise ValueError(
                f"text: {' '.join(self.config.text)} holds {len(hashes)} document(s), at least 2 are needed (one is "
                "held out); a blank line separates documents"
            )
        return split_documents(hashes, self.config.validation_fraction) == self.held_out

    def _table(self) -> np.ndarray:
        config, shards = self.config, self.corpus.shards
        chosen = self._chosen(np.concatenate([shard.hashes for shard in shards]))
        generator = np.random.default_rng(config.seed)
        longest = config.max_length - SPECIAL_TOKENS_OF_A_PAIR
        rows: list[tuple[int, int, int]] = []
        document = 0
        for number, shard in enumerate(shards):
            for first, last in zip(shard.documents[:-1], shard.documents[1:], strict=True):
                if chosen[document]:
                    boundaries = shard.sentences[first : last + 1].tolist()
                    found = passages(boundaries, longest, config.short_probability, generator)
                    rows.extend((number, start, stop) for start, stop in found if stop - start >= 2)
                document += 1
        return np.array(rows, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def lengths(self) -> np.ndarray:
        """(examples,): tokens of each, special tokens included"""
        return self.table[:, 2] - self.table[:, 1] + SPECIAL_TOKENS_OF_A_PAIR

    def token_counts(self) -> np.ndarray:
        """(vocabulary,): how often each token occurs in these passages"""
        counts = np.zeros(len(self.starts), dtype=np.int64)
        for number, start, stop in self.table:
            tokens, times = np.unique(self.corpus.shards[number].tokens[start:stop], return_counts=True)
            counts[tokens] += times
        return counts

    def example(self, epoch: int, index: int) -> dict[str, np.ndarray | int]:
        """A segment pair: input_ids, token_type_ids, labels (tokens,), sentence_order_label: 1 = swapped (ALBERT).

        A passage within a single sentence has no order to tell: one segment, and a label that is ignored.
        """
        generator = np.random.default_rng((self.config.seed, epoch, index))
        number, start, stop = self.table[index]
        shard = self.corpus.shards[number]
        tokens = shard.tokens[start:stop].astype(np.int64)
        units = self.starts[tokens] if self.config.whole_words else np.ones(len(tokens), dtype=bool)
        inputs, labels = mask_tokens(tokens, units, self.mask_probability, self.mask, self.replacements, generator)
        low, high = np.searchsorted(shard.sentences, [start + 1, stop])
        if low == high:
            segments, order = [slice(None)], IGNORED
        else:
            cut = int(shard.sentences[generator.integers(low, high)] - start)
            order = int(generator.random() < 0.5)
            segments = [slice(cut, None), slice(0, cut)] if order else [slice(0, cut), slice(cut, None)]
        return self._join([inputs[segment] for segment in segments], [labels[segment] for segment in segments], order)

    def _join(self, inputs: list[np.ndarray], labels: list[np.ndarray], order: int) -> dict[str, np.ndarray | int]:
        """[CLS] first [SEP], or [CLS] first [SEP] second [SEP]."""
        ids: list[ArrayLike] = [[self.cls]]
        targets: list[ArrayLike] = [[IGNORED]]
        types: list[ArrayLike] = [[0]]
        for number, (segment, answers) in enumerate(zip(inputs, labels, strict=True)):
            ids += [segment, [self.sep]]
            targets += [answers, [IGNORED]]
            types += [[number] * (len(segment) + 1)]
        return {
            "input_ids": np.concatenate(ids),
            "token_type_ids": np.concatenate(types),
            "labels": np.concatenate(targets),
            "sentence_order_label": order,
        }

    def collate(self, epoch: int, indices: np.ndarray) -> Batch:
        """The examples as one batch, padded on the right to the longest of them; (rows, tokens) and (rows,)."""
        examples = [self.example(epoch, int(index)) for index in indices]
        longest = max(len(example["input_ids"]) for example in examples)  # type: ignore[arg-type]
        padding = {"input_ids": self.pad, "token_type_ids": 0, "labels": IGNORED, "attention_mask": 0}
        batch = {name: np.full((len(examples), longest), value) for name, value in padding.items()}
        for row, example in enumerate(examples):
            length = len(example["input_ids"])  # type: ignore[arg-type]
            for name in ("input_ids", "token_type_ids", "labels"):
                batch[name][row, :length] = example[name]
            batch["attention_mask"][row, :length] = 1
        batch["sentence_order_label"] = np.array([example["sentence_order_label"] for example in examples])
        return {name: torch.from_numpy(values) for name, values in batch.items()}


@dataclass(frozen=True)
class Share:
    """Which rows of a global batch are this process's, and how many go through the model at once."""

    process: int
    processes: int
    micro_batch_size: int


class GlobalBatches(torch.utils.data.Dataset[list[Batch]]):
    """Item `step`: this process's micro-batches of the global batch of that step.

    A global batch is the same rows for any number of processes. An epoch is a permutation of the examples by
    (seed, epoch); what does not fill its last batch waits for another epoch. Rows of like length share a micro-batch.
    """

    def __init__(self, examples: Examples, batch_size: int, share: Share):
        if len(examples) < batch_size:
            raise ValueError(
                f"the text gives {len(examples)} training examples, fewer than one batch: batch_size must be at most "
                f"that, got {batch_size}"
            )
        self.examples = examples
        self.batch_size = batch_size
        self.share = share
        self.order = lru_cache(maxsize=1)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.examples.config.seed, epoch)).permutation(len(self.examples))

    def rows(self, step: int) -> tuple[int, np.ndarray]:
        """-> the epoch of a step, and (batch_size,) the examples of its global batch"""
        epoch, batch = divmod(step, len(self.examples) // self.batch_size)
        return epoch, self.order(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]

    def __getitem__(self, step: int) -> list[Batch]:
        epoch, rows = self.rows(step)
        rows = rows[np.argsort(self.examples.lengths[rows], kind="stable")]
        mine = rows[self.share.process :: self.share.processes]
        size = self.share.micro_batch_size
        return [self.examples.collate(epoch, mine[start : start + size]) for start in range(0, len(mine), size)]


def check_batch_size(batch_size: int, micro_batch_size: int | None, processes: int) -> int:
    """The micro-batch size; ValueError where processes and micro-batches do not divide the global batch."""
    share, rest = divmod(batch_size, processes)
    if rest:
        raise ValueError(f"batch_size must be a multiple of the number of processes ({processes}), got {batch_size}")
    micro_batch_size = micro_batch_size or share
    if share % micro_batch_size:
        raise ValueError(
            f"micro_batch_size must divide the share of a process ({share} of batch_size {batch_size}), "
            f"got {micro_batch_size}"
        )
    return micro_batch_size
