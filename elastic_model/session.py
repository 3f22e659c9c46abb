"""The client of an exported folder: numpy, onnxruntime and tokenizers, no torch."""

import ctypes
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from elastic_model.answers import PER_TOKEN, best_span, label_and_score
from elastic_model.checks import LengthConfig, policy_kind, shares_and_mass, warn_of_other_texts
from elastic_model.operating_points import FILE, OperatingPoint, OperatingPoints
from elastic_model.processor import ONNX_FILES, available_cores, cpu_flags, fitting_files
from elastic_model.spans import question_tokens

Text = str | tuple[str, str] | list[str]  # a list: the words of one text, for tags
FORMAT = 2  # of the metadata in an ONNX file
REPORT = "export_report.json"
CHUNK = 4096  # texts tokenised at a time, and their characters: they bound the memory for any number of them
CHUNK_CHARACTERS = 4_000_000
# a thread's rows times the longest of them: more leave its caches between one step and the next (32 reviews of 200
# tokens take 1.4 times as long together), fewer waste time on starting the steps
BATCH_TOKENS = 512
STRIDE = 128  # tokens that neighbouring windows of a long text share

# thresholds at which no row leaves: nothing is below an entropy of 0 or above a probability of 1; counts elsewhere
_NEVER = {"entropy": 0.0, "learned": 0.0, "confidence": 1.0, "margin": 1.0, "patience": 1e9, "voting": 1e9}


@dataclass(frozen=True)
class Encoding:
    """Token ids and types of a row: what `run` reads of the tokenizer's encodings, for rows made otherwise."""

    ids: list[int]
    type_ids: list[int]


class ElasticSession:
    """Answers texts with an exported ONNX file; the budget is chosen call by call.

    Threads may share one session; a forked process makes its own of it, and it can be pickled.
    """

    def __init__(
        self, model: Path, tokenizer: Path, points: OperatingPoints | None = None, threads: int | None = None
    ):
        self.file = model
        if threads is not None:  # None: what there are
            _check_count("threads", threads)
        self.threads = threads or available_cores()
        self._arguments = (model, tokenizer, points, self.threads)
        self._lock = threading.Lock()
        self._loaded: tuple[int, onnxruntime.InferenceSession] = (os.getpid(), load_graph(model, self.threads))
        metadata = _metadata(self.session, model)
        self.exit_layers: list[int] = metadata["exit_layers"]
        self.layers: int = metadata["layers"]
        self.labels: list[str] = metadata["labels"]
        self.problem_type: str = metadata["problem_type"]
        self.policy: dict[str, Any] | None = metadata["policy"]
        self.thresholds: list[float] = metadata["thresholds"]
        self.lengths: LengthConfig = metadata["length_config"]
        self.max_layer: int = metadata["max_layer"]
        self.max_tokens: int = metadata["max_tokens"]
        self._flops: list[dict[str, float]] = metadata["flops"]
        self.no_answer_threshold: float | None = metadata["no_answer_threshold"]
        self.text_pairs: bool | None = metadata["text_pairs"]
        self.never = never(self.policy, self.problem_type, len(self.thresholds))
        self.points = points
        self.tokenizer = load_tokenizer(tokenizer, self.max_tokens, self.problem_type, metadata["truncation_side"])
        defaulted = self.session.get_overridable_initializers()
        self.inputs = {one.name for one in [*self.session.get_inputs(), *defaulted]}
        self.outputs = [one.name for one in self.session.get_outputs()]
        _check_points(points, self, metadata["checkpoint"])

    @classmethod
    def from_pretrained(
        cls,
        folder: Path | str,
        file: str | None = None,
        threads: int | None = None,
        revision: str | None = None,
        *,
        points: bool = True,
    ) -> "ElasticSession":
        """The session of a folder that `python -m export` wrote, or of such a folder on the hub.

        file: a name under `onnx/` (without .onnx); default the best of those present for this CPU. threads: default
        what the container and the affinity allow. revision: of a hub id, its branch, tag or commit. points: whether
        the operating points are read, as those who measure new ones need not. Nothing but data is read, no code.
        Raises ValueError where the folder or the file is not one of ours, or was damaged.
        """
        path = Path(folder)
        if not path.is_dir():
            path = _download(str(folder), file, revision)
        known = OperatingPoints.read(path) if points and (path / FILE).exists() else None
        model = _choose_file(path, file)
        _check_hash(path, model)
        return cls(model, path / "tokenizer.json", known, threads)

    @cached_property
    def _whole(self) -> Tokenizer:
        """The tokenizer, cutting nothing."""
        return without_truncation(self.tokenizer)

    @property
    def session(self) -> onnxruntime.InferenceSession:
        """onnxruntime's session of this process: its threads do not survive a fork."""
        if self._loaded[0] != os.getpid():
            with self._lock:
                if self._loaded[0] != os.getpid():
                    # never freed: its end would wait for threads that this process does not have
                    ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._loaded[1]))
                    self._loaded = (os.getpid(), load_graph(self.file, self.threads))
        return self._loaded[1]

    def __reduce__(self):
        return type(self), self._arguments

    def __call__(
        self,
        texts: Text | Iterable[Text],
        budget: str | dict[str, float] | None = None,
        max_layer: int | None = None,
        batch_size: int = 32,
        *,
        cost: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Any:
        """One {"label", "score", "exit_layer", "point"} per text (or pair of texts), in their order: a list, or for an
        iterator of texts an iterator, which reads some thousands at a time.

        Tags of words are lists in "label" and "score", the words in "words"; a text may be a list of words. The answer
        to a (question, context) is the "label", its characters "start" and "end". The bare model answers "embedding".
        budget: an operating point's name or {"speedup" | "latency_ms" | "flops" | "max_drop": x}, default the file's
        own; max_layer: no row goes above it, default the last, or without a budget the file's own; batch_size: rows
        at a time, fewer where they are long; cost: adds "flops", what the row cost; progress: called with the number
        of texts answered so far. Texts longer than the model are cut, or read window by window where the task answers
        per token (a question is cut, as `spans.question_tokens` says); an empty one is a ValueError.
        """
        point = None if budget is None else self.point(budget)
        if max_layer is not None:
            self._checked_layer(max_layer)
        _check_count("batch_size", batch_size)
        answers = self._answers(self._many(texts), point, max_layer, batch_size, cost, progress)
        return answers if isinstance(texts, Iterator) else list(answers)

    def _answers(
        self,
        texts: Iterable[Text],
        point: OperatingPoint | None,
        max_layer: int | None,
        batch_size: int,
        cost: bool,
        progress: Callable[[int], None] | None,
    ) -> Iterator[dict[str, Any]]:
        name = self.default_point if point is None else point.name
        given = self.arguments(point) | ({} if max_layer is None else {"max_layer": max_layer})
        done = 0
        for chunk in self._chunks(texts):
            windows = self._windows(chunk)
            encodings = list(chain.from_iterable(windows))
            values: list[dict[str, np.ndarray]] = [{} for _ in encodings]
            for places, outputs in self._batches(encodings, batch_size, **given):
                for row, place in enumerate(places):
                    values[place] = self._row(outputs, row, len(encodings[place].ids))
            left = iter(values)
            for text, of_text in zip(chunk, windows, strict=True):
                rows = list(islice(left, len(of_text)))
                layer = max(int(row["exit_layer"]) for row in rows)
                result = {**self._answer(text, of_text, rows), "exit_layer": layer, "point": name}
                if cost:
                    result["flops"] = sum(map(self._flops_of, of_text, rows))
                yield result
            done += len(chunk)
            if progress is not None:
                progress(done)

    def exit_logits(
        self, texts: Text | Iterable[Text], batch_size: int = 32, length_config: LengthConfig | None = None
    ) -> np.ndarray:
        """Every exit's logits, (exits, texts, labels) float32, in one pass: what calibration needs.

        Where the task answers per token, (exits, windows, tokens, labels), NaN at padding; the last axis of question
        answering is start and end. length_config: a share per layer or {"mass": [...]}, default the file's own.
        """
        if self.problem_type == "embedding":
            raise ValueError(f"{self.file}: the bare model has no exits with logits")
        full = {"thresholds": self.never, "max_layer": self.exit_layers[-1], "length_config": length_config}
        parts = []
        for chunk in self._chunks(self._many(texts)):
            encodings = list(chain.from_iterable(self._windows(chunk)))
            rows: list[np.ndarray] = [np.empty(0)] * len(encodings)
            for places, outputs in self._batches(encodings, batch_size, **full):
                every = exit_values(outputs)
                for row, place in enumerate(places):
                    rows[place] = every[:, row, : len(encodings[place].ids)] if every.ndim > 3 else every[:, row]
            parts.extend(rows)
        per_token = self.problem_type in PER_TOKEN
        if not per_token:
            empty = np.empty((len(self.exit_layers), 0, len(self.labels)), np.float32)
            return np.stack(parts, axis=1) if parts else empty
        longest = max((part.shape[1] for part in parts), default=0)
        padded = [np.pad(one, ((0, 0), (0, longest - one.shape[1]), (0, 0)), constant_values=np.nan) for one in parts]
        return np.stack(padded, axis=1) if padded else np.empty((len(self.exit_layers), 0, 0, 0), np.float32)

    def point(self, budget: str | dict[str, float]) -> OperatingPoint:
        """The operating point that a budget means; ValueError where none was measured or none fits. "full", every
        layer and every token, needs no measuring."""
        known = self.points.points if self.points else []
        if budget == "full" and budget not in [point.name for point in known]:
            return OperatingPoint("full", self.never or [0.0], self.exit_layers[-1])
        if self.points is None:
            raise ValueError(
                f"budget {budget!r}: {self.file.parent.parent} has no {FILE}; export a checkpoint that has one"
            )
        return self.points.at(budget)

    def arguments(self, point: OperatingPoint | None) -> dict[str, Any]:
        """What `run` takes beside the rows for an operating point; None: nothing, the file's own default."""
        if point is None:
            return {}
        return {
            "thresholds": point.thresholds if self.never else None,  # a plain file has no exits to ask
            "max_layer": self.exit_layers[-1],  # the default may lie lower
            "length_config": point.length_config or [1.0] * self.layers,
        }

    @cached_property
    def default_point(self) -> str:
        """The name of the operating point at which the file runs by itself; points go up to the last exit."""
        for point in self.points.points if self.points and self.max_layer >= self.exit_layers[-1] else []:
            ours, theirs = (shares_and_mass(one, self.layers) for one in (self.lengths, point.length_config))
            if np.allclose(point.thresholds[:-1], self.thresholds[:-1], rtol=0, atol=1e-7) and np.allclose(
                ours, theirs, rtol=0, atol=1e-7
            ):
                return point.name
        return "default"

    def flops(self, tokens: int, exit_layer: int, kept_tokens: Iterable[int] | None = None) -> float:
        """What a row of so many tokens cost up to the layer it left at, as `elastic_model.cost` counts.

        kept_tokens: what each layer left of them, as the graph answers; None: all.
        """
        kept = [tokens] * self.layers if kept_tokens is None else list(map(int, kept_tokens))
        total = 0.0
        for one, inside, left in zip(self._flops[:exit_layer], [tokens, *kept], kept, strict=False):
            total += one["attention"] * inside + one["pairs"] * inside**2 + one["feed_forward"] * left
            total += one["exit"] + one["exit_tokens"] * tokens
        return total

    def _flops_of(self, encoding: Any, row: dict[str, np.ndarray]) -> float:
        kept = row.get("kept_tokens")
        return self.flops(len(encoding.ids), int(row["exit_layer"]), None if kept is None else kept.tolist())

    def run(
        self,
        encodings: Sequence[Any],
        thresholds: Sequence[float] | None = None,
        max_layer: int | None = None,
        length_config: LengthConfig | None = None,
    ) -> dict[str, np.ndarray]:
        """The graph's outputs by name for one batch of the tokenizer's encodings; None: the file's own default."""
        feed = _pad(encodings)
        if thresholds is not None:
            feed["exit_threshold"] = self._checked_thresholds(thresholds)
        if max_layer is not None:
            feed["max_layer"] = np.array([self._checked_layer(max_layer)], np.int64)
        if length_config is not None:
            feed |= self._checked_lengths(length_config)
        outputs = self.infer({name: value for name, value in feed.items() if name in self.inputs})
        return self._completed(dict(zip(self.outputs, outputs, strict=True)), len(encodings))

    def infer(self, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        """The graph's outputs, in the order of `outputs`, for inputs by name."""
        return self.session.run(self.outputs, feed)

    def _completed(self, outputs: dict[str, np.ndarray], rows: int) -> dict[str, np.ndarray]:
        """What the plain file of one exit leaves out."""
        if "exit_layer" not in outputs:
            names = {"logits": "exit_logits", "start_logits": "exit_start_logits", "end_logits": "exit_end_logits"}
            outputs |= {names[name]: value[None] for name, value in outputs.items() if name in names}
            outputs["exit_layer"] = np.full(rows, self.exit_layers[-1])
        return outputs

    def _many(self, texts: Text | Iterable[Text]) -> Iterable[Text]:
        """The texts; where they are all there, they are checked before any is answered."""
        if not isinstance(texts, Iterable) or isinstance(texts, bytes | Mapping):
            raise ValueError(f"texts must be a string, a pair of strings, or a list of them, got {_shown(texts)}")
        many = [texts] if isinstance(texts, str | tuple) else texts
        if not isinstance(many, Iterator):
            many = list(many)
            for number, text in enumerate(many):
                check_text(text, number, self.problem_type)
        return many

    def _chunks(self, texts: Iterable[Text]) -> Iterator[list[Text]]:
        """The texts, checked, as many at a time as memory is set aside for."""
        chunk: list[Text] = []
        characters = 0
        for number, text in enumerate(texts):
            check_text(text, number, self.problem_type)
            chunk.append(text)
            characters += len(text) if isinstance(text, str) else sum(map(len, text))
            if len(chunk) == CHUNK or characters > CHUNK_CHARACTERS:
                yield chunk
                chunk, characters = [], 0
        if chunk:
            yield chunk

    def encode(self, texts: Text | Iterable[Text]) -> list[Any]:
        """The tokenizer's encodings, which `run` takes: one per text, or per window of a text."""
        return [
            one for chunk in self._chunks(self._many(texts)) for windows in self._windows(chunk) for one in windows
        ]

    def _windows(self, texts: list[Text]) -> list[list[Any]]:
        """Encodings of each text: one, or where the task answers per token as many as it takes."""
        if self.problem_type == "token_classification":
            # a space stands before each word, as in training: byte-level tokens tell the two apart
            encodings = [
                self.tokenizer.encode([f" {word}" for word in text], is_pretokenized=True)
                if isinstance(text, list)
                else self.tokenizer.encode(text)
                for text in texts
            ]
        else:
            if self.problem_type == "question_answering":
                texts = with_short_questions(self._whole, texts, self.max_tokens)
            for pairs in {not isinstance(text, str) for text in texts}:
                warn_of_other_texts(self.text_pairs, pairs)
            encodings = self.tokenizer.encode_batch(texts)
        several = self.problem_type in ("token_classification", "question_answering")
        return [[one, *(one.overflowing if several else ())] for one in encodings]

    def _batches(
        self,
        encodings: Sequence[Any],
        batch_size: int,
        **given: Any,
    ) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Places and outputs batch by batch, rows of like length together; given: what `run` takes."""
        _check_count("batch_size", batch_size)
        sizes = np.array([len(one.ids) for one in encodings], int)
        order = np.argsort(sizes, kind="stable")
        start, tokens = 0, BATCH_TOKENS * self.threads
        while start < len(order):
            stop = start + 1
            while stop < min(start + batch_size, len(order)) and sizes[order[stop]] * (stop + 1 - start) <= tokens:
                stop += 1
            places = order[start:stop]
            yield places, self.run([encodings[place] for place in places], **given)
            start = stop

    def _row(self, outputs: dict[str, np.ndarray], row: int, tokens: int) -> dict[str, np.ndarray]:
        """One row's answer by name, its real tokens where it has values per token; of states their mean."""
        names = ("logits", "start_logits", "end_logits", "last_hidden_state", "exit_layer", "kept_tokens")
        values = {name: outputs[name][row] for name in names if name in outputs}
        if self.problem_type in PER_TOKEN:
            for name in set(values) - {"exit_layer", "kept_tokens"}:
                values[name] = np.array(values[name][:tokens])
        if self.problem_type == "embedding":  # what is answered, not the states of thousands of texts
            values["last_hidden_state"] = values["last_hidden_state"].mean(axis=0)
        return values

    def _answer(self, text: Text, encodings: list[Any], rows: list[dict[str, np.ndarray]]) -> dict[str, Any]:
        if self.problem_type == "question_answering":
            return best_span(text, encodings, rows, self.labels, self.no_answer_threshold)
        if self.problem_type in PER_TOKEN:
            return PER_TOKEN[self.problem_type](text, encodings, rows, self.labels)
        return label_and_score(rows[0]["logits"], self.labels, self.problem_type)

    def _checked_thresholds(self, thresholds: Sequence[float]) -> np.ndarray:
        values = np.asarray(thresholds, np.float32)
        if values.shape != (len(self.thresholds),) or not np.isfinite(values).all():
            raise ValueError(
                f"thresholds must be {len(self.thresholds)} finite numbers, one per exit, got {thresholds!r}"
            )
        return values

    def _checked_lengths(self, lengths: LengthConfig) -> dict[str, np.ndarray]:
        given = [float(one) for one in lengths] if isinstance(lengths, Sequence | np.ndarray) else lengths
        shares, mass = shares_and_mass(given, self.layers)
        for name, values in (("length_config", shares), ("length_mass", mass)):
            if name not in self.inputs and min(values) < 1:
                raise ValueError(f"{self.file} has no input {name}: it drops no tokens so, got {lengths!r}")
        return {"length_config": np.array(shares, np.float32), "length_mass": np.array(mass, np.float32)}

    def _checked_layer(self, max_layer: int) -> int:
        lowest, last = self.exit_layers[0], self.exit_layers[-1]
        whole = isinstance(max_layer, int | np.integer) and not isinstance(max_layer, bool)
        if not whole or not lowest <= max_layer <= last:
            raise ValueError(f"max_layer must be a layer from {lowest} to {last}, got {max_layer!r}")
        if "max_layer" not in self.inputs and max_layer < last:
            raise ValueError(f"{self.file} has no input max_layer: every row runs to layer {last}, got {max_layer}")
        return int(max_layer)


def never(policy: dict[str, Any] | None, problem_type: str, exits: int) -> list[float]:
    """Thresholds of a policy at which no row leaves before the last exit, one per exit."""
    # of a regression: |y_i - y_(i-1)| is never below 0
    nobody = 0.0 if policy is None or problem_type == "regression" else _NEVER[policy["name"]]
    return [nobody] * exits


def exit_values(outputs: dict[str, np.ndarray]) -> np.ndarray:
    """Every exit's logits, (exits, rows, labels) or (exits, rows, tokens, labels); start and end as two labels."""
    if "exit_logits" in outputs:
        return outputs["exit_logits"]
    return np.stack([outputs["exit_start_logits"], outputs["exit_end_logits"]], axis=-1)


def check_text(text: Any, number: int, problem_type: str) -> None:
    """ValueError where a text is none, or not such as the task reads; number: its place, for the message."""
    words = problem_type == "token_classification" and isinstance(text, list)
    parts = (text,) if isinstance(text, str) else text if isinstance(text, tuple | list) else ()
    if not all(isinstance(part, str) for part in parts) or not (words or isinstance(text, str) or len(parts) == 2):
        raise ValueError(f"text {number} must be a string or a pair of strings, got {_shown(text)}")
    if problem_type == "question_answering" and len(parts) != 2:
        raise ValueError(f"text {number} must be a pair of question and context, got {_shown(text)}")
    if problem_type == "token_classification" and isinstance(text, tuple):
        raise ValueError(f"text {number} must be a string or a list of words, got {_shown(text)}")
    if not parts or not all(part.strip() for part in parts):
        raise ValueError(f"text {number} is empty ({_shown(text)}); leave such rows out")
    for part in parts:
        try:
            part.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"text {number} is no Unicode text: {error}; read its file as UTF-8") from error


def _shown(text: Any) -> str:
    shown = repr(text)
    return shown if len(shown) <= 80 else shown[:77] + "..."


def _check_count(name: str, value: Any) -> None:
    """ValueError for anything but a whole number from 1."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _pad(encodings: Sequence[Any]) -> dict[str, np.ndarray]:
    """The tokenizer's encodings, at least one, as int64 arrays (batch, longest), zeros at padding."""
    if not len(encodings):
        raise ValueError("encodings is empty: a batch has at least one row")
    longest = max(len(encoding.ids) for encoding in encodings)
    feed = {
        name: np.zeros((len(encodings), longest), np.int64)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    for row, encoding in enumerate(encodings):
        length = len(encoding.ids)
        feed["input_ids"][row, :length] = encoding.ids
        feed["attention_mask"][row, :length] = 1
        feed["token_type_ids"][row, :length] = encoding.type_ids
    return feed


def _download(name: str, file: str | None, revision: str | None) -> Path:
    """The folder in the hub's cache with what a session needs of a repository, the ONNX file for this CPU alone."""
    from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    def fetch(path: str, revision: str | None) -> Path | None:
        try:
            return Path(hf_hub_download(name, path, revision=revision))
        except LocalEntryNotFoundError:  # no connection: whether the repository has the file is not known
            absent = try_to_load_from_cache(name, path, revision=revision) is _CACHED_NO_EXIST
            if not (absent or constants.HF_HUB_OFFLINE):
                raise
            return None
        except EntryNotFoundError:
            return None

    try:
        tokenizer = fetch("tokenizer.json", revision)
        if tokenizer is None:
            raise ValueError(
                f"{name} is neither a folder nor an exported model on the hub, unless the hub cannot be reached: no "
                "tokenizer.json was found; give a folder that `python -m export CHECKPOINT FOLDER` wrote"
            )
        folder = tokenizer.parent
        commit = folder.name  # everything else of the same commit
        for path in (FILE, REPORT):
            fetch(path, commit)
        for wanted in [file] if file else fitting_files(cpu_flags()):
            if fetch(f"onnx/{wanted}.onnx", commit) is not None:
                break
    except (HFValidationError, HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{name} is not a folder; give one that `python -m export CHECKPOINT FOLDER` wrote, or a model on the hub "
            f"({reason})"
        ) from error
    return folder


def _choose_file(folder: Path, file: str | None) -> Path:
    present = [name for name in ONNX_FILES if (folder / "onnx" / f"{name}.onnx").is_file()]
    fitting = [name for name in fitting_files(cpu_flags()) if name in present] if file is None else [file]
    if not fitting or fitting[0] not in present:
        if not (folder / "onnx").is_dir():
            raise ValueError(
                f"{folder} has no folder onnx: it is not an export; make one by `python -m export {folder} FOLDER`"
            )
        wanted = file or "file for this CPU"
        raise ValueError(
            f"{folder}/onnx has no {wanted}; present: {', '.join(present) or 'none'}; export the checkpoint again"
        )
    return folder / "onnx" / f"{fitting[0]}.onnx"


def _check_hash(folder: Path, model: Path) -> None:
    """ValueError where a file is not the one that the export's report speaks of."""
    report = folder / REPORT
    if not report.is_file():
        return
    try:
        expected = json.loads(report.read_text(encoding="utf-8"))["files"][model.stem]["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{report} does not state the sha256 of {model.name}: export the checkpoint again") from error
    with model.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{model} is damaged or was changed: its sha256 is {found[:12]}..., {REPORT} says {expected[:12]}...; "
            "fetch it again or export the checkpoint again"
        )


def load_graph(model: Path | bytes, threads: int) -> onnxruntime.InferenceSession:
    """onnxruntime's session of a file, or of its content; ValueError where it cannot be loaded."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False  # a pattern is kept for every shape seen: memory would grow with their variety
    options.log_severity_level = 3  # else a warning per input that has a default
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class of their own
        raise ValueError(f"{model!s:.200}: onnxruntime {onnxruntime.__version__} cannot load it: {error}") from error


def _metadata(session: onnxruntime.InferenceSession, model: Path) -> dict[str, Any]:
    found = session.get_modelmeta().custom_metadata_map
    names = ("exit_layers", "layers", "labels", "problem_type", "policy", "thresholds", "length_config", "max_layer")
    try:
        written = json.loads(found["elastic_format"])
        if written != FORMAT:
            raise ValueError(f"{model}: written in format {written}, this version reads format {FORMAT}")
        values = {name: json.loads(found[f"elastic_{name}"]) for name in (*names, "max_tokens", "flops")}
        later = {"no_answer_threshold": None, "truncation_side": "right", "checkpoint": None, "text_pairs": None}
        return values | {  # of files of before
            name: json.loads(found[f"elastic_{name}"]) if f"elastic_{name}" in found else value
            for name, value in later.items()
        }
    except KeyError as error:
        raise ValueError(
            f"{model}: not a file that `python -m export` of this version wrote: no elastic metadata ({error})"
        ) from error


def _check_points(points: OperatingPoints | None, session: ElasticSession, checkpoint: str | None) -> None:
    """ValueError where the operating points are not this file's; checkpoint: the hash of the weights that it is of."""
    file = session.file.parent.parent / FILE
    if points and points.checkpoint and checkpoint not in (None, points.checkpoint):
        raise ValueError(
            f"{file} belongs to another checkpoint (weights {points.checkpoint[:12]}..., {session.file.name} is of "
            f"{str(checkpoint)[:12]}...); copy that of the checkpoint that was exported, or delete the file"
        )
    for point in points.points if points else []:
        if len(point.thresholds) != len(session.thresholds):
            raise ValueError(
                f"{file}: {len(point.thresholds)} thresholds per point for the {len(session.thresholds)} exits of "
                f"{session.file.name}; export the checkpoint again"
            )
        lengths = point.length_config
        given = lengths["mass"] if isinstance(lengths, dict) else lengths
        if given is not None and len(given) != session.layers:
            raise ValueError(
                f"{file}: point {point.name!r} has {len(given)} lengths for the {session.layers} layers "
                f"of {session.file.name}; export the checkpoint again"
            )
        try:
            shares_and_mass(lengths, session.layers)
        except ValueError as error:
            raise ValueError(f"{file}: point {point.name!r}: {error}") from error
    if points and session.policy and policy_kind(points.policy) != policy_kind(session.policy):
        raise ValueError(
            f"{file} was measured with the exit policy {points.policy}, {session.file.name} has {session.policy}; "
            "export the checkpoint again"
        )


def without_truncation(tokenizer: Tokenizer) -> Tokenizer:
    """The same, which cuts nothing."""
    whole = Tokenizer.from_str(tokenizer.to_str())
    whole.no_truncation()
    return whole


def with_short_questions(whole: Tokenizer, texts: list[Any], max_tokens: int) -> list[Text]:
    """(question, context) pairs whose question leaves room for the context: cut as fine-tuning cuts it. whole: a
    tokenizer that cuts nothing."""
    most = question_tokens(max_tokens)
    questions = whole.encode_batch([question for question, _ in texts], add_special_tokens=False)
    return [
        (question if len(one.ids) <= most else question[: one.offsets[most - 1][1]], context)
        for (question, context), one in zip(texts, questions, strict=True)
    ]


def load_tokenizer(file: Path, max_tokens: int, problem_type: str, side: str) -> Tokenizer:
    """The tokenizer of a file as a session uses it: no padding, texts cut on this side or taken apart as the task
    needs."""
    if not file.is_file():
        raise ValueError(f"{file} is missing; export the checkpoint again")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{file}: not a tokenizer: {error}") from error
    tokenizer.no_padding()
    stride = min(STRIDE, max_tokens // 4)
    if problem_type == "question_answering":
        tokenizer.enable_truncation(max_tokens, stride=stride, strategy="only_second")
    elif problem_type == "token_classification":
        tokenizer.enable_truncation(max_tokens, stride=stride)
    else:
        tokenizer.enable_truncation(max_tokens, direction=side)
    return tokenizer
