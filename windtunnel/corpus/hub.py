"""Datasets of the Hugging Face hub, or a local dataset folder, as a stream of records (extra ``hub``)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from windtunnel.base.errors import DataError


def parse_hub(source: str, base: Path) -> tuple[str, str | None, str]:
    """Splits ``hf:NAME[/config][:split]`` into path, configuration and split.

    NAME is ``owner/name``, a single word, or a local folder (relative to the recipe or absolute).

    Raises:
        DataError: nothing stands after ``hf:``.
    """
    name, _, split = source.removeprefix("hf:").partition(":")
    if not name:
        raise DataError(
            source, "expected hf:NAME[/config][:split]", "name a dataset such as hf:roneneldan/TinyStories:train"
        )
    local = base / Path(name).expanduser()
    if local.is_dir():
        return str(local), None, split or "train"
    parts = name.split("/")
    return "/".join(parts[:2]), "/".join(parts[2:]) or None, split or "train"


def hub_records(source: str, base: Path) -> Iterator[dict[str, Any]]:
    """Streams the records of one split; no code of the dataset is run.

    Raises:
        DataError: the extra is not installed, or the dataset cannot be opened.
    """
    path, config, split = parse_hub(source, base)
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(source, "hf: sources need the package datasets", "pip install 'windtunnel[hub]'") from None
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry is a line of its own otherwise
    try:
        stream = datasets.load_dataset(path, config, split=split, streaming=True)
        for record in stream:
            yield cast(dict[str, Any], record)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fix = "check name, configuration, split and network"
        raise DataError(source, f"the dataset cannot be read ({reason})", fix) from None
