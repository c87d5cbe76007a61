"""What two runs say of the same slide, as plain values."""

from dataclasses import dataclass, field

Counts = tuple[int, int]


@dataclass(frozen=True)
class PairOfMeans:
    """A gene or a score in two runs.

    Attributes:
        means: Mean over the cells of each run.
        r: Pearson's r over squares of the slide; None: not known.
    """

    means: tuple[float, float]
    r: float | None


@dataclass(frozen=True)
class SlideBeside:
    """A slide in two runs. Pairs hold the value of the run, then that of the other one.

    Attributes:
        num_cells: Numbers of cells.
        types: Numbers of cells by nucleus type.
        genes: The shown genes that both runs have.
        profiles: By type that both runs have, Pearson's r over genes between how the type's means
            differ from those of all cells; None: not known.
        best: Numbers of cells by best type; empty unless both runs have scores.
        scores: Scores of the types that both runs are scored for.
    """

    num_cells: Counts
    types: dict[str, Counts]
    genes: dict[str, PairOfMeans] = field(default_factory=dict)
    profiles: dict[str, float | None] = field(default_factory=dict)
    best: dict[str, Counts] = field(default_factory=dict)
    scores: dict[str, PairOfMeans] = field(default_factory=dict)
