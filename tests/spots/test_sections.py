"""Matrices of several sections, told by the marks of their barcodes."""

import numpy as np
import pytest

from scellst_ray.spots.sections import check_one_section, repeated_spots, section_marks

CORES = ["".join(np.random.default_rng(i).choice(list("ACGT"), 16)) for i in range(6)]


def marked(before, after):
    return [f"{before}{core}{after}" for core in CORES]


@pytest.mark.parametrize(
    ("counted", "placed", "words"),
    [
        (marked("", "-1") + marked("", "-2"), marked("", "-1"), "2 sections .-1: 6 spots, -2: 6"),
        (marked("", "-1-0") + marked("", "-1-1"), marked("", "-1"), "-1-0: 6 spots"),
        (marked("s1_", "-1") + marked("s2_", "-1"), marked("s1_", "-1"), "s1_...-1: 6 spots"),
        (marked("", "-A") + marked("", "-B"), marked("", "-A"), "-A: 6 spots, -B: 6 spots"),
        (marked("", "-2"), marked("", "-1"), r"marked otherwise \(-2: 6 spots\)"),
        (marked("s1#", "-1"), marked("", "-1"), "marked otherwise"),
        (marked("", "-1") + marked("", "-2")[:1], marked("", "-1"), "-2: 1 spots"),
    ],
)
def test_counts_of_other_sections_are_refused(counted, placed, words):
    with pytest.raises(ValueError, match=words):
        check_one_section(counted, placed, "outs")


@pytest.mark.parametrize(
    ("counted", "placed"),
    [
        (marked("", "-1"), marked("", "-1")),
        (marked("", "-2"), marked("", "-2")),
        (marked("", "-1"), marked("", "-1") + marked("", "-2")),
        (marked("", "-1") + marked("", "-2"), marked("", "-1") + marked("", "-2")),
        ([f"s_008um_{i:05d}_00007-1" for i in range(9)], ["s_008um_00001_00007-1"] * 2),
        ([f"{i}x{i}" for i in range(9)], [f"{i}x{i}" for i in range(9)]),
        ([f"spot{i}" for i in range(9)], marked("", "-1")),
    ],
)
def test_one_section_is_read(counted, placed):
    check_one_section(counted, placed, "outs")


def test_barcodes_that_occur_in_two_sections():
    assert len(repeated_spots(marked("", "-0") + marked("", "-1"))) == 2
    assert not repeated_spots(marked("", "-0")[:3] + marked("", "-1")[3:])
    assert not repeated_spots(marked("", "-1"))


def test_names_whose_marks_are_as_many_as_spots_say_nothing():
    assert not section_marks([f"ACGTACGTACGTACGT-C{i}" for i in range(60)])
    assert list(section_marks([f"GATTACA_{core}-1" for core in CORES])) == [("GATTACA_", "-1")]
