"""A family: from one dial, the size, to a shape, by one rule. Needs no torch.

Every size of a family shares head dimension, base width, vocabulary and the rule from width to depth; that is what makes
measurements on its small members say something about its large ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from windtunnel.base.errors import RecipeError
from windtunnel.base.units import parse_count, si
from windtunnel.model.shape import Shape


@dataclass(frozen=True)
class Member:
    """One size of a family by name."""

    name: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    ff: int


@dataclass(frozen=True)
class Family:
    """Named members, all with one head dimension, one base width and one base depth: those of the smallest of them."""

    name: str
    head_dim: int
    base_width: int
    base_layers: int
    members: tuple[Member, ...]
    rule: str
    max_positions: int = 4096

    def shape(self, size: object, vocab: int, *, tied: bool = True, where: str = "model.size") -> Shape:
        """The member by name, or the one whose non-embedding parameter count is nearest (within 20 %).

        Raises:
            RecipeError: no member is near that size; the message names the nearest smaller and larger one.
        """
        return self._build(self.member(size, where), vocab, tied)

    def member(self, size: object, where: str = "model.size") -> Member:
        """The member that ``size`` names: by its name in any case, or by parameter count within 20 %."""
        by_name = {m.name.lower(): m for m in self.members}
        if str(size).lower() in by_name:
            return by_name[str(size).lower()]
        wanted = parse_count(size, where)
        best = min(self.members, key=lambda m: abs(self.body(m) - wanted))
        if abs(self.body(best) - wanted) > 0.2 * wanted:
            below = [m for m in self.members if self.body(m) < wanted]
            above = [m for m in self.members if self.body(m) > wanted]
            near = " or ".join(f"'{m.name}'" for m in (below[-1:] + above[:1]))
            raise RecipeError(where, f"expected a size of the family '{self.name}', got {si(wanted)}", f"choose {near}")
        return best

    def body(self, member: Member) -> int:
        """Non-embedding parameters of a member."""
        return self._build(member, 1, True).body

    def _build(self, m: Member, vocab: int, tied: bool) -> Shape:
        return Shape(
            width=m.width, layers=m.layers, heads=m.heads, kv_heads=m.kv_heads, head_dim=self.head_dim, ff=m.ff,
            vocab=vocab, base_width=self.base_width, tied=tied, max_positions=self.max_positions,
        )  # fmt: skip


def _tiny() -> tuple[Member, ...]:
    names = {32: "0.02M", 48: "0.05M", 64: "0.1M", 80: "0.2M", 96: "0.3M", 112: "0.6M", 128: "0.8M", 144: "1.2M",
             160: "1.5M", 176: "2.1M", 192: "2.5M"}  # fmt: skip
    members = []
    for width, name in names.items():
        layers = max(2, (width + 16) // 32)
        members.append(Member(name, width, layers, width // 16, width // 16, 5 * width // 2))
    return tuple(members)


def _wide() -> tuple[Member, ...]:
    names = {16: "0.01M", 32: "0.05M", 48: "0.1M", 64: "0.2M", 80: "0.3M", 96: "0.4M", 112: "0.6M", 128: "0.8M", 144: "1M",
             160: "1.2M", 192: "1.7M"}  # fmt: skip
    return tuple(Member(name, width, 4, width // 16, width // 16, 5 * width // 2) for width, name in names.items())


def _paper() -> tuple[Member, ...]:
    table8 = (("9M", 320, 8), ("30M", 512, 12), ("70M", 640, 14), ("0.1B", 768, 16), ("0.17B", 896, 18),
              ("0.2B", 1024, 20), ("0.5B", 1344, 24))  # fmt: skip
    members = [Member(name, d, layers, d // 64, d // 64, 5 * d // 2) for name, d, layers in table8]
    members.append(Member("1.2B", 1536, 52, 24, 8, 3840))
    members.append(Member("2.4B", 2304, 40, 36, 36, 5760))
    return tuple(members)


FAMILIES = {
    "tiny": Family(
        "tiny",
        16,
        32,
        2,
        _tiny(),
        "depth = max(2, width/32 rounded), head dimension 16, d_ff = 2.5·width",
        max_positions=2048,
    ),
    "tiny-wide": Family(
        "tiny-wide",
        16,
        32,
        4,
        _wide(),
        "four layers at every size, head dimension 16, d_ff = 2.5·width",
        max_positions=2048,
    ),
    "minicpm": Family(
        "minicpm", 64, 256, 8, _paper(), "arXiv 2404.06395, tables 2 and 8: head dimension 64, d_ff = 2.5·width"
    ),
}
"""The shipped families. ``tiny`` is for laptops, ``tiny-wide`` for laws: its sizes differ in width alone, so that no proxy is
shallower than what it speaks for. ``minicpm`` holds the paper's wind-tunnel and released shapes."""
