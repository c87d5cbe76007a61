"""The console command `scellst-ray`: a subcommand per job, its flags the job's config class.

Every job can also be set by a YAML file (`--config`) of the same keys; flags win over the file.
"""

import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings
from rich.console import Console
from rich.markup import escape

from scellst_ray.core.logs import log_to_stderr
from scellst_ray.core.version import __version__
from scellst_ray.storage.credentials import refuse_credentials

set_parsing_settings(docstring_parse_attribute_docstrings=True)

PROG = "scellst-ray"
TRUTHS = ("true", "false", "True", "False")
DESCRIPTION = "Single-cell gene expression from cohorts of H&E slides, on Ray."


class _Parser(ArgumentParser):
    """Says what is wrong in a line, and which key may have been meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        del ex
        wrong = re.search(r"(?:[Oo]ption '|arguments?: --|key ['\"])([\w-]+)", message)
        known = {action.dest for action in self._actions}
        near = get_close_matches(wrong.group(1).replace("-", "_"), known, n=1) if wrong else []
        if wrong and wrong.group(1).replace("-", "_") in known:
            near = []
        hint = f". Did you mean {near[0]!r}?" if near else ""
        line = re.sub(r"<class '(\w+)'>", r"\1", " ".join(message.split())).rstrip(".")
        _refuse(self.prog, f"{line}{hint}")


def _refuse(prog: str, line: str) -> NoReturn:
    print(f"{prog}: error: {line}", file=sys.stderr)  # noqa: T201
    sys.exit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code.

    0: all slides done or empty (or the job succeeded). 1: some slide is partial or failed, or the
    job could not be done. 2: the command line is wrong.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:  # before the jobs, and with them torch and Ray, are imported
        print(f"scellst-ray {__version__}")  # noqa: T201
        return 0
    try:
        log_to_stderr(logging.INFO)
    except ValueError as error:
        _refuse(PROG, str(error))
    from scellst_ray.commands import table as commands  # noqa: PLC0415 - keeps `scellst-ray --version` quick

    jobs = commands.jobs()
    name = _job(words, list(jobs))
    if name is None:
        return _list(words, {name: kind for name, (kind, _) in jobs.items()})
    config_class, run = jobs[name]
    also = [f"'{PROG} {other} --help'" for other in jobs if other.startswith(f"{name} ")]
    parser = _Parser(
        prog=f"{PROG} {name}",
        allow_abbrev=False,
        description=_about(config_class),
        epilog=f"See also {', '.join(also)}." if also else None,
    )
    parser.add_argument("--config", action="config", help="YAML file of the keys below")
    parser.add_class_arguments(config_class)
    given = parser.parse_args(_spelled(words[len(name.split()) :], config_class)).as_dict()
    try:
        config = config_class(**{f.name: given[f.name] for f in fields(config_class)})
        refuse_credentials(given)
        return run(config)
    except (ValueError, OSError) as error:
        # What users can mend: bad input, in one line. Anything else is ours, with its traceback.
        text = f"[red]error:[/] {escape(str(error))}"
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)
        return 1


def _job(words: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the job that the first words name, the longest if one begins with another.

    None if they name none: a first word shared by several jobs is followed by a word of its own,
    and `models fetc` is meant for another job than `models`.
    """
    for count in (2, 1):
        name = " ".join(words[:count])
        follows = words[count : count + 1]
        group = any(other.startswith(f"{name} ") for other in names)
        if name in names and not (group and follows and not follows[0].startswith("-")):
            return name
    return None


def _list(words: Sequence[str], kinds: Mapping[str, type]) -> int:
    """Print the help of all jobs or of a group, or say that there is no such job; return the code.

    A group named alone gets its help, though as an error: a script has forgotten a word.
    """
    group = bool(words) and any(name.startswith(f"{words[0]} ") for name in kinds)
    rest = list(words[1:] if group else words)
    kinds = {name: kind for name, kind in kinds.items() if not group or name.split()[0] == words[0]}
    prog = f"{PROG} {words[0]}" if group else PROG
    asked = rest[:1] in (["-h"], ["--help"])
    if asked or (group and not rest):
        lines = [f"usage: {prog} COMMAND ...", "", DESCRIPTION, ""]
        width = max(map(len, kinds)) + 2
        lines += [f"    {name:{width}}{_about(kind)}" for name, kind in kinds.items()]
        lines += ["", f"{PROG} COMMAND --help shows the flags of one."]
        print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    choices = ", ".join(repr(name) for name in kinds)
    if not rest:
        _refuse(prog, f"a command is needed: {choices}")
    # Reversed, so that `models` stands for itself and not for `models fetch`.
    names = reversed(list(kinds))
    meant = {name.split(" ", 1)[-1] if group else name.split()[0]: name for name in names}
    near = [meant[word] for word in get_close_matches(rest[0], meant, n=1)]
    hint = f". Did you mean {near[0]!r}?" if near else ""
    _refuse(prog, f"there is no command {rest[0]!r}, choose from {choices}{hint}")


def _about(config_class: type) -> str:
    """Return the first line of a job's description."""
    return (config_class.__doc__ or "").splitlines()[0]


def _spelled(words: Sequence[str], config_class: type) -> list[str]:
    """Spell a job's words the way jsonargparse takes them.

    --read-mpp is --read_mpp, `--seed -1e3` is --seed=-1e3, --slides a,b is a list of strings,
    `fetch NAME` is --name=NAME, `status RUN` is --run=RUN, --json is --json=true, and --config
    comes first, since of two that set a key the later wins.
    """
    known = {f.name: f.type for f in fields(config_class)}
    lists = {name for name, kind in known.items() if kind == (list[str] | None)}
    configs: list[str] = []
    spelled: list[str] = []
    rest = list(words)
    bare = next((name for name in ("name", "run") if name in known), None)
    if any(word.partition("=")[0] == f"--{bare}" for word in rest):
        bare = None
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        key = name[2:].replace("-", "_")
        if not name.startswith("--") or not key:
            is_bare = bare is not None and not word.startswith("-")
            spelled.append(f"--{bare}={word}" if is_bare else word)
            bare = None if is_bare else bare
            continue
        if not equals and known.get(key) is bool:
            equals, value = "=", rest.pop(0) if rest and rest[0] in TRUTHS else "true"
        if not equals and (key in known or key == "config") and rest and _is_value(rest[0]):
            equals, value = "=", rest.pop(0)
        if key in lists and equals and value[:1] not in {"[", ""} and value != "null":
            value = json.dumps([part.strip() for part in value.split(",")])
        (configs if key == "config" else spelled).append(f"--{key}{equals}{value}")
    return configs + spelled


def _is_value(word: str) -> bool:
    """Tell a flag's value from the next flag: a minus may begin a number."""
    return not word.startswith("-") or re.fullmatch(r"-[.\d][\w.+-]*", word) is not None


if __name__ == "__main__":
    sys.exit(main())
