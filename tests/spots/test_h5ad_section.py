"""Libraries, sections and lattices of AnnData files."""

import anndata
import h5py
import numpy as np
import pytest

from scellst_ray.spots.h5ad_section import check_one_section, find_library, stated_mpp
from tests.support.lattices import hexagons, squares

FACTORS = {"spot_diameter_fullres": 130.0, "tissue_hires_scalef": 0.1}
LIBRARY = {"scalefactors": FACTORS, "images": {}}


def opened(tmp_path, spatial=None, xy0=None, **obs):
    xy0 = hexagons()[2] if xy0 is None else xy0
    adata = anndata.AnnData(np.ones((len(xy0), 1), np.float32))
    for name, values in obs.items():
        adata.obs[name] = values
    if spatial is not None:
        adata.uns["spatial"] = spatial
    adata.write_h5ad(tmp_path / "s.h5ad")
    return h5py.File(tmp_path / "s.h5ad", "r")


@pytest.mark.parametrize(
    ("spatial", "names"),
    [
        ({"lib": LIBRARY, "is_single": True}, ["lib"]),
        ({"lib": LIBRARY, "is_single": np.True_, "note": "text"}, ["lib"]),
        ({"lib": LIBRARY, "parameters": {"a": 1}}, ["lib"]),
        (LIBRARY, [""]),
    ],
)
def test_entries_that_are_no_library_are_passed_over(tmp_path, spatial, names):
    with opened(tmp_path, spatial) as file:
        library = find_library(file, "s")
    assert (library.names, library.diameter0) == (names, 130.0)


@pytest.mark.parametrize("factor", [np.nan, -1.0, "text", [1.0, 2.0], 0])
def test_a_diameter_that_is_none_is_absent(tmp_path, factor):
    spatial = {"lib": {"scalefactors": {"spot_diameter_fullres": factor}}}
    with opened(tmp_path, spatial) as file:
        assert find_library(file, "s").diameter0 is None


@pytest.mark.parametrize(
    ("spatial", "words"),
    [
        ({"a": LIBRARY, "b": LIBRARY}, r"holds 2 sections, such as \['a', 'b'\]"),
        ({"a": {}, "b": {}, "is_single": True}, "holds 2 sections"),
        ({"a": LIBRARY, "is_single": False}, "is_single'. is False: the file holds several"),
    ],
)
def test_files_of_several_libraries_are_refused(tmp_path, spatial, words):
    with opened(tmp_path, spatial) as file, pytest.raises(ValueError, match=words):
        find_library(file, "s")


def names(after=""):
    letters = np.array(list("ACGT"))
    return ["".join(letters[[i // 4**p % 4 for p in range(8)]]) * 2 + after for i in range(72)]


def test_sections_that_were_joined_are_refused(tmp_path):
    half = np.arange(72) < 36
    with (
        opened(tmp_path, library_id=np.where(half, "a", "b")) as file,
        pytest.raises(ValueError, match=r"obs\['library_id'\] names 2 sections"),
    ):
        check_one_section(file["obs"], names("-1"), "s")
    row, column, _ = hexagons()
    places = {"array_row": row % 4, "array_col": column}
    with (
        opened(tmp_path, **places) as file,
        pytest.raises(ValueError, match="72 spots have only 36 different places in the array"),
    ):
        check_one_section(file["obs"], names("-1"), "s")
    joined = names("-0")[:36] + names("-1")[:36]
    with (
        opened(tmp_path) as file,
        pytest.raises(ValueError, match=r"same barcodes occur in 2 sections \(-0: 36 spots"),
    ):
        check_one_section(file["obs"], joined, "s")


def test_one_section_is_read(tmp_path):
    row, column, _ = hexagons()
    same = {"library_id": ["a"] * 72, "batch": np.where(row > 3, "x", "y")}
    with opened(tmp_path, array_row=row, array_col=column, **same) as file:
        check_one_section(file["obs"], names("-1"), "s")
    with opened(tmp_path, array_row=row * 0, array_col=row * 0) as file:
        check_one_section(file["obs"], [str(i) for i in range(72)], "s")


def statements(tmp_path, make, factors, *, numbered=True):
    row, column, xy0 = make(200.0)
    obs = {"array_row": row, "array_col": column} if numbered else {}
    spatial = {"lib": {"scalefactors": factors}}
    with opened(tmp_path, spatial, xy0, **obs) as file:
        return stated_mpp(file["obs"], find_library(file, "s"), xy0, 0.5, "s")


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("diameter0", [130.0, 110.0])
def test_hexagons_of_visium_state_the_resolution(tmp_path, numbered, diameter0):
    factors = {"spot_diameter_fullres": diameter0}
    (statement,) = statements(tmp_path, hexagons, factors, numbered=numbered)
    assert statement.mpp == pytest.approx(0.5)


def test_bins_of_visium_hd_state_it(tmp_path):
    (statement,) = statements(tmp_path, squares, {"bin_size_um": 8.0})
    assert statement.mpp == pytest.approx(0.04)
    (statement,) = statements(tmp_path, squares, {"bin_size_um": 8.0, "microns_per_pixel": 0.3})
    assert statement.mpp == 0.3


def test_without_hexagons_the_diameters_of_space_ranger_state_it(tmp_path):
    factors = {"spot_diameter_fullres": 130.0, "fiducial_diameter_fullres": 210.0}
    stated = statements(tmp_path, squares, factors)
    assert [statement.mpp for statement in stated] == pytest.approx([0.5, 55 / 130])
    assert statements(tmp_path, squares, factors | {"fiducial_diameter_fullres": 300.0}) == []


def test_other_lattices_state_nothing(tmp_path):
    assert statements(tmp_path, squares, {"spot_diameter_fullres": 130.0}) == []
    assert statements(tmp_path, hexagons, {}, numbered=False) == []
    assert statements(tmp_path, hexagons, {"spot_diameter_fullres": 180.0}, numbered=False) == []
