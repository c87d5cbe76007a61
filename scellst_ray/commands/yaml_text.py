"""YAML as text, within bounded time and memory, and lists of values in a word."""

from typing import Any, ClassVar

import yaml

# A file of settings may list ten thousand slides.
MAX_CHARACTERS = 2**20
# Levels of lists and mappings. A file of settings needs two.
MAX_DEPTH = 4
NULL = "tag:yaml.org,2002:null"
Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _TextLoader(Base):  # type: ignore[misc] # chosen at run time
    """A loader for which a plain scalar is text or null."""

    yaml_implicit_resolvers: ClassVar = {
        first: [pair for pair in pairs if pair[0] == NULL]
        for first, pairs in Base.yaml_implicit_resolvers.items()
    }


def compose(text: str) -> yaml.Node | None:
    """Return the tree of a document without aliases, not deeper than MAX_DEPTH.

    Raises:
        yaml.YAMLError: it is no such document.
    """
    depth = 0
    # Events need no memory, whatever the document; only then the tree is built.
    for event in yaml.parse(text, Loader=_TextLoader):
        if isinstance(event, yaml.AliasEvent):
            problem = f"*{event.anchor} stands for another value; write the value itself"
            raise _error_at(event, problem)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            problem = f"lists or keys within each other, deeper than {MAX_DEPTH}"
            raise _error_at(event, problem)
    node: yaml.Node | None = yaml.compose(text, Loader=_TextLoader)
    return node


def _error_at(event: Any, problem: str) -> yaml.MarkedYAMLError:  # noqa: ANN401 - of any kind
    return yaml.MarkedYAMLError(problem=problem, problem_mark=event.start_mark)


def explain(error: yaml.YAMLError) -> str:
    """Return the line and the cause of an error, in one line."""
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    mark = error.problem_mark or error.context_mark
    where = "" if mark is None else f"line {mark.line + 1}: "
    return " ".join((where + ", ".join(filter(None, (error.context, error.problem)))).split())


def scalar_text(node: Any) -> str | None:  # noqa: ANN401 - of any kind
    """Return the text of a scalar; None for null and for a node that is no scalar."""
    if not isinstance(node, yaml.ScalarNode) or node.tag == NULL:
        return None
    return str(node.value)


def parse_list(text: str) -> list[str]:
    """Return the words of a list in brackets: ["a", "b"] or [a, b].

    Raises:
        ValueError: the text is no such list.
    """
    expected = 'expected A,B or ["A", "B"]'
    if len(text) > MAX_CHARACTERS:
        message = f"a list of more than {MAX_CHARACTERS:,} characters; {expected}"
        raise ValueError(message)
    try:
        node = compose(text)
    except yaml.YAMLError as error:
        raise ValueError(expected) from error
    if not isinstance(node, yaml.SequenceNode):
        raise ValueError(expected)
    words = [scalar_text(item) for item in node.value]
    if None in words:
        raise ValueError(expected)
    return [word for word in words if word is not None]


def split_words(text: str) -> list[str]:
    """Return the words between commas; a comma too many adds none.

    Raises:
        ValueError: there is no word.
    """
    words = [word.strip() for word in text.split(",")]
    if not any(words):
        message = "expected at least one value"
        raise ValueError(message)
    return [word for word in words if word]
