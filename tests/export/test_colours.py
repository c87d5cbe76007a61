"""Every nucleus type has a colour of its own."""

from scellst_ray.export.colours import colours_of, rgb_of
from scellst_ray.report.cells import NUM_TYPES


def test_known_types_have_their_colour_and_others_spare_ones():
    found = colours_of(["Neoplastic", "immune", "dead", "stroma"])
    assert list(found) == ["Neoplastic", "immune", "dead", "stroma"]
    assert found["Neoplastic"] == "#ff0000"
    assert found["dead"] == "#feff00"
    assert len(set(found.values())) == 4
    assert rgb_of("#ff9f44") == [255, 159, 68]


def test_as_many_types_as_a_page_shows_have_colours_of_their_own():
    found = colours_of(f"t{n}" for n in range(NUM_TYPES + 1))
    assert len(set(found.values())) == NUM_TYPES + 1
