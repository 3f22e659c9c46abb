"""Options of the commands of pipelines, one dataclass each; the only place where a default of theirs stands."""

from dataclasses import dataclass

from elastic_model.arguments import option
from finetune.config import TaskOptions


@dataclass(kw_only=True)
class OperatorOptions(TaskOptions):
    """What pipelines and their study share: how each operator is carried out and measured."""

    model: str = option(
        help="what O is fine-tuned from, or the fine-tuned model that O is: folder of a checkpoint, elastic or stock",
        aliases=("checkpoint",),
    )
    epochs: int = option(3, help="epochs of a stage")
    batch_size: int = option(32, help="rows of one update")
    learning_rate: float = option(5e-5, help="peak learning rate of a stage")
    train_rows: int | None = option(None, help="use a random subset of the train split of this size")
    layers: int | None = option(None, help="D: layers of the student (default: half of the teacher's)")
    student: str | None = option(None, help="D: or another checkpoint as the student, of the same vocabulary: folder")
    temperature: float = option(1.0, help="D and P: logits are divided by it before they are compared")
    heads: int | None = option(None, help="P: heads kept in a layer (default: two thirds)")
    intermediate: int | None = option(None, help="P: FFN neurons kept in a layer (default: half)")
    rounds: int = option(8, help="P: rounds of removal")
    importance_rows: int = option(2000, help="P: rows of train that importance is measured on, in each round")
    multiple_of: int = option(8, help="P: FFN neurons of each layer are a multiple of this")
    uneven: bool = option(False, help="P: layers keep different numbers")
    label_free: bool = option(False, help="P: importance for the model's own predictions, without labels")
    search_iterations: int = option(10, help="S: generations of the search for a length configuration")
    permitted_loss: float = option(
        0.01, help="E and S: share of the quality that their operating point may lose, both together"
    )
    timed_rows: int = option(40, help="rows that times are measured on, batch 1, one thread")
    again: bool = option(False, help="measure all times anew, as where other work ran beside")


@dataclass(kw_only=True)
class PipelineOptions(OperatorOptions):
    """Carry out a pipeline of operators such as DEPLQ, stage by stage, and compare it with doing nothing (O)."""

    pipeline: str = option(help="letters of D, P, E, S, L, Q in their order, or O", positional=True)
    output: str = option(help="folder of the stages, the table and measured.json; a second run continues it")


@dataclass(kw_only=True)
class EstimateOptions:
    """Estimate the time and quality of a pipeline from measurements of its operators alone."""

    pipeline: str = option(help="letters of D, P, E, S, L, Q in their order, or O", positional=True)
    measured: list[str] = option([], help="measured.json of `pipeline` or `study`, one or more", aliases=("from",))
    draws: int = option(1000, help="resamplings of the seeds, which the interval comes from")
    seed: int = option(0, help="seed of the resampling")
    output: str | None = option(None, help="JSON file for the estimate")


@dataclass(kw_only=True)
class StudyOptions(OperatorOptions):
    """All orders of D, P and E over several seeds: are pipelines commutative, do their savings multiply?"""

    output: str = option(help="folder of the stages, tables and plots; a second run continues it")
    seeds: list[int] = option([0, 1, 2], help="seeds, each a run of its own of every order")
    orders: list[str] = option([], help="pipelines of D, P and E to run (default: every order there is)")
    plan: bool = option(False, help="print the plan with its expected time, and stop")
    minutes: float | None = option(None, help="begin no stage after so many minutes; a second run goes on")
    measure: bool = option(True, help="when all stages are there, measure their times and write tables and plots")
