"""Text to token shards, one per file, addressed by content: the same input is prepared once, a changed one anew."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from elastic_model.folders import new_folder
from pretrain.config import PretrainConfig
from pretrain.text import documents, find_files, sentences
from pretrain.tokenizer import load_tokenizer, train_wordpiece

FORMAT = "1"  # of the shards and of what is done to the text: a new number makes every cached shard stale
BATCH_CHARACTERS = 1_000_000  # text that is tokenised at once: bounds the memory


@dataclass(frozen=True)
class Shard:
    """The tokens of one file, on disk; offsets bound sentences within tokens, and documents within sentences."""

    folder: Path

    @cached_property
    def statistics(self) -> dict[str, Any]:
        return json.loads((self.folder / "statistics.json").read_text())

    def _map(self, name: str, dtype: Any) -> np.ndarray:
        return np.asarray(np.memmap(self.folder / f"{name}.bin", dtype, "r"))  # a plain view: slicing a memmap is slow

    @cached_property
    def tokens(self) -> np.ndarray:
        """(tokens,)"""
        return self._map("tokens", self.statistics["dtype"])

    @cached_property
    def sentences(self) -> np.ndarray:
        """(sentences + 1,): offsets into the tokens"""
        return self._map("sentences", np.int64)

    @cached_property
    def documents(self) -> np.ndarray:
        """(documents + 1,): offsets into the sentences"""
        return self._map("documents", np.int64)

    @cached_property
    def hashes(self) -> np.ndarray:
        """(documents,): 64 bits of each document's text"""
        return self._map("hashes", np.uint64)


@dataclass(frozen=True)
class Corpus:
    """A tokenizer and the shards made with it, one per source; digests say what a resumed run must find again."""

    tokenizer: PreTrainedTokenizerBase
    shards: list[Shard]
    sources: dict[Path, str]  # file -> sha256 of its bytes
    tokenizer_digest: str

    @property
    def digest(self) -> str:
        """What the text is, whatever its files are called."""
        return _address(*self.sources.values())

    def total(self, name: str) -> int:
        """Sum of one count of the shards' statistics: documents, sentences, tokens, unknown."""
        return sum(shard.statistics[name] for shard in self.shards)


def prepare(config: PretrainConfig, quiet: bool = False) -> Corpus:
    """The corpus of `config.text`, from the cache where it is there; ValueError for text that cannot be used."""
    files = find_files(config.text)
    digests = [_file_digest(file) for file in files]
    tokenizer = _tokenizer(config, files, digests, quiet)
    tokenizer_digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    shards = [
        _shard(config.cache / "shards" / _address(digest, tokenizer_digest), file, digest, tokenizer, quiet)
        for file, digest in zip(files, digests, strict=True)
    ]
    return Corpus(tokenizer, shards, dict(zip(files, digests, strict=True)), tokenizer_digest)


def _file_digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _address(*parts: str) -> str:
    return hashlib.sha256("\n".join((FORMAT, *parts)).encode()).hexdigest()[:32]


def _tokenizer(config: PretrainConfig, files: list[Path], digests: list[str], quiet: bool) -> PreTrainedTokenizerBase:
    """An existing tokenizer, or WordPiece trained on all of the text (held-out documents too, as is usual)."""
    if existing := config.tokenizer or config.init_from:
        return load_tokenizer(existing)
    folder = config.cache / "tokenizers" / _address(*digests, str(config.vocab_size), str(config.lowercase))
    if not folder.exists():
        trained = train_wordpiece(_paragraphs(files, quiet), config.vocab_size, config.lowercase)
        with new_folder(folder) as temporary:
            trained.save_pretrained(temporary)
    return load_tokenizer(folder)


def _paragraphs(files: list[Path], quiet: bool) -> Iterator[str]:
    for document in _progress((document for file in files for document in documents(file)), "tokenizer", quiet):
        yield from document


def _progress(items: Iterable[Any], what: str, quiet: bool) -> Iterable[Any]:
    return tqdm(items, desc=what, unit=" documents", disable=True if quiet else None, leave=False)


def _shard(folder: Path, file: Path, digest: str, tokenizer: PreTrainedTokenizerBase, quiet: bool) -> Shard:
    if not folder.exists():
        with new_folder(folder) as temporary:
            _write_shard(temporary, file, tokenizer, quiet)
            if _file_digest(file) != digest:
                raise ValueError(f"{file} changed while it was read; start again when it is complete")
    return Shard(folder)


def _write_shard(folder: Path, file: Path, tokenizer: PreTrainedTokenizerBase, quiet: bool) -> None:
    """Tokenise the file document by document, in batches that bound the memory (all cores work on a batch)."""
    encoder = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    encoder.no_truncation()
    encoder.no_padding()
    writer = ShardWriter(folder, len(tokenizer), tokenizer.unk_token_id)
    batch: list[list[str]] = []
    size = 0
    for document in _progress(documents(file), file.name, quiet):
        batch.append([sentence for paragraph in document for sentence in sentences(paragraph)])
        size += sum(map(len, document))
        if size >= BATCH_CHARACTERS:
            writer.add(batch, encoder)
            batch, size = [], 0
    writer.add(batch, encoder)
    writer.close(file)


class ShardWriter:
    """The open files of a shard, and its counts."""

    def __init__(self, folder: Path, vocabulary: int, unknown_id: int | None):
        self.folder = folder
        self.dtype = np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)
        self.unknown_id = -1 if unknown_id is None else unknown_id  # -1: byte-level vocabularies know everything
        self.counts = {"documents": 0, "sentences": 0, "tokens": 0, "unknown": 0}
        self.files: dict[str, IO[bytes]] = {
            name: open(folder / f"{name}.bin", "wb") for name in ("tokens", "sentences", "documents", "hashes")
        }
        for name in ("sentences", "documents"):
            self._write(name, [0], np.int64)

    def _write(self, name: str, values: list[int], dtype: Any) -> None:
        self.files[name].write(np.asarray(values, dtype).tobytes())

    def add(self, batch: list[list[str]], encoder: Tokenizer) -> None:
        """Documents, each a list of sentences; those without a token are left out."""
        texts = [sentence for document in batch for sentence in document]
        encoded = iter(encoder.encode_batch_fast(texts, add_special_tokens=False))
        for document in batch:
            encodings = [next(encoded).ids for _ in document]
            if sentences := [ids for ids in encodings if ids]:
                self._add_document(sentences, document)

    def _add_document(self, sentences: list[list[int]], document: list[str]) -> None:
        counts = self.counts
        for ids in sentences:
            self._write("tokens", ids, self.dtype)
            counts["tokens"] += len(ids)
            counts["unknown"] += ids.count(self.unknown_id)
            self._write("sentences", [counts["tokens"]], np.int64)
        counts["sentences"] += len(sentences)
        counts["documents"] += 1
        self._write("documents", [counts["sentences"]], np.int64)
        self.files["hashes"].write(hashlib.blake2b(" ".join(document).encode(), digest_size=8).digest())

    def close(self, source: Path) -> None:
        for file in self.files.values():
            file.close()
        if not self.counts["documents"]:
            raise ValueError(f"{source}: no text in this file (it is empty or blank)")
        statistics = {**self.counts, "dtype": self.dtype.name}
        (self.folder / "statistics.json").write_text(json.dumps(statistics, indent=2) + "\n")
