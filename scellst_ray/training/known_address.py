"""Run a trainer of Ray Train whose processes know to which Ray they belong."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.train import Result
from ray.train.torch import TorchTrainer
from ray.train.v2.api import data_parallel_trainer

VARIABLE = "RAY_ADDRESS"
FUNCTION = "get_env_vars_to_propagate"


def fit_trainer(trainer: TorchTrainer) -> Result:
    """Run a trainer to its end; return what it reports.

    Where a second Ray runs on the host, an actor of Ray Train that watches the controller finds
    two and dies with a traceback on the terminal, unless it is told the address.
    """
    with _propagated({VARIABLE: ray.get_runtime_context().gcs_address}):
        result: Result = trainer.fit()
    return result


@contextmanager
def _propagated(variables: dict[str, str]) -> Iterator[None]:
    """Give environment variables to the controller of a training that starts inside the `with`.

    The actors that it starts have them too.

    Assumption: the trainer asks the function FUNCTION of its module for the controller's.
    """
    before = getattr(data_parallel_trainer, FUNCTION)
    setattr(data_parallel_trainer, FUNCTION, lambda: before() | variables)
    try:
        yield
    finally:
        setattr(data_parallel_trainer, FUNCTION, before)
