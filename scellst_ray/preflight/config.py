"""Settings of `scellst-ray plan`: a job, and the cluster that it will run on."""

import os
from dataclasses import dataclass, fields
from typing import Any

from scellst_ray.core.numbers import check_numbers
from scellst_ray.preflight.costs import PlannedCluster
from scellst_ray.stages.config import ExtractConfig, PredictConfig


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Estimate tiles, cells, bytes, hours and price of a run of extract or predict.

    It takes the job's YAML file as it is. With `head` the job is predict, else extract.
    """

    job: ExtractConfig | PredictConfig
    """Settings of the job that is planned."""
    gpus: bool | int | None = None
    """Number of GPUs of the cluster: true is 1, false is 0. By default 0."""
    cpus: int | None = None
    """Number of CPUs of the cluster. By default the number of workers, or 8 for each GPU."""
    cpu_price: float | None = None
    """Price of one CPU for an hour, in any currency."""
    gpu_price: float | None = None
    """Price of one GPU for an hour, in the same currency."""
    from_run: list[str] | None = None
    """Comma-separated run folders of the same job on the same kind of machine. Rates are taken
    from their records."""
    calibrate: int | None = None
    """Number of tiles of the cohort to process on this machine, from which rates are measured. By
    default none."""
    json: str | None = None
    """File to write the plan to, as JSON."""
    processes: int | None = None
    """Number of slides that are opened at a time on this machine. By default one for each CPU."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        check_numbers(self, {"cpus": 1, "calibrate": 1, "processes": 1})

    @classmethod
    def from_flags(cls, **values: Any) -> "PlanConfig":  # noqa: ANN401 - flags of all types
        """Return the settings of a plan from flags of the job and of the cluster.

        `gpus` counts the GPUs of the cluster. The job uses GPUs if there are any.
        """
        kind = ExtractConfig if values.get("head") is None else PredictConfig
        names = {f.name for f in fields(kind)}
        for_job = {name: value for name, value in values.items() if name in names}
        # None stands for the default of the job, in which extract and predict differ.
        for name in ("encoder", "store_embeddings"):
            if for_job.get(name) is None:
                for_job.pop(name, None)
        gpus = values.get("gpus")
        # A plan writes no run folder, so it may have no name.
        for_job |= {"out": values.get("out") or "", "gpus": None if gpus is None else gpus > 0}
        own = {f.name for f in fields(cls)} - {"job"}
        rest = {name: value for name, value in values.items() if name in own}
        return cls(job=kind(**for_job), **rest)

    @property
    def num_gpus(self) -> int:
        """Number of GPUs of the cluster."""
        return int(self.gpus or 0)

    def cluster(self) -> PlannedCluster:
        """Return the CPUs, GPUs and workers that the run will have."""
        if self.num_gpus:
            cpus = self.cpus or 8 * self.num_gpus
            return PlannedCluster(cpus, self.num_gpus, cpus)
        cpus = self.cpus or self.job.workers or os.cpu_count() or 1
        return PlannedCluster(cpus, 0, self.job.workers or cpus)
