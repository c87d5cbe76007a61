"""The parser of the command line, by cyclopts: it returns values of settings or shows help."""

import inspect
import sys
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from cyclopts import (
    App,
    CycloptsError,
    Group,
    MissingArgumentError,
    UnknownCommandError,
    UnusedCliTokensError,
)
from cyclopts.config import Dict
from rich.console import Console

from scellst_ray.commands import table
from scellst_ray.commands.flags import TRUTHS, Flag, flags_of, signature_of
from scellst_ray.commands.yaml_file import read_settings
from scellst_ray.core.version import __version__

PROG = "scellst-ray"
ABOUT = "Single-cell gene expression from cohorts of H&E slides, on Ray."
COMPLETION = "--install-completion"
Values = dict[str, Any]


class UsageError(Exception):
    """Error of a command line that cannot be understood. Its message is one line.

    Attributes:
        prog: Words that come before the message; None for those of the command.
    """

    def __init__(self, text: str, prog: str | None = None) -> None:
        """Keep the text in one line, without its full stop."""
        line = " ".join(text.split()).rstrip(".")
        super().__init__(line if len(line) <= 400 else f"{line[:200]} ... {line[-190:]}")
        self.prog = prog


def parse(name: str, words: Sequence[str]) -> Values:
    """Return the values that flags, or else a YAML file, give to the settings of a command.

    It prints the help and exits if the words ask for it.

    Raises:
        UsageError: words, keys or values that the command does not take.
    """
    flags = flags_of(table.COMMANDS[name].load_settings())
    words, files = _split_config(words)
    words, nulls = _normalise(words, flags)
    values: Values = {}
    for file in files:
        try:
            values |= read_settings(file, flags)
        except ValueError as error:
            raise UsageError(str(error)) from error
    # cyclopts has no word for the value None.
    absent = {key: None for key, value in values.items() if value is None}
    given = {key: value for key, value in values.items() if value is not None}
    # Nest values below the words of the command: at the root, `manifest` would be the command.
    for word in reversed(name.split()):
        given = {word: given}
    config = Dict(given, source=files[-1] if files else None)
    app = make_app([name], [config])
    try:
        function, bound, _ = app.parse_args(
            [*name.split(), *words], exit_on_error=False, print_error=False
        )
    except CycloptsError as error:
        raise UsageError(_explain(error, flags)) from error
    if function.__name__ != "collect":
        function(*bound.args, **bound.kwargs)
        sys.exit(0)
    return absent | dict(bound.arguments) | nulls


def show_commands(words: Sequence[str]) -> int:
    """Show the list of commands or of a group, or install completion; return the exit code.

    A group without a command, as in `scellst-ray evaluate`, gets its list as an error.

    Raises:
        UsageError: the words name no command.
    """
    if not words:
        text = f"a command is needed: {', '.join(table.COMMANDS)}"
        raise UsageError(text)
    is_group = table.begins_others(words[0])
    app = make_app(table.COMMANDS if words[0] == COMPLETION else ())
    if is_group and len(words) == 1:
        app.help_print(list(words), console=Console(stderr=True))
        return 2
    try:
        app(list(words), exit_on_error=False, print_error=False, result_action="return_value")
    except UnknownCommandError as error:
        raise _unknown_command(words[1] if is_group else words[0], words[0] * is_group) from error
    except CycloptsError as error:
        raise UsageError(_explain(error), f"{PROG} {words[0]}" if is_group else None) from error
    return 0


def _unknown_command(word: str, group: str) -> UsageError:
    """Return the message about a word that names no command, or no command of a group."""
    names = [name for name in table.COMMANDS if not group or name.split()[0] == group]
    # Reversed, so that `models` stands for itself and not for `models fetch`.
    meant = {name.split()[-1] if group else name.split()[0]: name for name in reversed(names)}
    near = [meant[match] for match in get_close_matches(word, meant, n=1)]
    hint = f". Did you mean {near[0]!r}?" if near else ""
    text = f"there is no command {word!r}, choose from {', '.join(map(repr, names))}{hint}"
    return UsageError(text, f"{PROG} {group}" if group else None)


def make_app(loaded: Collection[str], config: Sequence[Dict] = ()) -> App:
    """Return the app of all commands; only those in `loaded` have flags, from their settings.

    Args:
        loaded: Names of commands whose settings are imported.
        config: Values below those of flags.
    """
    app = App(
        name=PROG,
        help=ABOUT,
        version=__version__,
        help_format="plaintext",
        group_commands=Group("Flags", sort_key=len(table.COMMANDS)),
    )
    app.register_install_completion_command(name=COMPLETION, help="Install shell completion.")
    sections = {
        command.section: Group(command.section, sort_key=number)
        for number, command in reversed(list(enumerate(table.COMMANDS.values())))
    }
    for number, (name, command) in enumerate(table.COMMANDS.items()):
        *first, last = name.split()
        if first and first[0] not in app:
            about = table.GROUPS[first[0]]
            group = App(name=first[0], help=about, group=sections[command.section], sort_key=number)
            app.command(group)
        part = App(
            name=last,
            help=command.about,
            help_epilogue=f"Example:\n\n    {command.example}\n",
            group=sections[command.section],
            sort_key=number,
            config=list(config),
        )
        if name in loaded:
            flags = flags_of(command.load_settings())
            part.default(_collector(signature_of(flags, command.groups, command.hidden)))
        (app[first[0]] if first else app).command(part)
    return app


def _collector(signature: inspect.Signature) -> Any:  # noqa: ANN401 - a function
    """Return a function with this signature, which replaces the work while words are parsed."""

    def collect(**values: Any) -> Values:  # noqa: ANN401 - of any type
        return values

    vars(collect)["__signature__"] = signature
    collect.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return collect


def _split_config(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the words without --config, and its files."""
    rest = list(words)
    files: list[str] = []
    for index in range(len(rest) - 1, -1, -1):
        name, equals, file = rest[index].partition("=")
        if name != "--config" or not (equals or rest[index + 1 :]):
            continue
        files.insert(0, file if equals else rest.pop(index + 1))
        del rest[index]
    return rest, files


def _normalise(words: Sequence[str], flags: Mapping[str, Flag]) -> tuple[list[str], Values]:
    """Return words as cyclopts takes them, and flags that are `null`.

    `--gpus false` becomes --gpus=false. A flag that is `null` is None, and leaves the words. A list
    that is given twice is one list, so `--crops+ b` is --crops b.
    """
    rest: list[str] = []
    nulls: Values = {}
    ahead = list(words)
    while ahead:
        word = ahead.pop(0)
        name, equals, value = word.partition("=")
        flag = flags.get(name[2:].replace("-", "_").rstrip("+")) if name.startswith("--") else None
        if flag is not None and name.endswith("+"):
            name = name.rstrip("+")
            word = f"{name}{equals}{value}"
        if flag is not None and not equals and ahead:
            next_word = ahead[0]
            is_truth = flag.is_switch and next_word.lower() in TRUTHS
            if is_truth or (flag.is_optional and next_word == "null"):
                value = ahead.pop(0)
                word = f"{name}={value}"
        if flag is not None and flag.is_optional and value == "null":
            nulls[flag.name] = None
        else:
            rest.append(word)
            if flag is not None:
                nulls.pop(flag.name, None)
    return rest, nulls


def _explain(error: CycloptsError, flags: Mapping[str, Flag] = MappingProxyType({})) -> str:
    """Return the reason why a command line cannot be understood."""
    if isinstance(error, UnusedCliTokensError):
        lists = ", ".join(f"--{f.name.replace('_', '-')}" for f in flags.values() if f.is_list)
        hint = f"; separate the values of {lists} by commas" if lists else ""
        return f"unexpected {', '.join(map(repr, error.unused_tokens or ()))}{hint}"
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        if error.keyword is not None:
            return f"{error.keyword} needs a value"
        return f"{error.argument.name} is required"
    return str(error)
