"""Names that users give, checked against those that exist."""

from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches


def check_names(names: Sequence[str], available: Sequence[str], source: str) -> list[str]:
    """Return `names` as a list if all of them are available and none is named twice.

    Args:
        names: The names to check; a single text counts as one name.
        available: The names that exist.
        source: Beginning of the message: what the names are, and of which file.

    Raises:
        ValueError: a name is unknown or named twice. The message names up to 5 of them, and
            similar names that exist.
    """
    wanted, present = [names] if isinstance(names, str) else list(names), set(available)
    unknown = [name for name in wanted if name not in present]
    if unknown:
        hints = [match for name in unknown[:5] for match in get_close_matches(name, available, n=1)]
        near = f"; did you mean {', '.join(map(repr, hints))}?" if hints else ""
        some = ", ".join(map(repr, available[:5])) + (", ..." if len(available) > 5 else "")
        message = (
            f"{source}: {len(unknown)} of {len(wanted)} not found, such as "
            f"{', '.join(map(repr, unknown[:5]))}{near} ({len(available)} exist: {some or 'none'})"
        )
        raise ValueError(message)
    repeated = [name for name, times in Counter(wanted).items() if times > 1]
    if repeated:
        message = f"{source}: {repeated[:5]} named more than once; name each once"
        raise ValueError(message)
    return wanted
