"""Domain shift: how far the cells of a slide lie from the cells that a head was trained on.

A cell's distance is the root mean square over features of (x - mean) / std. Mean and standard
deviation are those of the training instances, which the head holds. A cell like those has a
distance of about 1. A slide's score is the root mean square of its cells' distances. The limit is
the highest score that a training slide had when it was left out.

Shape letters: L instances of a slide, N cells, D features.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TypedDict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scellst_ray import storage
from scellst_ray.models.mil.head_file import parse_head
from scellst_ray.runs.records import DomainShift, SlideRecord

BLOCK = 4096
# A feature whose deviation is below this share of its mean is constant (MilHead.standardise).
CONSTANT = 1e-6


class HeadDomain(TypedDict):
    """`domain` of a head: scores of training slides under all other training slides.

    Attributes:
        held_out: Score by slide_id.
        limit: Highest score; None for a single slide.
    """

    held_out: dict[str, float]
    limit: float | None


@dataclass(frozen=True)
class Moments:
    """Number of instances, and mean and variance (over L) of each feature.

    Attributes:
        count: Number of instances, L.
        mean_D: Means, float64 [D].
        var_D: Variances, float64 [D].
    """

    count: int
    mean_D: NDArray[np.float64]
    var_D: NDArray[np.float64]


def pool_moments(parts: Iterable[Moments]) -> Moments:
    """Return the moments of several sets of instances together.

    Raises:
        ValueError: no set holds instances.
    """
    some = list(parts)
    count = sum(part.count for part in some)
    if count == 0:
        message = f"{len(some)} slides hold no instances; link cells to their spots before training"
        raise ValueError(message)
    mean_D = np.sum([part.count * part.mean_D for part in some], axis=0) / count
    # Deviations from the common mean: nothing cancels, as it would in a difference of squares.
    square_D = [part.count * (part.var_D + (part.mean_D - mean_D) ** 2) for part in some]
    return Moments(count, mean_D, np.sum(square_D, axis=0) / count)


def moments_of(x_LD: NDArray[np.floating]) -> Moments:
    """Return the moments of instances [L, D] of any float type, in float64 by blocks."""

    def blocks() -> Iterator[Moments]:
        for start in range(0, len(x_LD), BLOCK):
            block = x_LD[start : start + BLOCK].astype(np.float64)
            yield Moments(len(block), block.mean(axis=0), block.var(axis=0))

    return pool_moments(blocks())


def score_under(cells: Moments, reference: Moments) -> float:
    """Return the score of cells standardised by a reference, from moments alone.

    The mean over cells of ((x - mean) / std)^2 is (var + (mean of cells - mean)^2) / std^2.
    """
    std_D = np.sqrt(reference.var_D)
    constant_D = std_D <= CONSTANT * np.maximum(np.abs(reference.mean_D), CONSTANT)
    std_D = np.where(constant_D, 1.0, std_D)
    square_D = (cells.var_D + (cells.mean_D - reference.mean_D) ** 2) / std_D**2
    return float(np.sqrt(square_D.mean()))


def score_held_out(slides: Mapping[str, Moments]) -> HeadDomain:
    """Score each training slide under all other training slides; return the head's `domain`.

    Args:
        slides: Moments of each training slide's instances, by slide_id.
    """
    scores = {}
    if len(slides) > 1:
        for slide_id, mine in sorted(slides.items()):
            others = pool_moments(part for other, part in slides.items() if other != slide_id)
            scores[slide_id] = score_under(mine, others)
    return {"held_out": scores, "limit": max(scores.values(), default=None)}


def domain_of_bags(uris: Mapping[str, str]) -> HeadDomain:
    """Return `score_held_out` of BAGS files (URIs by slide_id), with one in memory at a time."""
    slides = {}
    for slide_id, uri in uris.items():
        bags = storage.read_table(uri, ["embedding"])["embedding"].combine_chunks()
        flat = bags.flatten()
        slides[slide_id] = moments_of(np.asarray(flat.flatten()).reshape(len(flat), -1))
    return score_held_out(slides)


class SlideScore:
    """Score of a slide, computed while its cells are written."""

    def __init__(self) -> None:
        """Start without cells."""
        self.sum_squares, self.num_cells = 0.0, 0

    def counting(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Yield the tables, and add their column `distance` to the score."""
        for table in tables:
            distance_N = table["distance"].to_numpy().astype(np.float64)
            self.sum_squares += float(distance_N @ distance_N)
            self.num_cells += len(distance_N)
            yield table

    def result(self, limit: float | None) -> DomainShift | None:
        """Return `domain_shift` of the slide's record; None if it has no cells."""
        if not self.num_cells:
            return None
        score = float(np.sqrt(self.sum_squares / self.num_cells))
        beyond = None if limit is None else score > limit
        return {"score": score, "limit": limit, "beyond": beyond}


def limit_of_head(uri: str, sha256: str | None = None) -> float | None:
    """Return the limit that a head states; None if the head has none.

    Args:
        uri: The head's file.
        sha256: SHA-256 of the expected head in hex; None: any head. A process reads an expected
            head once, since one SHA-256 means one content.

    Raises:
        ValueError: The file is another head, or is damaged.
    """
    return _read_limit(uri, sha256) if sha256 is None else _read_limit_once(uri, sha256)


def _read_limit(uri: str, sha256: str | None) -> float | None:
    domain = parse_head(storage.read_bytes(uri), uri, sha256).info.get("domain") or {}
    limit = domain.get("limit")
    return None if limit is None else float(limit)


_read_limit_once = lru_cache(maxsize=8)(_read_limit)


def domain_warnings(records: Mapping[str, SlideRecord], at_most: int = 10) -> list[str]:
    """Return warnings for people about slides far from the head's training, one a line.

    Args:
        records: The slides' records.
        at_most: Number of slides named, the farthest first. Further ones are counted.
    """
    shifts = {s: r["domain_shift"] for s, r in records.items() if "domain_shift" in r}
    beyond = sorted((s for s in shifts if shifts[s]["beyond"]), key=lambda s: -shifts[s]["score"])
    lines = [
        f"warning: {slide_id}: its cells look unlike those the head was trained on: score "
        f"{shifts[slide_id]['score']:.2f}, held-out training slides at most "
        f"{shifts[slide_id]['limit']:.2f}; check stain and resolution before you trust its "
        "expression"
        for slide_id in beyond[:at_most]
    ]
    if len(beyond) > at_most:
        lines.append(
            f"warning: {len(beyond) - at_most} more slides have cells unlike those the head was "
            "trained on; see domain_shift in the records"
        )
    if any(shift["limit"] is None for shift in shifts.values()):
        lines.append(
            "note: this head has no limit of domain shift; train it with this release on two or "
            "more slides to get one. Scores are in the records"
        )
    return lines
