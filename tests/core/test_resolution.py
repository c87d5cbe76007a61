"""Statements of one resolution that differ."""

import pytest

from scellst_ray.core.resolution import check_agreement


def check(stated, used, *, confirmed=False):
    return check_agreement(stated, used, confirmed=confirmed, source="s.tif")


@pytest.mark.parametrize("other", [0.5, 0.508, 0.492])
def test_statements_that_agree_are_not_reported(other):
    assert check({"the pitch of the spots": other}, 0.5) == []


@pytest.mark.parametrize("other", [0.52, 0.46, 0.549])
def test_a_small_difference_is_reported_with_both_values(other):
    (note,) = check({"the file's tags": other}, 0.5)
    assert note == f"s.tif: 0.5 um/px in use, but {other} um/px by the file's tags"


@pytest.mark.parametrize("other", [0.25, 1.0, 0.551, 0.45])
def test_a_large_difference_is_refused_unless_confirmed(other):
    stated = {"the file's OME-XML": 0.5, "the pitch of the spots": other}
    with pytest.raises(
        ValueError, match=rf"0\.5 um/px .*but {other:g} um/px by the pitch.*mpp_confirmed"
    ):
        check(stated, 0.5)
    (note,) = check(stated, 0.5, confirmed=True)
    assert f"{other:g} um/px" in note


@pytest.mark.parametrize("dpi", [72, 96, 300, 600])
def test_the_resolution_of_a_screen_or_a_printer_is_no_statement(dpi):
    assert check({"the file's tags": 25_400 / dpi}, 0.25) == []


def test_all_contradictions_are_in_one_message():
    with pytest.raises(ValueError, match=r"0\.25 um/px by tags.* 0\.3 um/px by spots"):
        check({"tags": 0.25, "spots": 0.3, "header": 0.51}, 0.5)
