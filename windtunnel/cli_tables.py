"""What the command line prints of families and laws. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from windtunnel.base.artefact import read_json, write_bytes, write_json
from windtunnel.base.errors import UserError
from windtunnel.base.units import parse_count, si
from windtunnel.laws.batch import NAMED_BATCH, BatchLaw
from windtunnel.laws.forms import FORMS, free_parameters
from windtunnel.laws.loss import NAMED, REACH, LossLaw, fit_loss_law
from windtunnel.laws.optimum import COUNTS, optimum, percentiles90
from windtunnel.laws.points import Point, read_points
from windtunnel.model.family import FAMILIES, Family
from windtunnel.report.contour import contour_figure


@dataclass(frozen=True)
class Shapes:
    """The sizes of families by name."""

    families: tuple[Family, ...]
    vocab: int

    @classmethod
    def of(cls, family: str | None, vocab: int) -> Shapes:
        """One family or all.

        Raises:
            UserError: there is no such family.
        """
        if family is not None and family not in FAMILIES:
            raise UserError("--family", f"expected one of {', '.join(FAMILIES)}, got {family[:60]!r}")
        return cls(tuple(found for name, found in FAMILIES.items() if family in (None, name)), vocab)

    def to_dict(self) -> dict[str, Any]:
        return {
            family.name: {
                m.name: {**shape.to_dict(), "body": shape.body, "embedding": shape.embedding, "total": shape.total}
                for m in family.members
                if (shape := family.shape(m.name, self.vocab))
            }
            for family in self.families
        }

    def __str__(self) -> str:
        lines: list[str] = []
        for family in self.families:
            lines.append(
                f"{family.name}: {family.rule}; base width {family.base_width}, rows up to {family.max_positions}"
            )
            for member in family.members:
                s = family.shape(member.name, self.vocab)
                heads = f"{s.heads}" if s.heads == s.kv_heads else f"{s.heads}/{s.kv_heads}"
                lines.append(
                    f"  {member.name:<6} width {s.width:<5} layers {s.layers:<3} heads {heads:<6} ff {s.ff:<5} "
                    f"{s.body:>13,} + {s.embedding:>11,} = {s.total:>13,}"
                )
        return "\n".join(lines)


class NamedLaws:
    """The laws that come with the package."""

    def to_dict(self) -> dict[str, Any]:
        return {name: law.to_dict() for name, law in NAMED.items()}

    def __str__(self) -> str:
        lines = [
            f"{name:<22} {law.form}  "
            + "  ".join(f"{key} {value:.4g}" for key, value in law.constants.items())
            + f"  ({law.source.partition(';')[0]})"
            for name, law in NAMED.items()
        ]
        for name, law in NAMED_BATCH.items():
            lines.append(f"{name:<22} batch = {law.coefficient:.3g} / L^{law.exponent:g} tokens (windtunnel law batch)")
        return "\n".join(lines)


@dataclass(frozen=True)
class BestBatch:
    """What a batch law says about one loss."""

    law: BatchLaw
    loss: float

    @classmethod
    def of(cls, name: str, loss: float) -> BestBatch:
        """Of a named law, or of a batch study's file.

        Raises:
            UserError: there is neither, the file holds no law, or the loss is not positive.
        """
        if name in NAMED_BATCH:
            law = NAMED_BATCH[name]
        elif Path(name).is_file():
            law = _law_of_study(name)
        else:
            fix = f"named laws: {', '.join(NAMED_BATCH)}"
            raise UserError("--law", f"expected a named batch law or a file, got {name[:60]!r}", fix)
        law.tokens(loss)
        return cls(law, loss)

    def to_dict(self) -> dict[str, Any]:
        return {
            "law": self.law.name, "loss": self.loss, "unit": "nats per token", "batch": self.law.tokens(self.loss),
            "source": self.law.source, "warning": self.law.caveat(self.loss),
        }  # fmt: skip

    def __str__(self) -> str:
        return (
            f"{si(self.law.tokens(self.loss))} tokens in a batch at {self.loss:g} nats per token, by the law "
            f"'{self.law.name}'\n{self.law.caveat(self.loss)}"
        )


def _law_of_study(path: str) -> BatchLaw:
    found = read_json(Path(path)).get("law", {})
    try:
        low, high = found["losses"]
        return BatchLaw(
            "tunnel", float(found["coefficient"]), float(found["exponent"]), (low, high), path, str(found["warning"])
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        why = found.get("undecided", "it has no fitted line") if isinstance(found, dict) else "it has no fitted line"
        raise UserError(path, f"expected a batch study with a fitted line, but {why}") from None


def law_called(name: str) -> LossLaw:
    """A named law, or a fitted one from a JSON file.

    Raises:
        UserError: there is neither.
    """
    if name not in NAMED and not Path(name).is_file():
        raise UserError(
            "--law", f"expected a named law or a file, got {name[:60]!r}", f"named laws: {', '.join(NAMED)}"
        )
    return NAMED[name] if name in NAMED else LossLaw.from_dict(read_json(Path(name)))


@dataclass(frozen=True)
class Prediction:
    """What a law says about one size and length."""

    law: str
    unit: str
    parameters: float
    tokens: float
    flops: float
    loss: float
    counts: str = "body"
    inference_tokens: float = 0.0
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict[str, tuple[float, float]])
    notes: tuple[str, ...] = ()
    setting: str = ""
    """The batch and base learning rate that the law is for."""

    @classmethod
    def of(
        cls, name: str, flops: str | None, parameters: str | None, tokens: str | None, inference: str | None = None,
        *, force: bool = False,
    ) -> Prediction:  # fmt: skip
        """Of a named law, or of a fitted one in a JSON file.

        Args:
            inference: tokens expected to be read and written in use; the compute then pays for them too.
            force: ask a law without a floor beyond ten times its largest size all the same.

        Raises:
            LawError: a law without a floor is asked too far.
            UserError: there is no such law, or neither a compute nor a size and length is given.
        """
        law = law_called(name)
        if flops is not None and parameters is None and tokens is None:
            served = float(parse_count(inference, "--inference-tokens")) if inference is not None else 0.0
            best = optimum(law, float(parse_count(flops, "--flops")), inference_tokens=served)
            n, d, compute, intervals = best.parameters, best.tokens, best.training_flops, best.intervals
        elif flops is None and inference is None and parameters is not None and tokens is not None:
            n, d = float(parse_count(parameters, "--parameters")), float(parse_count(tokens, "--tokens"))
            compute, served, intervals = 6 * n * d, 0.0, _loss90(law, n, d)
        else:
            fix = "see windtunnel law predict --help"
            raise UserError("law predict", "expected either --flops, or --parameters and --tokens", fix)
        notes = [*law.outside(n, d), *law.warnings]
        if intervals and law.reach(n, d) > REACH:
            intervals = {}
            notes.append("so far from what was fitted, refitted constants say nothing of the error: no interval")
        if served and 2 * n * served > compute:
            notes.append(f"use takes {100 * 2 * n * served / (compute + 2 * n * served):.0f} % of the FLOPs")
        return cls(
            name,
            law.unit,
            n,
            d,
            compute,
            law.predict(n, d, force=force),
            law.counts,
            served,
            intervals,
            tuple(notes),
            law.setting,
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "law": self.law, "unit": self.unit, "parameters": self.parameters, "tokens": self.tokens,
            "tokens_per_parameter": self.tokens / self.parameters, "flops": self.flops, "loss": self.loss,
            "counts": self.counts, "inference_tokens": self.inference_tokens,
            "inference_flops": 2 * self.parameters * self.inference_tokens,
            "intervals": {key: list(value) for key, value in self.intervals.items()}, "notes": list(self.notes),
            "setting": self.setting,
        }  # fmt: skip

    def __str__(self) -> str:
        ratio = self.tokens / self.parameters
        use = f" and {si(2 * self.parameters * self.inference_tokens)} in use" if self.inference_tokens else ""
        lines = [
            f"{self.law}: {si(self.parameters)} parameters on {si(self.tokens)} tokens ({ratio:.0f} for each parameter, "
            f"{si(self.flops)} FLOPs{use}): {self.loss:.4g} {self.unit}"
        ]
        if self.intervals:
            shown = [
                f"{key.replace('_', ' ')} {_short(key, low)} to {_short(key, high)}"
                for key, (low, high) in self.intervals.items()
            ]
            lines.append(f"  90 %: {', '.join(shown)}")
        lines.append(f"  N counts {_COUNTED[self.counts]}; FLOPs are 6ND")
        if self.setting:
            lines.append(f"  the law is {self.setting}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _loss90(law: LossLaw, parameters: float, tokens: float) -> dict[str, tuple[float, float]]:
    """The loss there by the constants refitted to resampled trunks; nothing for a law without."""
    losses = [one.predict(parameters, tokens, force=True) for one in law.drawn()]
    return {"loss": percentiles90(losses)} if losses else {}


_COUNTED = {"body": "non-embedding parameters", "body+head": "non-embedding parameters and the head"}


def _short(key: str, value: float) -> str:
    return si(value) if key in ("parameters", "tokens") else f"{value:.3g}"


@dataclass(frozen=True)
class FittedTable:
    """A law fitted to the runs of a CSV file, and every form that was tried."""

    law: LossLaw
    tried: dict[str, float]
    """Root mean square log residual of each form."""
    out: Path | None

    @classmethod
    def of(
        cls,
        path: str,
        form: str,
        *,
        unit: str,
        counts: str,
        delta: float,
        draws: int,
        out: Path | None,
        figure: Path | None = None,
    ) -> FittedTable:
        """Fits a form (or the one with the smallest residual for its number of constants) and writes it if asked to.

        Raises:
            UserError: the file, its points, the form or the convention is not usable.
        """
        if counts not in COUNTS:
            raise UserError("--counts", f"expected one of {', '.join(COUNTS)}, got {counts[:40]!r}")
        points = read_points(Path(path))
        trunks = len({p.cluster for p in points})
        draws = draws if trunks >= _TRUNKS else 0
        tried: dict[str, float] = {}
        laws: dict[str, LossLaw] = {}
        for one in FORMS if form == "best" else (form,):
            found = fit_loss_law(points, one, delta=delta, draws=draws, unit=unit, name=Path(path).stem, counts=counts)
            freedom = len(points) - free_parameters(one)
            tried[one], laws[one] = found.residual * (len(points) / freedom) ** 0.5, found
        law = laws[min(tried, key=tried.__getitem__)]
        if not draws:
            note = f"{trunks} independent trunks are too few to resample: no intervals (at least {_TRUNKS})"
            law = replace(law, warnings=(*law.warnings, note))
        if out is not None:
            write_json(out, law.to_dict())
        if figure is not None:
            write_bytes(figure, _map(law, points).encode())
        return cls(law, tried, out)

    def to_dict(self) -> dict[str, Any]:
        return {**self.law.to_dict(), "tried": self.tried}

    def __str__(self) -> str:
        law = self.law
        lines = [f"{law.name}: {law.form} law, {law.points} points, residual {100 * law.residual:.2f} % ({law.unit})"]
        for key, value in law.constants.items():
            low, high = law.intervals.get(key, (None, None))
            lines.append(f"  {key:<8} {value:<12.5g}" + (f" 95 %: {low:.4g} to {high:.4g}" if low is not None else ""))
        if len(self.tried) > 1:
            shown = ", ".join(f"{name} {100 * value:.2f} %" for name, value in self.tried.items())
            lines.append(f"  residual for the freedom left: {shown}")
        lines += [f"  note: {note}" for note in law.warnings]
        if self.out is not None:
            lines.append(f"wrote {self.out}; next: windtunnel law predict --law {self.out} --flops ...")
        return "\n".join(lines)


def _map(law: LossLaw, points: Sequence[Point]) -> str:
    """The law as a contour map with its points, and with the best N and D over three decades of compute around them."""
    spent = [6 * p.parameters * p.tokens for p in points]
    budgets = np.geomspace(min(spent) / 30, max(spent) * 30, 40)
    best = [(found.parameters, found.tokens) for found in (optimum(law, float(budget)) for budget in budgets)]
    pairs = [(float(p.parameters), float(p.tokens)) for p in points]
    return contour_figure(lambda n, d: law.predict(n, d, force=True), pairs, best, unit=law.unit)


_TRUNKS = 6
