"""What can go wrong, and what the command line does with it.

    WindtunnelError            exit 1   something failed that no better name fits
    ├── UserError              exit 2   a recipe, an option or an input file is wrong
    │   ├── RecipeError                 … in a recipe or an option
    │   ├── DataError                   … in a corpus or another input file
    │   └── ArtefactError               … in a folder that windtunnel wrote (damaged, foreign, in the way)
    ├── LimitReached           exit 3   the forecast exceeds a limit that the recipe sets
    ├── Diverged               exit 4   training kept producing non-finite numbers
    └── Stopped                exit 75  stopped cleanly on request: the same command continues

Each prints as one line without a traceback. Anything else that reaches the command line is a bug and keeps its traceback.
"""

from __future__ import annotations


class WindtunnelError(Exception):
    """Root of all errors that are printed as one line."""

    exit_code = 1


class UserError(WindtunnelError):
    """One line that names the place, what was expected, what came instead and the way out.

    Args:
        where: the field, option or file, as the user wrote it (``recipe.toml: trunk.tokens``).
        problem: a clause without a full stop (``expected a count of tokens, got 'x'``).
        fix: what to do about it, in the imperative (``write for example tokens = "6.4M"``).
    """

    exit_code = 2

    def __init__(self, where: str, problem: str, fix: str = "") -> None:
        self.where, self.problem, self.fix = where, problem, fix
        line = f"{where}: {problem}" + (f"; {fix}" if fix else "")
        super().__init__(" ".join(line.split()))


class RecipeError(UserError):
    """A recipe or an option is wrong."""


class DataError(UserError):
    """An input file or a corpus cannot be used."""


class ArtefactError(UserError):
    """A folder that windtunnel wrote is damaged, incomplete or of another kind."""


class LimitReached(WindtunnelError):
    """The forecast exceeds a limit that the recipe sets; nothing was trained beyond the tunnel."""

    exit_code = 3


class Diverged(WindtunnelError):
    """Too many steps in a row had a non-finite loss or gradient."""

    exit_code = 4


class Stopped(WindtunnelError):
    """A stop was asked for and has been carried out at a step boundary."""

    exit_code = 75
