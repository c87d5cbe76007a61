"""Configuration of a synthetic slide, and the random streams that its seed gives."""

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

NUCLEUS_TYPES = ("Neoplastic", "Inflammatory", "Connective", "Epithelial")
"""Names of the nucleus types as in PanNuke; every `[4]` axis here has this order."""


@dataclass(frozen=True, kw_only=True)
class SyntheticConfig:
    """Configuration of one synthetic slide. Equal configurations give equal bytes.

    Lengths are in um, so one seed gives the same tissue at any `mpp`.

    Attributes:
        seed: Seed of tissue, cells and counts, and of stain and sensor noise without `stain_seed`.
        programme_seed: Seed of the gene-by-type table. Slides of one patient share it.
        stain_seed: Seed of stain colours and sensor noise; None takes `seed`.
        width_um: Width of the slide in um.
        height_um: Height of the slide in um.
        mpp: Resolution in um per level-0 px, in [0.1, 1.2].
        cells_per_mm2: Intended nuclei per mm2 of tissue; at most about 4,000 fit.
        min_gap_um: Smallest distance between two nuclei in um.
        num_genes: Number of genes in the panel, at least 1.
        unseen_sd: Standard deviation of the part of the log rate that the image does not show.
        library_sd: Standard deviation of the log library size of a cell.
        dispersion: Negative binomial size of a cell's counts; larger is closer to Poisson.
        spot_layout: Grid of the spots, "hex" (Visium) or "square" (older arrays).
        spot_diameter_um: Diameter of a spot in um.
        spot_pitch_um: Distance between the centres of neighbouring spots in um.
        capture_efficiency: Mean probability that a spot captures a molecule, in (0, 1].
        capture_sd: Standard deviation of the log capture efficiency between spots.
    """

    seed: int = 0
    programme_seed: int = 0
    stain_seed: int | None = None
    width_um: float = 2048.0
    height_um: float = 2048.0
    mpp: float = 0.5
    cells_per_mm2: float = 3500.0
    min_gap_um: float = 1.0
    num_genes: int = 30
    unseen_sd: float = 0.15
    library_sd: float = 0.2
    dispersion: float = 10.0
    spot_layout: Literal["hex", "square"] = "hex"
    spot_diameter_um: float = 55.0
    spot_pitch_um: float = 100.0
    capture_efficiency: float = 0.7
    capture_sd: float = 0.15

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: A value is outside its range.
        """
        bounds = {
            "seed": (0, 2**63),
            "programme_seed": (0, 2**63),
            "width_um": (100, 1e5),
            "height_um": (100, 1e5),
            "mpp": (0.1, 1.2),
            "cells_per_mm2": (0, 6000),
            "min_gap_um": (0, 20),
            "num_genes": (1, 1e5),
            "unseen_sd": (0, 5),
            "library_sd": (0, 5),
            "dispersion": (1e-3, 1e9),
            "spot_diameter_um": (1, 1e4),
            "spot_pitch_um": (1, 1e4),
            "capture_efficiency": (1e-6, 1),
            "capture_sd": (0, 5),
        }
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if not low <= value <= high:
                message = f"{name}={value!r} is outside [{low:g}, {high:g}]; choose a value inside"
                raise ValueError(message)
        if self.spot_layout not in ("hex", "square"):
            message = f"spot_layout={self.spot_layout!r}; expected 'hex' or 'square'"
            raise ValueError(message)

    @property
    def width0(self) -> int:
        """Width of the slide in level-0 px."""
        return round(self.width_um / self.mpp)

    @property
    def height0(self) -> int:
        """Height of the slide in level-0 px."""
        return round(self.height_um / self.mpp)

    def stream(self, name: str, *keys: int) -> np.random.Generator:
        """Return the random generator of one named purpose, independent of all other purposes."""
        return np.random.default_rng([self.seed, zlib.crc32(name.encode()), *keys])

    def stain_stream(self, name: str, *keys: int) -> np.random.Generator:
        """Return the random generator of one named purpose of stain and scanner."""
        seed = self.seed if self.stain_seed is None else self.stain_seed
        return np.random.default_rng([seed, zlib.crc32(name.encode()), *keys])
