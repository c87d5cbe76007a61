"""The command `predict`."""

from scellst_ray.commands.progress import shown_progress
from scellst_ray.commands.run_end import summarise
from scellst_ray.pipelines.predict import predict
from scellst_ray.stages.config import PredictConfig


def run_predict(config: PredictConfig) -> int:
    """Run `predict`; return 0 only if every slide is done or empty."""
    with shown_progress() as report:
        records = predict(config, report)
    return summarise(records, config.out)
