"""Measured throughput: how many workers pay on one GPU, and which of several stages trains faster. Needs no torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

from windtunnel.base.devices import gpu_numbers
from windtunnel.base.errors import WindtunnelError
from windtunnel.train.stage import Stage
from windtunnel.tunnel.fleet import worker_environment

GAIN = 1.1
"""A doubling of workers has to bring at least a tenth more tokens a second."""
MOST = 16
_SECONDS = 4.0
_TURN, _TURNS = 1.5, 7


def pack(
    throughput: Callable[[int], float | None], most: int = MOST, gain: float = GAIN
) -> tuple[int, list[tuple[int, float]]]:
    """Doubles the number of workers as long as it pays.

    Args:
        throughput: tokens a second of so many workers together; None where they cannot run, for want of memory say.

    Returns:
        The number, one if nothing could be measured, and what was measured.
    """
    best, seen, count = 1, list[tuple[int, float]](), 1
    while count <= most:
        found = throughput(count)
        if found is None:
            break
        if seen and found < gain * seen[-1][1]:
            seen.append((count, found))
            break
        seen.append((count, found))
        best, count = count, 2 * count
    return best, seen


def measure_together(stage: Stage, device: str, count: int) -> float | None:
    """Tokens a second of ``count`` processes that train this stage's shape on one GPU at the same time; None if one fails.

    Each compiles and warms up, then waits for all others.
    """
    command = [sys.executable, "-m", "windtunnel.train.measure", "--train", json.dumps(stage.to_dict()), str(_SECONDS)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if numbers := gpu_numbers(device):
        environment["CUDA_VISIBLE_DEVICES"] = numbers[0]
    pipe = subprocess.PIPE
    crew = [
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=environment)
        for _ in range(count)
    ]
    try:
        ready = [process.stdout is not None and process.stdout.readline().strip() == "ready" for process in crew]
        if not all(ready):
            return None
        for process in crew:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [process.communicate()[0].split() for process in crew]
        return sum(float(words[-1]) for words in said) if all(said) else None
    except (OSError, ValueError):
        return None
    finally:
        for process in crew:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()


def measure_in_turns(stages: Sequence[Stage], device: str) -> list[list[float]]:
    """Tokens a second of one worker on each stage's own steps, in turns: [round][stage].

    Raises:
        WindtunnelError: the process failed; its last line says why.
    """
    job = json.dumps([stage.to_dict() for stage in stages])
    command = [sys.executable, "-m", "windtunnel.train.measure", "--turns", job, str(_TURN), str(_TURNS), device]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=worker_environment(1))
    if done.returncode:
        raise WindtunnelError((done.stderr.strip().splitlines() or ["measuring speeds failed"])[-1])
    return json.loads(done.stdout.splitlines()[-1])
