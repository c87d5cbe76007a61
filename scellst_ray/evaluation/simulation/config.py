"""Settings of `scellst-ray simulate`."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from scellst_ray.core.numbers import check_numbers

if TYPE_CHECKING:
    from scellst_ray.evaluation.simulation.fit import Search
    from scellst_ray.models.mil.fit import FitConfig


@dataclass(frozen=True, kw_only=True)
class SimulateConfig:
    """Repeat the simulation study of sCellST's paper: how much spots teach about single cells."""

    out: str = "simulation"
    """Folder to write: the report, the figure and the table of genes."""
    cells: str | None = None
    """Run folder of `extract` with stored embeddings. By default embeddings are synthetic."""
    slides: list[str] | None = None
    """Comma-separated slide_ids of that run. By default all."""
    max_cells: int = 60000
    """Highest number of cells of the run that are clustered. They are drawn by seed."""
    embedding_dim: int = 512
    """Length of synthetic embeddings: 512 as of a ResNet-18, 2048 as of a ResNet-50, which takes
    twice as long."""
    spread: float = 1.0
    """Standard deviation of synthetic embeddings within a cluster. That of the centres is 1."""
    reference: str = "synthetic"
    """Single-cell reference: `synthetic`, `pbmc` (needs scanpy) or an .h5ad file with counts."""
    reference_types: str = "cell_type"
    """Column of the reference file's obs that holds the cell types."""
    num_types: int = 6
    """Number of clusters of image cells, and of types of the reference."""
    cells_per_cluster: int = 2000
    """Number of cells nearest to each centroid that are used: half train, half test."""
    num_spots: int = 5000
    """Number of spots for training. The same number is used for testing."""
    cells_per_spot: int = 20
    """Number of cells in a spot, drawn with replacement."""
    num_variable: int = 1000
    """Number of genes in the panel of variable genes."""
    num_markers: int = 20
    """Number of genes per type in the panel of marker genes."""
    learning_rates: list[float] = field(default_factory=lambda: [1e-2, 1e-3, 1e-4, 1e-5])
    """Comma-separated learning rates to try. Validation chooses one."""
    search_epochs: list[int] = field(default_factory=lambda: [3, 15])
    """Comma-separated epochs after which the worse half of the learning rates is dropped. After the
    last, only the best goes on. Raise them for fewer spots."""
    max_epochs: int = 60
    """Highest number of epochs for the chosen learning rate."""
    patience: int = 8
    """Number of epochs without a better validation loss after which training stops. Raise it for
    fewer spots."""
    val_share: float = 0.2
    """Share (0 to 1) of the training cells, and of the training spots, that validate."""
    predictor: Literal["ours", "published"] = "ours"
    """Network of the head: `ours` as in sCellST's paper, `published` as in its code (LeakyReLU,
    dropout and softplus)."""
    seed: int = 0
    """Seed of everything that is drawn."""

    def __post_init__(self) -> None:
        """Raise ValueError if a value cannot work."""
        lowest = {
            "max_cells": 1,
            "embedding_dim": 1,
            "num_types": 2,
            "cells_per_cluster": 20,
            "num_spots": 10,
            "cells_per_spot": 1,
            "num_variable": 1,
            "num_markers": 1,
        }
        check_numbers(self, lowest, positive=("spread",))
        if not self.learning_rates:
            message = "learning_rates is empty; give at least one"
            raise ValueError(message)
        if self.search_epochs != sorted({epoch for epoch in self.search_epochs if epoch >= 1}):
            message = f"search_epochs is {self.search_epochs}; give ascending numbers from 1"
            raise ValueError(message)
        for rate in self.learning_rates:
            self.fit_config(rate)

    def fit_config(self, rate: float) -> "FitConfig":
        """Return the settings of a fit with this learning rate."""
        from scellst_ray.models.mil.fit import FitConfig  # noqa: PLC0415 - loads torch

        return FitConfig(
            lr=rate,
            max_epochs=self.max_epochs,
            patience=self.patience,
            val_share=self.val_share,
            seed=self.seed,
            predictor=self.predictor,
        )

    def search(self) -> "Search":
        """Return the settings of the search for a learning rate."""
        from scellst_ray.evaluation.simulation.fit import Search  # noqa: PLC0415 - loads torch

        rates = self.learning_rates
        return Search(self.fit_config(rates[0]), rates, self.search_epochs)
