"""The command `extract`."""

from scellst_ray.commands.progress import shown_progress
from scellst_ray.commands.run_end import summarise
from scellst_ray.pipelines.extract import extract
from scellst_ray.stages.config import ExtractConfig


def run_extract(config: ExtractConfig) -> int:
    """Run `extract`; return 0 only if every slide is done or empty."""
    with shown_progress() as report:
        records = extract(config, report)
    return summarise(records, config.out)
