"""Names that users give, checked against those that exist."""

from collections import Counter
from collections.abc import Sequence
from difflib import get_close_matches


def check_names(names: Sequence[str], there: Sequence[str], where: str) -> list[str]:
    """Return `names` as a list if all of them are `there`, none twice.

    Raises:
        ValueError: Naming up to 5 that are not, and what comes close to them.
    """
    wanted, present = [names] if isinstance(names, str) else list(names), set(there)
    unknown = [name for name in wanted if name not in present]
    if unknown:
        hints = [match for name in unknown[:5] for match in get_close_matches(name, there, n=1)]
        near = f"; did you mean {', '.join(map(repr, hints))}?" if hints else ""
        some = ", ".join(map(repr, there[:5])) + (", ..." if len(there) > 5 else "")
        message = (
            f"{where}: {len(unknown)} of {len(wanted)} not found, such as "
            f"{', '.join(map(repr, unknown[:5]))}{near} (there are {len(there)}: {some or 'none'})"
        )
        raise ValueError(message)
    repeated = [name for name, times in Counter(wanted).items() if times > 1]
    if repeated:
        message = f"{where}: {repeated[:5]} asked for more than once; ask for each once"
        raise ValueError(message)
    return wanted
