"""Names for columns and layers where some are taken already."""

from collections.abc import Iterable, Sequence


def free_names(names: Sequence[str], taken: Iterable[str] = (), *, is_cased: bool) -> list[str]:
    """Return names that all differ: one that is taken gets `_2`, or the next number that is free.

    Args:
        names: The wanted names, such as genes.
        taken: Names that others have.
        is_cased: Whether `Cd3e` and `CD3E` are two names. They are one in SQLite.
    """

    def key(name: str) -> str:
        return name if is_cased else name.lower()

    used, found = {key(name) for name in taken}, []
    # A name that is wanted as it stands is not given to another.
    wanted = {key(name) for name in names}
    for name in names:
        free, number = name, 2
        while key(free) in used or (free != name and key(free) in wanted):
            free, number = f"{name}_{number}", number + 1
        used.add(key(free))
        found.append(free)
    return found
