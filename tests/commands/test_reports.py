"""Tables and lines of reports."""

import re

import pytest
from rich.console import Console

from scellst_ray.commands.reports import (
    format_score,
    framed_table,
    line_printer,
    markdown_table,
    score_table,
)
from tests.support.paths import ROOT


@pytest.fixture
def console():
    return Console(width=60, record=True, quiet=False)


def test_lines_stay_as_they_are(capsys):
    text = "runs/[a] holds [/b] " + "word " * 40
    line_printer()(text)
    assert capsys.readouterr().out == f"{text}\n"


@pytest.mark.parametrize("make", [framed_table, score_table])
def test_nothing_of_a_table_is_cut_or_taken_for_markup(console, make):
    long = "[bold] " + "path/to/" * 30
    console.print(make(("name", "value"), [("a", "[/x]"), ("b", long)], "title"))
    shown = console.export_text()
    assert "title" in shown
    assert "[/x]" in shown
    assert re.sub(r"[\s│┃]", "", long) in re.sub(r"[\sb│┃]", "", shown).replace("[old]", "[bold]")
    assert max(map(len, shown.splitlines())) <= 60


def test_markdown():
    rows = [("a|b", "1"), ("c", "2")]
    assert markdown_table(("name", "n"), rows) == [
        "| name | n |",
        "| --- | --- |",
        "| a\\|b | 1 |",
        "| c | 2 |",
    ]
    assert markdown_table(("name", "n"), rows, with_numbers=True)[1] == "| --- | ---: |"


def test_scores():
    assert [format_score(value) for value in (None, 1234, 0.12345)] == ["-", "1,234", "0.123"]


def test_tables_are_made_in_one_file():
    makers = {
        path.name
        for path in (ROOT / "scellst_ray" / "commands").glob("*.py")
        if re.search(r"(?<!def )\bTable\(|\| --- ", path.read_text())
    }
    assert makers == {"reports.py"}
