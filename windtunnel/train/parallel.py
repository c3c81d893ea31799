"""Data-parallel training with sharded weights (FSDP2) or a copy on each rank, and the few collectives that a step needs.

With one process all of this is the identity. A step's sequences are split over the ranks in order; gradients are averaged
over ranks, so the loss is scaled by the world size over the global count. Copies see the same averages and so stay equal
bit for bit.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from windtunnel.base.runtime import Runtime
from windtunnel.model.moe import Experts
from windtunnel.model.transformer import Transformer


def start_ranks(runtime: Runtime, meeting: str | None = None) -> None:
    """Joins the process group, gloo on CPUs and nccl on GPUs: the one that torchrun prepared, or the one of all who name the
    same file as their ``meeting``."""
    if runtime.world > 1 and not dist.is_initialized():
        backend = "nccl" if runtime.device.startswith("cuda") else "gloo"
        where = f"file://{meeting}" if meeting else "env://"
        dist.init_process_group(backend, init_method=where, rank=runtime.rank, world_size=runtime.world)


def shard(model: Transformer, runtime: Runtime) -> None:
    """Shards every layer as a group and the rest (embedding, last norm, head; tied ones together) as the root group."""
    if runtime.world == 1 or not runtime.sharded:
        return
    low = runtime.dtype != "float32"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if low else None,
        reduce_dtype=torch.float32 if low else None,
        cast_forward_inputs=False,
    )
    for layer in model.layers:
        if isinstance(layer.mlp, Experts):
            fully_shard(layer.mlp.router)  # stays fp32
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    for method in ("routed", "summed_loss", "log_likelihoods"):
        register_fsdp_forward_method(model, method)


def average_gradients(model: nn.Module, runtime: Runtime) -> None:
    """Gives every rank that holds a copy the mean of all ranks' gradients; slices have been averaged as they were made."""
    if runtime.world == 1 or runtime.sharded:
        return
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together)
    together /= runtime.world
    parts = together.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def sum_over_ranks(values: np.ndarray, runtime: Runtime) -> np.ndarray:
    """The element-wise sum of a float64 array over all ranks."""
    if runtime.world == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=runtime.torch_device)
    dist.all_reduce(tensor)
    return tensor.cpu().numpy()


def any_rank(flag: bool, runtime: Runtime) -> bool:
    """Whether any rank raised the flag; all ranks get the same answer at the same step."""
    return flag if runtime.world == 1 else bool(sum_over_ranks(np.array([float(flag)]), runtime)[0])


def barrier(runtime: Runtime) -> None:
    """Waits until all ranks are here."""
    if runtime.world > 1:
        dist.barrier()


def global_norm_clip(model: nn.Module, limit: float) -> float:
    """Clips the gradient to an L2 norm over all parameters of all ranks and returns the norm before clipping."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def local(tensor: Tensor) -> Tensor:
    """This rank's slice of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def share(start: int, count: int, runtime: Runtime) -> tuple[int, int]:
    """This rank's part of ``count`` sequences from ``start``: (first, number). The parts are contiguous and in rank order."""
    low = count * runtime.rank // runtime.world
    high = count * (runtime.rank + 1) // runtime.world
    return start + low, high - low
