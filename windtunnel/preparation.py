"""From the recipe's corpora to a tokenizer and token stores, skipping what is built. Needs no torch."""

from __future__ import annotations

from typing import Any

from windtunnel.base.artefact import content_hash, read_json, read_manifest, write_json
from windtunnel.base.errors import ArtefactError, UserError
from windtunnel.base.units import si
from windtunnel.comparison import find_run
from windtunnel.corpus.build import build_corpus, build_tokenizer, corpus_key, tokenizer_key
from windtunnel.corpus.mixture import check_epochs
from windtunnel.corpus.packing import length_facts, row_index
from windtunnel.corpus.sources import source_fingerprint
from windtunnel.corpus.store import Corpus
from windtunnel.corpus.tokenizer import Tokenizer
from windtunnel.desk import Desk
from windtunnel.home import Home
from windtunnel.prepared import Prepared
from windtunnel.program import Program
from windtunnel.recipe import Recipe
from windtunnel.train.folder import KIND, checkpoint_path
from windtunnel.train.stage import FINISHED, Stage

_FILE = "prepared.json"


def preparation_key(recipe: Recipe) -> str:
    """What the preparation depends on, as far as the recipe tells."""
    tables = {name: corpus.model_dump(mode="json") for name, corpus in sorted(recipe.corpus.items())}
    packed = [[list(recipe.packed), recipe.model.row]] if recipe.packed else []
    lengths = [{"by_length": {name: list(map(list, pairs)) for name, pairs in recipe.by_length.items()}}]
    packed += lengths if recipe.by_length else []
    start = [{"start": recipe.trunk.start}] if recipe.trunk.start else []
    return content_hash(
        [tables, recipe.tokenizer.model_dump(mode="json"), sorted(recipe.tokenizer_corpora), *packed, *start]
    )


def known_preparation(home: Home, recipe: Recipe) -> Prepared | None:
    """The preparation that an earlier run recorded for the same corpora and tokenizer, if its folders are still there."""
    try:
        raw = read_json(home.program(recipe.name) / _FILE)
    except ArtefactError:
        return None
    if raw.get("key") != preparation_key(recipe):
        return None
    prepared = Prepared(
        **{k: raw[k] for k in ("tokenizer", "tokenizer_hash", "vocab", "corpora")}, origin=raw.get("origin")
    )
    there = all((home.root / corpus["folder"]).is_dir() for corpus in prepared.corpora.values())
    return prepared if there and (home.root / prepared.tokenizer).is_dir() else None


def prepare(desk: Desk, recipe: Recipe) -> Prepared:
    """Fetches, cleans and tokenises all corpora of a recipe; what is unchanged is only looked at.

    Raises:
        DataError: see the corpus room.
    """
    home, say = desk.home, desk.screen.say
    options = {"downloads": home.downloads, "base": recipe.base}
    with desk.screen.console.status("reading the corpora") as status:
        prints = {}
        for name, config in recipe.corpus.items():
            status.update(f"corpus '{name}': looking at its sources")
            prints[name] = source_fingerprint(config, **options)
        status.update("the tokenizer")
        tokenizer, folder = _tokenizer(home, recipe, prints, say)
        corpora: dict[str, dict[str, Any]] = {}
        for name, config in recipe.corpus.items():
            status.update(f"corpus '{name}': reading, cleaning, tokenising")
            out = home.corpora / f"{name}-{corpus_key(config, tokenizer.hash, prints[name])[:12]}"
            corpus = build_corpus(
                config, tokenizer, out, name=name, cache=home.text, fingerprint=prints[name], say=say, **options
            )
            corpora[name] = {
                "folder": str(out.relative_to(home.root)), "hash": corpus.hash, "tokens": corpus.tokens,
                "heldout_tokens": len(corpus.heldout.tokens), "heldout_bytes": int(corpus.heldout.bytes.sum()),
                "heldout_predictions": len(corpus.heldout.tokens) - (len(corpus.heldout.offsets) - 1),
            }  # fmt: skip
            if name in recipe.packed:
                corpora[name]["packed"] = _packed(corpus, recipe.model.row, say)
            for row, least in recipe.by_length.get(name, ()):
                facts = length_facts(corpus, row, least)
                corpora[name].setdefault("by_length", {})[f"{row}/{least}"] = facts
            with desk.book as book:
                book.put_fact(
                    recipe.name, "corpus", name, {**corpora[name], "stats": corpus.stats, "licence": config.licence}
                )
    origin = _origin(desk, recipe, tokenizer) if recipe.trunk.start else None
    prepared = Prepared(str(folder.relative_to(home.root)), tokenizer.hash, tokenizer.vocab_size, corpora, origin)
    write_json(home.program(recipe.name) / _FILE, {"key": preparation_key(recipe), **prepared.__dict__})
    return prepared


def _origin(desk: Desk, recipe: Recipe, tokenizer: Tokenizer) -> dict[str, Any]:
    """The stage key and last step of the finished model that the trunk starts from.

    Raises:
        UserError: there is no such model in this home, it is not finished, or of another shape or tokenizer.
    """
    where = recipe.where("trunk.start")
    row = find_run(desk.book, recipe.trunk.start or "", where)
    if row["kind"] not in FINISHED or row["status"] != "done":
        fix = f"choose a branch that windtunnel status shows as done, of the kinds {', '.join(FINISHED)}"
        raise UserError(
            where, f"expected a finished model, got the {row['kind']} '{row['name']}', {row['status']}", fix
        )
    stage = Stage.from_dict(row["config"])
    wanted, found = recipe.target_shape(tokenizer.vocab_size), stage.shape
    if wanted != found:
        here, there = (f"{si(s.body)} with a vocabulary of {s.vocab:,}" if s else "a budget" for s in (wanted, found))
        raise UserError(
            where, f"expected the shape of {row['id']} ({there}), got {here}", "windtunnel adapt writes the recipe"
        )
    checkpoint = checkpoint_path(desk.home.root / row["folder"], stage.steps)
    read = read_manifest(checkpoint, KIND, verify=False).facts.get("tokenizer")
    if read and read != tokenizer.hash:
        problem = f"expected the tokenizer of {row['id']} ({read[:10]}), got another of as many tokens ({tokenizer.hash[:10]})"
        raise UserError(where, problem, "windtunnel adapt writes the recipe")
    return {"stage": stage.key, "step": stage.steps}


def _packed(corpus: Corpus, row: int, say: Any) -> dict[str, Any]:
    """Exact counts of a corpus in rows of whole documents; says what was cut or left out."""
    facts = row_index(corpus, row).facts()
    if facts["cut"] or facts["left_out"]:
        say(
            f"corpus '{corpus.name}': {facts['cut']:,} documents are shortened to the answers that end within the row of {row} "
            f"tokens, {facts['left_out']:,} are left out because they do not fit or no answer ends; "
            f"{facts['documents']:,} take part"
        )
    return facts


def _tokenizer(home: Home, recipe: Recipe, prints: dict[str, str], say: Any) -> tuple[Tokenizer, Any]:
    if recipe.tokenizer.path:
        source = Tokenizer.load(recipe.base / recipe.tokenizer.path)
        folder = home.tokenizers / source.hash[:12]
        source.save(folder)
        return source, folder
    configs = {name: recipe.corpus[name] for name in recipe.tokenizer_corpora}
    key = tokenizer_key(configs, {name: prints[name] for name in configs}, recipe.tokenizer.vocab)
    folder = home.tokenizers / key[:12]
    if folder.is_dir():
        return Tokenizer.load(folder), folder
    tokenizer = build_tokenizer(
        configs, recipe.tokenizer.vocab, downloads=home.downloads, base=recipe.base, cache=home.text, say=say
    )
    tokenizer.save(folder)
    return tokenizer, folder


def note_target(desk: Desk, program: Program) -> None:
    """Records what the target's trunk and branches cost, to which a report holds the cost of the studies."""
    stages = [program.trunk(), *(program.branch(name) for name in program.recipe.branch)]
    cost = {"flops": sum(stage.flops for stage in stages), "tokens": sum(stage.own_tokens for stage in stages)}
    with desk.book as book:
        book.put_fact(program.name, "target", "cost", cost)


def check_supply(program: Program, say: Any) -> None:
    """Warns of corpora that would be read more than four times, and refuses those that cannot be read at all.

    Raises:
        DataError: a corpus is too small for the asked tokens.
    """
    assert program.prepared is not None
    trunk = program.trunk()
    for stage in [trunk, *(program.branch(name) for name in program.recipe.branch)]:
        rows = program.prepared.rows_of(stage.plan)
        # Rows of another length are counted from the beginning of the stage's own plan.
        before = trunk.batches.sequences(stage.first_step) if stage.plan.row == trunk.plan.row else 0
        for warning in check_epochs(stage.plan, rows, before + stage.own_tokens // stage.plan.row):
            say(f"{stage.name}: {warning}")
