"""Windtunnel designs, forecasts and trains small language models.

The verbs of the command line, as functions (imported when they are first used, so that this import stays light):

    import windtunnel as wt

    recipe = wt.load_recipe("quickstart", ["trunk.tokens=3.2M"])
    wt.plan(recipe)                        what would be done, derived and shown
    wt.forecast(recipe)                    the tunnel, then the expected loss with an interval; nothing beyond
    wt.run(recipe)                         everything, or what is missing of it
    run = wt.open("quickstart/better")     a finished or running run
    run.metrics()                          {"loss": (steps, values), ...} as arrays
    run.law, run.forecast, run.model()
    run.evaluate(), run.report(), run.export(), run.chat("Hello"), run.finish()
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from windtunnel.api import Run, clean, compare, forecast, new, open, plan, run, status
    from windtunnel.recipe import Recipe, load_recipe

__version__ = "0.1.0"
__all__ = [
    "Recipe", "Run", "__version__", "clean", "compare", "forecast", "load_recipe", "new", "open", "plan", "run", "status",
]  # fmt: skip

_HOMES = {name: "windtunnel.recipe" if name in ("Recipe", "load_recipe") else "windtunnel.api" for name in __all__}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'windtunnel' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
