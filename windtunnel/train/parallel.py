"""Data-parallel training with sharded weights (FSDP2) and the few collectives that a step needs.

With one process all of this is the identity. A step's sequences are split over the ranks in order; gradients are averaged
over ranks, so the loss is scaled by the world size over the global count.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from windtunnel.base.runtime import Runtime
from windtunnel.model.transformer import Transformer


def start_ranks(runtime: Runtime) -> None:
    """Joins the process group that torchrun prepared: gloo on CPUs, nccl on GPUs."""
    if runtime.world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if runtime.device.startswith("cuda") else "gloo")


def shard(model: Transformer, runtime: Runtime) -> None:
    """Shards every layer as a group and the rest (embedding, last norm, head; tied ones together) as the root group."""
    if runtime.world == 1:
        return
    low = runtime.dtype != "float32"
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if low else None,
        reduce_dtype=torch.float32 if low else None,
        cast_forward_inputs=False,
    )
    for layer in model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


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
