"""One random encoder, crops and their embedding for all tests of encoders."""

import numpy as np
import pytest

from scellst_ray.models.encoder.encoder import load_encoder
from tests.support.encoders import embed


@pytest.fixture(scope="package")
def encoder():
    return load_encoder("random:7")


@pytest.fixture(scope="package")
def crops():
    return np.random.default_rng(0).integers(0, 256, (10, 48, 48, 3)).astype(np.uint8)


@pytest.fixture(scope="package")
def embedding(encoder, crops):
    return embed(encoder, crops)
