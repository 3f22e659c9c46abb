"""Token shards on disk, one per chunk of documents, and the processes that write them.

A process that only writes shards loads no torch: it starts in a second and stays small.
"""

import hashlib
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import IO, Any

import numpy as np
from tokenizers import Tokenizer

from elastic_model.folders import new_folder
from pretrain.text import sentences

MOST_MAPPED = 256  # files: each takes a descriptor, of which a process usually has 1,024
BATCH_CHARACTERS = 500_000  # text that is tokenised at once: bounds the memory


@lru_cache(maxsize=MOST_MAPPED)
def _mapped(file: Path, dtype: Any) -> np.ndarray:
    return np.asarray(np.memmap(file, dtype, "r"))  # a plain view: slicing a memmap is slow


@dataclass(frozen=True)
class Shard:
    """The tokens of some documents, on disk; offsets bound sentences within tokens, and documents within sentences."""

    folder: Path

    @cached_property
    def statistics(self) -> dict[str, Any]:
        """Counts of documents, sentences, tokens and unknown tokens, and the tokens' dtype."""
        return json.loads((self.folder / "statistics.json").read_text())

    @property
    def tokens(self) -> np.ndarray:
        """(tokens,)"""
        return _mapped(self.folder / "tokens.bin", self.statistics["dtype"])

    @property
    def sentences(self) -> np.ndarray:
        """(sentences + 1,): offsets into the tokens"""
        return _mapped(self.folder / "sentences.bin", np.int64)

    @property
    def documents(self) -> np.ndarray:
        """(documents + 1,): offsets into the sentences"""
        return np.fromfile(self.folder / "documents.bin", np.int64)

    @property
    def hashes(self) -> np.ndarray:
        """(documents,): 64 bits of each document's text"""
        return np.fromfile(self.folder / "hashes.bin", np.uint64)


def write_shard(folder: Path, documents: list[list[str]], tokenizer: str, unknown_id: int | None) -> None:
    """The shard of `documents` (each its paragraphs), all of it or nothing.

    tokenizer: a tokenizer.json; unknown_id: its token for what it does not know, if it has one.
    """
    encoder = _encoder(tokenizer)
    with new_folder(folder) as temporary:
        writer = ShardWriter(temporary, encoder.get_vocab_size(), unknown_id)
        batch: list[list[str]] = []
        size = 0
        for document in documents:
            batch.append([sentence for paragraph in document for sentence in sentences(paragraph)])
            size += sum(map(len, document))
            if size >= BATCH_CHARACTERS:
                writer.add(batch, encoder)
                batch, size = [], 0
        writer.add(batch, encoder)
        writer.close()


@lru_cache(maxsize=1)
def _encoder(tokenizer: str) -> Tokenizer:
    encoder = Tokenizer.from_str(tokenizer)
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True  # a text that spells [MASK] holds no mask
    return encoder


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

    def _write(self, name: str, values: Any, dtype: Any) -> None:
        self.files[name].write(np.asarray(values, dtype).tobytes())

    def add(self, batch: list[list[str]], encoder: Tokenizer) -> None:
        """Documents, each a list of sentences; those without a token are left out.

        Byte-level tokenizers see the space before a sentence, as inside the text; to others it makes no difference.
        """
        pieces = [" " * (place > 0) + sentence for document in batch for place, sentence in enumerate(document)]
        ids: Iterator[list[int]] = iter(_encode(pieces, encoder))
        for document in batch:
            encoded = [next(ids) for _ in document]
            if sentences := [tokens for tokens in encoded if tokens]:
                self._add_document(sentences, document)

    def _add_document(self, sentences: list[list[int]], document: list[str]) -> None:
        counts = self.counts
        lengths = np.fromiter(map(len, sentences), np.int64, len(sentences))
        tokens = np.fromiter(itertools.chain.from_iterable(sentences), self.dtype, lengths.sum())
        self._write("tokens", tokens, self.dtype)
        self._write("sentences", counts["tokens"] + lengths.cumsum(), np.int64)
        counts["tokens"] += len(tokens)
        counts["unknown"] += int((tokens == self.unknown_id).sum())
        counts["sentences"] += len(sentences)
        counts["documents"] += 1
        self._write("documents", [counts["sentences"]], np.int64)
        self.files["hashes"].write(hashlib.blake2b(" ".join(document).encode(), digest_size=8).digest())

    def close(self) -> None:
        """Everything written, the counts too."""
        for file in self.files.values():
            file.close()
        statistics = {**self.counts, "dtype": self.dtype.name}
        (self.folder / "statistics.json").write_text(json.dumps(statistics, indent=2) + "\n")


def _encode(pieces: list[str], encoder: Tokenizer) -> Iterator[list[int]]:
    """The tokens of each piece; a document of any length is encoded in batches too."""
    batch: list[str] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece)
        if size >= BATCH_CHARACTERS:
            yield from (encoding.ids for encoding in encoder.encode_batch_fast(batch, add_special_tokens=False))
            batch, size = [], 0
    yield from (encoding.ids for encoding in encoder.encode_batch_fast(batch, add_special_tokens=False))


@contextmanager
def processes(count: int) -> Iterator[Callable[..., None]]:
    """A function that calls `function(*arguments)` in one of `count` processes; all calls have ended when the block
    ends, and the first error of one of them is raised.

    No more than twice as many calls wait as there are processes, which bounds the memory. With one process the calls
    are made here, one by one.
    """
    if count == 1:
        yield lambda function, *arguments: function(*arguments)
        return
    pool = ProcessPoolExecutor(count, get_context("spawn"), _begin)  # a fork would copy threads' locks
    waiting: set[Future[None]] = set()

    def submit(function: Callable[..., None], *arguments: Any) -> None:
        if len(waiting) >= 2 * count:
            _collect(waiting)
        waiting.add(pool.submit(function, *arguments))

    try:
        yield submit
        while waiting:
            _collect(waiting)
    except BrokenProcessPool:
        raise ValueError(
            "a process that prepares the text was killed, maybe for want of memory; what it had finished is kept: "
            "start again, with fewer prepare_workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _collect(waiting: set[Future[None]]) -> None:
    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
    waiting -= done
    for future in done:
        future.result()


def _begin() -> None:
    """A process with one thread, that leaves Ctrl-C to its parent and does not outlive it, however that ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
