"""Recipes as data: the phases of a fine-tuning run, each with what it trains and the losses of one update."""

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from elastic_model import ElasticBertConfig, subnetworks
from elastic_model.losses import exit_group, inplace_distillation, weighted_loss

Batch = Mapping[str, torch.Tensor]

SAMPLED = 2  # sub-networks that the sandwich rule samples beside the smallest one (Kim and Cho 2021, section 4)
EXIT_PARAMETER = re.compile(r"(?:encoder\.pooler|classifiers)\.(\d+)\.")


@dataclass(frozen=True)
class Update:
    """The number of an update, counted over the run, and random draws that are the same in every process."""

    number: int
    draw: random.Random


# (model, configuration, batch, update) -> losses, each computed when the one before has gone backward
Objective = Callable[[torch.nn.Module, ElasticBertConfig, Batch, Update], Iterator[torch.Tensor]]


def _exit_of(parameter: str, config: ElasticBertConfig) -> int | None:
    """The layer, from 1, of the exit that a parameter belongs to; None: backbone. A lone exit's head has no number."""
    found = EXIT_PARAMETER.search(parameter)
    if found:
        return int(found[1]) + 1
    return config.exit_layers[-1] if parameter.startswith("classifier.") else None


def everything(parameter: str, config: ElasticBertConfig) -> bool:
    """Trains the whole model."""
    return True


def backbone_and_last_exit(parameter: str, config: ElasticBertConfig) -> bool:
    """Trains what a model of one exit has."""
    return _exit_of(parameter, config) in (None, config.exit_layers[-1])


def inner_exits(parameter: str, config: ElasticBertConfig) -> bool:
    """Trains the exits below the last one; the backbone is frozen."""
    return not backbone_and_last_exit(parameter, config)


def joint(model: torch.nn.Module, config: ElasticBertConfig, batch: Batch, update: Update) -> Iterator[torch.Tensor]:
    """All exits (of the update's group) under the config's weighting: ElasticBERT (Liu et al. 2022), section 3.2."""
    yield model(**batch, exits=exit_group(config.exit_layers, config.exit_groups, update.number)).loss


def last_exit(
    model: torch.nn.Module, config: ElasticBertConfig, batch: Batch, update: Update
) -> Iterator[torch.Tensor]:
    """The task loss of the last exit alone."""
    yield model(**batch, exits=config.exit_layers[-1:]).loss


def alternating(
    model: torch.nn.Module, config: ElasticBertConfig, batch: Batch, update: Update
) -> Iterator[torch.Tensor]:
    """BERxiT (Xin et al. 2021), section 3.2: the last exit at even updates, all exits at odd ones."""
    yield from (joint if update.number % 2 else last_exit)(model, config, batch, update)


def distil_exits(
    model: torch.nn.Module, config: ElasticBertConfig, batch: Batch, update: Update
) -> Iterator[torch.Tensor]:
    """FastBERT (Liu et al. 2020), section 3.3: the inner exits learn the last exit's answers; no labels, no dropout.

    The backbone is frozen, so one pass in evaluation mode gives the teacher and its students.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    model.eval()
    logits = model(**inputs, exit_policy={"name": "never"}).exit_logits
    losses = [inplace_distillation(student, logits[-1], config.problem_type) for student in logits[:-1]]
    yield weighted_loss(dict(zip(config.exit_layers, losses, strict=False)), config.exit_loss)


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

    The full model on the task; the smallest and the sampled sub-networks on its last exit's detached answers.
    """
    share = 1 / (2 + SAMPLED)
    exits = exit_group(config.exit_layers, config.exit_groups, update.number)
    full = model(**batch, length_config=1.0, exits=exits)
    teacher = full.logits.detach()
    yield full.loss * share
    del full
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    students = subnetworks.sandwich(config.num_hidden_layers, SAMPLED, update.draw)
    for number, student in enumerate(students, start=1):
        logits = model(**inputs, **vars(student), exit_policy={"name": "never"}).exit_logits
        losses = {
            layer: inplace_distillation(one, teacher, config.problem_type)
            for layer, one in zip(config.exit_layers, logits, strict=True)
            if layer in student.layer_config or layer == config.exit_layers[-1]
        }
        last = _touched(model) if number == len(students) else 0.0
        yield weighted_loss(losses, config.exit_loss) * share + last


@dataclass(frozen=True)
class Phase:
    """A stretch of training: its losses per update, how many backward passes they are, which parameters it trains."""

    objective: Objective
    trains: Callable[[str, ElasticBertConfig], bool] = everything
    passes: int = 1


RECIPES: dict[str, tuple[Phase, ...]] = {
    "joint": (Phase(joint),),
    "two_stage": (Phase(last_exit, backbone_and_last_exit), Phase(joint, inner_exits)),  # DeeBERT (Xin et al. 2020)
    "alternating": (Phase(alternating),),
    "sandwich": (Phase(joint), Phase(sandwich, passes=2 + SAMPLED)),  # Kim and Cho 2021: LengthDrop after fine-tuning
    "self_distillation": (Phase(last_exit, backbone_and_last_exit), Phase(distil_exits, inner_exits)),
}


def find_recipe(name: str) -> tuple[Phase, ...]:
    """The phases of a recipe; ValueError that lists the table for another name."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is unknown; allowed: {', '.join(RECIPES)}")
    return RECIPES[name]
