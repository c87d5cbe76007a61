"""Shared fixtures: one small synthetic slide, and pyramids with dots at known places."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile

from scellst_ray.slides.synthetic.slide import SyntheticConfig, write_synthetic_slide
from tests.support.absent import leave_out
from tests.support.paths import SHARED
from tests.support.worker_forks import forked_workers

BACKGROUND = (40, 60, 80)
DOT_SIGMA = 7.0


def pytest_configure(config):
    """Leave out what needs a package that is absent."""
    leave_out(config, os.environ.get("TESTS_NEED", "").split())


def pytest_collection_modifyitems(items):
    """Put tests that share a Ray last, and those of one kind of Ray together."""
    items.sort(key=lambda i: ("local_ray" in i.fixturenames) + ("pretended_gpu" in i.fixturenames))


@pytest.fixture(scope="session")
def ray_forks():
    """Let Rays that tests start in this process fork their workers.

    With TESTS_PLAIN_WORKERS set, workers start as they do outside of tests.
    """
    plain = sys.platform != "linux" or "TESTS_PLAIN_WORKERS" in os.environ
    with nullcontext() if plain else forked_workers():
        yield


@pytest.fixture(scope="session")
def shared_ray(tmp_path_factory, ray_forks):  # noqa: ARG001 - set up first
    """Return a function that gives a local Ray of two CPUs, the one before if it is alike.

    To start one takes as long as many a test. It runs in another folder than the tests: a relative
    path means nothing to its workers.
    """
    import ray

    from scellst_ray.pipelines.session import ray_session

    running = []

    def start(num_gpus=0, **environment):
        if running != [num_gpus, environment] or not ray.is_initialized():
            ray.shutdown()
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp("elsewhere"))
                for name, value in environment.items():
                    patch.setenv(name, value)
                ray.init(
                    address="local",
                    num_cpus=2,
                    num_gpus=num_gpus,
                    include_dashboard=False,
                    logging_level="ERROR",
                    log_to_driver=False,
                )
            running[:] = num_gpus, environment
        return ray_session()

    yield start
    ray.shutdown()


@pytest.fixture(scope="module")
def local_ray(shared_ray):
    """Give a Ray of two CPUs."""
    with shared_ray() as cluster:
        yield cluster


def draw_dots(width, height, points_x0y0):
    """Return RGB [height, width, 3] with a bright Gaussian dot centred on each (x, y)."""
    image = np.full((height, width, 3), BACKGROUND, np.float32)
    for x, y in points_x0y0:
        left, top = max(0, int(x) - 40), max(0, int(y) - 40)
        rows = np.arange(top, min(height, top + 80)) + 0.5
        columns = np.arange(left, min(width, left + 80)) + 0.5
        weight = np.exp(-((columns[None] - x) ** 2 + (rows[:, None] - y) ** 2) / (2 * DOT_SIGMA**2))
        image[top : top + len(rows), left : left + len(columns)] += 170 * weight[..., None]
    return np.clip(np.rint(image, out=image), 0, 255, out=image).astype(np.uint8)


def shrink(image, factor):
    """Return the mean over squares of `factor` px; a remainder at the far edges is dropped."""
    height, width = (side // factor for side in image.shape[:2])
    whole = image[: height * factor, : width * factor].astype(np.uint16)
    rows = sum(whole[start::factor] for start in range(factor)).astype(np.uint32)
    sums = sum(rows[:, start::factor] for start in range(factor))
    return np.rint(sums / factor**2).astype(np.uint8)


def write_pyramid(path, levels, mpp, mpp_y=None, **options):
    """Write [H, W, 3] arrays, largest first, as a tiled TIFF; `mpp` None leaves it untold."""
    with tifffile.TiffWriter(path) as tiff:
        for number, level in enumerate(levels):
            scale = levels[0].shape[1] / level.shape[1]
            tags = {}
            if mpp is not None:
                tags = {
                    "resolution": (1e4 / (mpp * scale), 1e4 / ((mpp_y or mpp) * scale)),
                    "resolutionunit": "CENTIMETER",
                }
            tiff.write(
                level,
                tile=(256, 256),
                photometric="rgb",
                compression="adobe_deflate",
                subfiletype=int(number > 0),
                metadata=None,
                **(tags | options),
            )
    return Path(path)


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory):
    """Keep copies of remote files out of the real temporary folder."""
    patch = pytest.MonkeyPatch()
    patch.setenv("SCELLST_RAY_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def helpers():
    """Return the drawing and writing functions above."""
    return SimpleNamespace(
        BACKGROUND=BACKGROUND,
        draw_dots=draw_dots,
        find_stage=find_stage,
        shrink=shrink,
        slide_row=slide_row,
        write_pyramid=write_pyramid,
    )


@pytest.fixture(scope="session")
def synthetic_slide(tmp_path_factory):
    """Return the paths of a small synthetic slide: 720 x 520 px at 0.5 um/px."""
    config = SyntheticConfig(seed=3, width_um=360.0, height_um=260.0, mpp=0.5, num_genes=4)
    return write_synthetic_slide(tmp_path_factory.mktemp("synthetic"), config)


@pytest.fixture(scope="session")
def data_dir():
    """Return the folder of real slides next to the repository; skip where it is absent."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}")
    return folder


@pytest.fixture(scope="session")
def cells_spec():
    """Return what to compute in tests: small tiles, a random encoder."""
    from scellst_ray.stages.tiles import CellsSpec

    return CellsSpec(
        segmenter="hematoxylin",
        read_mpp=None,
        core_px=250,
        halo_px=32,
        encoder="random:0",
        precision="float32",
        head_uri=None,
        store_embeddings=True,
    )


@pytest.fixture(scope="session")
def embed_stage(cells_spec):
    """Return the embedding stage, made once."""
    from scellst_ray.stages.networks import Embed

    return Embed(cells_spec, "cpu")


@pytest.fixture(scope="session")
def segmented_rows(synthetic_slide, cells_spec):
    """Return a function that gives fresh rows of the synthetic slide, segmented once."""
    from scellst_ray.stages.plan_slide import plan_slide

    rows = find_stage(cells_spec)(plan_slide(slide_row(synthetic_slide.slide), cells_spec))
    return lambda: [dict(row) for row in rows]


@pytest.fixture(scope="session")
def few_rows(segmented_rows):
    """Return the same rows with at most six nuclei each, for tests that are not about numbers."""
    return lambda: [
        row | {"cells": row["cells"].slice(0, 6), "crops": row["crops"][:6]}
        for row in segmented_rows()
    ]


def find_stage(spec):
    """Return reading and finding nuclei in one call: what needs no network."""
    from scellst_ray.stages.find import FindNuclei
    from scellst_ray.stages.read import Read

    read, find = Read(spec), FindNuclei(spec)
    return lambda rows: find(read(rows))


def slide_row(path, **changes):
    """Return one slide as `plan_slide` takes it."""
    row = {"slide_id": "s", "uri": str(path), "mpp": None, "mpp_error": None, "done_tiles": []}
    row["mpp_confirmed"] = False
    return row | {"segmentation": None, "imported_uri": None, "source": None} | changes
