"""The client of an exported folder: numpy, onnxruntime and tokenizers, no torch."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

from elastic_model.operating_points import FILE, OperatingPoint, OperatingPoints
from elastic_model.processor import ONNX_FILES, available_cores, cpu_flags, fitting_files

Text = str | tuple[str, str]
CHUNK = 4096  # texts tokenised at a time: bounds the memory for any number of them

# thresholds at which no row leaves: nothing is below an entropy of 0 or above a probability of 1; counts elsewhere
_NEVER = {"entropy": 0.0, "learned": 0.0, "confidence": 1.0, "margin": 1.0, "patience": 1e9, "voting": 1e9}


class ElasticSession:
    """Answers texts with an exported ONNX file; the budget is chosen call by call. Threads may share one session."""

    def __init__(
        self, model: Path, tokenizer: Path, points: OperatingPoints | None = None, threads: int | None = None
    ):
        self.file = model
        self.session = _load_graph(model, threads or available_cores())
        metadata = _metadata(self.session, model)
        self.exit_layers: list[int] = metadata["exit_layers"]
        self.labels: list[str] = metadata["labels"]
        self.problem_type: str = metadata["problem_type"]
        self.policy: dict[str, Any] = metadata["policy"]
        self.thresholds: list[float] = metadata["thresholds"]
        self.max_tokens: int = metadata["max_tokens"]
        nobody = 0.0 if self.problem_type == "regression" else _NEVER[self.policy["name"]]  # |y_i - y_(i-1)| < 0
        self.never = [nobody] * len(self.exit_layers)  # thresholds at which no row leaves before the last exit
        self.points = points
        self.tokenizer = _load_tokenizer(tokenizer, self.max_tokens)
        defaulted = self.session.get_overridable_initializers()
        self.inputs = {one.name for one in [*self.session.get_inputs(), *defaulted]}
        if points is not None and points.points and len(points.points[0].thresholds) != len(self.exit_layers):
            raise ValueError(
                f"{model.parent.parent / FILE}: {len(points.points[0].thresholds)} thresholds per point for the "
                f"{len(self.exit_layers)} exits of {model.name}; export the checkpoint again"
            )

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, file: str | None = None, threads: int | None = None
    ) -> "ElasticSession":
        """The session of a folder that `python -m export` wrote.

        file: a name under `onnx/` (without .onnx); default the best of those present for this CPU. threads: default
        what the container and the affinity allow. Raises ValueError where the folder or the file is not one of ours.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a folder; give one that `python -m export CHECKPOINT FOLDER` wrote")
        points = OperatingPoints.load(folder) if (folder / FILE).exists() else None
        return cls(_choose_file(folder, file), folder / "tokenizer.json", points, threads)

    def __call__(
        self,
        texts: Text | Sequence[Text],
        budget: str | dict[str, float] | None = None,
        max_layer: int | None = None,
        batch_size: int = 32,
    ) -> list[dict[str, Any]]:
        """One {"label", "score", "exit_layer", "point"} per text (or pair of texts), in their order.

        budget: an operating point's name or {"speedup" | "latency_ms" | "flops" | "max_drop": x}, default the file's
        own thresholds; max_layer: no row goes above it. Texts longer than the model are cut; an empty one is a
        ValueError.
        """
        point = None if budget is None else self.point(budget)
        name = self.default_point() if point is None else point.name
        thresholds = None if point is None else point.thresholds
        results: list[dict[str, Any]] = []
        for rows in self._chunks(texts):
            found: list[dict[str, Any] | None] = [None] * len(rows)
            for places, outputs in self._batches(rows, thresholds, max_layer, batch_size):
                for place, logits, layer in zip(places, outputs["logits"], outputs["exit_layer"], strict=True):
                    found[place] = {**self._answer(logits), "exit_layer": int(layer), "point": name}
            results.extend(one for one in found if one is not None)
        return results

    def exit_logits(self, texts: Text | Sequence[Text], batch_size: int = 32) -> np.ndarray:
        """Every exit's logits, (exits, texts, labels) float32, in one pass: what calibration needs."""
        parts = []
        for rows in self._chunks(texts):
            part = np.empty((len(self.exit_layers), len(rows), len(self.labels)), np.float32)
            for places, outputs in self._batches(rows, self.never, self.exit_layers[-1], batch_size):
                part[:, places] = outputs["exit_logits"]
            parts.append(part)
        return (
            np.concatenate(parts, axis=1)
            if parts
            else np.empty((len(self.exit_layers), 0, len(self.labels)), np.float32)
        )

    def point(self, budget: str | dict[str, float]) -> OperatingPoint:
        """The operating point that a budget means; ValueError where none was measured or none fits."""
        if self.points is None:
            raise ValueError(
                f"budget {budget!r}: {self.file.parent.parent} has no {FILE}; export a checkpoint that has one"
            )
        return self.points.at(budget)

    def default_point(self) -> str:
        """The name of the operating point at which the file runs by itself."""
        for point in self.points.points if self.points else []:
            if np.allclose(point.thresholds[:-1], self.thresholds[:-1], rtol=0, atol=1e-7):
                return point.name
        return "default"

    def run(
        self, encodings: Sequence[Any], thresholds: Sequence[float] | None = None, max_layer: int | None = None
    ) -> dict[str, np.ndarray]:
        """The graph's outputs by name for one batch of the tokenizer's encodings; None: the file's own default."""
        feed = _pad(encodings)
        if thresholds is not None:
            feed["exit_threshold"] = self._checked_thresholds(thresholds)
        if max_layer is not None:
            feed["max_layer"] = np.array([self._checked_layer(max_layer)], np.int64)
        names = ["logits", "exit_layer", "exit_logits"]
        outputs = self.session.run(names, {name: value for name, value in feed.items() if name in self.inputs})
        return dict(zip(names, outputs, strict=True))

    def _chunks(self, texts: Text | Sequence[Text]) -> Iterator[list[Any]]:
        """Encodings of the texts, a few thousand at a time."""
        many = [texts] if isinstance(texts, str | tuple) else list(texts)
        for number, text in enumerate(many):
            _check_text(text, number)
        for start in range(0, len(many), CHUNK):
            yield self.tokenizer.encode_batch(many[start : start + CHUNK])

    def _batches(
        self, encodings: list[Any], thresholds: Sequence[float] | None, max_layer: int | None, batch_size: int
    ) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Places and outputs batch by batch, rows of like length together."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        order = np.argsort([len(encoding.ids) for encoding in encodings], kind="stable")
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            yield places, self.run([encodings[place] for place in places], thresholds, max_layer)

    def _answer(self, logits: np.ndarray) -> dict[str, Any]:
        """Label and score of one row's logits (labels,): several labels as lists, a regression's value as the
        score."""
        if self.problem_type == "regression":
            return (
                {"label": self.labels[0], "score": float(logits[0])}
                if len(logits) == 1
                else {"label": self.labels, "score": logits.tolist()}
            )
        if self.problem_type == "multi_label_classification":
            scores = 1 / (1 + np.exp(-logits.astype(np.float64)))
            chosen = np.flatnonzero(scores > 0.5)
            return {"label": [self.labels[one] for one in chosen], "score": scores[chosen].tolist()}
        shares = np.exp(logits.astype(np.float64) - logits.max())
        best = int(logits.argmax())
        return {"label": self.labels[best], "score": float(shares[best] / shares.sum())}

    def _checked_thresholds(self, thresholds: Sequence[float]) -> np.ndarray:
        values = np.asarray(thresholds, np.float32)
        if values.shape != (len(self.exit_layers),) or not np.isfinite(values).all():
            raise ValueError(
                f"thresholds must be {len(self.exit_layers)} finite numbers, one per exit, got {thresholds!r}"
            )
        return values

    def _checked_layer(self, max_layer: int) -> int:
        if isinstance(max_layer, bool) or not isinstance(max_layer, int) or not 1 <= max_layer <= self.exit_layers[-1]:
            raise ValueError(f"max_layer must be a layer from 1 to {self.exit_layers[-1]}, got {max_layer!r}")
        return max_layer


def _check_text(text: Any, number: int) -> None:
    parts = text if isinstance(text, tuple | list) else (text,)
    if not all(isinstance(part, str) for part in parts) or len(parts) not in (1, 2):
        raise ValueError(f"text {number} must be a string or a pair of strings, got {text!r}")
    if not all(part.strip() for part in parts):
        raise ValueError(f"text {number} is empty ({text!r}); leave such rows out")


def _pad(encodings: Sequence[Any]) -> dict[str, np.ndarray]:
    """The tokenizer's encodings as int64 arrays (batch, longest), zeros at padding."""
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


def _choose_file(folder: Path, file: str | None) -> Path:
    present = [name for name in ONNX_FILES if (folder / "onnx" / f"{name}.onnx").is_file()]
    fitting = [name for name in fitting_files(cpu_flags()) if name in present] if file is None else [file]
    if not fitting or fitting[0] not in present:
        wanted = file or "a file for this CPU"
        raise ValueError(
            f"{folder}/onnx has no {wanted}; present: {', '.join(present) or 'none'}; export the checkpoint again"
        )
    return folder / "onnx" / f"{fitting[0]}.onnx"


def _load_graph(model: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False  # a pattern is kept for every shape seen: memory would grow with their variety
    options.log_severity_level = 3  # else a warning per input that has a default
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common class of their own
        raise ValueError(f"{model}: onnxruntime {onnxruntime.__version__} cannot load it: {error}") from error


def _metadata(session: onnxruntime.InferenceSession, model: Path) -> dict[str, Any]:
    found = session.get_modelmeta().custom_metadata_map
    try:
        names = ("exit_layers", "labels", "problem_type", "policy", "thresholds", "max_tokens")
        return {name: json.loads(found[f"elastic_{name}"]) for name in names}
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{model}: not a file that `python -m export` wrote: no elastic metadata ({error})"
        ) from error


def _load_tokenizer(file: Path, max_tokens: int) -> Tokenizer:
    if not file.is_file():
        raise ValueError(f"{file} is missing; export the checkpoint again")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{file}: not a tokenizer: {error}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer
