"""Whether this machine can compile a training step. Needs no torch."""

from __future__ import annotations

import os
import shutil

_NAMES = ("g++", "clang++", "c++", "cl")


def has_compiler() -> bool:
    """Whether a C++ compiler is found, without which torch.compile cannot build CPU kernels."""
    named = os.environ.get("CXX")
    return any(shutil.which(name) for name in ((named,) if named else ()) + _NAMES)


NO_COMPILER = "no C++ compiler is found (g++, clang++ or cl): the step runs eagerly and slower"
