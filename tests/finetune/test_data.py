"""Batches: each row once, the same from the same seed, of similar length; rows cut to the length are counted."""

import numpy as np
import pytest
import torch
from transformers import BertJapaneseTokenizer

from finetune.data import GROUP, check_fast, collate, encode, shuffled_batches, sorted_batches
from finetune.examples import Examples

LENGTHS = [1 + (number * 7919) % 97 for number in range(1003)]


def examples_of(texts, pairs=None):
    return Examples(texts, pairs, [0] * len(texts), [""] * len(texts))


def test_an_epoch_has_each_row_once():
    batches = shuffled_batches(LENGTHS, 10, seed=0, epoch=0)
    assert sorted(row for batch in batches for row in batch) == list(range(1003))
    assert sorted(map(len, batches)) == [3] + [10] * 100


def test_batches_are_a_function_of_seed_and_epoch():
    assert shuffled_batches(LENGTHS, 10, 1, 2) == shuffled_batches(LENGTHS, 10, 1, 2)
    assert shuffled_batches(LENGTHS, 10, 1, 2) != shuffled_batches(LENGTHS, 10, 1, 3)
    assert shuffled_batches(LENGTHS, 10, 1, 2) != shuffled_batches(LENGTHS, 10, 2, 2)


def test_grouping_by_length_saves_most_of_the_padding():
    def slots(batches):
        return sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in batches)

    in_order = [list(range(first, min(first + 10, 1003))) for first in range(0, 1003, 10)]
    grouped = shuffled_batches(LENGTHS, 10, 0, 0)
    real = sum(LENGTHS)
    assert GROUP > 1 and slots(grouped) - real < 0.2 * (slots(in_order) - real)
    assert slots(sorted_batches(LENGTHS, 10)) <= slots(grouped)


def test_rows_longer_than_the_length_are_cut_and_counted(tiny_tokenizer):
    texts = ["the harvest " * 20, "the harvest", "a treaty"]
    encoded = encode(examples_of(texts), tiny_tokenizer, 12, np.zeros(3))
    assert encoded.cut == 1 and max(encoded.lengths) == 12 and len(encoded) == 3
    assert encoded.rows[0]["input_ids"][-1] == tiny_tokenizer.sep_token_id


def test_a_tokenizer_in_python_counts_the_same(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "harvest", "a", "treaty"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    slow = BertJapaneseTokenizer(tmp_path / "vocab.txt", word_tokenizer_type="basic")
    encoded = encode(examples_of(["the harvest " * 20, "the harvest", "a treaty"]), slow, 12, np.zeros(3))
    assert encoded.cut == 1 and max(encoded.lengths) == 12
    with pytest.raises(ValueError, match="tags and questions need a fast tokenizer .*, got BertJapaneseTokenizer"):
        check_fast(slow)


def test_a_batch_is_padded_to_its_longest_row(tiny_tokenizer):
    encoded = encode(examples_of(["the harvest of this year", "a treaty"]), tiny_tokenizer, 32, np.array([1, 0]))
    batch = collate(encoded, [1, 0], tiny_tokenizer, torch.device("cpu"))
    assert batch["input_ids"].shape == (2, max(encoded.lengths))
    assert batch["attention_mask"].sum(1).tolist() == [encoded.lengths[1], encoded.lengths[0]]
    assert batch["labels"].tolist() == [0, 1]


def test_pairs_carry_token_types(tiny_tokenizer):
    encoded = encode(examples_of(["the army"], ["the revenue"]), tiny_tokenizer, 32, np.zeros(1))
    assert set(encoded.rows[0]["token_type_ids"]) == {0, 1}


def test_batches_are_padded_on_the_right_whatever_the_tokenizer_does(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny_tokenizer, "padding_side", "left")
    encoded = encode(examples_of(["the harvest of this year", "the"]), tiny_tokenizer, 12, np.zeros(2))
    batch = collate(encoded, [0, 1], tiny_tokenizer, torch.device("cpu"))
    assert batch["attention_mask"][1].tolist() == sorted(batch["attention_mask"][1].tolist(), reverse=True)
    assert batch["input_ids"][1, 0] == tiny_tokenizer.cls_token_id
