"""Agreement of the segmenter's nucleus types with the best types of scores."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa

from scellst_ray.annotation.score_slide import Counts
from scellst_ray.core import schemas
from scellst_ray.core.names import check_names
from scellst_ray.runs.scores import StoredAccuracy


@dataclass(frozen=True)
class Accuracy:
    """How well best types agree with nucleus types.

    Attributes:
        type_map: Nucleus type that each scored type belongs to.
        recall: By nucleus type, share of its cells whose best type belongs to it.
        num_cells: Number of cells of these nucleus types.
    """

    type_map: dict[str, str]
    recall: dict[str, float]
    num_cells: int

    @property
    def balanced(self) -> float:
        """Mean of the recalls."""
        return sum(self.recall.values()) / len(self.recall)

    @property
    def chance(self) -> float:
        """Mean of the recalls of labels that are drawn evenly from these nucleus types."""
        return 1 / len(set(self.type_map.values()))

    def as_json(self) -> StoredAccuracy:
        """Return what `scores.json` holds."""
        return {
            "type_map": self.type_map,
            "recall": self.recall,
            "balanced_accuracy": self.balanced,
            "chance": self.chance,
            "num_cells": self.num_cells,
        }


def agreement_table(counts: Mapping[str, Counts], run_digest: str) -> pa.Table:
    """Return AGREEMENT: cells of each slide by nucleus type and best type.

    Args:
        counts: Counts of each slide.
        run_digest: Digest of the run.
    """
    rows = [
        {"slide_id": slide, "nucleus_type": nucleus, "best_type": best, "n": number}
        for slide, of_slide in counts.items()
        for (nucleus, best), number in sorted(of_slide.items(), key=str)
    ]
    table = pa.Table.from_pylist(rows, schema=schemas.AGREEMENT)
    return schemas.conform(table, schemas.AGREEMENT, "AGREEMENT", run_digest)


def parse_type_map(words: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Return the nucleus type of each scored type from words such as "T cells=Inflammatory".

    Raises:
        ValueError: a word is no such pair, or a scored type is unknown or named twice.
    """
    pairs = [word.rpartition("=") for word in words]
    bad = next((w for w, pair in zip(words, pairs, strict=True) if not (pair[0] and pair[2])), None)
    if bad is not None:
        message = f"type_map: {bad!r} is no pair; give TYPE=NUCLEUS_TYPE, such as T=Inflammatory"
        raise ValueError(message)
    scored = check_names([pair[0].strip() for pair in pairs], names, "type_map: scored types")
    return dict(zip(scored, (pair[2].strip() for pair in pairs), strict=True))


def same_names(names: Sequence[str], nucleus_types: Sequence[str]) -> dict[str, str]:
    """Return the nucleus type of each scored type that has its name, whatever the case."""
    place = {nucleus.lower(): nucleus for nucleus in nucleus_types}
    return {name: place[name.lower()] for name in names if name.lower() in place}


def accuracy(table: pa.Table, type_map: Mapping[str, str]) -> Accuracy | None:
    """Return how far best types agree with nucleus types; None if fewer than 2 can be compared.

    Cells of nucleus types that no scored type belongs to do not count. Cells without scores, and
    those whose best type belongs to no nucleus type, count as wrong.

    Args:
        table: AGREEMENT.
        type_map: Nucleus type of each scored type.
    """
    wanted = set(type_map.values())
    total: dict[str, int] = defaultdict(int)
    right: dict[str, int] = defaultdict(int)
    for row in table.to_pylist():
        nucleus = row["nucleus_type"]
        if nucleus in wanted:
            total[nucleus] += row["n"]
            right[nucleus] += row["n"] * (type_map.get(row["best_type"]) == nucleus)
    if len(total) < 2:
        return None
    recall = {nucleus: right[nucleus] / total[nucleus] for nucleus in sorted(total)}
    return Accuracy(dict(type_map), recall, sum(total.values()))


def shares(table: pa.Table, names: Sequence[str]) -> list[list[str]]:
    """Return a row for each nucleus type: its name, its cells, and their share in each best type.

    Args:
        table: AGREEMENT.
        names: The scored types, in order.
    """
    counts: dict[str, Counter[str | None]] = defaultdict(Counter)
    for row in table.to_pylist():
        counts[row["nucleus_type"]][row["best_type"]] += row["n"]
    return [
        [nucleus, f"{of.total():,}", *(f"{of[name] / of.total():.1%}" for name in names)]
        for nucleus, of in sorted(counts.items())
    ]
