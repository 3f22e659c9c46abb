"""The ranges of what linear layers read, seen on sample rows: what fixed activation scales are made of."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from export.checkpoint import Checkpoint


@torch.inference_mode()
def input_ranges(checkpoint: Checkpoint, rows: Sequence[Any]) -> dict[str, tuple[float, float]]:
    """Least and largest input of every linear layer, by its name below a task's head, over rows run one by one."""
    seen: dict[str, tuple[float, float]] = {}
    prefix = "elasticbert." if checkpoint.architecture == "ElasticBertModel" else ""

    def watch(name: str):
        def hook(module, inputs):
            low, high = float(inputs[0].min()), float(inputs[0].max())
            before = seen.get(name, (low, high))
            seen[name] = (min(before[0], low), max(before[1], high))

        return hook

    linear = [(name, module) for name, module in checkpoint.model.named_modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(watch(f"{prefix}{name}")) for name, module in linear]
    policies = (
        [{"name": "constant", "layer": layer} for layer in checkpoint.config.exit_layers]
        if prefix  # the bare model pools at one exit at a time
        else [{"name": "never"}]
    )
    try:
        for row in rows:
            types = {"token_type_ids": torch.tensor([row.type_ids])} if checkpoint.config.type_vocab_size > 1 else {}
            for policy in policies:
                checkpoint.model(input_ids=torch.tensor([row.ids]), **types, exit_policy=policy, length_config=1.0)
    finally:
        for one in hooks:
            one.remove()
    return seen
