"""Recipes as data: the phases of a fine-tuning run, each with what it trains and the losses of one update."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from elastic_model import ElasticBertConfig
from elastic_model.losses import exit_group, inplace_distillation, weighted_loss

Batch = Mapping[str, torch.Tensor]
# (model, configuration, batch, number of the update) -> losses, each computed when the one before has gone backward
Objective = Callable[[torch.nn.Module, ElasticBertConfig, Batch, int], Iterator[torch.Tensor]]

EXIT_PARAMETER = re.compile(r"(?:encoder\.pooler|classifiers)\.(\d+)\.")


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


def joint(model: torch.nn.Module, config: ElasticBertConfig, batch: Batch, update: int) -> Iterator[torch.Tensor]:
    """All exits (of the update's group) under the config's weighting: ElasticBERT (Liu et al. 2022), section 3.2."""
    yield model(**batch, exits=exit_group(config.exit_layers, config.exit_groups, update)).loss


def last_exit(model: torch.nn.Module, config: ElasticBertConfig, batch: Batch, update: int) -> Iterator[torch.Tensor]:
    """The task loss of the last exit alone."""
    yield model(**batch, exits=config.exit_layers[-1:]).loss


def alternating(
    model: torch.nn.Module, config: ElasticBertConfig, batch: Batch, update: int
) -> Iterator[torch.Tensor]:
    """BERxiT (Xin et al. 2021), section 3.2: the last exit at even updates, all exits at odd ones."""
    yield from (joint if update % 2 else last_exit)(model, config, batch, update)


def distil_exits(
    model: torch.nn.Module, config: ElasticBertConfig, batch: Batch, update: int
) -> Iterator[torch.Tensor]:
    """FastBERT (Liu et al. 2020), section 3.3: the inner exits learn the last exit's answers; no labels, no dropout.

    The backbone is frozen, so one pass in evaluation mode gives the teacher and its students.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    model.eval()
    logits = model(**inputs, exit_policy={"name": "never"}).exit_logits
    losses = [inplace_distillation(student, logits[-1], config.problem_type) for student in logits[:-1]]
    yield weighted_loss(dict(zip(config.exit_layers, losses, strict=False)), config.exit_loss)


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
    "self_distillation": (Phase(last_exit, backbone_and_last_exit), Phase(distil_exits, inner_exits)),
}


def find_recipe(name: str) -> tuple[Phase, ...]:
    """The phases of a recipe; ValueError that lists the table for another name."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r} is unknown; allowed: {', '.join(RECIPES)}")
    return RECIPES[name]
