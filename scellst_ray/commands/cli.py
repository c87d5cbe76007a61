"""The console command `scellst-ray`. Each job is a subcommand, whose settings are its flags.

Cyclopts parses and shows the flags (parse.py). It was chosen over jsonargparse and a parser of our
own for groups of flags, shell completion, suggestions and an import of 0.05 s.
"""

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.abc import MetaPathFinder
from typing import Any, NoReturn

from scellst_ray.commands import table
from scellst_ray.core.extras import explain_absent
from scellst_ray.core.logs import log_to_stderr, one_line
from scellst_ray.core.lost_process import explain_lost_process
from scellst_ray.core.quiet_stderr import QuietStderr
from scellst_ray.core.signals import catch_sigint
from scellst_ray.core.version import __version__

PROG = "scellst-ray"
INTERRUPTED = f"""{PROG}: interrupted (Ctrl-C); everything that is finished is stored
{PROG}: give the same command again to go on from there"""
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code.

    0: all slides done or empty (or the job succeeded). 1: some slide is partial or failed, or the
    job could not be done. 2: the command line is wrong. 130: Ctrl-C.
    """
    with catch_sigint() as interrupts:
        try:
            return _run(argv)
        except BaseException as error:
            if not interrupts.came:
                line = explain_lost_process(error)
                if line is None:
                    raise
                return _report_error(line)
    sys.stdout.flush()
    print(INTERRUPTED, file=sys.stderr, flush=True)  # noqa: T201
    if argv is None:
        # Threads that wait for a store would hold this process for half a minute.
        os._exit(EXIT_INTERRUPTED)
    return EXIT_INTERRUPTED


def _run(argv: Sequence[str] | None) -> int:
    """Run the command line without regard to Ctrl-C; return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:
        print(f"{PROG} {__version__}")  # noqa: T201
        return 0
    try:
        log_to_stderr(logging.INFO)
    except ValueError as error:
        _refuse(PROG, str(error))
    # Imported here, as --version and the workers that import this module do not need them.
    from scellst_ray.commands.parse import UsageError, parse, show_commands  # noqa: PLC0415

    name = _command_named(words)
    prog = PROG if name is None else f"{PROG} {name}"
    try:
        if name is None:
            return show_commands(words)
        values = parse(name, words[len(name.split()) :])
    except UsageError as error:
        from scellst_ray.storage.credentials import redact  # noqa: PLC0415 - not for help

        _refuse(error.prog or prog, redact(str(error)))
    try:
        command = table.COMMANDS[name]
        work = command.load_work()
        if command.is_light and argv is None:
            sys.meta_path.insert(0, _WithoutPandas())
        settings = _settings(command, values)
        # Light commands start no Ray.
        with nullcontext() if command.is_light else QuietStderr():
            return work(settings)
    except ImportError as error:
        line = explain_absent(error)
        if line is None:
            raise
        return _report_error(f"{name}: {line}")
    except (ValueError, OSError) as error:
        # Errors that users can fix, such as bad input, take one line, and so do processes that a
        # host ended (see `main`). All others are bugs and keep their traceback.
        return _report_error(str(error))


def _report_error(line: str) -> int:
    """Print an error as one line, without the secrets in it; return the exit code."""
    from rich.console import Console  # noqa: PLC0415 - not for help
    from rich.markup import escape  # noqa: PLC0415 - not for help

    from scellst_ray.storage.credentials import redact  # noqa: PLC0415 - not for help

    text = f"[red]error:[/] {escape(one_line(redact(line)))}"
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
    return 1


class _WithoutPandas(MetaPathFinder):
    """Keep pandas out of a process: pyarrow loads it for its first value (0.5 s, 60 MB).

    pyarrow works without pandas, but remembers that it is absent. So use this only in a process
    that never needs pandas.
    """

    def find_spec(self, fullname: str, *_: object) -> None:
        """Raise ModuleNotFoundError for pandas, and leave all else to other finders."""
        if fullname == "pandas":
            raise ModuleNotFoundError(fullname)


def _refuse(prog: str, line: str) -> NoReturn:
    print(f"{prog}: error: {line}", file=sys.stderr)  # noqa: T201
    sys.exit(2)


def _settings(command: table.Command, values: dict[str, Any]) -> Any:  # noqa: ANN401 - of any command
    """Return the settings of a command with the given values.

    Raises:
        ValueError: a value cannot work, or it is an address with credentials.
    """
    from scellst_ray.storage.credentials import refuse_credentials  # noqa: PLC0415 - not for help

    # First, so that no message about another mistake shows them.
    refuse_credentials(values)
    settings = command.load_settings()
    return getattr(settings, "from_flags", settings)(**values)


def _command_named(words: Sequence[str]) -> str | None:
    """Return the command that the first words name; None if they name none.

    `models` alone is a command, but `models fetc` does not mean it: another word follows.
    """
    for count in (2, 1):
        name, rest = " ".join(words[:count]), words[count : count + 1]
        is_followed = bool(rest) and not rest[0].startswith("-")
        if name in table.COMMANDS and not (table.begins_others(name) and is_followed):
            return name
    return None


if __name__ == "__main__":
    sys.exit(main())
