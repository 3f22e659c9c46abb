"""Losses over exits: weightings, gradient equilibrium, grouped training, inplace distillation; the loss of one exit.

L_j is the loss of the exit after layer j, from 1. Every formula stands where it is computed, with its paper.
"""

import torch
from torch import nn


def _normalised(weight_of_layer):
    """Weights that sum to one over the exits trained, and whose ratios depend on the layers alone."""

    def weights(layers: list[int]) -> list[float]:
        raw = [weight_of_layer(layer) for layer in layers]
        return [weight / sum(raw) for weight in raw]

    return weights


# exit layers -> one weight per exit
EXIT_LOSSES = {
    # L = sum_j L_j: ElasticBERT's training objective (Liu et al. 2022); the operator E of Xin et al. 2022
    "sum": lambda layers: [1.0] * len(layers),
    # L = L_last: a single-exit model
    "last": lambda layers: [0.0] * (len(layers) - 1) + [1.0],
    # L = sum_j j L_j / sum_j j: PABEE (Zhou et al. 2020)
    "linear": _normalised(lambda layer: layer),
    # L = sum_j e(j) L_j / sum_j e(j): the scales e of LayerSkip's early-exit loss (Elhoushi et al. 2024)
    "mean": _normalised(lambda layer: 1.0),
    "cumulative": _normalised(lambda layer: layer * (layer + 1) / 2),  # e(j) = 1 + 2 + ... + j
    "sqrt": _normalised(lambda layer: layer**0.5),
    "inverse": _normalised(lambda layer: 1.0 / layer),
    "inverse_sqrt": _normalised(lambda layer: layer**-0.5),
}


def exit_weights(exit_loss: str, layers: list[int]) -> list[float]:
    """One weight per exit of `layers` under the weighting named `exit_loss`; ValueError for an unknown name."""
    if exit_loss not in EXIT_LOSSES:
        raise ValueError(f"exit_loss must be one of {', '.join(EXIT_LOSSES)}, got {exit_loss!r}.")
    return EXIT_LOSSES[exit_loss](layers)


def trained_exits(exit_loss: str, layers: list[int]) -> list[int]:
    """Those of `layers` that the weighting named `exit_loss` gives any weight."""
    return [layer for layer, weight in zip(layers, exit_weights(exit_loss, layers), strict=True) if weight]


def weighted_loss(losses: dict[int, torch.Tensor], exit_loss: str) -> torch.Tensor:
    """The training loss: {exit layer: scalar loss} under the weighting named `exit_loss`."""
    weights = exit_weights(exit_loss, list(losses))
    terms = [weight * loss for weight, loss in zip(weights, losses.values(), strict=True) if weight]
    return torch.stack(terms).sum()


def exit_group(exit_layers: list[int], groups: int, step: int) -> list[int]:
    """The exits trained at `step`: dealt into `groups` in turn, the last exit in every group (ElasticBERT's grouped
    training, Liu et al. 2022).

    With 12 exits and 2 groups: layers 1, 3, ..., 11, 12 at even steps, layers 2, 4, ..., 12 at odd ones.
    """
    if groups < 1:
        raise ValueError(f"exit_groups must be at least 1, got {groups}.")
    dealt = exit_layers[:-1][step % groups :: groups]
    return [*dealt, exit_layers[-1]]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, factor):
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def gradient_equilibrium(hidden: torch.Tensor, exits_from_here: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`hidden` twice, once for this exit's branch and once for the way up, with scaled gradients.

    With n exits trained at or above this layer the branch gets 1/n of its gradient and the path upward (n - 1)/n, so
    that a layer sees the mean, not the sum, of the exits above it: dL/dh_l = 1/n dL_l/dh_l + (n - 1)/n dL/dh_(l+1)
    dh_(l+1)/dh_l (Li et al. 2019, "Improved techniques for training adaptive deep networks"; Liu et al. 2022).
    """
    branch = _ScaleGradient.apply(hidden, 1.0 / exits_from_here)
    upward = _ScaleGradient.apply(hidden, (exits_from_here - 1.0) / exits_from_here)
    return branch, upward


def _mean(total: torch.Tensor, count: torch.Tensor | int, num_items: torch.Tensor | int | None) -> torch.Tensor:
    """The mean over this batch, or this batch's share of the mean over `num_items` (gradient accumulation)."""
    if num_items is None:
        return total / (count.clamp(min=1) if torch.is_tensor(count) else max(count, 1))
    return total / (num_items.to(total.device) if torch.is_tensor(num_items) else num_items)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, num_items=None) -> torch.Tensor:
    """Mean cross-entropy over the labels that are not -100; logits (..., classes), labels (...)."""
    total = nn.functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="sum")
    return _mean(total, (labels != -100).sum(), num_items)


def exit_task_loss(logits: torch.Tensor, labels: torch.Tensor, problem_type: str, num_items=None) -> torch.Tensor:
    """The loss of one exit: squared error, cross-entropy or binary cross-entropy, after `problem_type`; logits (rows,
    labels)."""
    if problem_type == "regression":
        squares = (logits.float().reshape(labels.shape) - labels.float()) ** 2
        return _mean(squares.sum(), labels.numel(), num_items)
    if problem_type == "multi_label_classification":
        total = nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="sum")
        return _mean(total, labels.numel(), num_items)
    return cross_entropy(logits, labels, num_items)


def inplace_distillation(
    logits: torch.Tensor,
    teacher: torch.Tensor,
    problem_type: str,
    mask: torch.Tensor | None = None,
    num_items=None,
    reverse: bool = False,
) -> torch.Tensor:
    """KL(teacher || student) to the full model's detached prediction (Yu and Huang 2019; Kim and Cho 2021).

    logits, teacher (rows, ..., classes), mask (rows, ...) true where a prediction counts (tokens); regression:
    squared error; multi-label: the binary divergences, averaged over labels; question answering: (rows, tokens, 2),
    mean over start and end. Kim and Cho name no direction and their code computes KL(student || teacher), `reverse`
    here; the default is the usual one. num_items as in `_mean`.
    """
    logits, teacher = logits.float(), teacher.detach().float()
    if problem_type == "regression":
        return _mean(((logits - teacher) ** 2).sum(), logits.numel(), num_items)
    if problem_type == "multi_label_classification":
        logits, teacher = (torch.stack([torch.zeros_like(x), x], dim=-1) for x in (logits, teacher))
    if problem_type == "question_answering":
        if mask is not None:
            logits, teacher = (x.masked_fill(~mask[..., None], torch.finfo(x.dtype).min) for x in (logits, teacher))
        logits, teacher, mask = logits.transpose(1, 2), teacher.transpose(1, 2), None
    student, target = logits.log_softmax(-1), teacher.log_softmax(-1)
    if reverse:
        student, target = target, student
    divergence = nn.functional.kl_div(student, target, reduction="none", log_target=True).sum(-1)
    divergence = divergence if mask is None else divergence[mask]
    return _mean(divergence.sum(), divergence.numel(), num_items)


def uncertainty_loss(uncertainty: torch.Tensor, wrong: torch.Tensor) -> torch.Tensor:
    """(u - u*)^2: BERxiT's loss of the learned exit head, predicted and actual uncertainty, (rows,) (Xin 2021)."""
    return nn.functional.mse_loss(uncertainty.float(), wrong.detach().float())


def wrong_answers(
    logits: torch.Tensor, labels: torch.Tensor, problem_type: str, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """What BERxiT's learned exit head should predict; (rows,): 1 where a row's answer is wrong, |tanh(y' - y)| in
    regression.

    logits as `inplace_distillation` reads them; labels (rows,), tokens (rows, tokens), multi-label (rows, labels),
    question answering (rows, start and end); -100 is ignored. mask (rows, tokens): the tokens that may answer a
    question, None = all.
    """
    if problem_type == "regression":
        return (logits.flatten(1) - labels.reshape(logits.shape[0], -1)).tanh().abs().mean(-1)
    if problem_type == "multi_label_classification":
        return ((logits > 0) != (labels > 0.5)).any(-1)
    classes = 1 if problem_type == "question_answering" else -1
    if problem_type == "question_answering" and mask is not None:
        logits = logits.masked_fill(~mask[..., None], -torch.inf)
    answers = logits.argmax(classes)
    labels = labels.reshape(answers.shape)  # (rows, 1) is taken as (rows,), as by the loss
    return ((answers != labels) & (labels != -100)).reshape(labels.shape[0], -1).any(-1)
