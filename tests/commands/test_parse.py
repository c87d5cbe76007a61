"""Words to values, and files of YAML."""

import itertools
from dataclasses import MISSING
from typing import get_args

import pytest

from scellst_ray.commands.cli import _settings
from scellst_ray.commands.flags import flags_of
from scellst_ray.commands.parse import UsageError, make_app, parse
from scellst_ray.commands.table import COMMANDS

PLAN = ["--manifest", "m.csv"]


def test_only_what_is_given_is_returned():
    assert parse("status", ["a"]) == {"run": "a"}
    assert parse("status", ["a", "--json"]) == {"run": "a", "json": True}
    assert parse("status", ["a", "--no-json", "--write", "true"]) == {
        "run": "a",
        "json": False,
        "write": True,
    }


@pytest.mark.parametrize(
    ("words", "gpus"), [(["--gpus", "8"], 8), (["--gpus=true"], True), (["--gpus", "null"], None)]
)
def test_a_count_that_may_be_true(words, gpus):
    assert parse("plan", [*PLAN, *words]) == {"manifest": "m.csv", "gpus": gpus}


def test_lists_of_numbers():
    words = ["--learning-rates", "1e-2,0.001", "--search-epochs=[3, 5]"]
    values = parse("simulate", words)
    assert values == {"learning_rates": [0.01, 0.001], "search_epochs": [3, 5]}


def test_a_list_given_twice_is_one_list():
    assert parse("pretrain", ["--crops", "a,b", "--crops+=c", "--out=o"]) == {
        "crops": ["a", "b", "c"],
        "out": "o",
    }


def test_null_wins_over_the_file_and_the_last_of_two_flags_over_the_first(tmp_path):
    (tmp_path / "a.yaml").write_text("tile_timeout_s: 5\nplan_timeout_s: null\nmanifest: f\n")
    words = [*PLAN, "--config", f"{tmp_path}/a.yaml", "--tile-timeout-s", "null"]
    values = parse("plan", [*words, "--out", "a", "--out", "b"])
    assert values == {
        "manifest": "m.csv",
        "out": "b",
        "tile_timeout_s": None,
        "plan_timeout_s": None,
    }


def test_of_two_files_the_later_wins(tmp_path):
    (tmp_path / "a.yaml").write_text("manifest: a\nout: a\n")
    (tmp_path / "b.yaml").write_text("out: b\nslides: [x, '7']\n")
    files = [f"--config={tmp_path}/{name}.yaml" for name in "ab"]
    assert parse("extract", files) == {"manifest": "a", "out": "b", "slides": ["x", "7"]}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a\n", "expected lines of `key: value`"),
        ("core_px: 1.5\n", '"1.5"'),
        ("core_px: .inf\n", '".inf"'),
        (f"core_px: {'9' * 5000}\n", "into int"),
        ("memory_gb: .nan\n", '".nan"'),
        ("segmenter: magic\n", "magic"),
    ],
)
def test_refuses_files(tmp_path, text, part):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError) as refused:
        parse("extract", ["--out=o", *PLAN, f"--config={tmp_path}/a.yaml"])
    assert part in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


LISTS = [
    (name, flag.name)
    for name, command in COMMANDS.items()
    for flag in flags_of(command.load_settings()).values()
    if flag.is_list and flag.name not in command.hidden
]


@pytest.mark.parametrize(("name", "flag"), LISTS)
def test_every_list_takes_one_value_or_several_as_flag_and_in_a_file(tmp_path, name, flag):
    flags = flags_of(COMMANDS[name].load_settings())
    needed = [f"--{f.name}=x" for f in flags.values() if f.default is MISSING and f.name != flag]
    word = f"--{flag.replace('_', '-')}"
    one, two = ([1], [1, 2]) if "list[str]" not in str(flags[flag].kind) else (["1"], ["1", "2"])
    for value, expected in (("1", one), ("1,2", two), ("[1, 2]", two), ('["1", "2"]', two)):
        (tmp_path / "a.yaml").write_text(f"{flag}: {value}\n")
        for words in ([word, value], ["--config", f"{tmp_path}/a.yaml"]):
            assert parse(name, [*needed, *words])[flag] == expected
    with pytest.raises(UsageError, match="expected at least one value"):
        parse(name, [*needed, word, ""])


def test_values_without_a_comma_between_them():
    with pytest.raises(UsageError, match="unexpected 'b'; separate the values of --crops by comma"):
        parse("pretrain", ["--crops", "a", "b", "--out", "o"])


def numbers_of(flags):
    """Return the names of flags that take numbers."""
    return [
        flag.name
        for flag in flags.values()
        if {int, float} & {*flag.kinds, *(part for kind in flag.kinds for part in get_args(kind))}
    ]


@pytest.mark.parametrize(
    "name", [n for n, c in COMMANDS.items() if numbers_of(flags_of(c.load_settings()))]
)
def test_every_number_must_be_one(tmp_path, name):
    """As a flag and in a file: infinite, none, text, too large."""
    flags = flags_of(COMMANDS[name].load_settings())
    needed = [f"--{f.name}=x" for f in flags.values() if f.default is MISSING]
    values = itertools.cycle(["inf", ".inf", "nan", ".nan", "-inf", "1e400", "two", "9" * 5000])
    for flag, value in zip([n for n in numbers_of(flags) for _ in range(2)], values, strict=False):
        words = [f"--{flag}={value}"]
        if value.startswith("."):
            (tmp_path / "a.yaml").write_text(f"{flag}: {value}\n")
            words = ["--config", f"{tmp_path}/a.yaml"]
        with pytest.raises((UsageError, ValueError)) as refused:
            _settings(COMMANDS[name], parse(name, [*needed, *words]))
        assert flag in str(refused.value).replace("-", "_")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["extract", "plan", "evaluate expression", "models fetch"])
def test_help_shows_groups_and_an_example(capsys, name):
    with pytest.raises(SystemExit) as stopped:
        parse(name, ["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"─ {group} ─" in shown for group in COMMANDS[name].groups)
    assert f"    {COMMANDS[name].example}\n" in shown
    assert "--out" not in shown or name != "plan"


def test_completion_of_a_shell_knows_commands_and_flags():
    script = make_app(COMMANDS).generate_completion(shell="bash")
    assert all(word in script for word in ("crossvalidate", "--core-px", "segmentation"))
