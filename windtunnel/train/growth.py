"""What a stage may change about the model it starts from, and how a mixture of experts is kept in balance. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from windtunnel.base.errors import RecipeError


@dataclass(frozen=True)
class Surgery:
    """Makes a larger model of the parent's: experts where it had one MLP, a head of its own where it was tied.

    What has to happen follows from the two shapes; these are the choices that remain. ``drop`` is the share of each expert's
    inner columns that is drawn anew from the mean and deviation of the parent's (drop-upcycling, arXiv 2502.19261); 0 copies
    the MLP whole (sparse upcycling, arXiv 2212.05055). ``router`` multiplies the deviation of the fresh router's weights: the
    paper states a variance of 0.01, its released trainer a deviation of 0.01, which is a tenth of that.
    """

    drop: float = 0.0
    router: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise RecipeError(
                "drop", f"expected a share from 0 to 1, got {self.drop}", "0 copies, 0.5 is the paper's choice"
            )
        if not 0 < self.router < float("inf"):
            raise RecipeError("router", f"expected a positive number, got {self.router}", "1 is the paper's")


@dataclass(frozen=True)
class Balance:
    """What keeps experts equally busy.

    ``loss`` weighs the Switch loss E·Σ_e p_e·f_e, mean over layers, with p_e the mean probability of expert e and f_e its share
    of all choices of the step (arXiv 2101.03961, equations 4 to 6); ``z`` the mean square of the router's log-partition
    (arXiv 2202.08906); ``bias`` is how far a step moves the bias with which experts are chosen, up for those with less than
    their share and down for the others (arXiv 2408.15664).
    """

    loss: float = 0.01
    z: float = 0.0
    bias: float = 0.0

    def __post_init__(self) -> None:
        for name in ("loss", "z", "bias"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise RecipeError(
                    f"balance.{name}", f"expected a number from 0 on, got {getattr(self, name)}", "0 is off"
                )
