import random

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertTokenizer, CanineTokenizer, PreTrainedTokenizerFast

from pretrain.data import Examples
from pretrain.masking import IGNORED
from pretrain.prepare import prepare
from pretrain.tokenizer import SPECIAL_TOKENS, load_tokenizer, train_wordpiece, word_starts


def test_training_gives_the_same_vocabulary_every_time(corpus_text):
    trained = [train_wordpiece(corpus_text.splitlines(), 150, True).get_vocab() for _ in range(5)]
    assert all(vocabulary == trained[0] for vocabulary in trained)


def test_the_vocabulary_has_the_size_asked_and_knows_all_of_its_text(corpus_text):
    tokenizer = train_wordpiece(corpus_text.splitlines(), 110, True)
    ids = tokenizer(corpus_text.replace("\n", " ")).input_ids
    assert len(tokenizer) == 110 and tokenizer.unk_token_id not in ids
    assert tokenizer.convert_ids_to_tokens(range(5)) == SPECIAL_TOKENS
    assert tokenizer.decode(ids, skip_special_tokens=True).split()[:3] == corpus_text.lower().split()[:3]


def test_whole_words_of_the_text_become_tokens(corpus_text):
    tokenizer = train_wordpiece(corpus_text.splitlines(), 400, True)
    assert tokenizer.tokenize("The treasury needs treatyharbor") == [
        "the",
        "treasury",
        "needs",
        "treaty",
        *_tail(tokenizer),
    ]


def _tail(tokenizer):
    pieces = tokenizer.tokenize("treatyharbor")[1:]
    assert all(piece.startswith("##") for piece in pieces)
    return pieces


def test_case_is_kept_on_request(corpus_text):
    assert train_wordpiece(corpus_text.splitlines(), 150, False).tokenize("The") == ["The"]


def test_a_vocabulary_smaller_than_the_alphabet_is_an_error():
    with pytest.raises(ValueError, match="vocab_size must be above 57 for a text of 26 different characters, got 40"):
        train_wordpiece(["abcdefghijklmnopqrstuvwxyz"], 40, True)


def test_a_new_vocabulary_knows_the_most_frequent_characters_and_leaves_room_for_words(corpus_text):
    scripts = "".join(map(chr, range(0x4E00, 0x4E00 + 1500)))  # each once
    tokenizer = train_wordpiece([*corpus_text.splitlines(), scripts], 2200, True)
    known = {token.removeprefix("##") for token in tokenizer.get_vocab() if len(token.removeprefix("##")) == 1}
    assert len(known) == 1000 and set("abcdef") <= known
    assert tokenizer.tokenize("treaty") == ["treaty"]
    assert train_wordpiece([*corpus_text.splitlines(), scripts], 2200, True).get_vocab() == tokenizer.get_vocab()


def test_a_script_of_many_characters_is_known():
    script, draw = [chr(0x4E00 + number) for number in range(2000)], random.Random(0)
    lines = ["".join(draw.choices(script, [1 / (10 + rank) for rank in range(2000)], k=60)) for _ in range(1000)]
    tokenizer = train_wordpiece(lines, 8400, True)
    ids = tokenizer(" ".join(lines), add_special_tokens=False).input_ids
    assert ids.count(tokenizer.unk_token_id) < 0.001 * len(ids)


def test_a_tokenizer_that_cannot_be_used_is_named(tmp_path):
    CanineTokenizer().save_pretrained(tmp_path / "canine")
    with pytest.raises(ValueError, match="canine .* is not one of the tokenizers library"):
        load_tokenizer(tmp_path / "canine")
    special = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    BertTokenizer(vocab={**special, "far": 9}).save_pretrained(tmp_path / "holes")
    with pytest.raises(ValueError, match="has holes"):
        load_tokenizer(tmp_path / "holes")


def test_a_saved_tokenizer_is_read_by_auto_tokenizer(corpus_text, tmp_path):
    tokenizer = train_wordpiece(corpus_text.splitlines(), 150, True)
    tokenizer.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)):
        assert loaded.tokenize(corpus_text[:500]) == tokenizer.tokenize(corpus_text[:500])


def test_a_missing_tokenizer_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path} has no tokenizer that loads"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="tokenizer folder .*nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")


def test_word_starts_are_the_pieces_without_the_continuation_mark(corpus_text):
    tokenizer = train_wordpiece(corpus_text.splitlines(), 150, True)
    starts = np.array(word_starts(tokenizer))
    ids = tokenizer("the senatetreaty", add_special_tokens=False).input_ids
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert starts[ids].tolist() == [not piece.startswith("##") for piece in pieces] and not starts[ids].all()


@pytest.fixture
def byte_level(corpus_text, tmp_path):
    """The folder of a byte-level BPE tokenizer, as RoBERTa has one, that knows ## as text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>", "pad_token": "<pad>"}
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([corpus_text, " ##" * 1000], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "byte_level")
    return tmp_path / "byte_level"


def test_a_byte_level_tokenizer_reads_a_document_as_it_stands(byte_level, options, corpus_text):
    corpus = prepare(options(tokenizer=byte_level))
    document = corpus_text.split("\n\n")[0].replace("\n", " ")
    shard = corpus.shards[0]
    tokens = shard.tokens[: shard.sentences[shard.documents[1]]].tolist()
    assert tokens == corpus.tokenizer(document, add_special_tokens=False).input_ids
    assert corpus.total("unknown") == 0


def test_words_of_a_byte_level_tokenizer_start_at_its_spaces(byte_level):
    tokenizer = load_tokenizer(byte_level)
    starts = np.array(word_starts(tokenizer))
    ids = tokenizer(" the ## treatyharbor", add_special_tokens=False).input_ids
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert "\u0120##" in pieces and starts[ids].tolist() == [piece[0] == "\u0120" for piece in pieces]
    assert starts[ids].sum() == 3 < len(ids)


@pytest.mark.parametrize("kind", ["WordPiece", "byte level"])
def test_whole_words_are_masked_whole(kind, byte_level, options):
    config = options(whole_words=True, **({"tokenizer": byte_level} if kind == "byte level" else {}))
    examples = Examples(prepare(config), config, held_out=False)
    continued = 0
    for index in range(200):
        example = examples.example(0, index)
        predicted = example["labels"] != IGNORED
        ids = np.where(predicted, example["labels"], example["input_ids"])
        inside = ~np.isin(ids, [examples.cls, examples.sep])
        joined = np.flatnonzero(inside[1:] & inside[:-1] & ~examples.starts[ids[1:]])  # to the token after
        assert (predicted[joined] == predicted[joined + 1]).all()
        continued += predicted[joined].sum()
    assert continued > 50
