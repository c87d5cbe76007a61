"""The flags of a command, made from the dataclass of its settings.

A field is a flag. Its type decides which values it takes, and its docstring is the help. A field
that holds other settings stands for their fields.
"""

import inspect
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from cyclopts import Group, Parameter, Token
from docstring_parser import parse_from_object

from scellst_ray.commands.yaml_text import parse_list, split_words

TRUTHS = {"true": True, "false": False}
CONFIG_HELP = "YAML file with the same keys. Flags override it."


@dataclass(frozen=True)
class Flag:
    """A flag of a command.

    Attributes:
        name: Name of the field.
        kind: Type of the values.
        default: Value without the flag; MISSING if the flag is required.
        text: Help.
    """

    name: str
    kind: Any
    default: Any
    text: str

    def or_none(self) -> "Flag":
        """Return the flag with None as a possible value, and as default if the flag is required."""
        default = None if self.default is MISSING else self.default
        return replace(self, kind=self.kind | None, default=default)

    @property
    def kinds(self) -> tuple[Any, ...]:
        """Types that a value may have: the members of a union, else the type itself."""
        return get_args(self.kind) if _is_union(self.kind) else (self.kind,)

    @property
    def is_switch(self) -> bool:
        """Whether the flag may stand without a value, which means true."""
        return set(self.kinds) <= {bool, types.NoneType}

    @property
    def is_list(self) -> bool:
        """Whether the flag takes a list of values."""
        return _item(self) is not None

    @property
    def is_optional(self) -> bool:
        """Whether `null` is a value."""
        return types.NoneType in self.kinds


def flags_of(settings: type) -> dict[str, Flag]:
    """Return the flags of settings by name; those of the settings win over those of their parts."""
    flags: dict[str, Flag] = {}
    own: dict[str, Flag] = {}
    hints, texts = get_type_hints(settings), _docstrings(settings)
    for field in fields(settings):
        kind = hints[field.name]
        parts = [part for part in (get_args(kind) or (kind,)) if is_dataclass(part)]
        if parts:
            flags |= _common([flags_of(part) for part in parts if isinstance(part, type)])
        else:
            own[field.name] = Flag(field.name, kind, _default(field), texts.get(field.name, ""))
    return flags | own


def _common(choices: Sequence[dict[str, Flag]]) -> dict[str, Flag]:
    """Return the flags of one of several settings.

    A flag is required if all of them require it. Its default is None if their defaults differ.
    """
    flags: dict[str, Flag] = {}
    for flag in (flag for choice in choices for flag in choice.values()):
        others = [choice.get(flag.name) for choice in choices]
        defaults = [other.default if other else None for other in others]
        is_same = all(default == defaults[0] for default in defaults)
        same = Flag(flag.name, flag.kind, defaults[0], flag.text)
        flags.setdefault(flag.name, same if is_same else replace(same, default=None).or_none())
    return flags


def _default(field: "Field[Any]") -> Any:  # noqa: ANN401 - of any type
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def _docstrings(settings: type) -> dict[str, str]:
    """Return the docstrings of fields, also of those that are inherited."""
    texts: dict[str, str] = {}
    for part in reversed(settings.__mro__[:-1]):
        for entry in parse_from_object(part).params:
            texts[entry.arg_name] = " ".join((entry.description or "").split())
    return texts


def signature_of(
    flags: Mapping[str, Flag], groups: Mapping[str, str], hidden: Sequence[str]
) -> inspect.Signature:
    """Return what cyclopts parses and shows: flags in their groups, those required first.

    `name`, or else `run`, may be given without its flag.
    """
    flags = {name: flag.or_none() if name in hidden else flag for name, flag in flags.items()}
    place = {name: number for number, name in enumerate(" ".join(groups.values()).split())}
    order = sorted(
        flags.values(), key=lambda f: (f.default is not MISSING, place.get(f.name, len(place)))
    )
    bare = next((name for name in ("name", "run") if name in flags), None)
    headings = {
        name: Group(heading, sort_key=number)
        for number, (heading, names) in enumerate(groups.items())
        for name in names.split()
    }
    parameters = [
        inspect.Parameter(
            flag.name,
            _PLAIN if flag.name == bare else _BY_NAME,
            default=inspect.Parameter.empty if flag.default is MISSING else flag.default,
            annotation=Annotated[
                flag.kind, _parameter(flag, headings.get(flag.name), show=flag.name not in hidden)
            ],
        )
        for flag in order
    ]
    about = Parameter(help=CONFIG_HELP, group=next(iter(headings.values()), None))
    file = Annotated[str | None, about]
    parameters.append(inspect.Parameter("config", _BY_NAME, default=None, annotation=file))
    # Python wants positional parameters first, and among them those without a default.
    parameters.sort(key=lambda p: p.kind)
    return inspect.Signature(parameters)


_PLAIN, _BY_NAME = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY


def _parameter(flag: Flag, group: Group | None, *, show: bool) -> Parameter:
    """Return how cyclopts reads and shows a flag."""
    shared = Parameter(help=flag.text, group=group, show=show, allow_repeating=True)
    shared = Parameter.combine(shared, Parameter(show_default=_show_default(flag)))
    if _item(flag) is not None:
        return Parameter.combine(
            shared,
            Parameter(
                converter=_read_list,
                consume_multiple=False,
                n_tokens=1,
                negative=(),
                metavar="A,B,...",
            ),
        )
    if bool in flag.kinds and int in flag.kinds:
        return Parameter.combine(
            shared, Parameter(converter=_read_count, n_tokens=1, negative=(), metavar="INT")
        )
    if int in flag.kinds:
        return Parameter.combine(shared, Parameter(converter=_read_int))
    return shared


def _show_default(flag: Flag) -> Any:  # noqa: ANN401 - as cyclopts takes it
    if flag.default is None or flag.default is MISSING:
        return False
    if isinstance(flag.default, list):
        return lambda values: ",".join(f"{value:g}" for value in values)
    return True


def _is_union(kind: Any) -> bool:  # noqa: ANN401 - a type
    return get_origin(kind) in (Union, types.UnionType)


def _item(flag: Flag) -> Any:  # noqa: ANN401 - a type
    """Return the type of a list's items; None if the flag takes no list."""
    lists = [kind for kind in flag.kinds if get_origin(kind) is list]
    return get_args(lists[0])[0] if lists else None


def _read_list(kind: Any, tokens: Sequence[Token]) -> list[Any]:  # noqa: ANN401 - a type
    """Read a list: a,b or ["a", "b"] or [a, b], or the items of a file's list."""
    item = next((get_args(k)[0] for k in (kind, *get_args(kind)) if get_origin(k) is list), str)
    words: list[Any] = []
    for token in tokens:
        if token.source != "cli":
            words.append(token.value)
        elif token.value.startswith("["):
            words += parse_list(token.value)
        else:
            words += split_words(token.value)
    return [_exact_int(str(word)) if item is int else item(word) for word in words]


def _read_int(_: Any, tokens: Sequence[Token]) -> int:  # noqa: ANN401 - a type
    return _exact_int(tokens[-1].value)


def _read_count(_: Any, tokens: Sequence[Token]) -> int | bool:  # noqa: ANN401 - a type
    word = tokens[-1].value
    return TRUTHS[word.lower()] if word.lower() in TRUTHS else _exact_int(word)


def _exact_int(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        message = f'unable to convert "{word}" into int'
        raise ValueError(message) from None
