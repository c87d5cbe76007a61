"""What a process writes to descriptor 2 reaches its standard error, but for Ray's own lines."""

import subprocess
import sys

import pytest

from scellst_ray.core.quiet_stderr import QuietStderr

CPP = "[2026-12-01 04:18:21,078 E 1 1] core_worker.cc:2465: of ray"
WRITE = f"os.write(2, b'{CPP}\\nof C\\n'); print('of python', file=sys.stderr)"


def run(body):
    """Run Python code in a `with`; return exit code and standard error."""
    code = (
        "import os, signal, sys\nfrom scellst_ray.core.quiet_stderr import QuietStderr\n"
        f"with QuietStderr():\n    {WRITE}\n    {body}\nos.write(2, b'after\\n')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr


@pytest.mark.parametrize("body", ["pass", "os.environ['X'] = 'y'"])
def test_ray_is_quiet_in_a_healthy_process(body):
    code, text = run(body)
    assert code == 0
    assert sorted(text.splitlines()[:2]) == ["of C", "of python"]
    assert text.splitlines()[2:] == ["after"]


@pytest.mark.parametrize(
    "body", ["raise ValueError('bad')", "raise KeyboardInterrupt", "sys.exit(3)"]
)
def test_ray_is_quiet_where_one_line_tells_the_error(body):
    code, text = run(body)
    assert code != 0
    assert CPP not in text
    assert "of C" in text


@pytest.mark.parametrize(
    "body", ["raise RuntimeError('bug')", "os._exit(7)", "os.kill(os.getpid(), signal.SIGKILL)"]
)
def test_a_crash_shows_all(body):
    code, text = run(body)
    assert code != 0
    assert text.count(CPP) == 1
    assert "of C" in text
    assert ("RuntimeError: bug" in text) == ("RuntimeError" in body)


def test_a_filter_that_was_killed_costs_nothing():
    body = "quiet.filter.kill(); quiet.filter.wait(); print('still', file=sys.stderr)"
    code = (
        "import sys\nfrom scellst_ray.core.quiet_stderr import QuietStderr\n"
        f"quiet = QuietStderr()\nwith quiet:\n    {body}\nprint('after', file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "still\nafter\n")


@pytest.mark.parametrize(("end", "is_shown"), [("pass", False), ("raise RuntimeError", True)])
def test_a_child_that_lives_on_loses_no_line(end, is_shown):
    child = "import sys; sys.stdin.read(); print('of child', file=sys.stderr)"
    code = (
        "import os, subprocess, sys\nfrom scellst_ray.core import quiet_stderr\n"
        "quiet_stderr.END_S = 0.2\n"
        f"with quiet_stderr.QuietStderr():\n    os.write(2, b'{CPP}\\n')\n"
        f"    subprocess.Popen([sys.executable, '-c', {child!r}])\n    {end}"
    )
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.wait(20)
        _, text = process.communicate()  # closes standard input, so that the child ends
    assert text.endswith("of child\n")
    assert (CPP in text) == is_shown


def test_a_closed_standard_error_is_opened_for_ray():
    code = (
        "import faulthandler, sys\nfrom scellst_ray.core.quiet_stderr import QuietStderr\n"
        "with QuietStderr():\n    faulthandler.enable()\n    print(sys.stderr.name)"
    )
    command = f'"{sys.executable}" -c "{code}" 2>&-'
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "/dev/null\n")


def test_a_captured_stderr_is_left_alone(capsys):
    before = sys.stderr
    with QuietStderr():
        assert sys.stderr is before
        print("seen", file=sys.stderr)
    assert capsys.readouterr().err == "seen\n"
