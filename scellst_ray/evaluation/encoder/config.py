"""Settings of `scellst-ray evaluate encoder`."""

from dataclasses import dataclass
from typing import Literal

from scellst_ray.core.numbers import check_numbers

# Encoders that make embeddings without crops.
WITHOUT_CROPS = ("none", "tokens", "types")


@dataclass(frozen=True, kw_only=True)
class EvaluateEncoderConfig:
    """Score an encoder on cell types: linear probe, neighbours, batch effect and a gallery."""

    encoder: str
    """Weights to evaluate: a file, `imagenet`, `timm:NAME` or `random:SEED`."""
    manifest: str | None = None
    """Manifest of annotated images: CSV with slide_id, uri, points and, where the image lacks it,
    mpp. `points` names a CSV with x, y (px of the image) and type."""
    run: str | None = None
    """Run folder whose typed cells are used instead of a manifest. Its slides are read again."""
    slides: list[str] | None = None
    """Comma-separated slide_ids of the run. By default all."""
    out: str | None = None
    """Folder to write: report.json, report.md and gallery.png. By default nothing is written."""
    drop_types: list[str] | None = None
    """Comma-separated types to leave out, such as `unknown`."""
    also: list[str] | None = None
    """Comma-separated encoders to compare with, named like `--encoder`."""
    max_cells: int = 20_000
    """Highest number of cells. If there are more, they are drawn evenly by slide and type."""
    neighbours: int = 20
    """Number of nearest cells that vote on a type. Purity is counted in them, too."""
    queries: int = 3
    """Number of rows of the gallery for each type."""
    seed: int = 0
    """Seed of draws, folds, the untrained network and the bootstrap."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the networks. `auto` takes bfloat16 where the device has it. Otherwise it
    takes float16 on a GPU and float32 on a CPU."""
    gpus: bool | None = None
    """Embed on a GPU. By default on if this machine has one."""

    def __post_init__(self) -> None:
        """Refuse settings that do not name an encoder and cells to evaluate it on."""
        check_numbers(self, {"max_cells": 1, "neighbours": 1, "queries": 1})
        message = ""
        if (self.manifest is None) == (self.run is None):
            message = "give either manifest (annotated images) or run (typed cells)"
        elif self.slides is not None and self.run is None:
            message = "slides are those of run; a manifest lists its own: leave slides out"
        for name in (self.encoder, *(self.also or [])):
            if name in WITHOUT_CROPS:
                message = f"encoder {name!r} embeds no crops; give weights that do"
        if message:
            raise ValueError(message)
