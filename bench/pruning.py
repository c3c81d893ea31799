"""Early stopping of a search on planted trials: those go on that are forecast to win, the best after a decay, or at the plateau.

    PYTHONPATH=. python bench/pruning.py [--json] [--tables 20] [--orders 100]

64 trials with three judged lengths (1/16, 1/4 and all of a trial). A trial's final loss is a bowl in three parameters, the
logarithm of the learning rate among them. What the table has of WSD: a shorter trial prefers other parameters and is noisier,
and at the plateau the loss lies higher the larger the learning rate is, by more than trials differ (arXiv 2404.06395, figure 5:
most of the gain of a decay is a gain of high rates). Each table is replayed in resampled orders, in rounds of four. Printed:
the share of all tokens used (decays counted), how often the best of 64 was not kept, and what was lost then.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from windtunnel.tunnel.halving import replay, rungs_of
from windtunnel.tunnel.promotion import ByForecast, ByRank, Promotion

TRIALS = 64
SHARES = (1 / 16, 1 / 4, 1.0)
TITLES = {
    "forecast": "by forecast, judged after a short decay:", "decay": "best quarter, judged after a short decay:",
    "plateau": "best quarter, judged at the plateau (plain ASHA):",
}  # fmt: skip


def planted(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses after a decay and at the plateau, each of shape (trials, rungs), and places of shape (trials, 3)."""
    draw = np.random.default_rng(seed)
    place = draw.uniform(-1, 1, (TRIALS, 3))
    optimum, weight = draw.uniform(-0.4, 0.4, 3), draw.uniform(0.05, 0.2, 3)
    decayed, plateau = [], []
    for rung, share in enumerate(SHARES):
        drift = draw.normal(0, 0.15, 3) * (1 - share)
        level = 1.5 * share**-0.08
        loss = level + ((place - optimum - drift) ** 2 @ weight) + draw.normal(0, 0.004 * (1, 0.7, 0.4)[rung], TRIALS)
        decayed.append(loss)
        plateau.append(loss + 0.08 * np.exp(0.8 * place[:, 0]) + draw.normal(0, 0.004, TRIALS))
    return np.stack(decayed, 1), np.stack(plateau, 1), place


def measure(tables: int, orders: int, steps: int = 1600) -> dict[str, dict[str, float]]:
    """Medians over orders of all tables, for each way of promotion."""
    rungs = rungs_of(steps, 0.2, steps // 50, SHARES)
    out = {}
    for name in ("forecast", "decay", "plateau"):
        shares, failed, lost = [], [], []
        for number in range(tables):
            decayed, plateau, place = planted(number)
            rule: Promotion = (
                ByForecast(rungs, lambda those, place=place: place[list(those)], 0) if name == "forecast" else ByRank()
            )
            final = decayed[:, -1]
            draw = np.random.default_rng(1000 + number)
            for _ in range(orders):
                order = draw.permutation(TRIALS).tolist()
                found = replay(decayed, order, rungs, rule=rule, plateau=plateau if name == "plateau" else None)
                shares.append(found.share)
                failed.append(found.kept != int(final.argmin()))
                lost.append(float(final[found.kept] / final.min() - 1))
        out[name] = {
            "median_share_of_tokens": float(np.median(shares)), "largest_share_of_tokens": float(np.max(shares)),
            "best_not_kept": float(np.mean(failed)), "median_loss": float(np.median(lost)),
            "mean_loss": float(np.mean(lost)), "replays": len(shares),
        }  # fmt: skip
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tables", type=int, default=20)
    parser.add_argument("--orders", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(options.tables, options.orders)
    if options.json:
        print(json.dumps(found))
        return
    for name, row in found.items():
        print(
            TITLES[name],
            f"{100 * row['median_share_of_tokens']:.1f} % of the tokens (largest {100 * row['largest_share_of_tokens']:.1f} %),"
            f" best of {TRIALS} not kept in {100 * row['best_not_kept']:.1f} % of {row['replays']:.0f} replays,"
            f" loss of the kept one above the best {100 * row['mean_loss']:.3f} % (mean)",
        )


if __name__ == "__main__":
    main()
