"""YAML files of settings: keys with a value or a list of values, within bounded time and memory.

Scalars stay text, as on a command line; the type of a flag decides what they mean. So a slide_id
007 keeps its zeros, a gene NO is no `false`, and a number of many digits is read by nobody.
"""

import codecs
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from scellst_ray.commands.flags import Flag
from scellst_ray.commands.yaml_text import compose, explain, parse_list, scalar_text, split_words

# A file of settings may list ten thousand slides.
MAX_BYTES = 2**20
# Words of YAML 1.1 for true and false; cyclopts takes others.
BOOLS = {
    "true": "true",
    "yes": "true",
    "on": "true",
    "false": "false",
    "no": "false",
    "off": "false",
}
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_settings(file: str, flags: Mapping[str, Flag]) -> dict[str, Any]:
    """Return the keys and values of a YAML file of settings: text, lists of text, or None.

    Keys may be written with `-` or `_`. A list may also be text, its values separated by commas.

    Args:
        file: Local path.
        flags: The keys that are known, by name.

    Raises:
        ValueError: there is no such file, it cannot be read as YAML, or a key or value is none
            that `flags` take. The message is one line that names the file.
    """
    values: dict[str, Any] = {}
    for key, node in _nodes(file, _parse(file, _read_text(file))):
        name = key.replace("-", "_")
        if name not in flags:
            near = get_close_matches(name, flags, n=1)
            hint = f". Did you mean {near[0]!r}?" if near else ""
            message = f"{file}: there is no key {_short(key)!r}{hint}"
            raise ValueError(message)
        if name in values:
            message = f"{file}: line {_line(node)}: {name} is given twice; remove one"
            raise ValueError(message)
        value = values[name] = _value(file, flags[name], node)
        if value is None and not flags[name].is_optional:
            message = f"{file}: {name} has no value"
            raise ValueError(message)
    return values


def _read_text(file: str) -> str:
    """Return the text of a file: UTF-8, or UTF-16 with a byte order mark."""
    path = Path(file)
    try:
        if path.exists() and not path.is_file():
            message = f"--config {file}: is no file; name a YAML file"
            raise ValueError(message)
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        message = f"--config {file}: the file does not exist"
        raise ValueError(message) from error
    except OSError as error:
        message = f"--config {file}: {error}"
        raise ValueError(message) from error
    if len(content) > MAX_BYTES:
        message = f"--config {file}: has more than {MAX_BYTES:,} bytes; is it a file of settings?"
        raise ValueError(message)
    encoding = next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        message = f"--config {file}: is no text in UTF-8 (byte {error.start}); save it as UTF-8"
        raise ValueError(message) from error


def _parse(file: str, text: str) -> yaml.Node | None:
    try:
        return compose(text)
    except yaml.YAMLError as error:
        message = f"--config {file}: {explain(error)}"
        raise ValueError(message) from error


def _nodes(file: str, node: yaml.Node | None) -> list[tuple[str, yaml.Node]]:
    """Return the pairs of a document's keys and values."""
    if not isinstance(node, yaml.MappingNode):
        message = f"--config {file}: expected lines of `key: value`"
        raise ValueError(message)
    pairs = []
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            message = f"--config {file}: line {_line(key)}: a key is one word"
            raise ValueError(message)
        pairs.append((str(key.value), value))
    return pairs


def _value(file: str, flag: Flag, node: yaml.Node) -> str | list[str] | None:
    """Return the value of a key as text, as a list of text where the flag takes one, or None."""
    where = f"{file}: line {_line(node)}: {flag.name}"
    if isinstance(node, yaml.ScalarNode):
        text = scalar_text(node)
        if text is None or not flag.is_list:
            return BOOLS.get(text.lower(), text) if text and bool in flag.kinds else text
        try:
            return parse_list(text) if text.startswith("[") else split_words(text)
        except ValueError as error:
            message = f"{where}: {error}"
            raise ValueError(message) from error
    if not flag.is_list:
        message = f"{where}: expected one value"
        raise ValueError(message)
    words = (
        [scalar_text(item) for item in node.value]
        if isinstance(node, yaml.SequenceNode)
        else [None]
    )
    if None in words:
        message = f"{where}: expected a list of values, such as [A, B]"
        raise ValueError(message)
    return [word for word in words if word is not None]


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
