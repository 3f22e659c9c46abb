"""Token shards to global batches of masked segment pairs, each a function of (seed, epoch, example)."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike

from elastic_model import ElasticBertConfig
from pretrain.config import PretrainConfig
from pretrain.masking import IGNORED, mask_tokens
from pretrain.prepare import Corpus, TokenizedSource
from pretrain.shards import Shard
from pretrain.tokenizer import word_starts

SPECIAL_TOKENS_OF_A_PAIR = 3  # [CLS] first [SEP] second [SEP]
HELD_OUT_MASKING = 0.15  # whatever the training masks, so that held-out losses of different runs can be compared

Batch = dict[str, torch.Tensor]


def split_documents(hashes: np.ndarray, fraction: float) -> np.ndarray:
    """(documents,): true where a document is held out: a share of the different ones, at least one and not all, by the
    hash of their text.

    Copies of a document have one hash, so they are on one side.
    """
    different = np.unique(hashes)
    if len(different) < 2:
        raise ValueError(f"text: all {len(hashes)} documents are the same; at least 2 different ones are needed")
    return hashes <= different[min(max(1, round(fraction * len(different))), len(different) - 1) - 1]


def fitting(batch: Batch, config: ElasticBertConfig) -> Batch:
    """What of a batch the model takes: one of a single token type (RoBERTa) is not told which segment is which."""
    return {name: values for name, values in batch.items() if name != "token_type_ids" or config.type_vocab_size > 1}


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
        self.shards = corpus.shards
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
            names = ", ".join(part.name for source in self.corpus.sources for part in source.parts)
            raise ValueError(
                f"text: {names} holds {len(hashes)} document(s), at least 2 are needed (one is held out); "
                "a blank line separates documents"
            )
        return split_documents(hashes, self.config.validation_fraction) == self.held_out

    def _table(self) -> np.ndarray:
        config, shards = self.config, self.shards
        chosen = self._chosen(np.concatenate([shard.hashes for shard in shards]))
        generator = np.random.default_rng(config.seed)
        longest = config.max_length - SPECIAL_TOKENS_OF_A_PAIR
        tables: list[np.ndarray] = [np.empty((0, 3), dtype=np.int64)]
        document = 0
        for number, shard in enumerate(shards):
            rows: list[tuple[int, int, int]] = []
            offsets = shard.documents
            for first, last in zip(offsets[:-1], offsets[1:], strict=True):
                if chosen[document]:
                    boundaries = shard.sentences[first : last + 1].tolist()
                    found = passages(boundaries, longest, config.short_probability, generator)
                    rows.extend((number, start, stop) for start, stop in found if stop - start >= 2)
                document += 1
            tables.append(np.array(rows, dtype=np.int64).reshape(-1, 3))
        return np.concatenate(tables)

    def _by_shard(self) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
        """Each shard with the starts and stops of its passages."""
        bounds = np.searchsorted(self.table[:, 0], np.arange(len(self.shards) + 1))
        for shard, first, last in zip(self.shards, bounds[:-1], bounds[1:], strict=True):
            _, starts, stops = self.table[first:last].T
            yield shard, starts, stops

    def __len__(self) -> int:
        return len(self.table)

    @property
    def lengths(self) -> np.ndarray:
        """(examples,): tokens of each, special tokens included"""
        return self.table[:, 2] - self.table[:, 1] + SPECIAL_TOKENS_OF_A_PAIR - ~self.ordered

    def token_counts(self) -> np.ndarray:
        """(vocabulary,): how often each token occurs in these passages"""
        counts = np.zeros(len(self.starts), dtype=np.int64)
        for shard, starts, stops in self._by_shard():
            edges = np.zeros(len(shard.tokens) + 1, dtype=np.int8)
            edges[starts] += 1
            edges[stops] -= 1
            inside = edges[:-1].cumsum(dtype=np.int8).astype(bool)
            counts += np.bincount(shard.tokens[inside], minlength=len(counts))
        return counts

    @property
    def source(self) -> np.ndarray:
        """(examples,): the number of each one's source in the corpus"""
        of_shard = [number for number, source in enumerate(self.corpus.sources) for _ in source.shards]
        return np.array(of_shard, dtype=np.int64)[self.table[:, 0]]

    @property
    def ordered(self) -> np.ndarray:
        """(examples,): true for a passage of several sentences, whose order can be asked for"""
        found = [
            np.searchsorted(shard.sentences, starts + 1) < np.searchsorted(shard.sentences, stops)
            for shard, starts, stops in self._by_shard()
        ]
        return np.concatenate(found)

    def example(self, epoch: int, index: int) -> dict[str, np.ndarray | int]:
        """A segment pair: input_ids, token_type_ids, labels (tokens,), sentence_order_label: 1 = swapped (ALBERT).

        A passage within a single sentence has no order to tell: one segment, and a label that is ignored.
        """
        generator = np.random.default_rng((self.config.seed, epoch, index))
        number, start, stop = self.table[index]
        shard = self.shards[number]
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

    def collate(self, epochs: int | np.ndarray, indices: np.ndarray) -> Batch:
        """The examples as one batch, padded on the right to the longest of them; (rows, tokens) and (rows,).

        epochs: how often each was seen before, one number or (rows,)
        """
        seen = np.broadcast_to(epochs, len(indices))
        examples = [self.example(int(epoch), int(index)) for epoch, index in zip(seen, indices, strict=True)]
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


@dataclass(frozen=True)
class Pool:
    """Examples that are drawn from in turn: `quota` of them an epoch, all of them before one is seen again."""

    examples: np.ndarray  # (size,)
    quota: int
    seed: tuple[int, ...]

    def draw(self, epoch: int) -> np.ndarray:
        """(quota, 2): how often each was seen before, and the example; for every epoch another stretch of an endless
        row of permutations."""
        size = len(self.examples)
        seen, place = np.divmod(np.arange(epoch * self.quota, (epoch + 1) * self.quota), size)
        if self.quota == size:
            return np.stack([seen, self.examples], axis=1)
        drawn = np.empty_like(seen)
        for number in np.unique(seen):
            order = np.random.default_rng((*self.seed, int(number))).permutation(size)
            drawn[seen == number] = self.examples[order[place[seen == number]]]
        return np.stack([seen, drawn], axis=1)


class GlobalBatches(torch.utils.data.Dataset[list[Batch]]):
    """Item `step`: this process's micro-batches of the global batch of that step.

    A global batch is the same rows for any number of processes. An epoch has as many examples as there are; it is a
    permutation of them by (seed, epoch), or, where sources have weights, of what is drawn from each in proportion to
    its weight. What does not fill the last batch is left out. Rows of like length share a micro-batch.
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
        self.lengths = examples.lengths
        self.pools = _pools(examples)
        self.drawn: tuple[int, np.ndarray] | None = None  # the latest epoch and its order

    def __len__(self) -> int:
        """Global batches of an epoch."""
        return len(self.examples) // self.batch_size

    def order(self, epoch: int) -> np.ndarray:
        """(examples, 2): how often each was seen before, and the example, for every place of the epoch"""
        if self.drawn is None or self.drawn[0] != epoch:
            rows = np.concatenate([pool.draw(epoch) for pool in self.pools])
            mixed = np.random.default_rng((self.examples.config.seed, epoch)).permutation(len(rows))
            self.drawn = epoch, rows[mixed]
        return self.drawn[1]

    def rows(self, step: int) -> tuple[int, np.ndarray]:
        """-> the epoch of a step, and (batch_size, 2): how often each example of its global batch was seen before, and
        the example; in the order of length"""
        epoch, batch = divmod(step, len(self))
        rows = self.order(epoch)[batch * self.batch_size : (batch + 1) * self.batch_size]
        return epoch, rows[np.argsort(self.lengths[rows[:, 1]], kind="stable")]

    def __getitem__(self, step: int) -> list[Batch]:
        _, rows = self.rows(step)
        return [self.examples.collate(*micro_batch.T) for micro_batch in self._micro_batches(rows)]

    def _micro_batches(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        mine = rows[self.share.process :: self.share.processes]
        size = self.share.micro_batch_size
        return (mine[start : start + size] for start in range(0, len(mine), size))

    def padding(self, steps: int = 100) -> float:
        """The share of padding in this process's micro-batches of the first steps."""
        slots = tokens = 0
        for step in range(min(steps, len(self))):
            for micro_batch in self._micro_batches(self.rows(step)[1]):
                lengths = self.lengths[micro_batch[:, 1]]
                slots += len(lengths) * lengths.max()
                tokens += lengths.sum()
        return float(1 - tokens / slots)


def _pools(examples: Examples) -> list[Pool]:
    """Without weights one pool of everything, else one for each source."""
    config, sources = examples.config, examples.corpus.sources
    if any(source.weight is None for source in sources):
        return [Pool(np.arange(len(examples)), len(examples), (config.seed,))]
    of_source = examples.source
    pools = []
    for number, (source, quota) in enumerate(zip(sources, shares(sources, len(examples)), strict=True)):
        members = np.flatnonzero(of_source == number)
        if not len(members):
            raise ValueError(f"mixture: {source.name} gives no training example; give it more text or leave it out")
        pools.append(Pool(members, quota, (config.seed, number)))
    return pools


def shares(sources: list[TokenizedSource], examples: int) -> list[int]:
    """How many of the examples of an epoch each source gives, in proportion to the weights; they sum to all."""
    weights = np.array([source.weight for source in sources], dtype=np.float64)
    edges = np.round(np.concatenate([[0.0], weights.cumsum() / weights.sum()]) * examples)
    return np.diff(edges.astype(np.int64)).tolist()


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
