"""Narrower models: gates on heads and FFN neurons, their importance, and the model without some of them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from elastic_model import ElasticBertConfig
from elastic_model.modeling_elasticbert import ElasticBertExitModel

Gates = list[torch.Tensor]  # one a layer, (heads,) or (neurons,)
Loss = Callable[[ElasticBertExitModel, Mapping[str, torch.Tensor]], torch.Tensor]  # of a batch


@contextmanager
def gated(model: ElasticBertExitModel, heads: Gates, neurons: Gates) -> Iterator[None]:
    """Multiply each head's context and each FFN neuron by its gate."""
    size = model.config.attention_head_size or 0

    def by(gate: torch.Tensor):
        return lambda module, inputs: (inputs[0] * gate,)

    hooks = []
    layers: Any = model.elasticbert.encoder.layer
    for layer, head, neuron in zip(layers, heads, neurons, strict=True):
        wide = head.repeat_interleave(size)
        hooks.append(layer.attention.output.dense.register_forward_pre_hook(by(wide)))
        hooks.append(layer.output.dense.register_forward_pre_hook(by(neuron)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def loss_on_labels(model: ElasticBertExitModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The task loss of a batch, over all exits as the model's configuration weighs them, at full length."""
    loss: torch.Tensor = model(**batch, length_config=1.0).loss
    return loss


def importance(
    model: ElasticBertExitModel, batches: Iterable[Mapping[str, torch.Tensor]], loss: Loss = loss_on_labels
) -> tuple[Gates, Gates]:
    """|dL/dgate| at gates of one, summed over batches: (heads,) and (neurons,) of each layer, float64.

    First-order importance (Michel et al. 2019; Hou et al. 2020, section 2.1; Xin et al. 2022, section 4). Each
    batch's gradient is its own, so the sum does not depend on their order; the model is in evaluation mode.
    """
    config, device = model.config, model.device
    heads = [
        torch.ones(count, device=device, requires_grad=True) for count in config.num_attention_heads_per_layer or ()
    ]
    neurons = [
        torch.ones(count, device=device, requires_grad=True) for count in config.intermediate_size_per_layer or ()
    ]
    sums = [torch.zeros_like(gate, dtype=torch.float64) for gate in (*heads, *neurons)]
    was_training = model.training
    model.eval()
    for batch in batches:
        with gated(model, heads, neurons):
            value = loss(model, batch)
        for total, gradient in zip(sums, torch.autograd.grad(value, [*heads, *neurons]), strict=True):
            total += gradient.abs()
    model.train(was_training)
    return sums[: len(heads)], sums[len(heads) :]


def narrowed(model: ElasticBertExitModel, heads: list[list[int]], neurons: list[list[int]]) -> ElasticBertExitModel:
    """The model with these heads and FFN neurons of each layer alone: its matrices are really smaller."""
    size = model.config.attention_head_size or 0
    config = ElasticBertConfig.from_dict(
        {
            **model.config.to_dict(),
            "num_attention_heads_per_layer": [len(kept) for kept in heads],
            "intermediate_size_per_layer": [len(kept) for kept in neurons],
        }
    )
    weights = model.state_dict()
    for index, (kept_heads, kept_neurons) in enumerate(zip(heads, neurons, strict=True)):
        columns = torch.tensor([head * size + column for head in kept_heads for column in range(size)])
        rows = torch.tensor(kept_neurons)
        prefix = f"elasticbert.encoder.layer.{index}."
        for name in ("query", "key", "value"):
            for part in ("weight", "bias"):
                key = f"{prefix}attention.self.{name}.{part}"
                weights[key] = weights[key][columns]
        key = f"{prefix}attention.output.dense.weight"
        weights[key] = weights[key][:, columns]
        for part in ("weight", "bias"):
            key = f"{prefix}intermediate.dense.{part}"
            weights[key] = weights[key][rows]
        key = f"{prefix}output.dense.weight"
        weights[key] = weights[key][:, rows]
    narrow = type(model)(config)
    narrow.load_state_dict(weights)
    return narrow.eval().to(model.device)
