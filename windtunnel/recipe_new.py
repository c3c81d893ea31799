"""``windtunnel new``: a commented recipe for somebody's own text. Needs no torch."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Sequence
from glob import glob
from pathlib import Path

from windtunnel.base.errors import RecipeError, UserError
from windtunnel.base.units import bytes_size, si
from windtunnel.model.family import FAMILIES, Family, Member
from windtunnel.recipe import parse_recipe
from windtunnel.recipe_errors import toml_value

TOKENS_FOR_EACH_PARAMETER = 20
_LEAST, _READINGS = 100_000, 4
_BYTES_OF_A_TOKEN = 3.0
"""Of plain text under the small vocabularies written here: an estimate, until the corpus has been built."""
_LONG = 100_000
_RECORDS = (".jsonl", ".json", ".parquet", ".gz", ".xz", ".zst")
_TEMPLATE = """\
# windtunnel plan {name}.toml        what would be done, in seconds
# windtunnel run {name}.toml         do it; the same command continues after a stop
#
# {intro}

name = {name_value}
seed = 1

# Text, Markdown, JSONL and parquet are read; gzip, xz and zstd are opened; folders and globs are fine. Look first with:
#   windtunnel data {shown}
[corpus.text]
source = {source}
heldout = {heldout:<16g}# share of documents that are never trained on

[tokenizer]
vocab = {vocab}

[model]
family = "{family}"
size = "{size}"             # the dial: {sizes}
row = {row}                 # tokens of context
{tunnel}
[trunk]
tokens = "{tokens}"           # {why}
# batch = "{batch}"          # tokens in a step; derived if left out

# A finished model: the last fifth of the training at a falling learning rate. Add a second one with a mixture of its own to
# see what better data in the decay does.
[branch.final]
tokens = "20%"
"""
_TUNNEL = """
# Tiny models that are searched and measured first; the law fitted on them forecasts the model above.
[tunnel]
proxies = {proxies}
tokens = {lengths}
trials = 16
"""


def new_recipe(name: str, *, size: str = "0.3M", data: Sequence[str | Path], folder: Path | None = None) -> str:
    """The text of a recipe that trains a model of a size on text of one's own.

    Args:
        data: files, folders or globs; relative paths are taken from the current folder.
        folder: where the recipe will lie; its paths are written relative to it.

    Raises:
        RecipeError: no family has that size, or the name is no name.
        UserError: a path does not exist.
    """
    family, member = _find(size)
    body = family.body(member)
    count, size_of_text, records = _amount(data)
    notes = count and not records and size_of_text < _LONG * count  # a share of one in a hundred of a few would be none
    wanted = max(500_000, TOKENS_FOR_EACH_PARAMETER * body)
    there = int(size_of_text / _BYTES_OF_A_TOKEN)
    tokens = wanted if records or not there else min(wanted, max(_LEAST, _READINGS * there))
    why = f"{tokens / body:.0f} for each parameter; more is better as long as the text is not read over four times"
    if tokens < wanted:
        amount = bytes_size(size_of_text)
        why = f"about {tokens / max(1, there):.0f} readings of {amount} of text; with more text, {si(wanted, 2)}"
    small = family.name == "tiny" and body < 1_000_000
    proxies = [m for m in family.members if family.body(m) * 2.5 <= body][-3:]
    tunnel = ""
    if len(proxies) == 3:
        lengths = [si(tokens / share, 2) for share in (8, 4, 2)]
        tunnel = _TUNNEL.format(proxies=toml_value([m.name for m in proxies]), lengths=toml_value(lengths))
    sources = [_relative(path, folder or Path.cwd()) for path in data]
    text = _TEMPLATE.format(
        name=name, name_value=toml_value(name), shown=" ".join(sources), source=toml_value(sources),
        intro=f"A model of {member.name} parameters on text of your own.",
        vocab=2048 if small else 4096 if family.name == "tiny" else 32_768, family=family.name, size=member.name,
        sizes=", ".join(m.name for m in family.members), row=128 if small else 256 if family.name == "tiny" else 2048,
        tunnel=tunnel, tokens=si(tokens, 2), why=why,
        heldout=round(min(0.2, max(0.01, 20 / count)), 2) if notes else 0.01,
        batch="2048" if small else "4096" if family.name == "tiny" else "512k",
    )  # fmt: skip
    parse_check(text)
    return text


def _amount(data: Sequence[str | Path]) -> tuple[int, int, bool]:
    """Files, bytes, and whether any of them holds more than one document or is packed: then neither number says much."""
    files: list[Path] = []
    for source in map(Path, data):
        found = source.rglob("*") if source.is_dir() else map(Path, glob(str(source), recursive=True))
        files += [path for path in found if path.is_file()]
    return len(files), sum(path.stat().st_size for path in files), any(path.suffix in _RECORDS for path in files)


def parse_check(text: str) -> None:
    """Reads a recipe text that we wrote ourselves, so that a bad name or size fails here and not later.

    Raises:
        RecipeError: with the key at fault.
    """
    parse_recipe(tomllib.loads(text))


def _find(size: str) -> tuple[Family, Member]:
    errors: list[RecipeError] = []
    for family in FAMILIES.values():
        try:
            return family, family.member(size, "--size")
        except RecipeError as error:
            errors.append(error)
    names = ", ".join(m.name for family in FAMILIES.values() for m in family.members)
    raise RecipeError("--size", errors[-1].problem, f"choose one of {names}")


def _relative(path: str | Path, folder: Path) -> str:
    given = Path(path).expanduser()
    if not any(mark in str(path) for mark in "*?[") and not given.exists():
        raise UserError("--data", f"expected an existing file or folder, got {str(path)[:120]!r}")
    if given.is_absolute():
        return given.as_posix()
    try:
        return Path(os.path.relpath(given, folder)).as_posix()
    except ValueError:  # another drive on Windows
        return given.absolute().as_posix()
