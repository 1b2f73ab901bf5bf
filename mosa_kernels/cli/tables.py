"""How figures are shown on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.table import Table


def table_of(head: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """A table whose first column is text, and whose others are figures."""
    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(head):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table
