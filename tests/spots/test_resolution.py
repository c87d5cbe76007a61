"""What spots say about um per px, and the discs that stand for squares."""

import logging

import pytest

from scellst_ray.spots.lattice import Lattice
from scellst_ray.spots.resolution import (
    StatedMpp,
    check_stated_mpp,
    diameter_of_squares,
    diameter_statements,
    has_pooled_counts,
    st_statements,
    visium_statement,
)


def test_contradictions_of_more_than_a_tenth_are_refused(caplog):
    caplog.set_level(logging.WARNING)
    stated = [StatedMpp(0.5, "the pitch")]
    check_stated_mpp(stated, 0.55, "slide s")
    check_stated_mpp([], 9.0, "slide s")
    for mpp in (1.0, 0.56, 0.25):
        with pytest.raises(ValueError, match=rf"slide s: {mpp:g} um/px in use, but 0\.5 um/px by"):
            check_stated_mpp(stated, mpp, "slide s")
    assert not caplog.records
    check_stated_mpp(stated, 1.0, "slide s", is_confirmed=True)
    assert "1 um/px in use, but 0.5 um/px by the pitch" in caplog.text


def test_one_statement_of_a_source_is_enough():
    stated = st_statements(400.0)
    check_stated_mpp(stated, 0.5, "s")
    check_stated_mpp(stated, 0.375, "s")  # 150 um, the later arrays
    with pytest.raises(ValueError, match=r"0\.5 um/px by the pitch of the ST array"):
        check_stated_mpp(stated, 1.0, "s")
    assert st_statements(None) == []


@pytest.mark.parametrize("diameter0", [None, 130.0, 110.0])
def test_visium_is_told_by_pitch_and_diameter(diameter0):
    (statement,) = visium_statement(200.0, diameter0, 1.0, "s")
    assert statement.mpp == 0.5


def test_diameters_of_space_ranger_alone():
    stated = diameter_statements(130.0, 210.0)
    check_stated_mpp(stated, 0.5, "s")
    check_stated_mpp(stated, 55 / 130, "s")
    with pytest.raises(ValueError, match=r"1 um/px in use, but 0\.5 um/px by spot_diameter_full"):
        check_stated_mpp(stated, 1.0, "s")
    assert diameter_statements(130.0, 130.0) == []
    assert diameter_statements(130.0, None) == []
    assert diameter_statements(None, 210.0) == []


def test_a_diameter_that_does_not_fit_the_pitch_is_told(caplog):
    caplog.set_level(logging.WARNING)
    assert visium_statement(None, 130.0, 0.5, "s") == []
    assert not caplog.records
    assert visium_statement(200.0, 260.0, 0.5, "s") == []
    assert "0.5 um per px is used" in caplog.text
    assert "spot_diameter_fullres is 260.0 px (0.25 um per px)" in caplog.text


SQUARES, HEXAGONS = Lattice("squares", 200.0), Lattice("hexagons", 200.0)


@pytest.mark.parametrize(
    ("diameter_um", "lattice", "pooled", "given", "mpp", "result"),
    [
        (55.0, SQUARES, True, False, 0.5, 112.84),  # pooled Xenium
        (100.0, SQUARES, False, False, 0.5, 112.84),  # discs that would touch
        (55.0, SQUARES, False, False, 0.5, 55.0),  # cannot be told
        (55.0, SQUARES, True, True, 0.5, 55.0),  # given by the user
        (112.8, SQUARES, True, True, 0.5, 112.8),
        (55.0, HEXAGONS, False, False, 0.5, 55.0),  # Visium
        (55.0, None, True, False, 0.5, 55.0),
        (100.0, SQUARES, False, False, 1.0, 100.0),  # ST array: discs
    ],
)
def test_discs_that_stand_for_squares(diameter_um, lattice, pooled, given, mpp, result):
    found = diameter_of_squares(diameter_um, lattice, mpp, "s", is_pooled=pooled, is_given=given)
    assert found == pytest.approx(result, abs=0.01)


def test_a_part_of_the_squares_is_told(caplog):
    caplog.set_level(logging.WARNING)
    diameter_of_squares(100.0, SQUARES, 1.0, "s", is_pooled=False, is_given=False)
    diameter_of_squares(55.0, HEXAGONS, 0.5, "s", is_pooled=False, is_given=False)
    assert not caplog.records
    diameter_of_squares(55.0, SQUARES, 0.5, "s", is_pooled=False, is_given=False)
    assert "covers 24 % of them" in caplog.text
    assert "set spot_diameter_um to 112.8" in caplog.text


def test_technologies_whose_counts_are_pooled():
    assert has_pooled_counts("Xenium")
    assert has_pooled_counts("Visium HD")
    assert has_pooled_counts("CosMx_SMI")
    assert not has_pooled_counts("Visium")
    assert not has_pooled_counts("Spatial Transcriptomics")
    assert not has_pooled_counts(None)
