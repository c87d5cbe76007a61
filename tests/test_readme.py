"""The commands that the README and the helps show are accepted, and the README links to files."""

import re
import shlex
from dataclasses import MISSING

import pytest

from scellst_ray.commands.cli import main
from scellst_ray.commands.flags import flags_of
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


# Commands that work without any file: what they do is tested elsewhere.
WITHOUT_FILES = ("simulate", "models", "models fetch", "demo")


@pytest.mark.parametrize(
    "words", [words for words in SHOWN if name_of(words) not in WITHOUT_FILES], ids=" ".join
)
def test_a_command_of_the_readme_comes_as_far_as_its_files(words, tmp_path, monkeypatch, capsys):
    """In an empty folder each ends in a line about a file that is missing."""
    from scellst_ray.pipelines import session

    def refuse(*_args, **_options):
        message = "no Ray for this test"
        raise ConnectionError(message)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(session, "_start_ray", refuse)
    assert main(words) == 1
    shown = capsys.readouterr()
    if name_of(words) == "doctor":
        assert f"bad manifest: {words[2]}: no such manifest" in shown.out
    else:
        lines = [line for line in shown.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        missing = [word for word in words if word.partition("=")[2] or "." in word or "/" in word]
        assert any(word in lines[0] for word in missing), lines[0]


DOCUMENTS = ["README.md", "jobs/README.md", "cluster/README.md", "benchmarks/README.md"]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_scripts_that_documents_name_exist(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    folder = (ROOT / name).parent
    scripts = set(
        re.findall(r"(?<![\w./])((?:jobs|cluster|benchmarks)/[\w.-]+\.(?:py|sh|yaml))", text)
    )
    made = {"jobs/predict.yaml"}  # copied from the example in the line before
    assert {path for path in scripts - made if not (ROOT / path).exists()} == set()
    beside = set(re.findall(r"`([\w-]+\.(?:py|sh|yaml))", text))
    places = (folder, ROOT / "cluster", ROOT / "benchmarks", ROOT / "jobs")
    assert {n for n in beside if not any((place / n).exists() for place in places)} == set()


@pytest.mark.parametrize(
    "file", sorted((ROOT / "jobs").glob("*.example.yaml")), ids=lambda path: path.name
)
def test_an_example_of_a_job_is_accepted(file, tmp_path):
    """As it stands, and with the defaults that it shows in comments."""
    name = file.name.partition(".")[0]
    text = file.read_text(encoding="utf-8")
    (tmp_path / "all.yaml").write_text(re.sub(r"^# (\w+: )", r"\1", text, flags=re.MULTILINE))
    flags = flags_of(COMMANDS[name].load_settings())
    for path in (file, tmp_path / "all.yaml"):
        values = parse(name, ["--config", str(path)])
        assert set(values) <= set(flags)
    commented = {key for key in values if key not in parse(name, ["--config", str(file)])}
    assert commented
    assert {key: values[key] for key in commented} == {
        key: flags[key].default for key in commented if flags[key].default is not MISSING
    }


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []
