"""The command line: what it takes, what it refuses, and what it prints."""

import logging
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest

from scellst_ray.commands import table
from scellst_ray.commands.cli import INTERRUPTED, main
from scellst_ray.commands.models import ModelsConfig, ModelsFetchConfig
from scellst_ray.core.version import __version__
from scellst_ray.evaluation.segmentation.config import EvaluateSegmentationConfig
from scellst_ray.stages.config import ExtractConfig
from tests.support.commands import capture_settings
from tests.support.paths import ROOT

EXTRACT = ["extract", "--manifest", "m.csv", "--out", "o"]
TRAIN = ["train", "--manifest", "m.csv", "--cells", "c", "--out", "o"]


@pytest.fixture
def seen(monkeypatch):
    """Return the settings that commands were called with; no command does its work."""
    return capture_settings(monkeypatch)


def refused(capsys, argv):
    """Return the one line that a wrong command line gets."""
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err


def python(*words, cwd, **variables):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (["--core-px", "128"], {"core_px": 128}),
        (["--core_px=128"], {"core_px": 128}),
        (["--core-px=128", "--read_mpp", "0.5"], {"core_px": 128, "read_mpp": 0.5}),
        (["--out", "my-folder--x"], {"out": "my-folder--x"}),
        (["--out=my-folder--x"], {"out": "my-folder--x"}),
        (["--out=--odd-name"], {"out": "--odd-name"}),
        (["--out", "007"], {"out": "007"}),
        (["--out", "1e5"], {"out": "1e5"}),
        (["--out", "s3://a-b/c=d-e"], {"out": "s3://a-b/c=d-e"}),
        (["--gpus", "false"], {"gpus": False}),
        (["--encoder", "random:7"], {"encoder": "random:7"}),
    ],
)
def test_flags_take_dashes_or_underscores_and_values_stay_as_they_are(seen, words, changes):
    assert main(EXTRACT + words) == 0
    assert seen == [ExtractConfig(**{"manifest": "m.csv", "out": "o"} | changes)]


@pytest.mark.whole
@pytest.mark.parametrize(
    "words", [["--slides", "a-1,007"], ["--slides=a-1, 007"], ['--slides=["a-1","007"]']]
)
def test_lists_of_strings(seen, words):
    assert main(TRAIN + words) == 0
    assert seen[0].slides == ["a-1", "007"]


@pytest.mark.whole
def test_a_single_slide_and_none(seen):
    assert main([*TRAIN, "--slides", "1"]) == main([*TRAIN, "--slides=null"]) == main(TRAIN) == 0
    assert [config.slides for config in seen] == [["1"], None, None]


@pytest.mark.whole
def test_genes_of_training_stay_one_string(seen):
    assert main([*TRAIN, "--genes", "CD3E,HLA-A"]) == 0
    assert seen[0].genes == "CD3E,HLA-A"


@pytest.mark.parametrize("number", ["-1", "-0.5", "-1e-4", "-.5"])
def test_negative_numbers_reach_the_check_of_the_value(seen, capsys, number):
    # Refused by what it means, not taken for a flag.
    assert main([*TRAIN, "--learning-rate", number]) == 1
    assert f"learning_rate is {float(number)}; it must be at least 0" in capsys.readouterr().err
    assert seen == []


@pytest.mark.parametrize("place", [1, 3, 7])
def test_flags_win_over_the_file_wherever_they_stand(seen, tmp_path, place):
    file = tmp_path / "a.yaml"
    file.write_text("manifest: file.csv\nout: file\ncore_px: 300\nhalo_px: 40\nread_mpp: 0.4\n")
    argv = [*EXTRACT, "--core-px", "128"]
    assert main([*argv[:place], "--config", str(file), *argv[place:]]) == 0
    config = ExtractConfig(manifest="m.csv", out="o", core_px=128, halo_px=40, read_mpp=0.4)
    assert seen == [config]


@pytest.mark.whole
def test_a_file_alone(seen, tmp_path):
    (tmp_path / "a.yaml").write_text("manifest: m.csv\ncells: c\nout: o\nslides: [a, '7']\n")
    assert main(["train", f"--config={tmp_path}/a.yaml"]) == 0
    assert seen[0].slides == ["a", "7"]


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--tiles-per-tsak", "--tiles-per-task"),
        ("--read-mp", "--read-mpp"),
        ("--Out", "--out"),
    ],
)
def test_unknown_flag(seen, capsys, flag, meant):
    line = refused(capsys, [*EXTRACT, flag, "3"])
    assert flag in line
    assert f"Did you mean {meant}?" in line
    assert seen == []


@pytest.mark.usefixtures("seen")
def test_unknown_key_of_a_file(capsys, tmp_path):
    (tmp_path / "a.yaml").write_text("manifest: m.csv\nout: o\nhed: h\n")
    line = refused(capsys, ["predict", "--config", str(tmp_path / "a.yaml")])
    assert "'hed'" in line
    assert "Did you mean 'head'?" in line


@pytest.mark.usefixtures("seen")
@pytest.mark.parametrize("in_file", [False, True])
def test_wrong_type_names_the_key_and_what_was_given(capsys, tmp_path, in_file):
    (tmp_path / "a.yaml").write_text("manifest: m.csv\nout: o\ncore_px: big\n")
    file = ["extract", "--config", str(tmp_path / "a.yaml")]
    line = refused(capsys, file if in_file else [*EXTRACT, "--core-px=big"])
    assert ("[core_px]" if in_file else "--core-px") in line
    assert 'unable to convert "big" into int' in line
    assert "Did you mean" not in line


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["extract", "--out", "o"], ["required", "manifest"]),
        (["extrct"], ["'extrct'", "'extract'", "'doctor'"]),
        ([], ["a command is needed", "extract", "train", "predict"]),
        (["evaluat", "segmentation"], ["'evaluat'", "Did you mean 'evaluate segmentation'?"]),
        (["evaluate", "segmentaton"], ["'segmentaton'", "Did you mean 'evaluate segmentation'?"]),
        (["modls"], ["'modls'", "Did you mean 'models'?"]),
        (["models", "fetc", "x"], ["'fetc'", "'models'", "Did you mean 'models fetch'?"]),
        (["models", "--names", "x"], ["scellst-ray models: error", "names"]),
        (["models", "fetch"], ["required", "name"]),
        (["models", "fetch", "a", "b"], ["b"]),
        ([*EXTRACT, "--segmenter", "magic"], ["--segmenter", "hematoxylin", "magic"]),
        ([*EXTRACT, "stray"], ["stray"]),
        ([*EXTRACT, "--core-px"], ["--core-px needs a value"]),
        ([*EXTRACT, "--core-px", "1.5"], ["--core-px", '"1.5"']),
        ([*EXTRACT, "--config", "nowhere.yaml"], ["nowhere.yaml", "does not exist"]),
    ],
)
def test_what_else_is_wrong_is_said_in_a_line(seen, capsys, argv, parts):
    line = refused(capsys, argv)
    assert all(part in line for part in parts), line
    assert seen == []


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_version_and_help(capsys, word):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"scellst-ray {__version__}\n"
    assert main([word]) == 0
    shown = capsys.readouterr().out
    lines = [line.split()[1] for line in shown.splitlines() if line.startswith("│")]
    assert {name.split()[0] for name in table.COMMANDS} <= set(lines)
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--val-share FLOAT" in shown
    assert "[default: 0.2]" in shown


def test_commands_of_two_words(seen, tmp_path):
    words = ["--truth", "t.png", "--predicted", "p.npy", "--types", "a=B,c=", "--radius-um", "2"]
    assert main(["evaluate", "segmentation", *words]) == 0
    assert seen[-1] == EvaluateSegmentationConfig(
        truth="t.png", predicted="p.npy", types=["a=B", "c="], radius_um=2.0
    )
    (tmp_path / "a.yaml").write_text("truth: t.png\npredicted: p.npy\ntypes: [a=B]\n")
    assert main(["evaluate", "segmentation", f"--config={tmp_path}/a.yaml"]) == 0
    assert seen[-1].types == ["a=B"]
    assert main(["models"]) == 0
    assert seen[-1] == ModelsConfig()
    name = "resnet50-imagenet"
    for words in ([name], ["--name", name], [f"--name={name}"]):
        assert main(["models", "fetch", *words, "--url", "http://mirror/w"]) == 0
        assert seen[-1] == ModelsFetchConfig(name=name, url="http://mirror/w")


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["status", "runs/a"], {}),
        (["status", "--run", "runs/a"], {}),
        (["status", "--json", "runs/a"], {"json": True}),
        (["status", "runs/a", "--json", "--write=true"], {"json": True, "write": True}),
        (["status", "runs/a", "--json", "false"], {"json": False}),
        (["gc", "--dry-run", "runs/a"], {"dry_run": True}),
        (["retry", "runs/a", "--failed", "--memory-gb", "4"], {"failed": True, "memory_gb": 4.0}),
        (["retry", "--slides", "P1,007", "runs/a"], {"slides": ["P1", "007"]}),
    ],
)
def test_a_run_may_stand_without_its_flag_and_a_switch_without_its_value(seen, words, flags):
    assert main(words) == 0
    assert seen == [table.COMMANDS[words[0]].load_settings()(run="runs/a", **flags)]


@pytest.mark.usefixtures("seen")
@pytest.mark.parametrize("words", [["runs/a", "runs/b"], ["--run=runs/a", "runs/b"], []])
def test_one_run_and_no_more(capsys, words):
    refused(capsys, ["status", *words])


@pytest.mark.usefixtures("seen")
def test_a_format_of_logs_that_is_none(capsys, monkeypatch):
    monkeypatch.setenv("SCELLST_RAY_LOG", "xml")
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    assert "set it to text or json" in refused(capsys, ["status", "runs/a"])


@pytest.mark.usefixtures("seen")
def test_a_group_named_alone_shows_its_help(capsys):
    assert main(["evaluate"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert main(["evaluate", "--help"]) == 0
    assert capsys.readouterr().out == err
    assert err.startswith("Usage: scellst-ray evaluate COMMAND")
    assert "│ segmentation " in err
    assert "extract" not in err


def test_help_of_a_command_that_begins_others(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["models", "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.startswith("Usage: scellst-ray models ")
    assert "│ fetch Download published weights" in shown


@dataclass(frozen=True, kw_only=True)
class Config:
    """A job for a test."""

    name: str = "x"
    """A name."""


@pytest.fixture
def only_job(monkeypatch):
    """Return a function that makes a command `job` with this work the only one."""

    def replace_commands(work):
        monkeypatch.setattr(table, "load", {"m:Config": Config, "m:work": work}.__getitem__)
        job = table.Command("m:Config", "m:work", "A job.", "Runs", "scellst-ray job")
        monkeypatch.setattr(table, "COMMANDS", {"job": job})

    return replace_commands


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, PermissionError])
def test_a_job_that_cannot_be_done_is_one_line(only_job, capsys, error):
    text = "runs/[a]/m.csv: holds [/b] 'x'" + " and more" * 30

    def run(_):
        message = text + "\n  of \x1b[31m\ud800"
        raise error(message)

    only_job(run)
    assert main(["job"]) == 1
    assert capsys.readouterr().err == f"error: {text} of \\x1b[31m\\ud800\n"


def test_the_code_of_a_job_is_returned_and_a_bug_is_not_hidden(only_job):
    only_job(lambda _: 1)
    assert main(["job", "--name=y"]) == 1

    def run(config):
        raise KeyError(config.name)

    only_job(run)
    with pytest.raises(KeyError):
        main(["job"])


HEAVY = [
    "torch",
    "ray",
    "scanpy",
    "matplotlib",
    "sklearn",
    "anndata",
    "scipy",
    "openslide",
    "pandas.core",
    "cv2",
]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--version"], 0),
        (["--help"], 0),
        (["evaluate"], 2),
        (["extrct"], 2),
        (["status", "."], 0),
        (["gc", "."], 0),
        (["models"], 0),
        (["models", "fetch", "resnet50-imagenet"], 1),
    ],
)
def test_light_commands_load_nothing_heavy(tmp_path, words, code):
    """`models fetch` is refused by a file of that name, before it downloads anything."""
    (tmp_path / "run.json").write_text('{"format_version": 1, "digest": ""}')
    (tmp_path / "models").write_text("")
    program = (
        "import sys\n"
        "from scellst_ray.commands.cli import main\n"
        "try:\n    code = main()\n"
        "except SystemExit as stopped:\n    code = stopped.code\n"
        f"print(code, sorted(set({HEAVY}) & set(sys.modules)), file=sys.stderr)"
    )
    done = python("-c", program, *words, cwd=tmp_path, SCELLST_RAY_CACHE_DIR=str(tmp_path))
    assert done.stderr.splitlines()[-1] == f"{code} []", done.stderr


def test_a_missing_run_from_the_shell(tmp_path):
    done = python("-m", "scellst_ray.commands.cli", "status", "runs/none", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.whole
def test_a_missing_manifest_from_a_process_that_loaded_all_commands(tmp_path):
    """None of them loads what draws: it writes to the home folder when it is imported."""
    program = (
        "import sys\n"
        "from scellst_ray.commands import cli, table\n"
        "for command in table.COMMANDS.values():\n    command.load_work()\n"
        "print('matplotlib' in sys.modules)\n"
        "sys.exit(cli.main())"
    )
    words = ["extract", "--manifest", "missing.csv", "--out", "o"]
    done = python("-c", program, *words, cwd=tmp_path)
    assert done.stdout == "False\n"
    assert done.returncode == 1
    assert done.stderr == "error: missing.csv: no such manifest\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def heeded_sigint():
    """Have SIGINT raise KeyboardInterrupt, which a shell's background job would ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeded_sigint")
@pytest.mark.parametrize("error", [None, RuntimeError("turned by a library"), ImportError("cut")])
def test_ctrl_c_ends_in_two_lines(monkeypatch, capsys, error):
    def work(_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)  # a second press a moment later is ignored
            if error is not None:
                raise error from None
            raise

    monkeypatch.setattr(table.Command, "load_work", lambda _: work)
    before = signal.getsignal(signal.SIGINT)
    assert main(EXTRACT) == 130
    assert capsys.readouterr() == ("", f"{INTERRUPTED}\n")
    assert INTERRUPTED.count("\n") == 1
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_without_ctrl_c_keeps_its_traceback(monkeypatch):
    def work(_):
        message = "a bug"
        raise RuntimeError(message)

    monkeypatch.setattr(table.Command, "load_work", lambda _: work)
    with pytest.raises(RuntimeError, match="a bug"):
        main(EXTRACT)
