"""Options of the commands, one dataclass each; the only place where a default of theirs stands."""

from dataclasses import dataclass
from typing import Literal

from elastic_model.arguments import option
from finetune.tasks import DATA_VARIABLE, TASKS, ProblemType

TASK_HELP = f"a task of the table: {', '.join(TASKS)} (all but era are files below ${DATA_VARIABLE})"
OWN_HELP = "of your own files (.tsv, .csv, .jsonl, also compressed)"


@dataclass(kw_only=True)
class TaskOptions:
    """What the commands of a task share: the starting checkpoint, the rows, how they are read."""

    model: str = option(help="checkpoint folder: an elastic model, or a stock BERT, RoBERTa or DistilBERT one")
    task: str | None = option(None, help=TASK_HELP)
    train: str | None = option(None, help=f"train split {OWN_HELP}")
    dev: str | None = option(None, help=f"dev split {OWN_HELP}; it chooses the checkpoint and the threshold")
    test: str | None = option(None, help=f"test split {OWN_HELP}; only reported")
    text: str | None = option(None, help="column of the text in your own files")
    pair: str | None = option(None, help="column of the second text in your own files, if the task has pairs")
    label: str | None = option(None, help="column of the label in your own files; several labels are joined by |")
    problem_type: ProblemType | None = option(
        None, help="kind of the labels in your own files (default: found from them, and printed)"
    )
    max_length: int = option(128, help="tokens of a row, at most; longer rows are cut")
    metrics: list[str] = option([], help="metrics, the first decides; a+b is the mean of two (default: the task's)")
    eval_batch_size: int = option(64, help="rows in one forward pass of an evaluation")
    seed: int = option(0, help="seed of everything drawn: new heads, order of the rows, dropout, bootstrap")


@dataclass(kw_only=True)
class TrainOptions(TaskOptions):
    """Fine-tune a checkpoint with all its exits, choose an exit threshold on dev, write a task checkpoint."""

    output: str = option(help="folder of the task checkpoint (appears whole, at the end)")
    recipe: str = option("joint", help="which losses train what, in which phases (finetune/recipe.py has the table)")
    epochs: int = option(3, help="passes over the train split, in each phase of the recipe")
    batch_size: int = option(32, help="rows of one update, over all processes")
    micro_batch_size: int | None = option(None, help="rows of one forward pass (default: all of a process's rows)")
    learning_rate: float = option(5e-5, help="peak learning rate of AdamW")
    warmup: float = option(0.1, help="share of the updates over which the learning rate rises; it then falls to 0")
    weight_decay: float = option(0.01, help="AdamW's weight decay, not on biases and norms")
    max_grad_norm: float = option(1.0, help="gradients are scaled down to this norm")
    dropout: float | None = option(None, help="dropout of hidden states and attention (default: the checkpoint's)")
    exit_loss: str = option("sum", help="weighting of the exits in the loss: sum, linear, last, mean, ... ")
    gradient_equilibrium: bool = option(True, help="each layer sees the mean of the gradients of the exits above it")
    exit_groups: int = option(1, help="groups the exits are dealt into, one group an update, the last exit in all")
    exit_layers: list[int] | None = option(None, help="layers with an exit (default: the checkpoint's)")
    train_rows: int | None = option(None, help="use a random subset of the train split of this size")
    eval_steps: int | None = option(None, help="updates between evaluations on dev (default: once an epoch)")
    best_exit: Literal["last", "mean"] = option(
        "last", help="the checkpoint kept is best on dev by the first metric: at the last exit, or the mean over exits"
    )
    exit_policy: str | None = option(
        None,
        help="exit policy to calibrate: entropy, confidence, margin, patience (default: entropy, else patience)",
    )
    permitted_loss: float = option(0.01, help="loss of the first metric on dev that the threshold may cost")
    save_steps: int = option(200, help="updates between saved states, from which --resume continues")
    resume: bool = option(False, help="continue an interrupted run of this output; a finished one ends at once")
    mixed_precision: Literal["no", "bf16"] = option("no", help="precision of the forward and backward pass")
    log_steps: int = option(20, help="updates between lines of metrics.jsonl")
    license: str | None = option(
        None, help="licence you give the checkpoint, as the hub names it (default: the one its parent's card states)"
    )


@dataclass(kw_only=True)
class EvaluateOptions(TaskOptions):
    """Quality of a task checkpoint at every exit and over a sweep of exit thresholds."""

    split: Literal["train", "dev", "test"] = option("dev", help="which split")
    policy: str | None = option(None, help="exit policy to sweep (default: the checkpoint's, else as in train)")
    thresholds: list[float] = option([], help="thresholds of the sweep (default: a grid from never to always)")
    output: str | None = option(None, help="folder for curve.json (what is printed) and predictions.tsv")
