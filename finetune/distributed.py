"""Several processes: how they find each other, and how their gradients meet once an update."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DistributedType

from finetune.config import LoopOptions


def start_accelerator(options: LoopOptions) -> Accelerator:
    """The accelerator, on the CPU where there is nothing faster; ValueError where a launcher asks for what the loop
    cannot do, or started several processes that would each train alone."""
    no_device, zero = not torch.accelerator.is_available(), _asked_for("DEEPSPEED")
    if _asked_for("FSDP"):
        raise ValueError("fine-tuning runs under DDP and DeepSpeed ZeRO-1 and ZeRO-2, not under FSDP")
    if zero and options.resume:
        raise ValueError(
            "resume: under DeepSpeed fine-tuning saves no state to continue from; start it anew, or use DDP"
        )
    if no_device and zero:
        _deepspeed_on_cpu()
    accelerator = Accelerator(
        cpu=no_device and not zero,  # with DeepSpeed, cpu=True would mean: without DeepSpeed
        mixed_precision=options.precision,
        log_with=options.tracker,
        project_dir=options.output,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if no_device and zero else None,
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        raise ValueError(
            f"{launched} processes were launched, but accelerate runs {accelerator.num_processes}; launch with "
            "torchrun, or with accelerate launch and a config of pretrain/accelerate"
        )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        if plugin.zero_stage > 2:
            raise ValueError(f"fine-tuning runs under DeepSpeed ZeRO-1 and ZeRO-2, not ZeRO-{plugin.zero_stage}")
        plugin.deepspeed_config |= {  # the loop's own: it makes the batches, and clips as its options say
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": options.max_grad_norm,
            "zero_force_ds_cpu_optimizer": False,
        }
    return accelerator


def _asked_for(what: str) -> bool:
    """Whether `accelerate launch` was given a config for DEEPSPEED or FSDP."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


def _deepspeed_on_cpu() -> None:
    """Tell DeepSpeed not to look for a GPU, nor to compile a collective of its own when it starts: gloo does."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def saves(accelerator: Accelerator) -> bool:
    """Whether this process writes the state of an interrupted run: DeepSpeed's parts of it are in every process."""
    return accelerator.is_main_process and accelerator.distributed_type != DistributedType.DEEPSPEED


@contextmanager
def meeting(accelerator: Accelerator, model: torch.nn.Module, is_last: bool) -> Iterator[None]:
    """A forward and backward pass of an update; only in the last one gradients are exchanged.

    DeepSpeed exchanges and updates inside that backward pass (accelerate asks `sync_gradients`), and adds up before.
    """
    accelerator.gradient_state._set_sync_gradients(is_last)
    waits = is_last or accelerator.distributed_type == DistributedType.DEEPSPEED
    with nullcontext() if waits else accelerator.no_sync(model):
        yield
