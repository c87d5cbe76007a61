"""The device on which networks compute, and whether GPUs are used by default.

Torch is imported where it is asked: it takes seconds and half a gigabyte.
"""
# ruff: noqa: PLC0415 - see above

from typing import Literal

Device = Literal["cpu", "cuda"]


def has_gpu() -> bool:
    """Return whether torch can use a GPU in this process."""
    import torch

    return torch.cuda.is_available()


def uses_own_gpu(wanted: bool | None) -> bool:  # noqa: FBT001 - the value of a setting
    """Return whether this process computes on a GPU.

    Args:
        wanted: Setting `gpus`; None: use a GPU if this process has one.
    """
    return has_gpu() if wanted is None else wanted


def uses_cluster_gpus(
    wanted: bool | None,  # noqa: FBT001 - the value of a setting
    num_gpus: int,
    num_needed: int = 1,
) -> bool:
    """Return whether the workers of a cluster compute on GPUs.

    Args:
        wanted: Setting `gpus`; None: use GPUs if the cluster has as many as are needed.
        num_gpus: Number of GPUs of the cluster.
        num_needed: Least number of GPUs that the work can use.
    """
    return num_gpus >= num_needed if wanted is None else wanted


def device_name(*, on_gpu: bool) -> Device:
    """Return torch's name of a GPU or of the CPU."""
    return "cuda" if on_gpu else "cpu"


def device_of_worker(*, on_gpu: bool) -> Device:
    """Return the device of a worker.

    Args:
        on_gpu: Whether Ray gave the worker a GPU.

    Raises:
        RuntimeError: torch cannot use the GPU that Ray gave the worker. On the CPU its work would
            take hours, and memory that the worker has not declared.
    """
    if on_gpu and not has_gpu():
        message = (
            "Ray gave this worker a GPU, but torch sees none: check the driver and that torch is a "
            "CUDA build, or run with gpus: false"
        )
        raise RuntimeError(message)
    return device_name(on_gpu=on_gpu)
