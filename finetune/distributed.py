"""Several processes: how they find each other, and how their gradients meet once an update."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType

from finetune.config import LoopOptions


def start_accelerator(options: LoopOptions) -> Accelerator:
    """The accelerator; ValueError where a launcher started several processes that would each train alone."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    on_cpus = launched > 1 and not torch.cuda.is_available()
    handlers = [InitProcessGroupKwargs(backend="gloo")] if on_cpus else []  # DeepSpeed on CPUs would start none
    accelerator = Accelerator(
        mixed_precision=options.precision,
        log_with=options.tracker,
        project_dir=options.output,
        kwargs_handlers=handlers,
    )
    if accelerator.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched, but accelerate runs {accelerator.num_processes}; "
            "on CPUs set ACCELERATE_USE_CPU=true (for DeepSpeed leave it unset and set DS_ACCELERATOR=cpu)"
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("fine-tuning runs under DDP and DeepSpeed ZeRO-1 and ZeRO-2, not under FSDP")
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        if plugin.zero_stage > 2:
            raise ValueError(f"fine-tuning runs under DeepSpeed ZeRO-1 and ZeRO-2, not ZeRO-{plugin.zero_stage}")
        plugin.deepspeed_config |= {  # the loop's own: it makes the batches, and clips as its options say
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": options.max_grad_norm,
        }
    return accelerator


@contextmanager
def meeting(accelerator: Accelerator, model: torch.nn.Module, is_last: bool) -> Iterator[None]:
    """A forward and backward pass of an update; only in the last one gradients are exchanged.

    DeepSpeed exchanges and updates inside that backward pass (accelerate asks `sync_gradients`), and adds up before.
    """
    accelerator.gradient_state._set_sync_gradients(is_last)
    waits = is_last or accelerator.distributed_type == DistributedType.DEEPSPEED
    with nullcontext() if waits else accelerator.no_sync(model):
        yield
