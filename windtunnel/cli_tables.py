"""What the command line prints of families and laws. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from windtunnel.base.artefact import read_json
from windtunnel.base.errors import UserError
from windtunnel.base.units import parse_count, si
from windtunnel.laws.loss import NAMED, LossLaw
from windtunnel.model.family import FAMILIES, Family


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
        return "\n".join(
            f"{name:<22} {law.form}  " + "  ".join(f"{key} {value:.4g}" for key, value in law.constants.items())
            for name, law in NAMED.items()
        )


@dataclass(frozen=True)
class Prediction:
    """What a law says about one size and length."""

    law: str
    unit: str
    parameters: float
    tokens: float
    flops: float
    loss: float

    @classmethod
    def of(cls, name: str, flops: str | None, parameters: str | None, tokens: str | None) -> Prediction:
        """Of a named law, or of a fitted one in a JSON file.

        Raises:
            UserError: there is no such law, or neither a compute nor a size and length is given.
        """
        if name not in NAMED and not Path(name).is_file():
            raise UserError(
                "--law", f"expected a named law or a file, got {name[:60]!r}", f"named laws: {', '.join(NAMED)}"
            )
        law = NAMED[name] if name in NAMED else LossLaw.from_dict(read_json(Path(name)))
        if flops is not None and parameters is None and tokens is None:
            compute = float(parse_count(flops, "--flops"))
            n, d = law.optimum(compute)
        elif flops is None and parameters is not None and tokens is not None:
            n, d = float(parse_count(parameters, "--parameters")), float(parse_count(tokens, "--tokens"))
            compute = 6 * n * d
        else:
            fix = "see windtunnel law predict --help"
            raise UserError("law predict", "expected either --flops, or --parameters and --tokens", fix)
        return cls(name, law.unit, n, d, compute, law.predict(n, d, force=True))

    def to_dict(self) -> dict[str, Any]:
        return {
            "law": self.law, "unit": self.unit, "parameters": self.parameters, "tokens": self.tokens,
            "tokens_per_parameter": self.tokens / self.parameters, "flops": self.flops, "loss": self.loss,
        }  # fmt: skip

    def __str__(self) -> str:
        ratio = self.tokens / self.parameters
        return (
            f"{self.law}: {si(self.parameters)} parameters on {si(self.tokens)} tokens ({ratio:.0f} for each parameter, "
            f"{si(self.flops)} FLOPs): {self.loss:.4g} {self.unit}"
        )
