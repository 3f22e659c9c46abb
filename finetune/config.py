"""Options of the commands, one dataclass each; the only place where a default of theirs stands."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from elastic_model.arguments import option
from elastic_model.subnetworks import LAYER_DROP, LENGTH_DROP
from finetune.tasks import DATA_VARIABLE, TASKS, ProblemType

TASK_HELP = (
    f"a task of the table: {', '.join(TASKS)} (all but era are read below ${DATA_VARIABLE}, GLUE's and ELUE's else"
    " from the hub)"
)
OWN_HELP = (
    "of your own files (.tsv, .csv, .jsonl; .conll for tags, .json for SQuAD; also compressed), or its name in the"
    " --dataset"
)
LENGTH = 128  # tokens of a row, where nothing else is known
OWN_CHECKPOINT = "task checkpoint that `python -m finetune` wrote"


@dataclass(kw_only=True)
class ReadingOptions:
    """What every command has that reads rows."""

    max_length: int = option(LENGTH, help="tokens of a row, at most; longer rows are cut")
    eval_batch_size: int = option(64, help="rows in one forward pass of an evaluation")
    seed: int = option(0, help="seed of everything drawn: new heads, order of the rows, dropout, bootstrap")


@dataclass(kw_only=True)
class TaskOptions(ReadingOptions):
    """What the commands of a task share: the starting checkpoint, the rows, how they are read."""

    model: str = option(
        help="checkpoint folder: an elastic model, or a stock BERT, RoBERTa or DistilBERT one", positional=True
    )
    task: str | None = option(None, help=TASK_HELP)
    train: str | None = option(None, help=f"train split {OWN_HELP}")
    dev: str | None = option(None, help=f"dev split {OWN_HELP}; it chooses the checkpoint and the threshold")
    test: str | None = option(None, help=f"test split {OWN_HELP}; only reported")
    dataset: str | None = option(
        None,
        help="your own data set: a folder of datasets' save_to_disk or of files, or an id of the hub; with --task a"
        " copy of the task's data set",
    )
    dataset_config: str | None = option(None, help="configuration of --dataset, where it has several")
    text: str | None = option(
        None, help="column of the text (or of the words, or the question) in your own data; CoNLL's are 1, 2, ..."
    )
    pair: str | None = option(None, help="column of the second text (or of the context), if the task has pairs")
    label: str | None = option(
        None, help="column of the label (or of the tags, or the answers); several labels are joined by |"
    )
    problem_type: ProblemType | None = option(
        None, help="kind of the labels in your own files (default: found from them, and printed)"
    )
    metrics: list[str] = option([], help="metrics, the first decides; a+b is the mean of two (default: the task's)")

    @property
    def sources(self) -> tuple[str | None, ...]:
        """What is read, which no output may replace; some of it may be names instead of paths."""
        return self.model, self.train, self.dev, self.test, self.dataset


@dataclass(kw_only=True)
class LoopOptions(ReadingOptions):
    """What every training run has: how its updates are made, when it looks at dev, how it is kept and watched."""

    output: str = option(help="folder of the checkpoint (appears whole, at the end)")
    epochs: int = option(3, help="passes over the train split, in each phase of the recipe")
    phase_epochs: list[int] = option(
        [], help="the same, a number a phase where they differ: 3 5 for LAT's schedule, 0 leaves a phase out"
    )
    batch_size: int = option(32, help="rows of one update, over all processes")
    micro_batch_size: int | None = option(None, help="rows of one forward pass (default: all of a process's rows)")
    learning_rate: float = option(5e-5, help="peak learning rate of AdamW, in each phase")
    warmup: float = option(0.1, help="share of the updates over which the learning rate rises; it then falls to 0")
    weight_decay: float = option(0.01, help="AdamW's weight decay, not on biases and norms")
    max_grad_norm: float = option(1.0, help="gradients are scaled down to this norm")
    dropout: float | None = option(None, help="dropout of hidden states and attention (default: the checkpoint's)")
    precision: Literal["no", "bf16"] = option("no", help="mixed precision of the forward and backward pass")

    exit_layers: list[int] | None = option(None, help="layers with an exit (default: the checkpoint's)")
    exit_loss: str = option("sum", help="weighting of the exits in the loss: sum, linear, last, mean, ... ")
    gradient_equilibrium: bool = option(True, help="each layer sees the mean of the gradients of the exits above it")
    exit_groups: int = option(1, help="groups the exits are dealt into, one group an update, the last exit in all")
    distillation: Literal["forward", "reverse", "none"] = option(
        "forward",
        help="what sub-networks minimise: KL(teacher || student), KL(student || teacher), or without distillation the"
        " loss on the labels",
    )
    temperature: float = option(1.0, help="logits are divided by it before a student is compared with its teacher")

    best_exit: Literal["last", "mean"] = option(
        "last",
        help="the checkpoint kept is best on dev by the deciding metric: at the last exit, or the mean over exits",
    )
    eval_steps: int | None = option(None, help="updates between evaluations on dev (default: once an epoch)")
    patience: int | None = option(
        None, help="a phase ends after this many evaluations that are no better than its best, which is then kept"
    )
    save_steps: int = option(200, help="updates between saved states, from which --resume continues")
    resume: bool = option(False, help="continue an interrupted run of this output; a finished one ends at once")
    log_steps: int = option(20, help="updates between lines of metrics.jsonl")
    tracker: str | None = option(None, help="a tracker of accelerate (tensorboard, wandb, ...) beside metrics.jsonl")
    license: str | None = option(
        None, help="licence you give the checkpoint, as the hub names it (default: the one its parent's card states)"
    )

    # what has no option in every command: the weight of labels beside a teacher, and all that sub-networks need
    hard_weight, learned_exit_head, exit_pooling = 0.0, False, cast("str | None", None)
    length_drop, layer_drop, sampled, sandwich_rule = LENGTH_DROP, LAYER_DROP, 2, True


@dataclass(kw_only=True)
class SubnetworkOptions(LoopOptions):
    """What the recipes have beside the loop: sub-networks, new exits, and a head that learns when to leave."""

    exit_pooling: Literal["mean", "cls"] | None = option(
        None,
        help="what new exits read: the mean of the tokens, or [CLS] as BERT's do, for export's --to bert (default:"
        " mean; where a stock body's last exit is the only one, [CLS])",
    )
    learned_exit_head: bool = option(
        False, help="train BERxiT's head, which the exit policy `learned` asks whether an exit is right"
    )

    length_drop: float = option(
        LENGTH_DROP, help="sub-networks (recipe sandwich): share of the tokens dropped from layer to layer, at most"
    )
    layer_drop: float = option(
        LAYER_DROP, help="sub-networks: probability that one leaves a layer out (LayerDrop); 0: without"
    )
    sampled: int = option(2, help="sub-networks sampled in an update beside the smallest one")
    sandwich_rule: bool = option(True, help="the smallest sub-network is in every update; false: one more is sampled")


@dataclass(kw_only=True)
class LabelledOptions(LoopOptions, TaskOptions):
    """What every training run on a task has beside its loop: rows, and the exit threshold chosen in the end."""

    train_rows: int | None = option(None, help="use a random subset of the train split of this size")
    metric: str | None = option(None, help="metric that chooses the checkpoint (default: the first of the metrics)")
    exit_policy: str | None = option(
        None,
        help="exit policy to calibrate: entropy, confidence, margin, patience, learned (default: the recipe's, else"
        " entropy, for regression patience)",
    )
    permitted_loss: float = option(0.01, help="loss of the deciding metric on dev that the threshold may cost")

    stage = "finetune"  # what provenance calls the run
    remedy = "start from a checkpoint without a head"  # of a model for another task
    recipe, teacher = "joint", cast("str | None", None)  # only `train` has options for these


@dataclass(kw_only=True)
class TrainOptions(SubnetworkOptions, LabelledOptions):
    """Fine-tune a checkpoint with all its exits, choose an exit threshold on dev, write a task checkpoint."""

    recipe: str = option("joint", help="which losses train what, in which phases (finetune/recipe.py has the table)")
    teacher: str | None = option(
        None, help="a transformers classifier of the same labels, folder or hub id: every exit learns its answers too"
    )
    hard_weight: float = option(0.5, help="weight of the loss on the labels beside the teacher's, from 0 to 1")


@dataclass(kw_only=True)
class DistillOptions(LabelledOptions):
    """Distil a task checkpoint into a smaller student: its answers exit by exit, its embeddings and last states."""

    model: str = option(help="the teacher: a task checkpoint, elastic or stock", positional=True)
    layers: int | None = option(None, help="layers of the student, spread evenly over the teacher's, which it copies")
    student: str | None = option(None, help="or another checkpoint as the student: folder, of the same vocabulary")

    stage, remedy = "distill", "a teacher must be a model of the same task"


@dataclass(kw_only=True)
class PruneOptions(LabelledOptions):
    """Remove the least important heads and FFN neurons of a task checkpoint, then distil from the unpruned model."""

    model: str = option(help="a task checkpoint, elastic or stock", positional=True)
    heads: int | None = option(None, help="attention heads kept in a layer (--uneven: on average)")
    intermediate: int | None = option(None, help="FFN neurons kept in a layer (--uneven: on average)")
    share: float | None = option(None, help="or the share kept of both, above 0 and below 1")
    latency_ms: float | None = option(
        None, help="or milliseconds of a row, at most: batch 1, one thread, --max_length tokens, measured here"
    )
    rounds: int = option(8, help="rounds: a part is removed, and the importance of what is left measured anew")
    multiple_of: int = option(1, help="FFN neurons of each layer are a multiple of this")
    uneven: bool = option(False, help="layers keep different numbers, by importance over the whole model")
    label_free: bool = option(False, help="importance for the model's own predictions, without labels")
    importance_rows: int | None = option(2000, help="rows of train that importance is measured on (none: all)")
    distill: bool = option(True, help="train the pruned model on the unpruned one's answers and states")

    stage, remedy = "prune", "give a model of the task that it is pruned for"


@dataclass(kw_only=True)
class ElastifyOptions(SubnetworkOptions):
    """Give a fine-tuned classifier or tagger exits that answer as it does, from unlabelled texts alone."""

    model: str = option(
        help="a fine-tuned BERT, RoBERTa or DistilBERT classifier or token tagger: folder or hub id", positional=True
    )
    texts: str = option(
        help="unlabelled texts: one a line (.txt), or a table (.tsv, .csv, .jsonl) with --text; also compressed"
    )
    dev: str | None = option(None, help="held-out texts, in the same form (default: 5 % of the texts)")
    text: str | None = option(None, help="column of the text in a table")
    pair: str | None = option(None, help="column of the second text in a table, where the model reads pairs")
    train_backbone: bool = option(
        False, help="then train the whole model too, with LengthDrop: exits and lengths learn from the original"
    )
    backbone_learning_rate: float = option(2e-5, help="peak learning rate where the backbone is trained")
    learning_rate: float = option(1e-3, help="peak learning rate of the exits")
    best_exit: Literal["last", "mean"] = option(
        "mean",
        help="the checkpoint kept agrees best with the original on held-out texts: at the last exit, or the mean",
    )


def trained_length(folder: str | Path) -> int | None:
    """The --max_length that the last stage of a checkpoint read its rows with; None where no record says it."""
    from elastic_model.provenance import read_provenance  # here: --help must not wait for it

    stated = [stage.settings["max_length"] for stage in read_provenance(folder) if "max_length" in stage.settings]
    return stated[-1] if stated else None


@dataclass(kw_only=True)
class CheckpointOptions(TaskOptions):
    """What the commands share that measure a task checkpoint: its rows are read as in its training."""

    max_length: int = option(
        None, help="tokens of a row, at most; longer rows are cut (default: as many as in the checkpoint's training)"
    )

    def __post_init__(self) -> None:
        if self.max_length is None:
            self.max_length = trained_length(self.model) or LENGTH


@dataclass(kw_only=True)
class EvaluateOptions(CheckpointOptions):
    """Quality of a task checkpoint at every exit and over a sweep of exit thresholds."""

    model: str = option(help=OWN_CHECKPOINT, positional=True)

    split: Literal["train", "dev", "test"] = option("dev", help="which split")
    rows: int | None = option(None, help="rows of the split, a random subset (default: all)")
    exit_policy: str | None = option(None, help="exit policy to sweep (default: the checkpoint's, else as in train)")
    thresholds: list[float] = option([], help="thresholds of the sweep (default: a grid from never to always)")
    length_config: list[float] = option([], help="shares of the tokens kept, one a layer (default: the checkpoint's)")
    length_rate: float | None = option(None, help="the same as one rate: each layer keeps this share of what it gets")
    timed_rows: int = option(128, help="rows that wall time is measured on, really run; 0: no times")
    output: str | None = option(None, help="folder for curve.json (what is printed), curve.png and predictions.tsv")


@dataclass(kw_only=True)
class CalibrateOptions(CheckpointOptions):
    """Choose exit thresholds with a guarantee: rarely another answer than the full model's."""

    model: str = option(help="task checkpoint, or a folder that `python -m export` wrote", positional=True)
    split: Literal["train", "dev", "test"] = option("dev", help="which split of the task to calibrate on")
    texts: str | None = option(
        None, help="calibrate on unlabelled texts: one a line (.txt), or a table (.tsv, .csv, .jsonl) with --text"
    )
    reference: str | None = option(
        None,
        help="the classifier whose answers count, folder or hub id (default: the full depth of what is calibrated)",
    )
    max_disagreement: float | None = option(None, help="bound of P(answer differs from the full model's)")
    max_accuracy_loss: float | None = option(
        None, help="bound of the accuracy lost: P(the full model is right and the answer is not); needs labels"
    )
    tolerance: float | None = option(None, help="regression: answers differ where they are further apart than this")
    confidence: float = option(0.95, help="probability, over the calibration rows drawn, that the bound holds")
    exit_policy: str | None = option(None, help="exit policy (default: that of the operating points there are)")
    length_config: list[float] = option([], help="calibrate at these shares of the tokens, one a layer")
    file: str | None = option(
        None, help="of an exported folder: ONNX file, without .onnx (default: best for this CPU)"
    )
    drift: str | None = option(
        None, help="compare instead: answers in service, a .tsv with a column exit_layer (`python -m export predict`)"
    )
    output: str | None = option(None, help="JSON file for the report; beside it a figure of the operating points")


@dataclass(kw_only=True)
class SearchOptions(CheckpointOptions):
    """Search the best length configurations and exit thresholds at every cost; they become operating points."""

    model: str = option(help=OWN_CHECKPOINT, positional=True)

    split: Literal["train", "dev", "test"] = option("dev", help="which split to search on")
    rows: int = option(500, help="rows of the split to search on, a random subset; points are measured on all")
    halving: int = option(
        4, help="1 in so many configurations goes on to so many times the rows; only all rows count; 1: no subsets"
    )
    axes: Literal["joint", "lengths", "exits"] = option(
        "joint", help="what is searched: length configurations, exit thresholds, or both together"
    )
    exit_policy: str | None = option(None, help="exit policy (default: the checkpoint's, else as in train)")
    iterations: int = option(30, help="generations after the first (G)")
    mutations: int = option(30, help="mutations in a generation (N_m)")
    crossovers: int = option(30, help="crossovers in a generation (N_c)")
    mutation_probability: float = option(0.5, help="probability that a mutation changes a layer (p_m)")
    first: int = option(20, help="constant-ratio configurations of the first generation")
    smallest_ratio: float = option(0.8, help="smallest of their ratios: what LengthDrop's smallest sub-network keeps")
    points: int = option(16, help="operating points kept of the front, at most")
    by_row: bool = option(
        False,
        help="beside each point that drops tokens, one whose rows choose their own lengths, at what its lengths cost"
        " at full depth",
    )
    eval_batch_size: int = option(16, help="rows in one forward pass: few share most, of like length")
    precision: Literal["no", "bf16"] = option("no", help="bf16: passes in mixed precision, for machines fast at it")
    graph: str | None = option(
        None, help="an exported folder of the checkpoint: its answers (int8, as served) are searched, not PyTorch's"
    )
    latency: str | None = option(
        None, help="an exported folder of the checkpoint: its latency on this machine is the cost, not FLOPs"
    )
    latency_batch: int = option(1, help="rows in a batch where latency is measured")
    latency_threads: int = option(1, help="threads where latency is measured")
    latency_rows: int = option(32, help="rows that latency is measured on")
    output: str | None = option(
        None, help="folder of the journal, the curves and the figures (default: MODEL.search, beside the checkpoint)"
    )
    resume: bool = option(False, help="continue an interrupted search of this output")
