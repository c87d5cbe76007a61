"""Check spots on tissue, and the mistakes that move them off it."""

import numpy as np
import pytest

from scellst_ray.spots.alignment import check_alignment

WIDTH0, HEIGHT0 = 6000, 4000


def in_tissue(xy0):
    """Return which points lie in a tissue without symmetry: an ellipse with a tail."""
    x, y = np.asarray(xy0, float).T
    ellipse = ((x - 1900) / 1500) ** 2 + ((y - 1200) / 900) ** 2 <= 1
    return ellipse | ((x > 1500) & (x < 5200) & (y > 1300) & (y < 1800))


def grid(step, offset=0.0):
    x, y = np.meshgrid(np.arange(offset, WIDTH0, step), np.arange(offset, HEIGHT0, step))
    return np.column_stack([x.ravel(), y.ravel()]).astype(float)


TISSUE = grid(40)[in_tissue(grid(40))]
SPOTS = grid(150, 20)[in_tissue(grid(150, 20))]


def found_for(xy0, size0=(WIDTH0, HEIGHT0)):
    return check_alignment(xy0, TISSUE, 50.0, size0)


def test_sound_spots_have_no_problem():
    found = found_for(SPOTS)
    assert found.problem is None
    assert found.given.share_on_tissue == 1.0
    assert found.given.share_of_tissue > 0.95
    assert found.best.name == "as given"
    assert found.as_json()["given"]["share_on_tissue"] == 1.0


@pytest.mark.parametrize(
    ("mistake", "cause"),
    [
        (lambda x, y: (y, x), "x and y swapped"),
        (lambda x, y: (WIDTH0 - x, y), "mirrored left to right"),
        (lambda x, y: (x, HEIGHT0 - y), "mirrored top to bottom"),
        (lambda x, y: (WIDTH0 - x, HEIGHT0 - y), "turned by 180 degrees"),
        # Positions on the image turned by 90 degrees, which is as wide as ours is high.
        (lambda x, y: (HEIGHT0 - y, x), "turned by 90 degrees anticlockwise"),
        (lambda x, y: (y, WIDTH0 - x), "turned by 90 degrees clockwise"),
        (lambda x, y: (HEIGHT0 - y, WIDTH0 - x), "mirrored along the other diagonal"),
        (lambda x, y: (x / 2, y / 2), "scaled by 2"),
        (lambda x, y: (x * 4, y * 4), "scaled by 0.25"),
        (lambda x, y: (x * 0.17, y * 0.17), "scaled by about 6.1"),
        (lambda x, y: (x / 1.4, y / 1.4), "scaled by about 1.5"),
    ],
)
def test_mistakes_are_reported_with_their_cause(mistake, cause):
    found = found_for(np.column_stack(mistake(*SPOTS.T)))
    assert found.problem is not None
    assert cause in found.problem
    assert "likely cause" in found.problem
    assert found.best.share_on_tissue > 0.9


def test_what_no_placing_explains_is_a_problem_without_a_cause():
    rng = np.random.default_rng(0)
    nowhere = rng.uniform([5300, 2200], [5900, 3900], (200, 2))
    found = check_alignment(nowhere, TISSUE[:50], 50.0, (WIDTH0, HEIGHT0))
    assert found.problem == (
        "0% of the spots lie on tissue; swapping, mirroring or scaling their positions does not "
        "help"
    )


def test_some_spots_off_tissue_are_no_problem():
    rng = np.random.default_rng(1)
    stray = grid(150, 20)[~in_tissue(grid(150, 20))]
    spots = np.concatenate([SPOTS, rng.choice(stray, len(SPOTS) // 8)])
    found = found_for(spots)
    assert 0.85 < found.given.share_on_tissue < 0.95
    assert found.problem is None


def test_a_part_of_the_tissue_is_no_problem_though_scaling_covers_more():
    part = SPOTS[(SPOTS[:, 0] > 1000) & (SPOTS[:, 0] < 2400) & (SPOTS[:, 1] < 1700)]
    found = found_for(part)
    assert found.given.share_of_tissue < 0.6
    assert found.problem is None


def test_tissue_everywhere_hides_mistakes_and_none_is_claimed():
    for xy0 in (SPOTS, SPOTS[:, ::-1], np.column_stack([WIDTH0 - SPOTS[:, 0], SPOTS[:, 1]])):
        assert check_alignment(xy0, grid(40), 50.0, (WIDTH0, HEIGHT0)).problem is None


def test_sparse_points_count_as_tissue_between_them(monkeypatch):
    monkeypatch.setattr("scellst_ray.spots.alignment.MAX_POINTS", 300)
    found = check_alignment(SPOTS, TISSUE, 1.0, None)
    assert found.given.share_on_tissue > 0.5
    assert check_alignment(SPOTS[:1], TISSUE, 60.0).given.share_on_tissue == 1.0


def test_no_tissue_at_all():
    found = check_alignment(SPOTS, np.zeros((0, 2)), 50.0)
    assert found.problem == "the slide has no tissue on which spots could lie"
