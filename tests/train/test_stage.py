"""A stage's identity: what came later is no part of it at its default, and everything else survives the dictionary."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pytest

from windtunnel.base.errors import RecipeError
from windtunnel.base.identity import as_identity, later
from windtunnel.corpus.mixture import DataPlan, Segment
from windtunnel.model.parametrization import Parametrization
from windtunnel.model.shape import Shape
from windtunnel.train.schedule import Schedule
from windtunnel.train.stage import AdamW, Stage

SHAPE = Shape(width=64, layers=2, heads=4, kv_heads=2, head_dim=16, ff=160, vocab=300, base_width=32)
STAGE = Stage(
    "golden", "trunk", SHAPE, Parametrization(), AdamW(),
    Schedule(warmup=3, stable_end=7, decay_steps=3, form="exponential"),
    DataPlan(seed=1, row=48, segments=(Segment(0, (("golden", 1.0),)),)), (("golden", "hash"),), 6, 10, 3,
)  # fmt: skip
FIRST_KEY = "362dff65961f8be4350beafcb3e4da06c9f1726e545a88896d571c60ff33ba7c"
"""Of STAGE in version e349dfa, with NUMERICS 2, before any field came later."""
CHANGES = {
    "independent decay": {"optimizer": AdamW(weight_decay=1e-3, decay="independent")},
}


def test_a_stage_of_defaults_has_the_key_that_it_had_before_fields_were_added() -> None:
    assert STAGE.key == FIRST_KEY


@pytest.mark.parametrize("name", CHANGES)
def test_what_came_later_changes_the_key_where_it_is_used_and_survives_json(name: str) -> None:
    changed = replace(STAGE, **CHANGES[name])
    assert changed.key != STAGE.key
    back = Stage.from_dict(json.loads(json.dumps(changed.to_dict())))
    assert back == changed
    assert back.key == changed.key


def test_a_later_field_is_left_out_at_its_default_only() -> None:
    @dataclass(frozen=True)
    class Old:
        a: int = 1
        b: bool = later(False)
        c: float = later(2.0)

    assert as_identity(Old()) == {"a": 1}
    assert as_identity(Old(b=True, c=2.0)) == {"a": 1, "b": True}
    assert Old(**as_identity(Old(c=3.0))) == Old(c=3.0)


def test_an_unknown_kind_of_decay_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"optimizer\.decay: expected plain or independent, got 'none'"):
        AdamW(decay="none")  # type: ignore[arg-type]
