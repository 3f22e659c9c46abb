import json
import os
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pretrain.data import Examples, GlobalBatches, Pool, Share, check_batch_size, passages, split_documents
from pretrain.masking import IGNORED
from pretrain.prepare import prepare
from pretrain.shards import MOST_MAPPED, Shard
from pretrain.statistics import statistics, table


@pytest.fixture
def examples(options):
    config = options()
    return Examples(prepare(config), config, held_out=False)


def originals(example):
    """An example's tokens before masking."""
    ids = np.array(example["input_ids"])
    return np.where(example["labels"] != IGNORED, example["labels"], ids)


def segments(example, sep):
    ids = originals(example).tolist()
    ends = [place for place, token in enumerate(ids) if token == sep]
    starts = [1, *(end + 1 for end in ends[:-1])]
    return [ids[start:end] for start, end in zip(starts, ends, strict=True)]


def test_passages_keep_every_token_once_and_break_at_sentences():
    generator = np.random.default_rng(0)
    boundaries = [0, *np.cumsum(np.random.default_rng(1).integers(1, 30, 200)).tolist()]
    found = list(passages(boundaries, 64, 0.1, generator))
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])] and found[-1][1] == boundaries[-1]
    assert all(2 <= stop - start <= 64 for start, stop in found[:-1])
    assert np.mean([stop in boundaries for _, stop in found]) > 0.9


def test_a_sentence_longer_than_a_passage_is_cut_and_kept():
    assert list(passages([0, 250, 260], 100, 0.0, np.random.default_rng(0))) == [(0, 100), (100, 200), (200, 260)]


def test_a_document_is_on_one_side_and_its_copies_too():
    hashes = np.array([5, 3, 9, 3, 7, 1, 8, 5], dtype=np.uint64)
    held_out = split_documents(hashes, 0.25)
    assert held_out.tolist() == [False, True, False, True, False, True, False, False]
    assert split_documents(np.array([4, 2], dtype=np.uint64), 0.001).tolist() == [False, True]
    assert split_documents(np.array([1, 5, 5], dtype=np.uint64), 0.5).tolist() == [True, False, False]
    copied = np.array([1] * 300 + [*range(2, 702)], dtype=np.uint64)  # the share is of different documents
    assert len(np.unique(copied[split_documents(copied, 0.05)])) == 35
    with pytest.raises(ValueError, match="all 3 documents are the same"):
        split_documents(np.array([4, 4, 4], dtype=np.uint64), 0.1)


def test_training_and_held_out_documents_are_disjoint(options):
    config = options(validation_fraction=0.2)
    corpus = prepare(config)
    covered = {}
    for held_out in (False, True):
        covered[held_out] = {
            token for _, start, stop in Examples(corpus, config, held_out).table for token in range(start, stop)
        }
    assert not covered[False] & covered[True]
    assert len(covered[False] | covered[True]) > 0.99 * corpus.total("tokens")
    starts = corpus.shards[0].sentences[corpus.shards[0].documents]
    of_document = [set(range(a, b)) for a, b in zip(starts[:-1], starts[1:], strict=True)]
    assert sum(bool(tokens & covered[True]) for tokens in of_document) == 8


def test_pairs_are_neighbours_in_order_or_swapped(examples):
    sep = examples.sep
    shard = examples.corpus.shards[0]
    pairs = 0
    for index in range(len(examples)):
        example = examples.example(0, index)
        _, start, stop = examples.table[index]
        parts = segments(example, sep)
        order = example["sentence_order_label"]
        if order == IGNORED:
            assert len(parts) == 1 and not set(shard.sentences) & set(range(start + 1, stop))
        else:
            pairs += 1
            assert start + len(parts[order]) in shard.sentences  # the cut between them is the end of a sentence
            parts = parts[::-1] if order else parts
        assert [token for part in parts for token in part] == shard.tokens[start:stop].tolist()
    assert 100 < pairs < len(examples)


def test_half_of_the_pairs_are_swapped(examples):
    labels = [
        examples.example(epoch, index)["sentence_order_label"] for epoch in range(8) for index in range(len(examples))
    ]
    labels = [label for label in labels if label != IGNORED]
    assert np.mean(labels) == pytest.approx(0.5, abs=4 * 0.5 / len(labels) ** 0.5)


def test_special_tokens_frame_the_segments_and_are_never_predicted(examples):
    for index in range(50):
        example = examples.example(1, index)
        ids, types = example["input_ids"], example["token_type_ids"]
        special = np.isin(ids, [examples.cls, examples.sep])
        assert ids[0] == examples.cls and ids[-1] == examples.sep and len(ids) <= 24
        assert (example["labels"][special] == IGNORED).all()
        first = int(np.flatnonzero(ids == examples.sep)[0])
        assert not types[: first + 1].any() and types[first + 1 :].all()


def test_an_example_is_a_function_of_seed_epoch_and_index(options, examples):
    def same(one, other):
        return all(np.array_equal(one[name], other[name]) for name in one)

    again = Examples(examples.corpus, examples.config, held_out=False)
    assert same(examples.example(3, 7), again.example(3, 7))
    assert not same(examples.example(3, 7), examples.example(4, 7))
    other = Examples(examples.corpus, options(seed=2), held_out=False)
    assert not np.array_equal(other.table, examples.table)


def rows_of(batches):
    """The real tokens of each row, with their labels, as a sorted list."""
    rows = []
    for batch in batches:
        for row in range(len(batch["input_ids"])):
            real = batch["attention_mask"][row].bool()
            fields = [batch[name][row][real].tolist() for name in ("input_ids", "labels", "token_type_ids")]
            rows.append((*fields, int(batch["sentence_order_label"][row])))
    return sorted(rows)


@pytest.mark.parametrize("step", [0, 1, 30])
def test_a_global_batch_is_the_same_for_any_number_of_processes_and_micro_batches(examples, step):
    whole = GlobalBatches(examples, 8, Share(0, 1, 8))[step]
    assert len(whole) == 1 and len(whole[0]["input_ids"]) == 8
    for processes, micro in ((1, 2), (2, 4), (2, 1), (4, 2)):
        shares = [GlobalBatches(examples, 8, Share(number, processes, micro))[step] for number in range(processes)]
        assert rows_of([batch for share in shares for batch in share]) == rows_of(whole)


def test_batches_go_to_workers_that_are_not_forked(examples):
    """macOS starts them anew, Python 3.14 too: what they were given could not be sent to them."""
    batches = GlobalBatches(examples, 8, Share(0, 1, 8))
    first = rows_of(batches[0])
    how = {"sampler": range(1), "batch_size": None, "num_workers": 1, "multiprocessing_context": "spawn"}
    assert [rows_of(found) for found in DataLoader(batches, **how)] == [first]


def test_few_files_of_a_large_text_are_open_at_a_time(examples, tmp_path):
    """Two of each shard were, until the system had no more: 509 shards, 2 GB of text."""
    (shard,) = examples.shards
    opened = len(os.listdir("/proc/self/fd"))
    for number in range(MOST_MAPPED):
        copy = Shard(shutil.copytree(shard.folder, tmp_path / str(number)))
        assert len(copy.tokens) == len(shard.tokens) and len(copy.sentences) == len(shard.sentences)
    assert len(os.listdir("/proc/self/fd")) <= opened + MOST_MAPPED


def test_an_epoch_shows_every_example_once_and_the_next_one_in_another_order(examples):
    batches = GlobalBatches(examples, 8, Share(0, 1, 8))
    per_epoch = len(examples) // 8
    first, second = ([batches.rows(step) for step in range(start, start + per_epoch)] for start in (0, per_epoch))
    assert {epoch for epoch, _ in first} == {0} and {epoch for epoch, _ in second} == {1}
    shown, again = (np.concatenate([rows for _, rows in epoch]) for epoch in (first, second))
    assert len(set(shown[:, 1])) == len(shown) == 8 * per_epoch
    assert (shown[:, 0] == 0).all() and (again[:, 0] == 1).all()
    assert not np.array_equal(shown[:, 1], again[:, 1])


def test_padding_is_on_the_right_and_not_predicted(examples):
    batch = examples.collate(0, np.arange(20))
    mask = batch["attention_mask"].bool()
    assert (mask.int().diff(dim=1) <= 0).all() and mask.any(0).all()
    assert (batch["input_ids"][~mask] == examples.pad).all() and (batch["labels"][~mask] == IGNORED).all()
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


def test_token_counts_are_those_of_the_passages(examples):
    _, starts, stops = examples.table.T
    tokens = np.concatenate([examples.corpus.shards[0].tokens[a:b] for a, b in zip(starts, stops, strict=True)])
    assert (examples.token_counts() == np.bincount(tokens, minlength=len(examples.corpus.tokenizer))).all()


def test_batches_that_do_not_fit_are_named(examples):
    with pytest.raises(ValueError, match="gives .* training examples, fewer than one batch: .* got 100000"):
        GlobalBatches(examples, 100_000, Share(0, 1, 1))
    with pytest.raises(ValueError, match=r"multiple of the number of processes \(3\), got 8"):
        check_batch_size(8, None, 3)
    with pytest.raises(ValueError, match=r"must divide the share of a process \(4 of batch_size 8\), got 3"):
        check_batch_size(8, 3, 2)
    assert check_batch_size(8, None, 2) == 4


def test_held_out_text_is_masked_the_same_whatever_the_training_masks(options):
    config = options(mask_probability=0.4)
    corpus = prepare(config)
    shares = {}
    for held_out in (False, True):
        examples = Examples(corpus, config, held_out)
        labels = [examples.example(0, index)["labels"] for index in range(len(examples))]
        shares[held_out] = (
            sum((row != IGNORED).sum() for row in labels) / (examples.table[:, 2] - examples.table[:, 1]).sum()
        )
    assert shares[False] == pytest.approx(0.4, abs=0.03) and shares[True] == pytest.approx(0.15, abs=0.03)


@pytest.fixture
def mixed(options, corpus_file, corpus_text, tmp_path):
    """-> examples of a large source and of one a fourth of its size, with these weights."""
    small = tmp_path / "small.txt"
    small.write_text("\n\n".join(corpus_text.replace("treaty", "pact").split("\n\n")[:10]) + "\n")

    def make(**weights):
        mixture = {name: {"text": str(file)} for name, file in (("large", corpus_file), ("small", small))}
        for name, weight in weights.items():
            mixture[name]["weight"] = weight
        config = options(text=[], mixture=json.dumps(mixture))
        return Examples(prepare(config), config, held_out=False)

    return make


def shown(batches, epoch):
    """(examples, 2): what the batches of an epoch show"""
    return np.concatenate([batches.rows(step)[1] for step in range(epoch * len(batches), (epoch + 1) * len(batches))])


def test_weights_are_the_sources_shares_of_every_epoch(mixed):
    examples = mixed(large=1, small=1)
    batches = GlobalBatches(examples, 8, Share(0, 1, 8))
    for epoch in (0, 1, 5):
        of_small = examples.source[shown(batches, epoch)[:, 1]] == 1
        assert of_small.mean() == pytest.approx(0.5, abs=0.02)
    assert (examples.source == 1).mean() < 0.25


def test_a_source_is_shown_whole_before_any_of_it_is_shown_again_and_then_masked_anew(mixed):
    examples = mixed(large=1, small=1)
    pool = GlobalBatches(examples, 8, Share(0, 1, 8)).pools[1]
    drawn = np.concatenate([pool.draw(epoch) for epoch in range(4)])
    assert len({tuple(row) for row in drawn}) == len(drawn)  # never the same example with the same masks
    for number in range(drawn[:, 0].max()):
        assert sorted(drawn[drawn[:, 0] == number, 1]) == pool.examples.tolist()
    index = pool.examples[0]
    assert not np.array_equal(examples.example(0, index)["labels"], examples.example(1, index)["labels"])


def test_a_pool_is_a_function_of_seed_and_epoch():
    pools = [Pool(np.arange(100, 130), 50, seed) for seed in ((1, 0), (1, 0), (1, 1), (2, 0))]
    later, again, of_other_source, of_other_seed = (pool.draw(7) for pool in pools)
    assert np.array_equal(later, again)
    assert not np.array_equal(later, of_other_source) and not np.array_equal(later, of_other_seed)


def test_without_weights_sources_are_shown_as_one_text_is(mixed):
    examples = mixed()
    batches = GlobalBatches(examples, 1, Share(0, 1, 1))
    assert sorted(shown(batches, 3)[:, 1]) == list(range(len(examples)))


def test_a_mixture_is_the_same_for_any_number_of_processes(mixed):
    examples = mixed(large=1, small=3)
    whole = GlobalBatches(examples, 8, Share(0, 1, 8))[40]
    shares = [GlobalBatches(examples, 8, Share(number, 2, 2))[40] for number in range(2)]
    assert rows_of([batch for share in shares for batch in share]) == rows_of(whole)


def test_statistics_count_what_the_examples_hold(mixed):
    examples = mixed(large=1, small=3)
    batches = GlobalBatches(examples, 8, Share(0, 1, 4))
    held_out = Examples(examples.corpus, examples.config, held_out=True)
    found = statistics(examples.corpus, batches, held_out)
    large, small, total = found["sources"]["large"], found["sources"]["small"], found["total"]
    for name in ("documents", "sentences", "tokens", "examples", "pairs", "held_out"):
        assert large[name] + small[name] == total[name]
    assert (total["documents"], total["sentences"]) == (50, 600)
    made = [examples.example(0, index) for index in range(len(examples))]
    assert total["pairs"] == sum(example["sentence_order_label"] != IGNORED for example in made)
    assert total["padding"] == pytest.approx(1 - np.mean([len(example["input_ids"]) / 24 for example in made]))
    assert (large["share"], small["share"], total["unknown"]) == (0.25, 0.75, 0.0)
    masks = [batch["attention_mask"] for step in range(len(batches)) for batch in batches[step]]
    padding = sum((mask == 0).sum() for mask in masks) / sum(mask.numel() for mask in masks)
    assert found["padding_in_batches"] == pytest.approx(float(padding)) and padding < total["padding"]
    assert json.loads(json.dumps(found)) == found
    assert [line.split()[0] for line in table(found).splitlines()] == [
        "documents",
        "large",
        "small",
        "total",
        "padding",
    ]


def test_unknown_tokens_are_counted(options, corpus_text, tmp_path):
    prepare(options()).tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "greek.txt").write_text(corpus_text + "\n\n\u03b1\u03b2 \u03b3.\n")
    corpus = prepare(options(text=tmp_path / "greek.txt", tokenizer=tmp_path / "tokenizer"))
    assert corpus.total("unknown") == 2


def test_passages_are_packed_to_the_length(options):
    config = options(short_probability=0, max_length=32)
    corpus = prepare(config)
    examples = Examples(corpus, config, held_out=False)
    ends = {int(shard.sentences[place]) for shard in corpus.shards for place in shard.documents}
    sentence = np.diff(corpus.shards[0].sentences).max()
    for _, start, stop in examples.table.tolist():
        assert stop - start + sentence > 29 or stop in ends  # no further sentence fits, or the document ends


def test_pairs_are_cut_after_any_sentence(options):
    config = options(max_length=64, max_position_embeddings=64)
    examples = Examples(prepare(config), config, held_out=False)
    shard, first = examples.corpus.shards[0], []
    for index in np.flatnonzero(examples.ordered):
        example, start = examples.example(0, index), examples.table[index][1]
        cut = start + len(segments(example, examples.sep)[example["sentence_order_label"]])
        first.append(cut == shard.sentences[np.searchsorted(shard.sentences, start + 1)])
    assert 0.2 < np.mean(first) < 0.9


def test_short_passages_have_two_tokens_at_least(options):
    config = options(short_probability=1.0, max_length=8)
    found = Examples(prepare(config), config, held_out=False)
    assert (found.table[:, 2] - found.table[:, 1]).min() == 2


def test_rows_of_like_length_share_a_micro_batch(examples):
    batches = GlobalBatches(examples, 8, Share(0, 1, 4))
    assert all((np.diff(batches.lengths[batches.rows(step)[1][:, 1]]) >= 0).all() for step in range(4))
