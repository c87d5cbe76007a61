"""The console command `scellst-ray`: a subcommand per job, its flags the job's config class.

Every job can also be set by a YAML file (`--config`) of the same keys; flags win over the file.
"""

import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings
from rich.console import Console
from rich.markup import escape

from scellst_ray import __version__

set_parsing_settings(docstring_parse_attribute_docstrings=True)


class _Parser(ArgumentParser):
    """Says what is wrong in a line, and which key may have been meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        del ex
        wrong = re.search(r"(?:option '|arguments?: --|key ['\"])([\w-]+)", message)
        known = {action.dest.rsplit(".", 1)[-1] for action in _actions(self)}
        near = get_close_matches(wrong.group(1).replace("-", "_"), known, n=1) if wrong else []
        if wrong and wrong.group(1).replace("-", "_") in known:
            near = []
        hint = f". Did you mean {near[0]!r}?" if near else ""
        line = re.sub(r"<class '(\w+)'>", r"\1", " ".join(message.split())).rstrip(".")
        print(f"{self.prog}: error: {line}{hint}", file=sys.stderr)  # noqa: T201
        sys.exit(2)


def _actions(parser: ArgumentParser) -> list[Any]:
    """Return a parser's actions and those of its subcommands."""
    found: list[Any] = []
    for action in parser._actions:  # noqa: SLF001 - argparse has no public way to list them
        found.append(action)
        children: Any = action.choices if hasattr(action, "_name_parser_map") else None
        for child in dict(children or {}).values():
            found += _actions(child)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code.

    0: all slides done or empty (or the job succeeded). 1: some slide is partial or failed, or the
    job could not be done. 2: the command line is wrong.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("scellst_ray").setLevel(logging.INFO)
    words = list(sys.argv[1:] if argv is None else argv)
    if words == ["--version"]:  # before the jobs, and with them torch and Ray, are imported
        print(f"scellst-ray {__version__}")  # noqa: T201
        return 0
    parser, jobs = _parser()
    config_class = jobs[words[0]][0] if words and words[0] in jobs else None
    parsed = parser.parse_args(words[:1] + _spelled(words[1:], config_class))
    config_class, run = jobs[parsed.command]
    given = parsed[parsed.command].as_dict()
    try:
        config = config_class(**{f.name: given[f.name] for f in fields(config_class)})
        return run(config)
    except (ValueError, OSError) as error:
        # What users can mend: bad input, in one line. Anything else is ours, with its traceback.
        text = f"[red]error:[/] {escape(str(error))}"
        Console(stderr=True).print(text, highlight=False, soft_wrap=True)
        return 1


def _spelled(words: Sequence[str], config_class: type | None) -> list[str]:
    """Spell a subcommand's words the way jsonargparse takes them.

    --read-mpp is --read_mpp, `--seed -1e3` is --seed=-1e3, --slides a,b is a list of strings, and
    --config comes first, since of two that set a key the later wins.
    """
    known = {f.name: f.type for f in fields(config_class)} if config_class else {}
    lists = {name for name, kind in known.items() if kind == (list[str] | None)}
    configs: list[str] = []
    spelled: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        key = name[2:].replace("-", "_")
        if not name.startswith("--") or not key:
            spelled.append(word)
            continue
        if not equals and (key in known or key == "config") and rest and _is_value(rest[0]):
            equals, value = "=", rest.pop(0)
        if key in lists and equals and value[:1] not in {"[", ""} and value != "null":
            value = json.dumps([part.strip() for part in value.split(",")])
        (configs if key == "config" else spelled).append(f"--{key}{equals}{value}")
    return configs + spelled


def _is_value(word: str) -> bool:
    """Tell a flag's value from the next flag: a minus may begin a number."""
    return not word.startswith("-") or re.fullmatch(r"-[.\d][\w.+-]*", word) is not None


def _parser() -> tuple[ArgumentParser, dict[str, tuple[type, Callable[[Any], int]]]]:
    """Build the parser; the jobs' own modules are imported here, not when this one is."""
    from scellst_ray import commands  # noqa: PLC0415 - keeps `scellst-ray --version` quick

    jobs = commands.jobs()
    parser = _Parser(
        prog="scellst-ray",
        description="Single-cell gene expression from cohorts of H&E slides, on Ray.",
        version=__version__,
        allow_abbrev=False,
    )
    subcommands = parser.add_subcommands(required=True, dest="command")
    for name, (config_class, _) in jobs.items():
        job = _Parser(allow_abbrev=False, description=(config_class.__doc__ or "").splitlines()[0])
        job.add_argument("--config", action="config", help="YAML file of the keys below")
        job.add_class_arguments(config_class)
        subcommands.add_subcommand(name, job, help=(config_class.__doc__ or "").splitlines()[0])
    return parser, jobs


if __name__ == "__main__":
    sys.exit(main())
