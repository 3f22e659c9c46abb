"""Recipes as data: the phases of a fine-tuning run, each with what it trains and the losses of one update."""

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from elastic_model import ElasticBertConfig, subnetworks
from elastic_model.encoder import zero_for_others
from elastic_model.losses import exit_group, inplace_distillation, uncertainty_loss, weighted_loss, wrong_answers
from finetune.config import LoopOptions
from finetune.data import inputs_of

Batch = Mapping[str, torch.Tensor]

EXIT_PARAMETER = re.compile(r"(?:encoder\.pooler|classifiers|qa_outputs)\.(\d+)\.")
LONE_EXIT = ("classifier.", "qa_outputs.")  # static use: the head of the only exit has no number
LEARNED_EXIT_HEAD = "exit_uncertainty."
NEVER = {"name": "never"}


@dataclass(frozen=True)
class Update:
    """What an objective is told: the number of the update, counted over the run, random draws that are the same in
    every process, the options, and the teacher's logits (rows, ...) for the batch where there is one."""

    number: int
    draw: random.Random
    options: LoopOptions
    teacher: torch.Tensor | None = None


# (model, configuration, batch, update) -> losses, each computed when the one before has gone backward
Objective = Callable[[torch.nn.Module, ElasticBertConfig, Batch, Update], Iterator[torch.Tensor]]


def _exit_of(parameter: str, config: ElasticBertConfig) -> int | None:
    """The layer, from 1, of the exit that a parameter belongs to; None: backbone."""
    found = EXIT_PARAMETER.search(parameter)
    if found:
        return int(found[1]) + 1
    return config.exit_layers[-1] if parameter.startswith(LONE_EXIT) else None


def everything(parameter: str, config: ElasticBertConfig) -> bool:
    """Trains the whole model."""
    return True


def backbone_and_last_exit(parameter: str, config: ElasticBertConfig) -> bool:
    """Trains what a model of one exit has."""
    if parameter.startswith(LEARNED_EXIT_HEAD):
        return False  # it is asked at the inner exits alone
    return _exit_of(parameter, config) in (None, config.exit_layers[-1])


def inner_exits(parameter: str, config: ElasticBertConfig) -> bool:
    """Trains the exits below the last one, and the learned exit head; the backbone is frozen."""
    return not backbone_and_last_exit(parameter, config)


class Exits(NamedTuple):
    """Exits as the losses read them: logits {exit layer: (rows, ...)}, QA (rows, tokens, 2); what they mean; which
    predictions count, (rows, tokens) or None = all; {exit layer: learned uncertainty (rows,)}, empty without one."""

    logits: dict[int, torch.Tensor]
    problem_type: str
    mask: torch.Tensor | None
    uncertainty: dict[int, torch.Tensor]


def exits_of(output: Any, config: ElasticBertConfig, batch: Batch, layers: list[int]) -> Exits:
    """The exits `layers` of a model's output, whatever its task."""
    places = [config.exit_layers.index(layer) for layer in layers]
    doubts = getattr(output, "exit_uncertainty", None)
    uncertainty = {} if doubts is None else {layer: doubts[at] for layer, at in zip(layers, places, strict=True)}
    mask = batch["attention_mask"].bool()
    if "exit_start_logits" in output:
        spans = (output.exit_start_logits, output.exit_end_logits)
        logits = {
            layer: torch.stack([side[at] for side in spans], dim=-1) for layer, at in zip(layers, places, strict=True)
        }
        return Exits(logits, "question_answering", mask, uncertainty)
    logits = {layer: output.exit_logits[at] for layer, at in zip(layers, places, strict=True)}
    if logits[layers[-1]].dim() == 3:
        return Exits(logits, "token_classification", mask, uncertainty)
    one = "regression" if config.num_labels == 1 else "single_label_classification"
    return Exits(logits, config.problem_type or one, None, uncertainty)


def as_labels(teacher: torch.Tensor, problem_type: str, mask: torch.Tensor | None) -> torch.Tensor:
    """What a teacher's logits (rows, ...) answer, in the form of the labels that `wrong_answers` reads."""
    if problem_type == "regression":
        return teacher
    if problem_type == "multi_label_classification":
        return (teacher > 0).float()
    if problem_type == "question_answering" and mask is not None:
        return teacher.masked_fill(~mask[..., None], -torch.inf).argmax(1)  # (rows, start and end)
    labels = teacher.argmax(-1)
    return labels if mask is None else labels.masked_fill(~mask, -100)


def distillation(
    model: torch.nn.Module,
    config: ElasticBertConfig,
    answers: Exits,
    teacher: torch.Tensor | Mapping[int, torch.Tensor],
    options: LoopOptions,
) -> torch.Tensor:
    """The loss of exits that learn from a teacher's logits (rows, ...), or each from those {exit layer: logits} of its
    own, weighted as the task loss is.

    T^2 KL(softmax(teacher / T) || softmax(exit / T)): the soft cross-entropy of Hinton et al. (2015), section 2, less
    the teacher's entropy. With a learned exit head, whether an exit differs from the teacher is what that learns.
    """
    logits, problem_type, mask, uncertainty = answers
    taught = teacher if isinstance(teacher, Mapping) else dict.fromkeys(logits, teacher)
    heat = 1.0 if problem_type == "regression" else options.temperature
    reverse = options.distillation == "reverse"
    losses = {
        layer: heat**2 * inplace_distillation(one / heat, taught[layer] / heat, problem_type, mask, reverse=reverse)
        for layer, one in logits.items()
    }
    loss = weighted_loss(losses, config.exit_loss)
    below = [layer for layer in uncertainty if layer != config.exit_layers[-1]]
    if below:
        truth = {layer: as_labels(taught[layer], problem_type, mask) for layer in below}
        wrong = {layer: wrong_answers(logits[layer], truth[layer], problem_type, mask) for layer in below}
        loss = loss + sum(uncertainty_loss(uncertainty[layer], wrong[layer]) for layer in below) / len(below)
    return loss + zero_for_others(model, list(losses))


def task_loss(
    model: torch.nn.Module,
    config: ElasticBertConfig,
    batch: Batch,
    update: Update,
    exits: list[int],
    **subnetwork: Any,
) -> tuple[torch.Tensor, Any]:
    """The loss of some exits on the labels, with a teacher on its answers too, and the model's output.

    Without labels the teacher's answers are all there is to learn.
    """
    output = model(**batch, exits=exits, **subnetwork)
    if update.teacher is None:
        return output.loss, output
    soft = distillation(model, config, exits_of(output, config, batch, exits), update.teacher, update.options)
    hard = update.options.hard_weight
    return soft if output.loss is None else hard * output.loss + (1 - hard) * soft, output


def _exits_of(config: ElasticBertConfig, update: Update) -> list[int]:
    """The exits of an update: of its group, among no more groups than there are exits below the last."""
    groups = max(1, min(config.exit_groups, len(config.exit_layers) - 1))
    return exit_group(config.exit_layers, groups, update.number)


def joint(model: torch.nn.Module, config: ElasticBertConfig, batch: Batch, update: Update) -> Iterator[torch.Tensor]:
    """All exits (of the update's group) under the config's weighting: ElasticBERT (Liu et al. 2022), section 3.2."""
    exits = _exits_of(config, update)
    yield task_loss(model, config, batch, update, exits)[0]


def last_exit(
    model: torch.nn.Module, config: ElasticBertConfig, batch: Batch, update: Update
) -> Iterator[torch.Tensor]:
    """The task loss of the last exit alone."""
    yield task_loss(model, config, batch, update, config.exit_layers[-1:])[0]


def alternating(
    model: torch.nn.Module, config: ElasticBertConfig, batch: Batch, update: Update
) -> Iterator[torch.Tensor]:
    """BERxiT (Xin et al. 2021), section 3.2: the last exit at even updates, all exits at odd ones."""
    joint_update = replace(update, number=update.number // 2)  # so that every group of exits gets its turn
    yield from (joint if update.number % 2 else last_exit)(model, config, batch, joint_update)


def distil_exits(
    model: torch.nn.Module, config: ElasticBertConfig, batch: Batch, update: Update
) -> Iterator[torch.Tensor]:
    """FastBERT (Liu et al. 2020), section 3.3: the inner exits learn the last exit's answers; no labels, no dropout.

    The backbone is frozen, so one pass in evaluation mode gives the teacher and its students.
    """
    model.eval()
    exits = _exits_of(config, update)
    output = model(**inputs_of(batch), exits=exits, exit_policy=NEVER)
    answers = exits_of(output, config, batch, exits)
    teacher = answers.logits.pop(config.exit_layers[-1]).detach()
    yield distillation(model, config, answers, teacher, update.options)


def _touched(model: torch.nn.Module) -> torch.Tensor:
    """Zero, with a zero gradient for every parameter: they are exchanged only where a backward pass has come by."""
    return sum(
        (0.0 * parameter.sum() for parameter in model.parameters() if parameter.requires_grad),
        torch.zeros((), device=next(model.parameters()).device),
    )


def sandwich(
    model: torch.nn.Module, config: ElasticBertConfig, batch: Batch, update: Update
) -> Iterator[torch.Tensor]:
    """The sandwich rule with inplace distillation: Kim and Cho (2021), section 3.2, at every exit.

    The full model on the task; the smallest and the sampled sub-networks on its last exit's detached answers, on the
    teacher's where there is one, or without distillation on the labels.
    """
    options = update.options
    share = 1 / (2 + options.sampled)
    exits = _exits_of(config, update)
    loss, full = task_loss(model, config, batch, update, exits, length_config=1.0, exit_policy=NEVER)
    teacher = exits_of(full, config, batch, exits).logits[exits[-1]].detach()
    teacher = teacher if update.teacher is None else update.teacher
    yield loss * share
    del loss, full
    students = subnetworks.sandwich(
        config.num_hidden_layers,
        options.sampled,
        update.draw,
        smallest=options.sandwich_rule,
        length_drop=options.length_drop,
        layer_drop=options.layer_drop,
    )
    for number, student in enumerate(students, start=1):
        if options.distillation == "none":
            loss = model(**batch, **vars(student), exits=exits).loss
        else:
            output = model(**inputs_of(batch), **vars(student), exits=exits, exit_policy=NEVER)
            computed = [layer for layer in exits if layer in student.layer_config or layer == exits[-1]]
            loss = distillation(model, config, exits_of(output, config, batch, computed), teacher, options)
        last = _touched(model) if number == len(students) else 0.0
        yield loss * share + last


OF_TEACHER = ("teacher", "hard_weight")
OF_SUBNETWORKS = ("length_drop", "layer_drop", "sampled", "sandwich_rule")
OF_DISTILLATION = ("distillation", "temperature")


@dataclass(frozen=True)
class Phase:
    """A stretch of training: its losses per update, which parameters it trains, how many backward passes they are,
    its peak learning rate where that is not the run's, and which options it reads that others do not."""

    objective: Objective
    trains: Callable[[str, ElasticBertConfig], bool] = everything
    passes: Callable[[LoopOptions], int] = lambda options: 1
    learning_rate: float | None = None
    reads: tuple[str, ...] = OF_TEACHER


@dataclass(frozen=True)
class Recipe:
    """The phases of a run, and what they need in the model's configuration and in the policy to calibrate."""

    phases: tuple[Phase, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    exit_policy: str | None = None


SANDWICH = Phase(
    sandwich,
    passes=lambda options: 2 + options.sampled,
    reads=(*OF_TEACHER, *OF_SUBNETWORKS, *OF_DISTILLATION),
)
INNER_EXITS = Phase(distil_exits, inner_exits, reads=OF_DISTILLATION)

RECIPES: dict[str, Recipe] = {
    "joint": Recipe((Phase(joint),)),
    # DeeBERT (Xin et al. 2020)
    "two_stage": Recipe((Phase(last_exit, backbone_and_last_exit), Phase(joint, inner_exits))),
    "alternating": Recipe((Phase(alternating),)),
    # BERxiT's learning to exit (Xin et al. 2021, section 3.3)
    "learned": Recipe((Phase(alternating),), {"learned_exit_head": True}, "learned"),
    # Kim and Cho 2021: LengthDrop after fine-tuning
    "sandwich": Recipe((Phase(joint), SANDWICH)),
    "self_distillation": Recipe((Phase(last_exit, backbone_and_last_exit), INNER_EXITS)),
}


def find_recipe(name: str) -> Recipe:
    """A recipe; ValueError that lists the table for another name."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is unknown; allowed: {', '.join(RECIPES)}")
    return RECIPES[name]
