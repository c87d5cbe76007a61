"""Lines and tables of reports: every table that a command prints or writes is made here."""

from collections.abc import Callable, Sequence
from functools import partial

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Say = Callable[[str], None]


def line_printer(console: Console | None = None) -> Say:
    """Return a function that prints a text as it is: no markup, no colours, no folding."""
    return partial((console or Console()).print, markup=False, highlight=False, soft_wrap=True)


def framed_table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str | None = None,
    *,
    wide_last: bool = False,
    show_lines: bool = False,
) -> Table:
    """Return a table in a frame.

    Args:
        headings: Headings of the columns.
        rows: Cells as text; brackets in them are no markup.
        title: Title above the table.
        wide_last: Whether the last column gets at least 24 characters, for long texts.
        show_lines: Whether to draw a line between rows.
    """
    table = Table(title=title, show_lines=show_lines)
    for number, heading in enumerate(headings):
        is_wide = wide_last and number == len(headings) - 1
        table.add_column(heading, overflow="fold", min_width=24 if is_wide else None)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def score_table(headings: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    """Return a table of scores: names on the left, numbers on the right, no frame."""
    table = Table(title=escape(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, heading in enumerate(headings):
        justify = "right" if number else "left"
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type] # a str
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def plain_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table of plain text: names on the left, numbers on the right."""
    lines = [headings, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headings))]
    return [
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        )
        for line in lines
    ]


def markdown_table(
    headings: Sequence[str], rows: Sequence[Sequence[str]], *, with_numbers: bool = False
) -> list[str]:
    """Return the lines of a table in Markdown.

    Args:
        headings: Headings of the columns.
        rows: Cells as text.
        with_numbers: Whether all columns but the first are aligned on the right.
    """
    rest = "---:" if with_numbers else "---"
    rule = ["---", *[rest] * (len(headings) - 1)]
    return [_markdown_row(headings), _markdown_row(rule), *map(_markdown_row, rows)]


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def format_score(value: float | None) -> str:
    """Return a score with 3 decimals, a count with thousands separators, or - without a value."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"
