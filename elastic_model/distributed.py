"""One process or many: how the model and its optimizer are spread over them, and gathered into one checkpoint again.

What `accelerate launch` was given decides: every process holds all of it (one process, DDP), DeepSpeed partitions it
(ZeRO-1, 2, 3), or torch's `fully_shard` does (FSDP2). All take the same steps on the same global batch. Their state
goes in and out as whole tensors by the parameters' names, so that a checkpoint is the same in every mode: an ordinary
`from_pretrained` folder, resumed in any mode by any number of processes.
"""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, InitProcessGroupKwargs, broadcast_object_list
from torch import nn

from .folders import working_in

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state, each of the parameter's shape; beside them the number of steps
LONGEST_WAIT = timedelta(days=1)  # for the process that prepares text while the others wait; usually it is 10 minutes
Tensors = dict[str, torch.Tensor]
Result = TypeVar("Result")


def start_accelerator(precision: str, tracker: str | None, logs: Path) -> Accelerator:
    """The accelerator, on the CPU where there is nothing faster. precision: no or bf16; tracker: the name of one that
    accelerate knows; logs: the folder for what it writes.

    ValueError where the launcher asked for more processes than train together, or the tracker is not installed.
    """
    _check_launcher()
    no_device, deepspeed = not torch.accelerator.is_available(), _asked_for("DEEPSPEED")
    if no_device:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # accelerate imports DeepSpeed, which would look for one
        if deepspeed:
            _without_compiled_collective()
    if _asked_for("FSDP"):  # else `from_pretrained` reads weights in the first process alone, for accelerate to send
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    backend = {"backend": "gloo"} if no_device and deepspeed else {}
    accelerator = Accelerator(
        cpu=no_device and not deepspeed,  # with DeepSpeed, cpu=True would mean: without DeepSpeed
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT, **backend)],
        mixed_precision=precision,
        log_with=tracker,
        project_dir=logs,
        step_scheduler_with_optimizer=False,
    )
    _check_processes(accelerator)
    if deepspeed:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # under ZeRO-3 `from_pretrained` would part the weights, as `Partitioned` does
    if tracker and not accelerator.log_with:  # accelerate leaves it out without a word
        raise ValueError(f"tracker {tracker!r} is not installed: pip install {tracker}, or leave it out")
    return accelerator


def holds_parts(accelerator: Accelerator) -> bool:
    """Whether each process will hold a part of the model only: ZeRO-3, FSDP."""
    plugin = accelerator.deepspeed_plugin
    return _asked_for("FSDP") or (plugin is not None and plugin.zero_stage == 3)


def _asked_for(what: str) -> bool:
    """Whether `accelerate launch` was given a config for DEEPSPEED or FSDP."""
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() == "true"


def _without_compiled_collective() -> None:
    """Tell DeepSpeed to leave collectives on a CPU to gloo, and to compile none of its own when it starts.

    A run that is killed while it compiles leaves a lock on which every later one would wait.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _check_launcher() -> None:
    """ValueError where the environment asks for more processes than a launcher started."""
    processes, known = os.environ.get("WORLD_SIZE", "1"), {"RANK", "LOCAL_RANK"} & os.environ.keys()
    if processes != "1" and not known:
        raise ValueError(
            f"WORLD_SIZE is {processes}, but no launcher started this process (RANK is not set): unset it, or use "
            "accelerate launch with a config of pretrain/accelerate"
        )
    if "WORLD_SIZE" not in os.environ and "MASTER_PORT" in os.environ and "ACCELERATE_USE_CPU" in os.environ:
        raise ValueError(
            "accelerate launch was asked for several processes on a CPU but starts one (--cpu, or distributed_type: "
            "MULTI_CPU); leave that out and use --config_file pretrain/accelerate/ddp.yaml"
        )


def _check_processes(accelerator: Accelerator) -> None:
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != asked:
        raise ValueError(
            f"the launcher started {asked} processes, but accelerate joined {accelerator.num_processes}: launch with "
            "torchrun, or with accelerate launch and a config of pretrain/accelerate"
        )


def adamw(
    model: nn.Module, rate: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> torch.optim.AdamW:
    """AdamW over the parameters that require a gradient, without decay on biases and LayerNorms."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trained if parameter.ndim > 1]
    other = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": other, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=eps, fused=True)  # a sixth of the time on CPUs


@torch.no_grad()
def _gather(
    accelerator: Accelerator, tensors: Iterator[tuple[str, torch.Tensor]], everywhere: bool = False
) -> Tensors:
    """Whole tensors, one after another: where they are not wanted each is dropped at once."""
    kept = {}
    for name, tensor in tensors:
        if everywhere or accelerator.is_main_process:
            kept[name] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
    return kept


class Replicated:
    """All of the model and its optimizer in every process: one process, or DDP.

    `model` is called as any module; gradients and updates go through here.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.AdamW, clip_norm: float):
        self.accelerator = accelerator
        self.clip_norm = clip_norm
        self.optimizer = optimizer
        self.model, _ = accelerator.prepare(model, optimizer)
        self.parameters = dict(model.named_parameters())

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Around a forward and backward pass; gradients are exchanged in the `last` of an update, which must reach
        every parameter that is trained."""
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of this process's part of the loss."""
        loss.backward()

    def step(self, rate: float) -> float:
        """Clip the averaged gradients and take the optimizer's step, unless they are not finite; -> their norm."""
        norm = self._clip()
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _clip(self) -> float:
        return float(nn.utils.clip_grad_norm_(self.parameters.values(), self.clip_norm))

    def weights(self, everywhere: bool = False) -> Tensors:
        """Every parameter in float32, on the CPU of the main process, or of all. All processes call this."""
        whole = ((name, self._whole(one)) for name, one in self.parameters.items())
        return _gather(self.accelerator, whole, everywhere)

    def optimizer_tensors(self) -> Tensors:
        """AdamW's state as NAME.exp_avg, NAME.exp_avg_sq, NAME.step, on the CPU of the main process. All processes
        call this."""
        state = self.optimizer.state
        tensors = (
            (f"{name}.{key}", self._whole(value))
            for name, parameter in self.parameters.items()
            for key, value in state.get(parameter, {}).items()
        )
        return _gather(self.accelerator, tensors)

    def load_optimizer(self, tensors: Tensors) -> None:
        """What `optimizer_tensors` gave."""
        for name, parameter in self.parameters.items():
            if f"{name}.step" in tensors:
                self.optimizer.state[parameter] = {
                    "step": tensors[f"{name}.step"].to(parameter.device),
                    **{key: self._part(tensors[f"{name}.{key}"], parameter) for key in MOMENTS},
                }

    def close(self) -> None:
        """Leave the model as an ordinary one in float32, to be given its weights; not where processes hold parts."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def _part(self, whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """What this process holds of a tensor that belongs to `parameter`."""
        return whole.to(parameter.device)


class Sharded(Replicated):
    """FSDP2: torch's `fully_shard` on every layer and on the model, as the launcher's fsdp_config says.

    Applied here and not by accelerate, which shards on GPUs only: so a CPU runs what a GPU runs.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        make_optimizer: Callable[[nn.Module], torch.optim.AdamW],
        clip_norm: float,
    ):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, OffloadPolicy, fully_shard

        plugin = getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()
        if plugin.fsdp_version != 2:
            raise ValueError(f"fsdp_version must be 2, got {plugin.fsdp_version}; see pretrain/accelerate/fsdp2.yaml")
        reduced = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        settings: dict[str, Any] = {
            "mesh": init_device_mesh(accelerator.device.type, (accelerator.num_processes,)),
            "reshard_after_forward": plugin.reshard_after_forward,
            "offload_policy": plugin.cpu_offload or OffloadPolicy(),
            "mp_policy": reduced if accelerator.mixed_precision == "bf16" else MixedPrecisionPolicy(),
        }
        model.to(accelerator.device)
        for layer in model.get_submodule("elasticbert.encoder.layer").children():
            fully_shard(layer, **settings)
        fully_shard(model, **settings)
        self.accelerator = accelerator
        self.clip_norm = clip_norm
        self.model = model
        self.optimizer = make_optimizer(model)
        self.parameters = dict(model.named_parameters())

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def _clip(self) -> float:
        return float(self._whole(nn.utils.clip_grad_norm_(self.parameters.values(), self.clip_norm)))

    def _whole(self, tensor: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import DTensor

        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _part(self, whole: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        part = torch.zeros_like(parameter, requires_grad=False)
        assert isinstance(parameter, DTensor) and isinstance(part, DTensor)
        mesh = parameter.device_mesh
        distributed = distribute_tensor(whole.to(mesh.device_type), mesh, parameter.placements)
        part.to_local().copy_(distributed.to_local())  # offloaded, a part lies on the CPU and the mesh elsewhere
        return part


class Partitioned:
    """DeepSpeed's ZeRO, as the launcher's deepspeed_config says; methods as `Replicated`. Its engine clips, skips and
    updates.

    Optimizer state goes in and out through DeepSpeed's access to whole tensors, not through its checkpoints: those
    are pickles, and tied to the number of processes.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.AdamW, clip_norm: float):
        accelerator.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": 1,  # for its log alone: `micro_batch` says when an update ends
            "gradient_accumulation_steps": 1,
            "gradient_clipping": clip_norm,
            "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is as fast, and needs no compiler
        }
        weights = {name: one.detach().to("cpu", copy=True) for name, one in model.named_parameters()}
        self.accelerator = accelerator
        self.model, _ = accelerator.prepare(model, optimizer)
        self.zero = self.model.optimizer
        everything = dict(self.model.module.named_parameters())
        self.parameters = {name: one for name, one in everything.items() if one.requires_grad}
        self.frozen = {name: weights.pop(name) for name in everything.keys() - self.parameters.keys()}
        for name, whole in weights.items():  # in bf16 the float32 masters were made from rounded weights
            self._set(name, whole)
        self._start_optimizer()

    def _start_optimizer(self) -> None:
        """AdamW's state before its first step. DeepSpeed finds the state of a parameter by links that it makes in the
        first step, when only the first group of parameters has a state: so it gets one for all of them before."""
        stage3 = self.accelerator.deepspeed_plugin.zero_stage == 3
        for flat in self.zero.fp32_partitioned_groups_flat if stage3 else self.zero.single_partition_of_fp32_groups:
            moments = {key: torch.zeros_like(flat) for key in MOMENTS}
            self.zero.optimizer.state[flat] = {"step": torch.zeros((), device=flat.device), **moments}
        if not stage3:
            self.zero._lazy_init_hp_params_optimizer_state()

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: torch.Tensor) -> None:
        self.model.backward(loss)

    def step(self, rate: float) -> float:
        for group in self.zero.param_groups:
            group["lr"] = rate
        self.model.step()
        return float(self.model.get_global_grad_norm())

    def weights(self, everywhere: bool = False) -> Tensors:
        from deepspeed.utils import safe_get_full_fp32_param

        trained = ((name, safe_get_full_fp32_param(one)) for name, one in self.parameters.items())
        return _gather(self.accelerator, chain(trained, self.frozen.items()), everywhere)

    def optimizer_tensors(self) -> Tensors:
        from deepspeed.utils import safe_get_full_optimizer_state

        taken = next(iter(self.zero.optimizer.state.values()))["step"]
        steps = ((f"{name}.step", taken) for name in self.parameters)
        moments = (
            (f"{name}.{key}", safe_get_full_optimizer_state(parameter, key))
            for name, parameter in self.parameters.items()
            for key in MOMENTS
        )
        return _gather(self.accelerator, steps) | _gather(self.accelerator, moments)

    def load_optimizer(self, tensors: Tensors) -> None:
        if not tensors:  # of a run whose every update was skipped
            return
        for state in self.zero.optimizer.state.values():
            state["step"].copy_(tensors[f"{next(iter(self.parameters))}.step"])
        for name in self.parameters:
            for key in MOMENTS:
                self._set(name, tensors[f"{name}.{key}"], key)

    def close(self) -> None:
        self.model.destroy()
        self.model.module.float()
        self.accelerator.free_memory()

    def _set(self, name: str, whole: torch.Tensor, *key: str) -> None:
        """Write a parameter's float32 master, or the moment `key` of it: the part that this process holds."""
        from deepspeed import utils

        parameter = self.parameters[name]
        whole = whole.to(parameter.device)
        if not hasattr(parameter, "ds_id"):  # stages 1 and 2
            setter = utils.safe_set_full_optimizer_state if key else utils.safe_set_full_fp32_param
            setter(parameter, whole, *key)
            return
        size, rank = parameter.ds_tensor.numel(), self.accelerator.process_index  # the last part is padded
        padded = nn.functional.pad(whole.flatten(), (0, size * self.accelerator.num_processes - whole.numel()))
        setter = utils.safe_set_local_optimizer_state if key else utils.safe_set_local_fp32_param
        setter(parameter, padded[rank * size : (rank + 1) * size], *key)


Engine = Replicated | Partitioned


def start_engine(
    accelerator: Accelerator,
    model: nn.Module,
    make_optimizer: Callable[[nn.Module], torch.optim.AdamW],
    clip_norm: float,
) -> Engine:
    """The engine for what the launcher was asked for; it trains the parameters that require a gradient."""
    if accelerator.deepspeed_plugin:
        return Partitioned(accelerator, model, make_optimizer(model), clip_norm)
    if _asked_for("FSDP"):
        return Sharded(accelerator, model, make_optimizer, clip_norm)
    return Replicated(accelerator, model, make_optimizer(model), clip_norm)


def on_main_process(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """`work()` in the main process while the others wait, and what it gives in all of them; an error there ends all of
    them, none waits for ever."""
    error: Exception | None = None
    results: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            results = [work()]
        except Exception as caught:
            error = caught
    failures = accelerator.reduce(torch.tensor(float(error is not None), device=accelerator.device), "sum")
    if error is not None:
        raise error
    if failures:
        raise ValueError("the main process failed, its error says why")
    return broadcast_object_list(results)[0]


@contextmanager
def working_together_in(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """The folder is this job's, in all its processes, until the block ends; ValueError where another is at work
    there."""
    with ExitStack() as held:
        on_main_process(accelerator, lambda: held.enter_context(working_in(folder)))
        yield
