"""One synthetic slide, its pixels and its files."""

import pytest

from scellst_ray.slides.synthetic import slide as synthetic
from tests.support.small_tissue import SMALL


@pytest.fixture(scope="session")
def tissue():
    return synthetic.make_tissue(SMALL)


@pytest.fixture(scope="session")
def image(tissue):
    return synthetic.render(tissue)


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    return synthetic.write_synthetic_slide(tmp_path_factory.mktemp("slide"), SMALL)
