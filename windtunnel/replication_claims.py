"""The claims of arXiv 2404.06395, sections 3 to 5, that are tried here. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping

from windtunnel.replication_data import data_law, dynamics, more_data, two_stage
from windtunnel.replication_design import designed
from windtunnel.replication_found import Claim
from windtunnel.replication_schedules import cosine, decay, onward, rate, wsd
from windtunnel.replication_sft import two_stage_sft

CLAIMS: Mapping[str, Claim] = {
    claim.name: claim
    for claim in (
        Claim("rate", "section 3.3, figure 3", "The best base learning rate is the same for all sizes.", rate),
        Claim(
            "cosine", "section 4.1, figure 4", "A cosine is best where its period is the length of training.", cosine
        ),
        Claim("wsd", "section 4.2, figure 5", "WSD ends at or below the cosine with T = S.", wsd),
        Claim("decay", "section 4.2, figure 5", "The loss drops in the decay; 10 % is enough, 2.5 % is not.", decay),
        Claim(
            "designed",
            "arXiv 2408.11029, not in the paper",
            "A decay designed by the law of curves beats a linear tenth and does not lose to a cosine.",
            designed,
        ),
        Claim(
            "continue", "section 4.2, figure 5", "The stable checkpoint goes on and matches a longer cosine.", onward
        ),
        Claim(
            "data-law",
            "section 4.3, figures 6, 16",
            "A power law fits the data axis better than an exponential.",
            data_law,
        ),
        Claim(
            "more-data",
            "section 4.3, figure 6",
            "A small model matches a larger one at 4 times the compute.",
            more_data,
        ),
        Claim(
            "dynamics", "section 4.4, figures 7 and 8", "In the decay gradients agree and curvature grows.", dynamics
        ),
        Claim("two-stage", "section 5, table 1", "High-quality data belongs into the decay.", two_stage),
        Claim(
            "two-stage-sft",
            "section 5, table 1",
            "Better data in the decay move what fine-tuning reaches; more fine-tuning does not.",
            two_stage_sft,
        ),
    )
}
"""In the paper's order."""
