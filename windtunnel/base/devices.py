"""Which GPUs a word names, which this machine has, and how many workers are asked for. Needs no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from windtunnel.base.errors import UserError

_NVIDIA = Path("/proc/driver/nvidia/gpus")


def gpu_numbers(devices: str) -> list[str]:
    """The GPUs of a word such as "0,1" or "cuda:0,1", in order; none for "cuda" and "cpu"."""
    parts = [part.strip() for part in devices.removeprefix("cuda:").split(",")]
    return parts if all(part.isdigit() for part in parts) else []


def visible_gpus() -> list[str]:
    """Numbers of the NVIDIA GPUs that this process may use (Linux; elsewhere ``--devices`` says it)."""
    try:
        count = len(list(_NVIDIA.iterdir()))
    except OSError:
        return []
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return gpu_numbers(allowed) if allowed is not None else [str(number) for number in range(count)]


@dataclass(frozen=True)
class Crew:
    """How many workers small stages get: a number or ``auto`` in all (one a core or GPU), and for each GPU."""

    workers: str = "auto"
    per_gpu: str = "1"

    def __post_init__(self) -> None:
        for name, value in (("--workers", self.workers), ("--workers-per-gpu", self.per_gpu)):
            if value != "auto" and not (value.isdecimal() and 1 <= int(value) <= 1024):
                raise UserError(name, f"expected auto or a number from 1 on, got {value[:40]!r}")


USUAL = Crew()
"""One worker for each core or GPU."""
