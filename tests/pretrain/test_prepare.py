import json
import lzma
import os
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import psutil
import pytest

from elastic_model.arguments import to_yaml
from elastic_model.folders import is_ours
from pretrain.data import Examples
from pretrain.prepare import chunks, prepare, sample
from pretrain.text import documents, sentences


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 3,000 characters: a few documents of the tests' corpus."""
    monkeypatch.setattr("pretrain.prepare.CHUNK_CHARACTERS", 3000)


def contents(folder):
    """Every file below the folder, by its name."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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


def test_a_text_that_spells_a_special_token_holds_none(options, corpus_text, tmp_path):
    (tmp_path / "text.txt").write_text(corpus_text + "\n\nThe [MASK] and the [SEP] of the treaty. It has no [PAD].\n")
    corpus = prepare(options(text=tmp_path / "text.txt", vocab_size=200))
    special = corpus.tokenizer.convert_tokens_to_ids(["[MASK]", "[SEP]", "[PAD]"])
    assert not np.isin(corpus.shards[0].tokens, special).any()


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


def test_the_shards_are_the_same_whatever_the_number_of_processes(options, small_chunks, tmp_path):
    one, two = (prepare(options(cache=tmp_path / str(count), prepare_workers=count)) for count in (1, 2))
    assert len(one.shards) > 5 and one.sources[0].digest == two.sources[0].digest
    assert [shard.folder.name for shard in one.shards] == [shard.folder.name for shard in two.shards]
    assert contents(tmp_path / "1" / "shards") == contents(tmp_path / "2" / "shards")


def test_chunks_hold_every_document_once_and_change_with_the_text(corpus_file, small_chunks):
    found = list(chunks(documents(corpus_file)))
    assert [document for _, chunk in found for document in chunk] == list(documents(corpus_file))
    others = list(chunks([paragraph.replace("treaty", "pact") for paragraph in it] for it in documents(corpus_file)))
    assert len(found) > 5 and len({digest for digest, _ in found + others}) == 2 * len(found)
    split, joined = ([digest for digest, _ in chunks(iter(texts))] for texts in ([["a", "b"]], [["a"], ["b"]]))
    assert split != joined


def test_what_was_prepared_before_an_error_is_kept_and_used(options, corpus_file, small_chunks, tmp_path):
    prepare(options()).tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = tmp_path / "bad.txt"
    file.write_bytes(corpus_file.read_bytes() + b"\xff\n")
    config = options(text=file, cache=tmp_path / "c", tokenizer=tmp_path / "tokenizer", prepare_workers=2)
    with pytest.raises(ValueError, match="bad.txt: line 280 is not UTF-8 text"):
        prepare(config)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "c" / "shards").iterdir()}
    assert kept and all(map(is_ours, kept))
    file.write_bytes(corpus_file.read_bytes())
    used = {shard.folder for shard in prepare(config).shards}
    assert len(used) > 5 and kept.keys() <= used
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())


def test_a_part_is_read_again_where_one_of_its_shards_is_gone(options, small_chunks, tmp_path):
    before = prepare(options(cache=tmp_path))
    tokens = before.shards[3].tokens.copy()
    for path in before.shards[3].folder.iterdir():
        path.unlink()
    before.shards[3].folder.rmdir()
    assert (prepare(options(cache=tmp_path)).shards[3].tokens == tokens).all()


@pytest.mark.slow
def test_a_killed_preparation_goes_on_and_leaves_no_process(options, corpus_text, tmp_path):
    text = tmp_path / "long.txt"
    text.write_text("\n".join(corpus_text.replace("treaty", f"treaty {number}") for number in range(170)))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}

    def start(cache):
        config = options(text=text, cache=cache, prepare_workers=2)
        (tmp_path / "recipe.yaml").write_text(to_yaml(config))
        command = [sys.executable, "-m", "pretrain", "prepare", "--config", str(tmp_path / "recipe.yaml")]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    process = start(tmp_path / "killed")
    while not list((tmp_path / "killed" / "shards").glob("[!.]*")):
        assert process.poll() is None
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert workers and not psutil.wait_procs(workers, timeout=20)[1]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "shards").glob("[!.]*")}
    printed = [start(tmp_path / name).communicate()[0] for name in ("killed", "whole")]
    assert printed[0] == printed[1] and "6,800" in printed[0]
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in kept.items())
    assert contents(tmp_path / "killed" / "shards") == contents(tmp_path / "whole" / "shards")


def test_a_dataset_gives_the_shards_of_the_same_text_in_a_file_and_changed_rows_give_others(
    options, corpus_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    rows = ["\n".join(document) for document in documents(corpus_file)]
    from_file = prepare(options())
    found = {}
    for name, texts in (("same", rows), ("changed", [rows[0].replace("the", "a"), *rows[1:]])):
        datasets.Dataset.from_dict({"body": texts}).to_parquet(tmp_path / name / "train.parquet")
        found[name] = prepare(options(text=[], dataset=tmp_path / name, text_column="body", streaming=True))
    assert found["same"].shards == from_file.shards
    assert found["same"].sources[0].digest == from_file.sources[0].digest != found["changed"].sources[0].digest


def test_the_sources_of_a_mixture_are_kept_apart(options, corpus_text, corpus_file, tmp_path):
    (tmp_path / "other.txt").write_text(corpus_text.replace("treaty", "convention"))
    mixture = {name: {"text": str(file)} for name, file in (("b", corpus_file), ("a", tmp_path / "other.txt"))}
    corpus = prepare(options(text=[], mixture=json.dumps(mixture)))
    assert [source.name for source in corpus.sources] == ["a", "b"] and corpus.total("documents") == 80
    assert [source.total("documents") for source in corpus.sources] == [40, 40]
    assert corpus.shards == [shard for source in corpus.sources for shard in source.shards]


def test_a_tokenizer_is_trained_on_a_sample_that_fits_and_does_not_depend_on_the_order():
    texts = [[f"document {number} " + "x" * (number % 50)] for number in range(400)]
    total = sum(len(text) for (text,) in texts)
    assert sample(iter(texts), total) == texts
    chosen = sample(iter(texts), total // 4)
    assert 0.2 * total < sum(len(text) for (text,) in chosen) <= total / 4
    assert sorted(sample(iter(texts[::-1]), total // 4)) == sorted(chosen) != sorted(texts[: len(chosen)])


@pytest.mark.parametrize("count", [6_000, pytest.param(320_000, marks=pytest.mark.slow, id="ten megabytes")])
def test_a_long_document_in_one_line_is_prepared(options, small_chunks, tmp_path, count):
    prepare(options()).tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = tmp_path / "long.txt"
    file.write_text("The senate needs the treasury. " * count + "\n\n" + "army" * 20_000 + "\n")
    corpus = prepare(options(text=file, tokenizer=tmp_path / "tokenizer", cache=tmp_path / "cache"))
    assert [corpus.total(name) for name in ("documents", "sentences")] == [2, count + 4]
    assert [shard.statistics["documents"] for shard in corpus.shards] == [1, 1]
    assert (
        corpus.shards[0].tokens.tolist() == corpus.tokenizer("The senate needs the treasury.").input_ids[1:-1] * count
    )


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
