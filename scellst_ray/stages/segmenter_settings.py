"""Checks of the settings of `extract` that depend on its segmenter or encoder."""

from typing import Protocol

from scellst_ray.slides.reader import GRID_PX
from scellst_ray.slides.tiling import NETWORK_NATIVE_MPP

# Encoders without a file of weights.
WITHOUT_FILE = ("none", "tokens", "types")
TYPES_UNKNOWN = {
    "hematoxylin": "encoder 'types' needs nuclei that have types, and segmenter hematoxylin gives "
    "none; use segmenter cellvit",
    "imported": "encoder 'types' needs all type names before the first nucleus is read, and those "
    "of imported nuclei are not known then; use segmenter cellvit, or an encoder of crops",
}


class Settings(Protocol):
    """The part of ExtractConfig that is checked."""

    @property
    def segmenter(self) -> str:
        """See ExtractConfig."""

    @property
    def segmenter_weights(self) -> str | None:
        """See ExtractConfig."""

    @property
    def segmenter_window_px(self) -> int | None:
        """See ExtractConfig."""

    @property
    def read_mpp(self) -> float | None:
        """See ExtractConfig."""

    @property
    def core_px(self) -> int:
        """See ExtractConfig."""

    @property
    def halo_px(self) -> int:
        """See ExtractConfig."""

    @property
    def encoder(self) -> str:
        """See ExtractConfig."""


def segmenter_problems(config: Settings) -> list[str]:
    """Return the problems of the segmenter's settings, a sentence each."""
    weights, window_px = config.segmenter_weights, config.segmenter_window_px
    if config.segmenter != "cellvit":
        given = {"segmenter_weights": weights, "segmenter_window_px": window_px}
        wrong = [name for name, value in given.items() if value is not None]
        wrong += ["encoder 'tokens'"] * (config.encoder == "tokens")
        problems = [
            f"{name} is only for segmenter cellvit; this is {config.segmenter}" for name in wrong
        ]
        return problems + [TYPES_UNKNOWN[config.segmenter]] * (config.encoder == "types")
    problems = []
    if weights is None:
        problems.append(
            "segmenter cellvit needs segmenter_weights: a checkpoint, or a name that `scellst-ray "
            "models` lists"
        )
    low, high = NETWORK_NATIVE_MPP
    if config.read_mpp is not None and not low <= config.read_mpp <= high:
        problems.append(
            f"read_mpp is {config.read_mpp}; CellViT was trained at 0.25: give {low} to {high}"
        )
    side = config.core_px + 2 * config.halo_px
    if side % 16 or config.core_px % GRID_PX or config.halo_px % GRID_PX:
        problems.append(
            f"core_px {config.core_px} and two halo_px {config.halo_px} make {side} px; CellViT "
            f"needs a multiple of 16 of them, and multiples of {GRID_PX} of each (960 and 32)"
        )
    if window_px is not None and window_px < 64:
        problems.append(f"segmenter_window_px is {window_px}; it must be at least 64")
    return problems
