"""Options of pre-training; a recipe is a YAML file that lists some of them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from elastic_model.arguments import check_at_least, from_mapping, option

CACHE = Path.home() / ".cache" / "elastic-model"


@dataclass(kw_only=True)
class Source:
    """Where documents come from: text files, or a dataset."""

    text: list[str] = option(
        [], help="text files or globs (.txt, .gz, .xz, .zst): a paragraph a line, a blank line between documents"
    )
    dataset: str | None = option(
        None,
        help="in place of text, what `datasets` reads: a hub id, a file or folder of parquet, json, csv, arrow, or of "
        "save_to_disk; a document a row, a paragraph a line",
    )
    dataset_config: str | None = option(None, help="configuration of the dataset, where it has several")
    dataset_split: str = option("train", help="split of the dataset, or a slice of one: train[:10%]")
    text_column: str = option("text", help="column of the dataset that holds the text")
    streaming: bool = option(False, help="read the dataset as it arrives, without a copy of it on the disk")

    def __post_init__(self) -> None:
        if bool(self.text) == bool(self.dataset):
            raise ValueError(
                f"text or dataset: one of the two is needed, got text {self.text or 'none'} and dataset "
                f"{self.dataset or 'none'}; several sources are named in mixture"
            )
        of_a_dataset = [field for field in dataclasses.fields(Source) if field.name not in ("text", "dataset")]
        for field in of_a_dataset:
            if self.dataset is None and (value := getattr(self, field.name)) != field.default:
                raise ValueError(f"{field.name} belongs to a dataset, but there is none, got {value}; give dataset")


@dataclass(kw_only=True)
class WeightedSource(Source):
    """An entry of `mixture`."""

    weight: float | None = option(None, help="share of the examples of an epoch, relative to the other sources'")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"weight must be positive, got {self.weight}; leave a source without weight out")


@dataclass(kw_only=True)
class PretrainConfig(Source):
    """Text to a multi-exit checkpoint: masked language modelling and sentence order at every exit. Other commands,
    each with a --help of its own: `python -m pretrain prepare`, `evaluate` and `release`."""

    # what goes in and what comes out
    mixture: dict = option(
        {},
        help="several sources, in place of text and dataset, each a name with these options of its own and maybe "
        'a weight: {"novels": {"text": ["novels/*.xz"], "weight": 1}, "reviews": {"dataset": "imdb", "weight": 2}}; '
        "without weights every example is seen once an epoch",
    )
    output: Path = option(help="folder for the checkpoint, metrics.jsonl and the plot")
    resume: bool = option(False, help="continue the run in --output at the exact batch (start one if there is none)")
    resume_previous: bool = option(False, help="as --resume, from the checkpoint before the newest one")
    cache: Path = option(CACHE, help="folder for tokenizers and token shards, addressed by content")
    prepare_workers: int | None = option(
        None, help="processes that prepare the text (default: the cores this process may use)"
    )

    # tokenizer
    tokenizer: Path | None = option(
        None, help="folder of an existing tokenizer (default: WordPiece, trained on the text)"
    )
    vocab_size: int = option(30522, help="entries of the trained vocabulary")
    lowercase: bool = option(True, help="lower-case the text in the trained tokenizer")

    # model
    init_from: Path | None = option(
        None, help="warm start: a checkpoint folder that gives shape, weights and tokenizer"
    )
    hidden_size: int = option(768, help="width")
    num_hidden_layers: int = option(12, help="layers")
    num_attention_heads: int = option(12, help="heads per layer")
    intermediate_size: int | None = option(None, help="width of the feed-forward (default: 4 x hidden_size)")
    max_position_embeddings: int = option(512, help="longest input the model can ever read")
    dropout: float = option(0.1, help="dropout of hidden states and attention")
    initializer_range: float | None = option(
        None,
        help="deviation of new weights (default: 0.02, which suits width 768, or the warm start's own; 1/sqrt(width) "
        "suits a narrow model)",
    )
    exit_layers: list[int] | None = option(None, help="layers with an exit, from 1 (default: every layer)")
    exit_loss: str = option("sum", help="weighting of the exits in the loss")
    gradient_equilibrium: bool = option(
        True, help="each layer gets the mean, not the sum, of the exits' gradients above"
    )
    exit_groups: int = option(2, help="grouped training: groups of exits, one group a step; the last exit is in all")
    length_drop: float = option(
        0.0,
        help="LengthDrop: the largest share of its tokens that a sub-network drops from layer to layer (paper: 0.2)",
    )
    layer_drop: float = option(
        0.0, help="LayerDrop: the chance of each layer to be left out of a sub-network (paper: 0.2)"
    )
    sandwich: int = option(
        2,
        help="with length_drop or layer_drop: sub-networks sampled per update beside the smallest one, all of them "
        "learning the full model's answers",
    )

    # data
    max_length: int = option(128, help="tokens per example, at most, special tokens included")
    short_probability: float = option(
        0.1, help="share of examples packed to a random shorter length, so that short inputs are known too"
    )
    mask_probability: float = option(0.15, help="share of the tokens predicted in training; held-out text: 0.15")
    whole_words: bool = option(False, help="mask all pieces of a word or none")
    validation_fraction: float = option(0.05, help="share of the documents held out, at least one")
    workers: int = option(1, help="processes that make batches ahead of the training; 0: in the training process")

    # optimisation
    batch_size: int = option(256, help="examples per update, over all processes and accumulation steps")
    micro_batch_size: int | None = option(
        None, help="examples per forward pass of a process (default: its whole share)"
    )
    steps: int = option(100_000, help="updates")
    learning_rate: float = option(5e-4, help="peak learning rate")
    schedule: Literal["linear", "cosine", "constant"] = option("linear", help="decay after the warm-up, to zero")
    warmup_steps: int = option(1000, help="updates of linear warm-up")
    weight_decay: float = option(0.01, help="decoupled decay; not on biases and LayerNorms")
    adam_beta2: float = option(0.98, help="AdamW's second beta")
    clip_norm: float = option(1.0, help="gradient norm to clip to")
    precision: Literal["no", "bf16"] = option("no", help="mixed precision")
    seed: int = option(1, help="of weights, split into batches, masking, swaps and dropout")
    max_skipped: int = option(10, help="stop after this many updates in a row with a loss that is not finite")

    # seeing it, and not losing it
    log_every: int = option(50, help="updates between lines of metrics.jsonl")
    evaluate_every: int = option(
        1000, help="updates between evaluations on held-out documents; there is one at the end"
    )
    evaluation_examples: int = option(2000, help="held-out examples per evaluation, at most")
    save_every: int = option(1000, help="updates between checkpoints; there is one at the end and on SIGTERM")
    keep_checkpoints: int = option(2, help="newest checkpoints that are kept")
    license: str | None = option(
        None, help="licence you give the checkpoint, as the hub names it (default: the one its parent's card states)"
    )
    peak_tflops: float | None = option(
        None, help="what one device can do, for the utilisation in the log (default: by the GPU's name, in bf16)"
    )
    tracker: str | None = option(None, help="a tracker of accelerate (tensorboard, wandb, ...) beside metrics.jsonl")

    def __post_init__(self) -> None:
        self.sources()
        check_at_least(1, self, *AT_LEAST_ONE)
        for name, (low, high) in RANGES.items():
            if (value := getattr(self, name)) is not None and not low <= value <= high:
                raise ValueError(f"{name} must lie within {low}..{high}, got {value}")
        for name in ("learning_rate", "peak_tflops"):
            if (value := getattr(self, name)) is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be positive, got {value}")
        if self.max_length < 8 or (not self.init_from and self.max_length > self.max_position_embeddings):
            raise ValueError(
                f"max_length must lie within 8..max_position_embeddings ({self.max_position_embeddings}), "
                f"got {self.max_length}"
            )
        if self.exit_layers == []:
            raise ValueError("exit_layers names no layer; leave it out for an exit after every one")
        if self.init_from and self.tokenizer:
            raise ValueError("init_from brings its own tokenizer: leave tokenizer out")

    def sources(self) -> dict[str, WeightedSource]:
        """Name -> source, by name; ValueError for one that cannot be, or weights that only some have."""
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(Source)}
        if not self.mixture:
            return {"text": WeightedSource(**own)}
        if self.text or self.dataset:
            raise ValueError("mixture names all sources: leave text and dataset out, or make them an entry of it")
        if unnamed := [name for name in self.mixture if not isinstance(name, str)]:
            raise ValueError(f"mixture: {unnamed[0]!r} is no text; a name that YAML reads otherwise needs quotes")
        sources = {name: _source(name, self.mixture[name]) for name in sorted(self.mixture)}
        unweighted = [name for name, source in sources.items() if source.weight is None]
        if 0 < len(unweighted) < len(sources):
            raise ValueError(f"mixture: {', '.join(unweighted)} without weight; give every source a weight, or none")
        return sources


def _source(name: str, given: Any) -> WeightedSource:
    if not isinstance(given, dict):
        raise ValueError(f"mixture: {name} must be a mapping such as {{text: [FILE], weight: 2}}, got {given!r}")
    return from_mapping(WeightedSource, given, f"mixture: {name}")


@dataclass(kw_only=True)
class PrepareConfig(PretrainConfig):
    """The token shards of a run, without its training: the options of training, of which those of sources, tokenizer,
    lengths and batches count."""

    output: Path = option(Path("."), help="as in training; nothing is written there")


@dataclass
class EvaluateConfig:
    """Masked-token and sentence-order losses of a checkpoint at every exit on any text, always masked the same way."""

    model: Path = option(help="checkpoint folder: weights and tokenizer")
    text: list[str] = option(help="text files or globs, as for pre-training")
    output: Path | None = option(None, help="JSON file for the result")
    held_out: float | None = option(
        None,
        help="only the documents that a run on this text with this validation_fraction holds out (default: all)",
    )
    length_config: list[float] | None = option(
        None, help="shares of a row's tokens that remain, one per layer (default: the checkpoint's, all of them)"
    )
    examples: int | None = option(None, help="examples, at most, drawn over the whole text (default: all)")
    max_length: int | None = option(
        None, help="tokens per example, at most, special tokens included (default: 128, or the model's longest input)"
    )
    batch_size: int = option(32, help="examples per forward pass of a process")
    precision: Literal["no", "bf16"] = option("no", help="mixed precision")
    seed: int = option(1, help="of the masking, the swaps and of weights that the checkpoint does not hold")
    cache: Path = option(CACHE, help="folder for token shards, addressed by content")

    def __post_init__(self) -> None:
        check_at_least(1, self, "examples", "batch_size")
        low, high = RANGES["validation_fraction"]
        if self.held_out is not None and not low <= self.held_out <= high:
            raise ValueError(
                f"held_out must lie within {low}..{high}, as validation_fraction, got {self.held_out}; leave it out "
                "for all documents"
            )


@dataclass
class ReleaseConfig:
    """A checkpoint, pre-trained or fine-tuned, as a complete and checked folder for the hub."""

    model: Path = option(help="checkpoint folder: weights and tokenizer")
    output: Path = option(help="folder for the release")
    push: str | None = option(None, help="hub id (organisation/name) to upload to (default: nothing is uploaded)")
    private: bool = option(False, help="with --push, a repository that is made for it is private")

    def __post_init__(self) -> None:
        if not (self.model / "config.json").is_file():
            raise ValueError(f"model: {self.model} is no checkpoint folder (it holds no config.json)")
        if self.private and not self.push:
            raise ValueError("private says who may see what is uploaded: it needs --push REPO_ID")


AT_LEAST_ONE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "exit_groups"),
    *("batch_size", "micro_batch_size", "steps", "max_skipped", "log_every", "evaluate_every", "evaluation_examples"),
    *("save_every", "keep_checkpoints", "prepare_workers"),
)
RANGES = {
    "dropout": (0, 0.9),
    "length_drop": (0, 0.9),
    "layer_drop": (0, 0.9),
    "sandwich": (0, 16),
    "initializer_range": (1e-5, 1),
    "short_probability": (0, 1),
    "mask_probability": (0.01, 0.9),
    "validation_fraction": (0.0001, 0.5),
    "workers": (0, 64),
    "warmup_steps": (0, float("inf")),
    "weight_decay": (0, 1),
    "adam_beta2": (0, 0.99999),
    "clip_norm": (1e-6, float("inf")),
    "seed": (0, 2**31 - 1),
}

# what may differ between a run and its resumption: the rest decides the batches, the model or the losses
FREE_ON_RESUME = frozenset(
    {
        *(
            *(field.name for field in dataclasses.fields(Source)),
            *("mixture", "prepare_workers"),
            "output",
            "resume",
            "resume_previous",
            "cache",
            "tokenizer",
            "init_from",
            "workers",
            "micro_batch_size",
        ),
        *("log_every", "evaluate_every", "evaluation_examples", "save_every", "keep_checkpoints", "tracker"),
        *("license", "max_skipped", "peak_tflops", "vocab_size", "lowercase", "initializer_range"),
    }
)
