"""The laboratory of a replication: the program, the models that its claims ask for, and their trained losses. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from windtunnel.base.errors import UserError
from windtunnel.base.units import Length
from windtunnel.corpus.mixture import check_epochs
from windtunnel.desk import Desk, Result
from windtunnel.growth import posttrained
from windtunnel.laws.design import DecayRule
from windtunnel.model.family import FAMILIES
from windtunnel.model.shape import Shape
from windtunnel.pretrain.setting import Mixture
from windtunnel.program import Program
from windtunnel.study import mean_loss
from windtunnel.train.stage import Stage
from windtunnel.tunnel.replica import Model, Scale
from windtunnel.tunnel.transfer import best_rate, next_rates, rate_at

STUDY = "replicate"
TUNED_AT = 40
"""The whole length, in the paper's N, at which each schedule's rate is tuned."""
_SPACING, _FIRST, _ROUNDS, _SEED_STEP = "sqrt2", 3, 10, 1000


@dataclass
class Lab:
    """One call of ``windtunnel replicate``: trains what claims ask for, once."""

    desk: Desk
    program: Program
    scale: Scale
    count: int
    results: dict[str, Result] = field(default_factory=dict[str, Result])
    stages: dict[str, Stage] = field(default_factory=dict[str, Stage])
    rates: dict[str, float] = field(default_factory=dict[str, float])
    grids: dict[str, dict[float, float]] = field(default_factory=dict[str, dict[float, float]])
    """What was tried for each schedule: base rate → loss, at the tuning seed."""

    @property
    def seeds(self) -> list[int]:
        """The seeds of all claims. The recipe's own seed tunes the rates and decides nothing."""
        return [self.program.recipe.seed + _SEED_STEP * (i + 1) for i in range(self.count)]

    @property
    def mixture(self) -> Mapping[str, float]:
        return self.program.recipe.mixture

    def shape(self, size: str) -> Shape:
        """A size of the scale's family with what the recipe says about all of its models."""
        recipe = self.program.recipe
        shape = FAMILIES[self.scale.family].shape(size, self.program.vocab, tied=recipe.model.tied)
        return replace(shape, base_width=recipe.model.base_width or shape.base_width, qk_norm=recipe.model.qk_norm)

    def model(self, size: str, seed: int, rate: float) -> Model:
        """A size at a seed and a base learning rate."""
        setting = self.program.setting().with_seed(seed)
        batch = max(1, self.scale.batch // setting.row)
        setting = replace(setting, batch=batch, optimizer=replace(setting.optimizer, learning_rate=rate))
        return Model(
            self.shape(size), setting, self.scale.unit, f"{size.lower().replace('.', '_')}-s{seed}-lr{rate:.4g}"
        )

    def models(self, kind: str, size: str | None = None) -> list[Model]:
        """One model a seed, at the tuned rate of a schedule."""
        rate = self.tuned(kind)
        return [self.model(size or self.scale.model, seed, rate) for seed in self.seeds]

    def tuned(self, kind: str, rule: DecayRule | None = None) -> float:
        """The best base rate of a schedule, ``wsd``, ``cosine`` or a ``rule``, at one length, from a grid that grows around it.

        ``kind`` names the schedule in what is kept; asked again, the rule may be left out.
        """
        if kind not in self.rates:
            grid: dict[int, list[float | None]] = {}
            for _ in range(_ROUNDS):
                todo = next_rates(grid, _FIRST)
                if not todo:
                    break
                stages = {k: self._whole(kind, k, rule) for k in todo}
                self.train(f"tune the rate of {kind}", list(stages.values()))
                grid |= {k: [_known(self.loss(stage))] for k, stage in stages.items()}
            best = best_rate(grid)
            if best is None:
                raise UserError("replicate", f"every learning rate of {kind} diverged", "state a lower optimizer.lr")
            self.rates[kind] = self._rate(best)
            self.grids[kind] = {self._rate(k): v for k, (v,) in sorted(grid.items()) if v is not None}
        return self.rates[kind]

    def _rate(self, k: int) -> float:
        return rate_at(self.program.setting().optimizer.learning_rate, _SPACING, k)

    def _whole(self, kind: str, k: int, rule: DecayRule | None) -> Stage:
        return self.model(self.scale.model, self.program.recipe.seed, self._rate(k)).whole(kind, TUNED_AT, rule)

    def train(self, title: str, stages: Sequence[Stage]) -> None:
        """Trains what is not done, parents before what grows from them."""
        assert self.program.prepared is not None
        wanted = list({stage.key: stage for stage in stages}.values())
        streams = [stage for stage in wanted if not stage.plan.packed]
        packed = [stage for stage in wanted if stage.plan.packed]
        for longest in (max(group, key=lambda stage: stage.tokens) for group in (streams, packed) if group):
            rows = self.program.prepared.rows_of(longest.plan)
            for warning in check_epochs(longest.plan, rows, longest.steps * longest.batch):
                self.desk.screen.say(f"{longest.name}: {warning}")
        title = f"replicate: {title}, {len(wanted)} runs"
        self.stages |= {stage.key: stage for stage in wanted}
        self.results |= self.desk.train(title, STUDY, wanted, self.program.prepared)

    def loss(self, stage: Stage, mixture: Mapping[str, float] | None = None) -> float:
        """Nats per byte at the end of a stage, over the trunk's corpora or another mixture; not a number if it failed."""
        result = self.results[stage.key]
        return math.nan if "failed" in result else mean_loss(result["scores"], mixture or self.mixture)

    def chats(self) -> str | None:
        """The recipe's first branch of kind sft: its mixture of chats is what models are tuned on."""
        return next((name for name, branch in self.program.recipe.branch.items() if branch.kind == "sft"), None)

    @property
    def template(self) -> str:
        """How the turns of those chats are marked."""
        recipe, name = self.program.recipe, self.chats()
        mixture = (recipe.branch[name].mixture or {}) if name else {}
        return next((recipe.corpus[c].template for c in mixture if recipe.corpus[c].chats), "chatml")

    def tune(self, model: Model, parent: Stage, length: float, name: str) -> Stage:
        """SFT of a finished model on the recipe's chats, for a length in the paper's N, from where its decay's rate ended."""
        chats, prepared = self.chats(), self.program.prepared
        assert chats is not None
        assert prepared is not None
        own = {"tokens": Length(model.steps(length), "steps"), "epochs": None, "lr": None, "batch": None, "lora": None}
        packed = {corpus: facts["packed"] for corpus, facts in prepared.corpora.items() if "packed" in facts}
        return posttrained(
            name, self.program.recipe.branch[chats].model_copy(update=own), parent, model.setting, packed, 0
        )

    def better(self) -> Mixture | None:
        """The mixture of the recipe's first decay with data of its own."""
        recipe = self.program.recipe
        for name in recipe.decays:
            mixture = recipe.branch[name].mixture
            if mixture and dict(mixture) != dict(self.mixture):
                return tuple(sorted(mixture.items()))
        return None


def _known(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None
