"""Settings of `scellst-ray evaluate expression`."""

from dataclasses import dataclass

from scellst_ray.core.numbers import check_numbers
from scellst_ray.evaluation.expression.scores import Bootstrap


@dataclass(frozen=True, kw_only=True)
class EvaluateExpressionConfig:
    """Score predicted expression on spots or cells: PCC, SCC, rMSE, MAE and three baselines."""

    run: str
    """Run folder of `predict` on slides that the head was not trained on."""
    manifest: str
    """Manifest of these slides: slide_id, uri and spots as `train` takes them. For single cells it
    has xenium (output folder) and xenium_alignment (its *_he_imagealignment.csv) instead."""
    train_manifest: str
    """Manifest of the slides that the head was trained on. The baselines learn from their spots."""
    slides: list[str] | None = None
    """Comma-separated slide_ids to evaluate. By default all rows with spots or xenium."""
    colour: bool = True
    """Compare with a ridge regression on colours alone. It reads the image around every spot, or
    the same area around every cell. Turn it off where slides are not reachable."""
    radius_um: float = 5.0
    """Distance in um within which a predicted and a measured cell may be the same (xenium)."""
    bootstraps: int = 200
    """Number of draws for 95 % intervals. 0 leaves intervals out."""
    seed: int = 0
    """Seed of draws and shuffles."""
    out: str | None = None
    """File to write all scores to; its name ends in .json. The tables go to a .md file of the same
    name. By default nothing is written."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        check_numbers(self, positive=("radius_um",))
        message = ""
        if self.out is not None and not self.out.endswith(".json"):
            message = f"out is {self.out}; it must end in .json"
        if message:
            raise ValueError(message)

    def bootstrap(self) -> Bootstrap:
        """Return the draws of the intervals."""
        return Bootstrap(self.bootstraps, self.seed)
