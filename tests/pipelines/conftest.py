"""A local Ray for the tests of this folder, and a small cohort."""

import pytest

from scellst_ray.slides.synthetic.slide import SyntheticConfig, write_synthetic_slide
from tests.support.pretended_gpu import ENVIRONMENT, pretend_in_this_process


@pytest.fixture(scope="module")
def pretended_gpu():
    """Mark tests whose Ray has a GPU in name only."""


@pytest.fixture(scope="module")
def local_ray(shared_ray, pretended_gpu):  # noqa: ARG001 - set up first
    """Give a Ray with two CPUs, and a GPU in name only."""
    with pytest.MonkeyPatch.context() as patch, shared_ray(1, **ENVIRONMENT) as cluster:
        pretend_in_this_process(patch)
        yield cluster


@pytest.fixture(scope="session")
def small_cohort(tmp_path_factory):
    """Return two slides of a dozen tiles and their manifest."""
    folder = tmp_path_factory.mktemp("cohort")
    lines = ["slide_id,uri"]
    for number in range(2):
        config = SyntheticConfig(
            seed=number, width_um=200.0, height_um=160.0, cells_per_mm2=2500, num_genes=4
        )
        write_synthetic_slide(folder / f"s{number}", config)
        lines.append(f"s{number},s{number}/slide.tiff")
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder / "manifest.csv"
