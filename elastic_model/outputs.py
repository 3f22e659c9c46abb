"""What the models return."""

from dataclasses import dataclass
from typing import TypedDict

import torch
from transformers.utils import ModelOutput


class RecordingArguments(TypedDict, total=False):
    """What every forward takes besides its own arguments, as in transformers: what to record, and in which form to
    return it."""

    output_hidden_states: bool | list[int] | None
    output_attentions: bool | None
    return_dict: bool | None


@dataclass
class ElasticBertModelOutput(ModelOutput):
    """last_hidden_state (rows, tokens, width), dropped tokens restored; pooler_output (rows, width) of the last
    exit."""

    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class ElasticBertExitOutput(ModelOutput):
    """logits (rows, labels), (rows, tokens, labels) for token heads: each row's answer, from the exit it left at.

    exit_logits: one tensor like logits per exit of the model, NaN where a row had left or the exit was not computed.
    exit_layers (rows,): the layer, from 1, that each row left at. exit_losses: one scalar per computed exit, with
    labels. exit_uncertainty (exits, rows): the learned exit head's, where the model has one.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    exit_logits: tuple[torch.Tensor, ...] | None = None
    exit_layers: torch.Tensor | None = None
    exit_losses: tuple[torch.Tensor, ...] | None = None
    exit_uncertainty: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class ElasticBertQuestionAnsweringOutput(ModelOutput):
    """start_logits and end_logits (rows, tokens), and the same per exit; the rest as in ElasticBertExitOutput."""

    loss: torch.Tensor | None = None
    start_logits: torch.Tensor | None = None
    end_logits: torch.Tensor | None = None
    exit_start_logits: tuple[torch.Tensor, ...] | None = None
    exit_end_logits: tuple[torch.Tensor, ...] | None = None
    exit_layers: torch.Tensor | None = None
    exit_losses: tuple[torch.Tensor, ...] | None = None
    exit_uncertainty: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class ElasticBertForPreTrainingOutput(ModelOutput):
    """prediction_logits (rows, tokens, vocabulary) and sop_logits (rows, 2) of the last exit; while training with
    labels no prediction_logits, since logits are computed at masked positions only. mlm_losses, sop_losses, mlm_right
    (masked tokens predicted right): a scalar per computed exit. distillation_loss: the mean of the students'."""

    loss: torch.Tensor | None = None
    prediction_logits: torch.Tensor | None = None
    sop_logits: torch.Tensor | None = None
    exit_prediction_logits: tuple[torch.Tensor, ...] | None = None
    exit_sop_logits: tuple[torch.Tensor, ...] | None = None
    exit_layers: torch.Tensor | None = None
    mlm_losses: tuple[torch.Tensor, ...] | None = None
    sop_losses: tuple[torch.Tensor, ...] | None = None
    mlm_right: tuple[torch.Tensor, ...] | None = None
    distillation_loss: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
