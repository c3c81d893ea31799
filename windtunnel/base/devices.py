"""Which GPUs a word names, and which this machine has. Needs no torch."""

from __future__ import annotations

import os
from pathlib import Path

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
