"""What the numbers run on: device, threads, dtype, compiler, ranks, and the numeric class that follows from them."""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import sys
from dataclasses import asdict, dataclass
from typing import Any

import torch

from windtunnel.base.compiler import has_compiler
from windtunnel.base.devices import gpu_numbers
from windtunnel.base.errors import RecipeError

_MALLOC_MMAP_THRESHOLD, _MALLOC_TRIM_THRESHOLD, _MALLOC_TOP_PAD = -3, -1, -2
_LARGEST_THRESHOLD = 32 * 1024 * 1024
"""The largest that glibc takes; more is ignored without a word."""


@dataclass(frozen=True)
class Runtime:
    """Where a stage runs. ``compiled`` is whether the step is compiled; ``rank`` and ``world`` are of the process group, whose
    ranks hold slices of the weights (``sharded``) or a copy each."""

    device: str = "cpu"
    threads: int = 1
    dtype: str = "float32"
    compiled: bool = True
    rank: int = 0
    world: int = 1
    sharded: bool = True

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device)

    def numeric_class(self) -> dict[str, Any]:
        """What must be equal for two runs to agree bit for bit."""
        return {
            "device": torch.cuda.get_device_name(self.torch_device)
            if self.device.startswith("cuda")
            else platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": self.threads,
            "dtype": self.dtype,
            "compiled": self.compiled,
            "world": self.world,
            "torch": torch.__version__.split("+")[0],
            **({"copies": True} if self.world > 1 and not self.sharded else {}),
        }

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def choose(
    devices: str | None = None, threads: int | None = None, *, compiled: bool | None = None, sharded: bool = True
) -> Runtime:
    """The runtime for this process: what it sees, restricted by ``devices`` ("cpu", "cuda", "cuda:1", "0,1").

    Raises:
        RecipeError: a device that is not there.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    wanted = devices or ("cuda" if torch.cuda.is_available() else "cpu")
    numbers = gpu_numbers(wanted)
    if numbers:
        wanted = f"cuda:{numbers[local % len(numbers)]}"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(
            "--devices", f"expected a device of this machine, got {devices!r}", "use 'cpu', no GPU is visible here"
        )
    if wanted not in ("cpu", "cuda") and not wanted.startswith("cuda:"):
        raise RecipeError(
            "--devices", f"expected 'cpu', 'cuda', 'cuda:N' or GPU numbers such as '0,1', got {devices!r}"
        )
    if wanted == "cuda":
        wanted = f"cuda:{local}"
    on_cpu = wanted == "cpu"
    able = has_compiler() if on_cpu else True
    return Runtime(
        device=wanted,
        threads=threads or (os.cpu_count() or 1 if on_cpu else 4),
        dtype="float32" if on_cpu else "bfloat16",
        compiled=able if compiled is None else compiled and able,
        rank=rank,
        world=world,
        sharded=sharded,
    )


def prepare(runtime: Runtime) -> None:
    """Sets this process up: threads, denormals, allocator, compiler limits, determinism.

    Compiled code on several threads splits reductions in an order that changes from run to run unless deterministic
    algorithms are asked for; on one thread it is repeatable as it is.
    """
    torch.set_num_threads(runtime.threads)
    torch.set_flush_denormal(True)
    _tune_malloc()
    torch.use_deterministic_algorithms(runtime.device == "cpu" and runtime.threads > 1)
    # Filling empty memory is only a guard for those who read it, and costs time.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 (a property that stubs do not know)
    if runtime.device.startswith("cuda"):
        torch.cuda.set_device(runtime.torch_device)
        torch.set_float32_matmul_precision("high")
    if runtime.compiled:
        dynamo = importlib.import_module("torch._dynamo")  # only when a step will be compiled: it costs seconds
        dynamo.config.recompile_limit = 64
        dynamo.config.fail_on_recompile_limit_hit = True
        dynamo.config.automatic_dynamic_shapes = False


def _tune_malloc() -> None:
    """Keeps freed activations in the process instead of giving them back and faulting them in again (glibc only)."""
    _mallopt(
        (_MALLOC_MMAP_THRESHOLD, _LARGEST_THRESHOLD), (_MALLOC_TRIM_THRESHOLD, 1 << 30), (_MALLOC_TOP_PAD, 64 << 20)
    )


def return_large_blocks(wanted: bool) -> None:
    """Whether blocks of 2 MiB and more go back to the system when they are freed (glibc only).

    Layers that are computed again leave small blocks between large ones: a heap that keeps all holes grew to twice what the
    tensors take (docs/lab-log.md).
    """
    _mallopt((_MALLOC_MMAP_THRESHOLD, 2 << 20 if wanted else _LARGEST_THRESHOLD))


def _mallopt(*settings: tuple[int, int]) -> None:
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    for name, value in settings:
        mallopt(name, value)


def peak_memory() -> int:
    """The largest resident memory of this process so far, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
