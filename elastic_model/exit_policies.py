"""Exit policies: from the exits that a row has passed to whether it leaves, one function each.

Every task is read as groups of categorical distributions, so that a policy knows nothing of tasks: a classification
row is one group over the labels, a multi-label row one group of two classes per label, a token row one group per real
token, a question-answering row two groups (start, end) over the real tokens. The worst group decides.
"""

import math
from dataclasses import dataclass

import torch

from .checks import check_exit_policy, thresholds_of


@dataclass
class Prediction:
    """What one exit says of the rows inside: log_probs (rows, groups, classes) in float32; valid (rows, groups) or
    None = all; classes: how many count, a number or (rows, 1); regression: values (rows, values); uncertainty (rows,)
    of a learned exit head."""

    log_probs: torch.Tensor
    valid: torch.Tensor | None = None
    classes: torch.Tensor | int = 0
    values: torch.Tensor | None = None
    uncertainty: torch.Tensor | None = None

    def select(self, rows: torch.Tensor) -> "Prediction":
        """The same for some rows (a mask or indices)."""
        pick = {name: value[rows] if torch.is_tensor(value) else value for name, value in vars(self).items()}
        return Prediction(**pick)

    def worst(self, scores: torch.Tensor) -> torch.Tensor:
        """(rows, groups) uncertainties -> (rows,), the largest of a row's valid groups."""
        return (scores if self.valid is None else scores.masked_fill(~self.valid, -torch.inf)).amax(-1)

    def everywhere(self, agreed: torch.Tensor) -> torch.Tensor:
        """(rows, groups) booleans -> (rows,), true where all of a row's valid groups are true."""
        return (agreed if self.valid is None else agreed | ~self.valid).all(-1)


def predict(logits: torch.Tensor, problem_type: str, mask: torch.Tensor | None = None, uncertainty=None) -> Prediction:
    """Read an exit's logits as a Prediction.

    logits (rows, labels); tokens (rows, tokens, labels) and question answering (rows, tokens, 2) with mask (rows,
    tokens), true at real tokens. Computed in float32 from `log_softmax`: finite for every finite logit.
    """
    logits = logits.float()
    if problem_type == "regression":
        nothing = logits.new_empty(len(logits), 0, 0)  # no distribution
        return Prediction(nothing, values=logits, uncertainty=uncertainty)
    if problem_type == "multi_label_classification":
        log_probs = torch.stack(
            [-torch.nn.functional.softplus(logits), -torch.nn.functional.softplus(-logits)], dim=-1
        )
        return Prediction(log_probs, None, 2, uncertainty=uncertainty)
    if problem_type == "token_classification":
        return Prediction(logits.log_softmax(-1), mask, logits.shape[-1], uncertainty=uncertainty)
    if problem_type == "question_answering":
        logits = logits.transpose(1, 2)  # (rows, start and end, tokens)
        classes = logits.shape[-1] if mask is None else mask.sum(-1, keepdim=True)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None], torch.finfo(logits.dtype).min)
        return Prediction(logits.log_softmax(-1), None, classes, uncertainty=uncertainty)
    return Prediction(logits.log_softmax(-1)[:, None], None, logits.shape[-1], uncertainty=uncertainty)


def normalised_entropy(prediction: Prediction) -> torch.Tensor:
    """Entropy / ln(classes) of the least certain group, 0 (certain) to 1 (uniform); (rows,). FastBERT; DeeBERT
    in nats."""
    entropy = torch.special.entr(prediction.log_probs.exp()).sum(-1)
    classes = prediction.classes
    largest = classes.clamp(min=2).log() if torch.is_tensor(classes) else math.log(max(classes, 2))
    return prediction.worst(entropy / largest)


def top_probability(prediction: Prediction) -> torch.Tensor:
    """Probability of the likeliest class, of the least certain group; (rows,)."""
    return -prediction.worst(-prediction.log_probs.amax(-1).exp())


def top_margin(prediction: Prediction) -> torch.Tensor:
    """Probability of the likeliest class minus that of the next, of the least certain group; (rows,)."""
    top = prediction.log_probs.topk(min(2, prediction.log_probs.shape[-1]), dim=-1).values.exp()
    return -prediction.worst(-(top[..., 0] - (top[..., 1] if top.shape[-1] > 1 else 0.0)))


def _patience(history, threshold, policy):
    """PABEE (Zhou et al. 2020): the last `patience` + 1 exits agree, in regression each within its threshold of the
    one before."""
    recent = history[-policy["patience"] - 1 :]
    if len(recent) <= policy["patience"]:
        return _nobody(history)
    if recent[-1].values is not None:
        near = [
            ((after.values - before.values).abs() < limit).all(-1)
            for before, after, limit in zip(recent[:-1], recent[1:], threshold[-policy["patience"] :], strict=True)
        ]
        return torch.stack(near).all(0)
    votes = torch.stack([prediction.log_probs.argmax(-1) for prediction in recent])
    return recent[-1].everywhere((votes == votes[-1]).all(0))


def _voting(history, threshold, policy):
    """Sun et al. 2021: some class has `votes` votes among the exits so far."""
    if len(history) < policy["votes"]:
        return _nobody(history)
    votes = torch.stack([prediction.log_probs.argmax(-1) for prediction in history])
    most = (votes[:, None] == votes[None]).sum(0).amax(0)  # (rows, groups): votes of the class with the most
    return history[-1].everywhere(most >= policy["votes"])


def _nobody(history):
    return history[-1].log_probs.new_zeros(len(history[-1].log_probs), dtype=torch.bool)


POLICIES = {
    "entropy": lambda history, threshold, policy: normalised_entropy(history[-1]) < threshold,
    "confidence": lambda history, threshold, policy: top_probability(history[-1]) > threshold,
    "margin": lambda history, threshold, policy: top_margin(history[-1]) > threshold,
    # BERxiT (Xin et al. 2021): the learned exit head's predicted uncertainty is low
    "learned": lambda history, threshold, policy: history[-1].uncertainty < threshold,
    "patience": _patience,
    "voting": _voting,
}


COMPARED = ("entropy", "confidence", "margin", "learned")  # one number an exit against a threshold


def leaving(policy: dict, history: list[Prediction], positions: list[int], exit_layers: list[int]) -> torch.Tensor:
    """Which rows leave at the last exit of `history`: (rows,) booleans.

    history: the exits that the rows inside have passed; positions: their places in `exit_layers`, the model's exits,
    which give each exit its own threshold. The last exit is never asked: every row that is still inside leaves there.
    """
    if policy["name"] == "never":
        return _nobody(history)
    if policy["name"] == "constant":
        return ~_nobody(history) if exit_layers[positions[-1]] >= policy["layer"] else _nobody(history)
    if "threshold" not in policy:
        return POLICIES[policy["name"]](history, None, policy)
    thresholds = thresholds_of(policy, len(exit_layers))
    passed = [thresholds[position] for position in positions]
    return POLICIES[policy["name"]](history, passed if policy["name"] == "patience" else passed[-1], policy)


def sweep(policies: list[dict], exit_logits, exit_layers: list[int], problem_type: str, mask=None, uncertainty=None):
    """Where each row leaves under each of many settings of one policy: (settings, rows) places among the exits.

    exit_logits (exits, rows, ...) array or tensor, all computed; mask (rows, tokens); uncertainty (exits, rows) for
    "learned". Certainty is computed once for all settings; no further pass through the model.
    """
    if len(exit_logits) != len(exit_layers):
        raise ValueError(f"exit_logits must have one entry per exit, {len(exit_layers)}, got {len(exit_logits)}.")
    policies = [check_exit_policy(policy, len(exit_layers), problem_type) or {"name": "never"} for policy in policies]
    exit_logits, history = torch.as_tensor(exit_logits), []
    mask = None if mask is None else torch.as_tensor(mask).bool()
    left = torch.full((len(policies), exit_logits.shape[1]), len(exit_layers) - 1, device=exit_logits.device)
    together = bool(policies) and all(policy["name"] in COMPARED for policy in policies)
    for position in range(len(exit_layers) - 1 if any(one["name"] != "never" for one in policies) else 0):
        doubt = None if uncertainty is None else torch.as_tensor(uncertainty)[position]
        history.append(predict(exit_logits[position], problem_type, mask, doubt))
        if together:
            limits = torch.tensor([thresholds_of(policy, len(exit_layers))[position] for policy in policies])
            leaves = POLICIES[policies[0]["name"]](history, limits[:, None].to(exit_logits.device), policies[0])
        else:
            positions = list(range(position + 1))
            leaves = torch.stack([leaving(one, history, positions, exit_layers) for one in policies])
        left = torch.where(leaves & (left == len(exit_layers) - 1), position, left)
    return left


def simulate(policy, exit_logits, exit_layers: list[int], problem_type: str, mask=None, uncertainty=None):
    """What a policy answers, (rows, ...), and the layer, from 1, that each row leaves at, (rows,): tensors, from the
    logits of all exits. Arguments as in `sweep`."""
    exit_logits = torch.as_tensor(exit_logits)
    (left,) = sweep([policy], exit_logits, exit_layers, problem_type, mask, uncertainty)
    layers = torch.as_tensor(exit_layers, device=left.device)
    return exit_logits[left, torch.arange(len(left), device=left.device)], layers[left]
