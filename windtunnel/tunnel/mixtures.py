"""Mixtures to try: drawn around all of the text, within what each corpus can give. Plain numbers; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from windtunnel.base.errors import UserError
from windtunnel.laws.mixture import into_limits
from windtunnel.pretrain.setting import Mixture

_STRENGTH = (0.5, 4.0)
"""Concentration of the Dirichlet draws, times corpora: RegMix (arXiv 2407.01492) draws it from 0.1 to 5."""
_DIGITS = 4


def share_limits(
    rows: Mapping[str, int], before: Mapping[str, int], own: int, names: Sequence[str], cap: float
) -> dict[str, float]:
    """The largest share of each corpus at which none of its text is read more than ``cap`` times.

    Args:
        rows: rows of each corpus.
        before: rows of each that have been read when the stage begins.
        own: rows that the stage reads.
        cap: how many times a row may be read, what was read before included.

    Raises:
        UserError: together they give less than the stage reads.
    """
    out = {name: min(1.0, max(0.0, (cap * rows.get(name, 0) - before.get(name, 0)) / own)) for name in names}
    if sum(out.values()) < 1:
        raise UserError(
            "--cap", f"expected corpora that fill the stage at {cap:g} times each, got text for {sum(out.values()):.0%} of it",
            "raise --cap, mix more corpora, or shorten the stage",
        )  # fmt: skip
    return out


def stratified(rows: Mapping[str, int], limits: Mapping[str, float]) -> dict[str, float]:
    """Shares in proportion to the text that there is: all corpora are read equally often, as far as their limits let them."""
    names = list(limits)
    size = np.array([float(rows.get(name, 0)) for name in names])
    return _rounded(names, into_limits(size, np.array([limits[name] for name in names])))


def draw_mixtures(
    centre: Mapping[str, float], limits: Mapping[str, float], count: int, seed: int
) -> list[dict[str, float]]:
    """The stratified mixture, then Dirichlet draws around the mean of it and equal shares, more and less concentrated."""
    names, draw = list(centre), np.random.default_rng(seed)
    middle = (np.array([centre[name] for name in names]) + 1 / len(names)) / 2
    high = np.array([limits[name] for name in names])
    out = [dict(centre)]
    for _ in range(count - 1):
        strength = float(np.exp(draw.uniform(*np.log(_STRENGTH))))
        shares = draw.dirichlet(strength * len(names) * middle)
        out.append(_rounded(names, into_limits(shares, high)))
    return out


def _rounded(names: Sequence[str], shares: np.ndarray) -> dict[str, float]:
    """Four digits, so that what is drawn on one machine is what is drawn on another."""
    whole = np.round(shares, _DIGITS)
    whole[int(np.argmax(whole))] += round(1 - float(whole.sum()), _DIGITS)
    return {name: round(float(share), _DIGITS) for name, share in zip(names, whole, strict=True)}


def as_mixture(shares: Mapping[str, float]) -> Mixture:
    """Corpora that have a share, as a stage reads them."""
    return tuple(sorted((name, share) for name, share in shares.items() if share > 0))
