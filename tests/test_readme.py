"""The commands that the README and the helps show are accepted, and the README links to files."""

import re
import shlex

import pytest

from scellst_ray.commands.parse import parse
from scellst_ray.commands.table import COMMANDS
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands_in(text):
    """Return the words after `scellst-ray` of each command line, without comments."""
    lines = (line.partition("#")[0] for line in text.replace("\\\n", " ").splitlines())
    words = [shlex.split(line) for line in lines if line.strip().startswith("scellst-ray ")]
    return [line[1:] for line in words]


SHOWN = [
    words
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for words in commands_in(block)
]


def name_of(words):
    names = (" ".join(words[:count]) for count in (2, 1))
    return next(name for name in names if name in COMMANDS)


def test_the_readme_shows_most_commands():
    assert len(SHOWN) > 15
    assert set(COMMANDS) - {name_of(words) for words in SHOWN} <= {
        *("demo", "manifest hest", "models", "models fetch"),
    }


@pytest.mark.parametrize("words", SHOWN, ids=" ".join)
def test_a_command_of_the_readme_is_accepted(words):
    name = name_of(words)
    assert parse(name, words[len(name.split()) :])


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_a_help_is_accepted(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "predict.yaml").write_text("manifest: cohort.csv\nhead: runs/head\n")
    (words,) = commands_in(f"scellst-ray {COMMANDS[name].example.removeprefix('scellst-ray ')}")
    assert name_of(words) == name
    parse(name, words[len(name.split()) :])


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []
