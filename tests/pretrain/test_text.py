import gzip
import lzma

import pytest
import zstandard

from pretrain.text import documents, find_files, sentences

TEXT = "One. Two.\nThree.\n\n\nFour, five.\n"


@pytest.mark.parametrize(("suffix", "opener"), [(".txt", open), (".gz", gzip.open), (".xz", lzma.open)])
def test_documents_are_separated_by_blank_lines(tmp_path, suffix, opener):
    file = tmp_path / f"text{suffix}"
    with opener(file, "wb") as stream:
        stream.write(TEXT.encode())
    assert list(documents(file)) == [["One. Two.", "Three."], ["Four, five."]]


def test_zst_files_are_read(tmp_path):
    half = len(TEXT) // 2
    frames = [zstandard.compress(part.encode()) for part in (TEXT[:half], TEXT[half:])]  # as `zstd` appends
    (tmp_path / "text.zst").write_bytes(b"".join(frames))
    assert list(documents(tmp_path / "text.zst")) == [["One. Two.", "Three."], ["Four, five."]]


@pytest.mark.parametrize(
    ("paragraph", "split"),
    [
        ("It ended. It began! Did it? Yes.", ["It ended.", "It began!", "Did it?", "Yes."]),
        ("Mr. Adams met Dr. Rush.  They spoke.", ["Mr. Adams met Dr. Rush.", "They spoke."]),
        ("The U. S. Army won.", ["The U. S. Army won."]),
        ('He said "No." Then 3.5 per cent. fell away.', ['He said "No."', "Then 3.5 per cent. fell away."]),
        ("It is I. We know.", ["It is I.", "We know."]),
        ("Привет. Как дела? Хорошо.", ["Привет.", "Как дела?", "Хорошо."]),
        ("He left. Élise stayed.", ["He left.", "Élise stayed."]),
        ("no end", ["no end"]),
        ("   ", []),
    ],
)
def test_sentences(paragraph, split):
    assert sentences(paragraph) == split


def test_no_text_is_lost_between_sentences(corpus_text):
    assert " ".join(sentences(corpus_text)).split() == corpus_text.split()


@pytest.mark.parametrize("text", ["word " * 2_000_000, "a" * 10_000_000, "Mr. " * 250_000, "." + "'" * 10_000_000])
def test_a_line_without_an_end_is_cut_into_pieces_and_nothing_is_lost(text):
    found = sentences(text)
    assert "".join(found).replace(" ", "") == text.replace(" ", "") and len(text) // 20_000 <= len(found)
    assert max(map(len, found)) <= 20_000


def test_globs_and_names_give_each_file_once(tmp_path):
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(TEXT)
    found = find_files([str(tmp_path / "*.txt"), str(tmp_path / "b.txt")])
    assert [path.name for path in found] == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("bad.txt", b"fine\nca\xfft\n", "line 2 is not UTF-8 text (byte 0xff at column 3)"),
        ("bad.txt", b"\x00\x01\x02", "line 1 holds a NUL byte: this is a binary file"),
        ("bad.xz", lzma.compress(TEXT.encode() * 9)[:-20], "damaged or truncated .xz archive"),
        ("bad.gz", gzip.compress(TEXT.encode() * 9, mtime=0)[:-12], "damaged or truncated .gz archive"),
        ("bad.gz", b"plain text", "damaged or truncated .gz archive"),
        ("bad.zst", zstandard.compress(TEXT.encode() * 9)[:-5], "damaged or truncated .zst archive"),
        ("bad.zst", b"plain text", "damaged or truncated .zst archive"),
        ("text.txt", "\ufeffOne.\n".encode("utf-16"), "line 1 is not UTF-8 text (byte 0xff at column 1)"),
    ],
)
def test_what_is_not_text_is_named_with_its_place(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError) as raised:
        list(documents(tmp_path / name))
    assert named in str(raised.value) and name in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no file 'nowhere.txt'"):
        find_files(["nowhere.txt"])
    with pytest.raises(ValueError, match="no file"):
        find_files([str(tmp_path / "*.txt")])


def test_a_folder_is_named_with_what_to_give(tmp_path):
    (tmp_path / "one.txt").write_text(TEXT)
    with pytest.raises(ValueError, match="is a folder; give its files, as in '.*/\\*.txt'"):
        find_files([str(tmp_path)])


def test_progress_is_told_in_bytes_of_the_file(tmp_path):
    (tmp_path / "text.gz").write_bytes(gzip.compress(TEXT.encode()))
    told = []
    list(documents(tmp_path / "text.gz", told.append))
    assert told == [(tmp_path / "text.gz").stat().st_size]


def test_a_linked_file_is_read_by_the_name_of_its_link(tmp_path):
    with gzip.open(tmp_path / "blob", "wt") as file:
        file.write("One. Two.\n")
    (tmp_path / "a.txt.GZ").symlink_to(tmp_path / "blob")
    (found,) = find_files([str(tmp_path / "a.txt.GZ")])
    assert list(documents(found)) == [["One. Two."]]
