"""A small head, and one thread for all tests of heads."""

import pytest
import torch

from scellst_ray.models.mil.head import MilHead


@pytest.fixture(autouse=True)
def one_thread():
    """Compute on one thread: threads that wait for each other make small products slow."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def head() -> MilHead:
    torch.manual_seed(0)
    return MilHead(embedding_dim=20, num_genes=3)
