"""Sources to token shards, one per chunk of text, addressed by content: the same text is prepared once, a changed one
anew, and a preparation that was cut off goes on after its last whole chunk."""

import hashlib
import heapq
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from elastic_model.folders import new_folder, write_json
from elastic_model.processor import available_cores
from pretrain.config import PretrainConfig
from pretrain.shards import Shard, processes, write_shard
from pretrain.sources import DatasetRows, TextFile, parts_of
from pretrain.tokenizer import ALPHABET, COVERED, load_tokenizer, train_wordpiece

FORMAT = "4"  # of the shards and of what is done to the text: a new number makes every cached shard stale
CHUNK_CHARACTERS = 4_000_000  # text of a shard, or one longer document: bounds the memory, and what a kill costs
SAMPLE_CHARACTERS = 50_000_000  # text that a tokenizer is trained on, at most: bounds the memory

Part = TextFile | DatasetRows


@dataclass(frozen=True)
class TokenizedSource:
    """A source's parts, their shards in the order of the documents, and the share it has in a mixture."""

    name: str
    weight: float | None
    parts: list[Part]
    shards: list[Shard]
    digest: str  # of the text itself, whatever its files are called and however they are packed

    def total(self, name: str) -> int:
        """Sum of one count of the shards' statistics: documents, sentences, tokens, unknown."""
        return sum(shard.statistics[name] for shard in self.shards)


@dataclass(frozen=True)
class Corpus:
    """A tokenizer and the sources that it made tokens of; digests say what a resumed run must find again."""

    tokenizer: PreTrainedTokenizerBase
    sources: list[TokenizedSource]
    tokenizer_digest: str

    @property
    def shards(self) -> list[Shard]:
        """Of all sources, one source after the other."""
        return [shard for source in self.sources for shard in source.shards]

    def total(self, name: str) -> int:
        """Sum of one count over the sources: documents, sentences, tokens, unknown."""
        return sum(source.total(name) for source in self.sources)


def prepare(config: PretrainConfig, quiet: bool = False) -> Corpus:
    """The corpus of the sources of `config`, from the cache where it is there; ValueError for what cannot be used.

    Memory: a few chunks of text a process, or of the longest document, and the sample for a new tokenizer.
    """
    sources = config.sources()
    parts = {name: parts_of(source) for name, source in sources.items()}
    tokenizer = _tokenizer(config, [part for several in parts.values() for part in several], quiet)
    with processes(config.prepare_workers or available_cores()) as call:
        preparation = Preparation(config.cache, tokenizer, call, quiet)
        texts = {name: [preparation.chunks(part) for part in several] for name, several in parts.items()}
    prepared = []
    for name, source in sources.items():
        for part, digests in zip(parts[name], texts[name], strict=True):
            if not any(preparation.shard(digest).statistics["documents"] for digest in digests):
                raise ValueError(f"{part.name}: no text in this {part.kind} (it is empty or blank)")
        chunks = [digest for digests in texts[name] for digest in digests]
        shards = [shard for shard in map(preparation.shard, chunks) if shard.statistics["documents"]]
        prepared.append(TokenizedSource(name, source.weight, parts[name], shards, _address(*chunks)))
    return Corpus(tokenizer, prepared, preparation.tokenizer_digest)


class Preparation:
    """Chunks of text to shards in the cache."""

    def __init__(self, cache: Path, tokenizer: PreTrainedTokenizerBase, call: Callable[..., None], quiet: bool):
        self.cache = cache
        self.call = call
        self.quiet = quiet
        self.encoder = tokenizer.backend_tokenizer.to_str()
        self.unknown_id = tokenizer.unk_token_id
        self.tokenizer_digest = hashlib.sha256(self.encoder.encode()).hexdigest()

    def shard(self, digest: str) -> Shard:
        """The shard of the chunk with this digest."""
        return Shard(self.cache / "shards" / _address(digest, self.tokenizer_digest))

    def chunks(self, part: Part) -> list[str]:
        """The digests of the chunks of a part; a chunk without a shard is handed on to be tokenised.

        A part that was read to its end before is not read again as long as all its shards are there.
        """
        known = self.cache / "parts" / f"{_address(part.key)}.json"
        if known.is_file():
            digests = json.loads(known.read_text())
            if all(self.shard(digest).folder.is_dir() for digest in digests):
                return digests
        digests = []
        for digest, documents in chunks(_documents(part, part.name, self.quiet)):
            digests.append(digest)
            folder = self.shard(digest).folder
            if not folder.is_dir():
                self.call(write_shard, folder, documents, self.encoder, self.unknown_id)
        _check_unchanged(part)
        known.parent.mkdir(parents=True, exist_ok=True)
        write_json(known, digests, indent=None)
        return digests


def chunks(documents: Iterator[list[str]]) -> Iterator[tuple[str, list[list[str]]]]:
    """The documents in chunks of 4 million characters, or one longer document, each with the sha256 of its text."""
    chunk: list[list[str]] = []
    digest = hashlib.sha256()
    size = 0
    for document in documents:
        chunk.append(document)
        text = "\n".join(document)
        digest.update(text.encode() + b"\n\n")
        size += len(text)
        if size >= CHUNK_CHARACTERS:
            yield digest.hexdigest(), chunk
            chunk, digest, size = [], hashlib.sha256(), 0
    if chunk:
        yield digest.hexdigest(), chunk


def _documents(part: Part, what: str, quiet: bool) -> Iterator[list[str]]:
    """The documents of a part, under a progress bar."""
    with tqdm(
        total=part.size, desc=what, unit=part.unit, unit_scale=True, disable=True if quiet else None, leave=False
    ) as bar:
        yield from part.documents(lambda position: bar.update(position - bar.n))


def _check_unchanged(part: Part) -> None:
    if part.changed:
        raise ValueError(f"{part.name} changed while it was read; start again when it is complete")


def _address(*parts: str) -> str:
    return hashlib.sha256("\n".join((FORMAT, *parts)).encode()).hexdigest()[:32]


def _tokenizer(config: PretrainConfig, parts: list[Part], quiet: bool) -> PreTrainedTokenizerBase:
    """An existing tokenizer, or WordPiece trained on the text (on held-out documents too, as is usual)."""
    if existing := config.tokenizer or config.init_from:
        return load_tokenizer(existing)
    keys = [part.key for part in parts]
    how = map(str, (config.vocab_size, config.lowercase, ALPHABET, COVERED))
    folder = config.cache / "tokenizers" / _address(*keys, *how)
    if not folder.exists():
        documents = (_documents(part, f"tokenizer: {part.name}", quiet) for part in parts)
        chosen = sample(itertools.chain.from_iterable(documents), SAMPLE_CHARACTERS)
        lines = [paragraph for document in chosen for paragraph in document]
        trained = train_wordpiece(lines, config.vocab_size, config.lowercase)
        for part in parts:
            _check_unchanged(part)
        with new_folder(folder) as temporary:
            trained.save_pretrained(temporary)
    return load_tokenizer(folder)


def sample(documents: Iterator[list[str]], characters: int) -> list[list[str]]:
    """The documents, or where they have more than so many characters those that fit in, in the order of a hash of
    their text: the same sample whatever the order of the documents."""
    kept: list[tuple[int, int, list[str]]] = []  # a heap with the largest hash first
    size = 0
    for number, document in enumerate(documents):
        text = "\n".join(document)
        order = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
        heapq.heappush(kept, (-order, number, document))
        size += len(text)
        while size > characters and len(kept) > 1:
            size -= len("\n".join(heapq.heappop(kept)[2]))
    return [document for _, _, document in sorted(kept, key=lambda item: item[1])]
