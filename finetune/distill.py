"""`python -m finetune distill TEACHER --layers N`: a smaller student learns the teacher's answers and states.

Xin et al. (2022), section 3.1: soft cross-entropy of the answers, squared error of the embedding output and of the
last hidden states, 1 : 1 : 1. Student layer i stands for teacher layer ceil(i * teacher_layers / student_layers).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import mse_loss
from transformers import AutoConfig, set_seed

from elastic_model import ElasticBertConfig
from elastic_model.losses import exit_group
from elastic_model.modeling_elasticbert import ElasticBertExitModel
from finetune.checkpoint import write_checkpoint
from finetune.config import DistillOptions, LabelledOptions
from finetune.data import inputs_of
from finetune.kinds import KINDS, kind_of, problem_type_of
from finetune.labels import Labels
from finetune.prepare import check_length, configured, exit_pooling_of, load_tokenizer, weight_files
from finetune.recipe import NEVER, Batch, Phase, Update, distillation, exits_of
from finetune.run import TaskRun, prepare, start_accelerator
from finetune.state import Progress
from finetune.teacher import check_tokenizer
from finetune.train import run_to_the_end, was_finished

FULL = {"exit_policy": NEVER, "length_config": 1.0, "output_hidden_states": True}


def layer_map(student_layers: int, teacher_layers: int) -> dict[int, int]:
    """{student layer: the teacher layer that it stands for}, both from 1; ValueError for a student that is deeper."""
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(
            f"a student of {student_layers} layers cannot learn from a teacher of {teacher_layers}: it must have 1 to "
            f"{teacher_layers}"
        )
    return {layer: math.ceil(layer * teacher_layers / student_layers) for layer in range(1, student_layers + 1)}


def exit_map(student_layers: int, teacher: ElasticBertConfig) -> dict[int, int]:
    """{student exit: the teacher exit that it learns from}: where a layer stands for one that has an exit."""
    layers = layer_map(student_layers, teacher.num_hidden_layers)
    return {layer: other for layer, other in layers.items() if other in teacher.exit_layers}


def load_teacher(options: LabelledOptions) -> ElasticBertExitModel:
    """A task checkpoint as an elastic model, with the exits it has, in evaluation mode and without gradients.

    ValueError where it has no trained head.
    """
    folder = Path(options.model)
    weight_files(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    problem_type = problem_type_of(config)
    if problem_type is None:
        found = ", ".join(config.architectures or []) or config.model_type
        raise ValueError(f"teacher {folder} holds {found}, which has no head: fine-tune it on the task first")
    check_length(config, options.max_length)
    stock = config.model_type != ElasticBertConfig.model_type
    exits = {"exit_layers": [config.num_hidden_layers]} if stock else {}
    teacher: ElasticBertExitModel = KINDS[problem_type].model.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32, exit_policy=None, length_config=None, **exits
    )
    return teacher.eval().requires_grad_(False)


def settings_of_student(options: LabelledOptions, labels: Labels, exits: list[int]) -> dict[str, Any]:
    """What a student's configuration takes from the options; exits: where it can have them, by layer from 1."""
    chosen = exits if options.exit_layers is None else options.exit_layers
    if not set(chosen) <= set(exits) or exits[-1] not in chosen:
        raise ValueError(f"exit_layers of this student must be some of {exits}, the last one among them, got {chosen}")
    own: dict[str, Any] = {"exit_layers": chosen, "num_output_layers": None, "learned_exit_head": False}
    own |= {"no_answer_threshold": labels.no_answer_threshold, "text_pairs": labels.text_pairs}
    return {**configured(options, exits[-1]), **own}


def shallower(teacher: ElasticBertExitModel, layers: int, settings: dict[str, Any]) -> ElasticBertExitModel:
    """The teacher's layers, spread evenly, with the poolers and heads of their exits; as many as it has: a copy."""
    source = layer_map(layers, teacher.config.num_hidden_layers)
    per_layer = {
        name: [getattr(teacher.config, name)[layer - 1] for layer in source.values()]
        for name in ("num_attention_heads_per_layer", "intermediate_size_per_layer", "exit_pooling")
    }
    depth = {"num_hidden_layers": layers, "max_output_layers": layers}
    config = ElasticBertConfig.from_dict({**teacher.config.to_dict(), **depth, **per_layer, **settings})
    student = type(teacher)(config)
    ours, theirs = student.elasticbert, teacher.elasticbert
    pairs: list[tuple[Any, Any]] = [(ours.embeddings, theirs.embeddings)]
    pairs += [(ours.encoder.layer[layer - 1], theirs.encoder.layer[other - 1]) for layer, other in source.items()]
    for layer in student.exit_layers:
        pairs.append((student.head_at(layer), teacher.head_at(source[layer])))
        if ours.encoder.pooler is not None and theirs.encoder.pooler is not None:
            pairs.append((ours.encoder.pooler.at(layer), theirs.encoder.pooler.at(source[layer])))
    for mine, other in pairs:
        mine.load_state_dict(other.state_dict())
    return student


def student_layers(options: DistillOptions, teacher: ElasticBertConfig) -> int:
    """How many layers the student will have; ValueError for a student that is not one, or not smaller."""
    if (options.layers is None) == (options.student is None):
        raise ValueError("give the student: --layers N for some of the teacher's layers, or --student FOLDER")
    if options.student is None:
        layers = int(options.layers or 0)
        if not 1 <= layers < teacher.num_hidden_layers:
            raise ValueError(
                f"layers must be 1 to {teacher.num_hidden_layers - 1}, fewer than the teacher's, got {layers}"
            )
        return layers
    weight_files(Path(options.student))
    config = AutoConfig.from_pretrained(options.student, local_files_only=True)
    check_length(config, options.max_length)
    layer_map(config.num_hidden_layers, teacher.num_hidden_layers)
    return int(config.num_hidden_layers)


def make_student(options: DistillOptions, labels: Labels, teacher: ElasticBertExitModel) -> ElasticBertExitModel:
    """The student as the options name it; what it lacks is drawn from the seed."""
    layers = student_layers(options, teacher.config)
    settings = settings_of_student(options, labels, list(exit_map(layers, teacher.config)))
    set_seed(options.seed)
    if options.student is None:
        return shallower(teacher, layers, settings)
    check_tokenizer(options.student, load_tokenizer(Path(options.model)))
    config = AutoConfig.from_pretrained(options.student)
    settings |= {"exit_pooling": exit_pooling_of(config, settings["exit_layers"], options)}
    names = dict(enumerate(labels.names))
    student: ElasticBertExitModel = kind_of(labels).model.from_pretrained(
        options.student,
        local_files_only=True,
        dtype=torch.float32,
        id2label=names,
        label2id={name: number for number, name in names.items()},
        problem_type=teacher.config.problem_type,
        ignore_mismatched_sizes=True,  # a head of as many other labels is left to `_fit_heads`
        **settings,
    )
    if problem_type_of(config) is not None:
        _fit_heads(student, config, labels)
    return student


def _fit_heads(student: ElasticBertExitModel, config: Any, labels: Labels) -> None:
    """The heads that a student brings with it, `config` its own: their labels in the task's order; heads of another
    task are drawn anew."""
    ours, theirs = list(labels.names), [config.id2label[number] for number in range(config.num_labels)]
    named = labels.problem_type not in ("regression", "question_answering")
    same = problem_type_of(config) == labels.problem_type and (not named or sorted(ours) == sorted(theirs))
    for layer in student.exit_layers:
        head: Any = student.head_at(layer)
        if not same:
            nn.init.normal_(head.weight, std=student.config.initializer_range)
            nn.init.zeros_(head.bias)
        elif named:
            order = [theirs.index(name) for name in ours]
            head.load_state_dict({name: value[order] for name, value in head.state_dict().items()})


def add_projections(student: ElasticBertExitModel, teacher: ElasticBertExitModel) -> None:
    """Where widths differ, projections of the student's states to the teacher's width, while it is trained."""
    own, other = student.config.hidden_size, teacher.config.hidden_size
    if own != other:
        student.projections = nn.ModuleDict({name: nn.Linear(own, other) for name in ("embeddings", "last")})


@dataclass(frozen=True)
class Distillation:
    """The losses of a student that learns from a teacher; exits: {student exit: teacher exit}."""

    teacher: ElasticBertExitModel
    student: ElasticBertExitModel
    exits: dict[int, int]

    def _states(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """The student's states (..., width) in the teacher's width."""
        projections = getattr(self.student, "projections", None)
        return states if projections is None else projections[name](states)

    def __call__(
        self, model: nn.Module, config: ElasticBertConfig, batch: Batch, update: Update
    ) -> Iterator[torch.Tensor]:
        """One loss: T^2 KL(softmax(teacher / T) || softmax(student / T)), which is the soft cross-entropy less the
        teacher's entropy, over the exits as the configuration weighs them, + MSE + MSE over the real tokens."""
        options, inputs = update.options, inputs_of(batch)
        exits = exit_group(config.exit_layers, config.exit_groups, update.number)
        self.teacher.eval()
        with torch.no_grad():
            taught = self.teacher(**inputs, **FULL)
        output = model(**inputs, exits=exits, **FULL)
        answers = exits_of(output, config, batch, exits)
        theirs = exits_of(taught, self.teacher.config, batch, [self.exits[layer] for layer in exits]).logits
        real = batch["attention_mask"].bool()
        squares = [
            mse_loss(self._states(name, output.hidden_states[place][real]).float(), taught.hidden_states[place][real])
            for name, place in (("embeddings", 0), ("last", -1))
        ]
        each = {layer: theirs[self.exits[layer]] for layer in exits}
        yield distillation(model, config, answers, each, options) + sum(squares)


def check_distillation(options: LabelledOptions) -> None:
    """ValueError where a student shall learn from nothing."""
    if options.distillation == "none":
        raise ValueError("distillation none: there is nothing but the teacher's answers and states to learn from")


def taught_by(run: TaskRun, student: ElasticBertExitModel, teacher: ElasticBertExitModel) -> TaskRun:
    """The run of `student` learning from `teacher`."""
    check_distillation(run.options)
    add_projections(student, teacher)
    exits = exit_map(student.config.num_hidden_layers, teacher.config)
    objective = Distillation(teacher.to(run.accelerator.device), student, exits)
    return replace(run, model=student, phases=(Phase(objective),))


def write_student(run: TaskRun, progress: Progress) -> None:
    """As any checkpoint of a run, without the projections."""
    if hasattr(run.model, "projections"):
        del run.model.projections
        progress.best_weights = {
            name: one for name, one in progress.best_weights.items() if not name.startswith("projections.")
        }
    write_checkpoint(run, progress)


def prepare_student(options: DistillOptions, accelerator: Accelerator) -> TaskRun:
    """Everything read and checked; nothing is written yet."""
    teacher = load_teacher(options)
    student_layers(options, teacher.config)
    run = prepare(options, accelerator, lambda _, labels: make_student(options, labels, teacher))
    return taught_by(run, run.model, teacher)


def distill(options: DistillOptions) -> int:
    """Train the student, choose an exit policy, write it; exit code 0, or 143 after SIGTERM (state saved)."""
    accelerator = start_accelerator(options)
    run = prepare_student(options, accelerator)
    if was_finished(run):
        return 0
    config = run.model.config
    accelerator.print(
        f"{len(run.splits['train'])} rows; {run.labels.problem_type}; student of {config.num_hidden_layers} layers, "
        f"width {config.hidden_size}, exits {config.exit_layers}"
    )
    return run_to_the_end(run, write_student)
