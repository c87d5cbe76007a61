"""Words to values, and files of YAML."""

import pytest

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
        ("a: [\n", "while parsing"),
        ("core_px: null\n", "core_px has no value"),
        ("core_px: 1.5\n", '"1.5"'),
        ("segmenter: magic\n", "magic"),
        ("cor_px: 3\n", "Did you mean 'core_px'?"),
    ],
)
def test_refuses_files(tmp_path, text, part):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UsageError) as refused:
        parse("extract", ["--out=o", *PLAN, f"--config={tmp_path}/a.yaml"])
    assert part in str(refused.value)
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
