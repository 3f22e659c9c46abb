import lzma

import numpy as np
import pytest

from elastic_model.folders import is_ours
from pretrain.data import Examples
from pretrain.prepare import prepare
from pretrain.text import documents, sentences


def test_shards_hold_every_sentence_of_every_document(options, corpus_file):
    corpus = prepare(options())
    (shard,) = corpus.shards
    texts = [sentence for document in documents(corpus_file) for line in document for sentence in sentences(line)]
    assert [corpus.total(name) for name in ("documents", "sentences", "unknown")] == [40, 480, 0]
    assert len(shard.tokens) == corpus.total("tokens") == shard.sentences[-1]
    for number, text in enumerate(texts):
        ids = shard.tokens[shard.sentences[number] : shard.sentences[number + 1]]
        assert corpus.tokenizer(text, add_special_tokens=False).input_ids == ids.tolist()
    assert np.diff(shard.documents).tolist() == [12] * 40


def test_the_same_text_is_prepared_once_and_changed_text_anew(options, corpus_text, tmp_path):
    file, cache = tmp_path / "text.txt", tmp_path / "cache"
    file.write_text(corpus_text)
    first = prepare(options(text=file, cache=cache))
    written = first.shards[0].folder / "tokens.bin"
    stamp = written.stat().st_mtime_ns
    file.rename(tmp_path / "renamed.txt")
    again = prepare(options(text=tmp_path / "renamed.txt", cache=cache))
    assert (
        again.shards == first.shards
        and again.sources[0].digest == first.sources[0].digest
        and written.stat().st_mtime_ns == stamp
    )
    file.write_text(corpus_text.replace("treaty", "convention", 1))
    changed = prepare(options(text=file, cache=cache))
    assert changed.shards != first.shards and changed.sources[0].digest != first.sources[0].digest


def test_two_caches_hold_the_same_bytes(options, tmp_path):
    one, other = (prepare(options(cache=tmp_path / name)) for name in ("a", "b"))
    assert one.tokenizer_digest == other.tokenizer_digest
    assert one.shards[0].folder.name == other.shards[0].folder.name
    for name in ("tokens", "sentences", "documents", "hashes"):
        file = f"{name}.bin"
        assert (one.shards[0].folder / file).read_bytes() == (other.shards[0].folder / file).read_bytes()


def test_a_compressed_file_gives_the_same_tokens(options, corpus_text, tmp_path):
    packed = tmp_path / "text.txt.xz"
    packed.write_bytes(lzma.compress(corpus_text.encode()))
    plain = prepare(options())
    assert (prepare(options(text=packed)).shards[0].tokens == plain.shards[0].tokens).all()


def test_an_existing_tokenizer_is_used_without_its_truncation(options, tmp_path):
    corpus = prepare(options())
    corpus.tokenizer.backend_tokenizer.enable_truncation(4)
    corpus.tokenizer.backend_tokenizer.enable_padding(length=50)
    corpus.tokenizer.save_pretrained(tmp_path / "tokenizer")
    again = prepare(options(tokenizer=tmp_path / "tokenizer"))
    assert (again.shards[0].tokens == corpus.shards[0].tokens).all()


def test_an_interrupted_preparation_leaves_no_shard(options, corpus_file, tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(corpus_file.read_bytes() + b"\xff\n")
    corpus = prepare(options())
    corpus.tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = options(text=[corpus_file, bad], cache=tmp_path / "cache", tokenizer=tmp_path / "tokenizer")
    with pytest.raises(ValueError, match="bad.txt: line 280 is not UTF-8 text"):
        prepare(config)
    (kept,) = (tmp_path / "cache" / "shards").iterdir()  # the first file's, to be used again
    assert is_ours(kept)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "no text in this file"),
        (" \n\n \n", "no text in this file"),
        ("One. Two.\nThree. One. Two. Three.\n", "holds 1 document(s), at least 2 are needed"),
    ],
)
def test_a_corpus_that_cannot_be_split_is_named(options, tmp_path, content, named):
    file = tmp_path / "text.txt"
    file.write_text(content)
    config = options(text=file, vocab_size=40)
    with pytest.raises(ValueError) as raised:
        Examples(prepare(config), config, held_out=True)
    assert named in str(raised.value) and "text.txt" in str(raised.value)
