"""The embedded data: sizes, splits, hashes, what was taken out, and that the script makes the same text again."""

import csv
import hashlib
import lzma
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import make_data

ROOT = Path(__file__).resolve().parent.parent
PRETRAIN_FILE = ROOT / "pretrain/data/state_of_the_union.txt.xz"
ERA_FOLDER = ROOT / "finetune/data/era"
SPLITS = ("train", "dev", "test")


def rows(split: str) -> list[dict[str, str]]:
    with lzma.open(ERA_FOLDER / f"{split}.tsv.xz", "rt", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


@pytest.fixture(scope="module")
def era():
    return {split: rows(split) for split in SPLITS}


@pytest.fixture(scope="module")
def speeches():
    text = lzma.decompress(PRETRAIN_FILE.read_bytes()).decode()
    return text.split("\n\n")


def test_embedded_files_are_small():
    sizes = [path.stat().st_size for path in ROOT.glob("*/data/**/*") if path.suffix == ".xz"]
    assert len(sizes) == 4
    assert max(sizes) < 1_000_000 and sum(sizes) < 2_000_000


def test_the_provenance_states_the_hashes():
    stated = (ERA_FOLDER / "PROVENANCE.md").read_text() + (PRETRAIN_FILE.parent / "PROVENANCE.md").read_text()
    for path in [PRETRAIN_FILE, *(ERA_FOLDER / f"{split}.tsv.xz" for split in SPLITS)]:
        assert hashlib.sha256(lzma.decompress(path.read_bytes())).hexdigest() in stated, path
        assert f"{path.stat().st_size:,}" in stated, path


def test_no_president_and_no_speech_is_on_two_sides(era):
    presidents = {split: {row["president"] for row in era[split]} for split in SPLITS}
    assert sum(map(len, presidents.values())) == len(set.union(*presidents.values())) == 43
    texts = [row["text"] for split in SPLITS for row in era[split]]
    assert len(set(texts)) == len(texts)


def test_every_era_has_the_stated_number_of_passages_on_every_side(era):
    for split, count in {"train": 800, "dev": 120, "test": 300}.items():
        assert Counter(row["label"] for row in era[split]) == dict.fromkeys(make_data.ERAS, count)


def test_labels_follow_from_the_year(era):
    for row in (row for split in SPLITS for row in era[split]):
        first, last = row["label"].split("-")
        assert int(first) <= int(row["year"]) <= int(last)


def test_passages_have_60_to_120_words_and_no_year(era):
    for row in (row for split in SPLITS for row in era[split]):
        assert 60 <= len(row["text"].split()) <= 120
        assert not re.search(r"[1-9]|[(\[](?:[Aa]pplause|[Ll]aughter)|[“”’—]|--", row["text"])


def test_any_slice_is_mixed(era):
    assert set(Counter(row["label"] for row in era["test"][:40])) == set(make_data.ERAS)


def test_pretraining_sees_no_speech_of_dev_or_test(era, speeches):
    text = re.sub(r"\d", "0", " ".join(" ".join(speeches).split()))
    for row in era["dev"] + era["test"]:
        assert row["text"] not in text
    seen = sum(row["text"] in text for row in era["train"])
    assert seen > 1000  # the comparison above does find passages where they are


def test_pretraining_text_is_a_sentence_a_line_and_a_speech_a_document(speeches):
    assert len(speeches) == 141
    assert all(len(speech.splitlines()) > 20 for speech in speeches)
    assert max(len(speech.split()) for speech in speeches) <= make_data.WORDS_PER_SPEECH


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("Mr. Polk spoke. He sat down.", ["Mr. Polk spoke.", "He sat down."]),
        ("It cost $1. 500 men came.", ["It cost $1.", "500 men came."]),
        ("The U.S. Senate met. J. Q. Adams left!", ["The U.S. Senate met.", "J. Q. Adams left!"]),
        ('He said "No." Then he left.', ['He said "No."', "Then he left."]),
    ],
)
def test_sentences_end_where_a_reader_ends_them(text, sentences):
    assert list(make_data.split_sentences(text)) == sentences


def test_late_transcripts_are_written_as_early_ones():
    assert make_data.clean("“It’s time”—(Applause.) -- now - or never.") == '"It\'s time"-now-or never.'


@pytest.mark.slow
@pytest.mark.skipif("npm_config_offline" in os.environ, reason="npm is told to stay offline")
def test_the_script_makes_the_same_text_again():
    command = [sys.executable, str(ROOT / "benchmarks/make_data.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("as made") == 4
