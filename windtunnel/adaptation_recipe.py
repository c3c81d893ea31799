"""The recipe that adapts a finished model to new text, as commented TOML. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from windtunnel.base.errors import UserError
from windtunnel.base.units import si
from windtunnel.corpus.config import SourceConfig
from windtunnel.recipe_errors import toml_value
from windtunnel.train.stage import AdamW, Stage

NEW, CHATS, BRANCH = "new", "chats", "adapted"
"""Names of the new corpus, of the chats and of the finished model."""
_SCHEMES = ("pypi:", "hf:")
_TEMPLATE = """\
# windtunnel adapt {parent} ...     wrote this file and forecasts what it gains and loses
# windtunnel run {name}.toml        does it; the same command continues after a stop
#
# {parent} goes on with new text: its own tokenizer and shape, fresh moments, the learning rate warmed up again, held, and let
# down in the last fifth. {replay:g} % of the tokens are replayed from what it learnt before, so that it forgets less
# (arXiv 2403.08763).

name = {name_value}
seed = {seed}

{corpora}
[tokenizer]
path = {tokenizer}

[model]
{model}
[model.shape]
{shape}
[optimizer]
{optimizer}
[trunk]
start = {start}
tokens = "{tokens}"
batch = "{batch}"
warmup = "2%"
masking = {masking}
mixture = {mixture}

[branch.{branch}]
tokens = "20%"
{decay}
[evaluate]
tokens = {scored}
"""


def adaptation_recipe(
    name: str, parent: str, stage: Stage, old: Mapping[str, Any], *, data: Sequence[str], chats: Sequence[str], tokenizer: Path,
    base: Path, folder: Path, tokens: int, replay: float, lr: float | None, chat_share: float = 0.2,
) -> str:  # fmt: skip
    """The text of the recipe.

    Args:
        parent: PROGRAM/RUN of the model, whose stage is ``stage`` and whose program's resolved recipe is ``old``.
        data, chats: files, folders or globs; relative ones are taken from the current folder.
        tokenizer: the folder of the model's tokenizer.
        base: the folder to which the old recipe's paths are relative.
        folder: where the recipe will lie; its paths are written relative to it.
        replay: share of the tokens that is replayed from the old mixture.
        chat_share: share of the decay that reads the chats, where there are some.

    Raises:
        UserError: the old recipe has a corpus of one of the names that are used here, or a path does not exist.
    """
    mixture = _old_mixture(old)
    if taken := sorted({NEW, CHATS} & set(mixture)):
        raise UserError(
            "adapt", f"expected no corpus called '{taken[0]}' in the old recipe, found one", "rename it there"
        )
    tables = {NEW: {"source": [_relative(path, Path.cwd(), folder) for path in data], "heldout": 0.05}}
    if chats:
        sources = [_relative(path, Path.cwd(), folder) for path in chats]
        tables[CHATS] = {"source": sources, "messages": "messages", "heldout": 0.05}
    for corpus in mixture:
        given = SourceConfig.model_validate(_without_empty(old["corpus"][corpus])).model_dump(
            mode="json", exclude_defaults=True
        )
        tables[corpus] = {**given, "source": [_relative(path, base, folder) for path in given["source"]]}
    blend = {NEW: round(1 - replay, 4), **{c: round(replay * w, 4) for c, w in mixture.items() if replay}}
    used = {corpus: table for corpus, table in tables.items() if replay or corpus not in mixture}
    last = {c: round((1 - chat_share) * w, 4) for c, w in blend.items()} | {CHATS: chat_share}
    return _TEMPLATE.format(
        name=name, name_value=toml_value(name), parent=parent, seed=old.get("seed", 0), replay=100 * replay,
        corpora="\n".join(_table(f"corpus.{corpus}", table) for corpus, table in {**used, **tables}.items()),
        tokenizer=toml_value(_relative(str(tokenizer), Path.cwd(), folder)), model=_model(stage, old), shape=_shape(stage),
        optimizer=_optimizer(stage, lr), start=toml_value(parent), tokens=si(tokens, 2), batch=stage.step_tokens,
        masking=toml_value(stage.masking), mixture=toml_value(blend), branch=BRANCH,
        decay=f"mixture = {toml_value(last)}\n" if chats else "", scored=toml_value(old["evaluate"].get("tokens") or "100k"),
    )  # fmt: skip


def _old_mixture(old: Mapping[str, Any]) -> dict[str, float]:
    weights = old["trunk"].get("mixture") or {next(iter(old["corpus"])): 1.0}
    whole = sum(weights.values())
    return {corpus: weight / whole for corpus, weight in weights.items()}


def _without_empty(table: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if value is not None}


def _relative(path: str, base: Path, folder: Path) -> str:
    """A path as seen from the recipe's folder; what lies elsewhere, globs and remote sources stay what they are."""
    if path.startswith(_SCHEMES):
        return path
    given = Path(path).expanduser()
    whole = given if given.is_absolute() else base / given
    if not any(mark in path for mark in "*?[") and not whole.exists():
        raise UserError("--data", f"expected an existing file or folder, got {path[:120]!r}")
    if given.is_absolute() and base == Path.cwd():
        return given.as_posix()
    return Path(os.path.relpath(whole, folder.absolute())).as_posix()


def _table(name: str, values: Mapping[str, Any]) -> str:
    return f"[{name}]\n{_lines(values)}"


def _lines(values: Mapping[str, Any]) -> str:
    return "".join(f"{key} = {toml_value(value)}\n" for key, value in values.items())


def _model(stage: Stage, old: Mapping[str, Any]) -> str:
    rule, shape = stage.parametrization, stage.shape
    values = {
        "family": old["model"]["family"], "tied": shape.tied, "qk_norm": shape.qk_norm, "row": stage.plan.row,
        "parametrization": rule.name, "base_width": shape.base_width, "init_std": rule.init_std,
    }  # fmt: skip
    if rule.name != "standard":
        values |= {"scale_emb": rule.scale_emb, "scale_depth": rule.scale_depth}
    if rule.name == "completep":
        values["base_layers"] = rule.base_layers
    if rule.vocabulary_regime != "fixed":
        values["vocabulary_regime"] = rule.vocabulary_regime
    return _lines(values)


def _shape(stage: Stage) -> str:
    return _lines({name: getattr(stage.shape, name) for name in ("width", "layers", "heads", "kv_heads", "ff")})


def _optimizer(stage: Stage, lr: float | None) -> str:
    """The model's own constants; its base rate unless another is given."""
    names = {"epsilon": "eps", "learning_rate": "lr"}
    usual, out = AdamW(), {"kind": stage.optimizer.kind, "lr": lr or stage.optimizer.learning_rate}
    for one in fields(AdamW):
        value = getattr(stage.optimizer, one.name)
        if one.name != "learning_rate" and value != getattr(usual, one.name):
            out[names.get(one.name, one.name)] = value
    return _lines(out)
