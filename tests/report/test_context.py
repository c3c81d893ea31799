"""What a longer context cost is told against the checkpoint before it and against the trunk's plain decay."""

from __future__ import annotations

from windtunnel.base.labbook import LabBook
from windtunnel.report.context import in_short_rows, read_contexts
from windtunnel.report.page import _context

PLAN, OTHER = ({"plan": {"segments": [{"start": 0, "mixture": mixture} for mixture in parts]}} for parts in ([{"a": 1}], [{"a": 1}, {"b": 1}]))  # fmt: skip


def book_with(tmp_path, decays: dict[str, tuple[dict, int, float]]) -> LabBook:
    book = LabBook(tmp_path / "book.sqlite")
    context = {
        "row": 64,
        "short_row": 32,
        "short": {"a": {"before": 1.2, "after": 1.01}},
        "positions": {},
        "retrieval": [],
    }
    with book:
        for name, kind, config, tokens in (
            ("trunk", "trunk", PLAN, 900), ("old", "trunk", PLAN, 900), ("stretch", "long", PLAN, 1000), ("long", "long", PLAN, 1200),
            *((n, "decay", c, t) for n, (c, t, _) in decays.items()),
        ):  # fmt: skip
            run = f"p/{name}-0123456789"
            above = {"trunk": "", "old": "", "stretch": "trunk", "long": "stretch", "elsewhere": "old"}.get(
                name, "trunk"
            )
            book.put_run(
                run,
                program="p",
                kind=kind,
                name=name,
                status="done",
                folder=f"runs/{name}",
                parent=f"p/{above}-0123456789" if above else "",
                config=config,
                tokens=tokens,
            )
        for name, (_, _, bits) in decays.items():
            book.put_score(f"p/{name}-0123456789", "a", "bits_per_byte", bits, "bits per UTF-8 byte", 10)
        book.put_fact("p", "model", "long-0123456789", {"context": context})
    return book


def test_the_loss_in_short_rows_stands_beside_the_nearest_decay_on_the_trunks_own_data(tmp_path):
    decays = {
        "half": (PLAN, 1000, 1.1),
        "same": (PLAN, 1150, 1.0),
        "better": (OTHER, 1200, 0.5),
        "elsewhere": (PLAN, 1200, 0.1),
    }
    book = book_with(tmp_path, decays)
    (found,) = read_contexts(book, "p")
    assert found.short == (("a", 1.2, 1.01, 1.0),)
    assert found.plain == "same"
    said = "long: bits per byte in rows of 32: 1.2000 before, 1.0100 after, 1.0000 of the plain decay 'same' (+1.0 % against it)"
    assert in_short_rows(found) == said
    page = str(_context(book, "p"))
    assert "same, without it" in page
    assert "what the longer context cost" in page


def test_without_such_a_decay_only_the_checkpoint_is_compared(tmp_path):
    book = book_with(tmp_path, {"better": (OTHER, 1200, 0.5)})
    (found,) = read_contexts(book, "p")
    assert found.short == (("a", 1.2, 1.01, None),)
    assert in_short_rows(found) == "long: bits per byte in rows of 32: 1.2000 before, 1.0100 after"
    assert "without it" not in str(_context(book, "p"))
