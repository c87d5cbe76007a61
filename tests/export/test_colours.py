"""Every nucleus type has a colour of its own."""

from scellst_ray.export.colours import colours_of, rgb_of


def test_known_types_have_their_colour_and_others_spare_ones():
    found = colours_of(["Neoplastic", "immune", "dead", "stroma"])
    assert list(found) == ["Neoplastic", "immune", "dead", "stroma"]
    assert found["Neoplastic"] == "#ff0000"
    assert found["dead"] == "#feff00"
    assert len(set(found.values())) == 4
    assert rgb_of("#ff9f44") == [255, 159, 68]
