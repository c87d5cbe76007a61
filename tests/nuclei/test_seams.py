"""Closed cases of offered and kept nuclei, then discs as a grid of tiles sees them."""

import itertools

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from scellst_ray.core.geometry import Box
from scellst_ray.nuclei import seams
from scellst_ray.nuclei.seams import CANDIDATE, CUT, NEAR, SeamCells, resolve, select_offered

CORE, HALO, MARGIN0 = 200, 32, 8
EDGES = [0, 200, 400, 410]  # the last core is narrower than the halo, and than most nuclei


def disc(x, y, radius):
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return shapely.Polygon(ring * radius + (x, y))


def parts_of(cells, size=2):
    """Return a source of cells [(cell_id, seam, polygon)] in parts, and its ascending order."""
    cells = sorted(cells, key=lambda cell: cell[0])
    columns = (
        np.array([cell[0] for cell in cells], np.int64),
        np.array([cell[1] for cell in cells], np.uint8),
        np.array([shapely.to_wkb(cell[2]) for cell in cells], object),
    )

    def parts():
        for start in range(0, len(cells), size):
            yield SeamCells(*(column[start : start + size] for column in columns))

    return parts


def kept(*cells):
    """Return the names of the cells kept, given as (tile, seam, polygon), named by position."""
    ids = [(tile << 20) + number for number, (tile, _, _) in enumerate(cells)]
    found = resolve(parts_of([(i, *cell[1:]) for i, cell in zip(ids, cells, strict=True)]))
    assert (np.diff(found.dropped) > 0).all()
    assert set(found.dropped.tolist()) <= set(ids)
    return "".join("abcdef"[n] for n, i in enumerate(ids) if i not in found.dropped)


# --- offered nuclei --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("centre", "radius", "expected"),
    [
        ((100, 100), 10, 0),
        ((100, 100), 70, NEAR),  # owned, but it reaches into the halos of neighbours
        ((43, 100), 10, NEAR),  # a neighbour's halo may be rounded up
        ((44, 100), 10, 0),
        ((0, 100), 10, NEAR),
        ((200, 100), 10, CANDIDATE),  # half-open
        ((-7, 207), 10, CANDIDATE),
        ((207.9, 100), 30, CANDIDATE | CUT),
        ((199, 100), 33, NEAR | CUT),
        ((199, 100), 32.6, NEAR | CUT),  # an outline through the middles of the outermost pixels
        ((199, 100), 32, NEAR),
        ((208, 100), 10, None),
        ((100, -9), 10, None),
    ],
)
def test_bits(centre, radius, expected):
    x, y = centre
    box = [[x - radius, y - radius, x + radius, y + radius]]
    core = Box(0, 0, CORE, CORE)
    index, seam = select_offered(
        np.array([centre]), np.array(box), core, core.grow(HALO), MARGIN0, 1.0
    )
    assert seam.dtype == np.uint8
    assert seam.tolist() == ([] if expected is None else [expected])
    assert index.tolist() == ([] if expected is None else [0])


def test_a_tile_without_nuclei_offers_none():
    core = Box(0, 0, CORE, CORE)
    index, seam = select_offered(np.zeros((0, 2)), np.zeros((0, 4)), core, core.grow(4), 2.0, 1.0)
    assert len(index) == len(seam) == 0


@given(
    st.tuples(st.integers(-900, 900), st.integers(-900, 900)),
    st.tuples(st.floats(0, 60), st.floats(0, 60)),
    st.sampled_from([-1, 1]),
)
def test_what_has_no_bits_is_read_by_no_neighbour(corner, size, rounding):
    """Neighbours read up to their halo, give or take the rounding of boxes."""
    x, y = corner[0] / 3, corner[1] / 3
    box = np.array([[x, y, x + size[0], y + size[1]]])
    core = Box(0, 0, CORE, CORE)
    centre = (box[:, :2] + box[:, 2:]) / 2
    _, seam = select_offered(centre, box, core, core.grow(HALO), MARGIN0, 1.0)
    if seam.tolist() == [0]:
        steps = [s for s in itertools.product((-CORE, 0, CORE), repeat=2) if any(s)]
        others = [Box(a, b, CORE, CORE).grow(HALO + rounding) for a, b in steps]
        mine = shapely.box(*box[0])
        for other in others:
            theirs = shapely.box(other.x0, other.y0, other.x0 + other.w0, other.y0 + other.h0)
            assert not shapely.intersects(mine, theirs)


# --- kept nuclei -----------------------------------------------------------------------------


def test_nothing_to_resolve():
    found = resolve(lambda: iter(()))
    assert (found.dropped.tolist(), found.num_doubled, found.num_adopted) == ([], 0, 0)
    assert kept((0, NEAR, disc(0, 0, 9))) == "a"


@pytest.mark.parametrize("tiles", [(0, 1), (1, 0)])
def test_the_more_complete_one_is_kept_whichever_tile_comes_first(tiles):
    whole, part = (
        disc(0, 0, 30),
        shapely.intersection(disc(0, 0, 30), shapely.box(-18, -50, 50, 50)),
    )
    assert kept((tiles[0], NEAR, whole), (tiles[1], NEAR | CUT, part)) == "a"
    # This holds even if the owning tile sees less of it than another tile.
    assert kept((tiles[0], CANDIDATE, whole), (tiles[1], NEAR | CUT, part)) == "a"
    # Of two similar nuclei a complete one wins, then an owned one, in spite of noisy outlines.
    larger = disc(0, 0, 31)
    assert kept((tiles[0], NEAR, whole), (tiles[1], CANDIDATE, larger)) == "a"
    assert kept((tiles[0], NEAR, whole), (tiles[1], NEAR | CUT, larger)) == "a"


def test_of_two_equal_ones_the_first_is_kept():
    assert kept((3, NEAR, disc(0, 0, 9)), (2, NEAR, disc(0, 0, 9))) == "b"


def test_touching_neighbours_both_stay():
    """The published merge calls 1 percent of overlap the same nucleus."""
    for share in (0.0, 1.0, 2.5):  # px of overlap: up to 9 percent of the area
        assert kept((0, NEAR, disc(0, 0, 12)), (1, NEAR, disc(24 - share, 0, 12))) == "ab"


def test_overlapping_nuclei_of_one_tile_are_not_compared():
    assert kept((4, NEAR, disc(0, 0, 12)), (4, NEAR, disc(1, 0, 12))) == "ab"


def test_of_a_chain_both_ends_stay():
    """The published merge keeps only the last."""
    a, b, c = disc(0, 0, 10), disc(7, 0, 10.5), disc(14, 0, 10)
    assert kept((0, NEAR, b), (1, NEAR, a), (2, NEAR, c)) == "a"
    longer = [(0, NEAR, disc(0, 0, 11)), (1, NEAR, disc(7, 0, 10)), (2, NEAR, disc(14, 0, 9))]
    assert kept(*longer) == "ac"


HALVES = [
    shapely.intersection(disc(0, 0, 20), shapely.box(*b))
    for b in ((-20, -20, 0, 20), (0, -20, 20, 20))
]


def test_one_nucleus_seen_as_two_by_the_neighbour():
    whole, (left, right) = disc(0, 0, 20), HALVES
    assert kept((0, NEAR, whole), (1, CANDIDATE, left), (1, NEAR, right)) == "a"
    assert kept((0, CANDIDATE, whole), (1, NEAR, left), (1, NEAR, right)) == "a"


def test_two_nuclei_seen_as_one_by_the_neighbour():
    """Tile 1 owns neither half: dropping what it saw as one would lose the right half."""
    whole, (left, _) = disc(0, 0, 20), HALVES
    assert kept((0, NEAR, left), (1, CANDIDATE, whole)) == "b"
    # A fragment next to a nucleus does not make the neighbour's version better.
    most = shapely.intersection(disc(0, 0, 20), shapely.box(-20, -20, 14, 20))
    assert kept((0, NEAR, most), (1, CANDIDATE, whole)) == "a"


def test_candidates_are_adopted_only_where_nobody_has_them():
    cells = [
        (0, NEAR, disc(0, 0, 10)),
        (1, CANDIDATE, disc(3, 2, 10)),  # seen by its owner, elsewhere
        (1, CANDIDATE, disc(60, 0, 10)),  # offered by two tiles, owned by no tile
        (2, CANDIDATE, disc(61, 1, 10)),
        (2, NEAR, disc(100, 0, 10)),  # owned by two tiles
        (3, NEAR, disc(101, 0, 10)),
    ]
    assert kept(*cells) == "ace"
    ids = [(tile << 20) + n for n, (tile, _, _) in enumerate(cells)]
    found = resolve(parts_of([(i, *c[1:]) for i, c in zip(ids, cells, strict=True)]))
    assert (found.num_doubled, found.num_adopted) == (1, 1)


@pytest.mark.parametrize(("radius", "shift"), [(10, 4.0), (5, 2.8)])
def test_lymphocytes_seen_in_different_places(radius, shift):
    """Nuclei of 5 um at 0.25 and 0.5 um/px differ by 2 px in each tile, 1 px along both axes."""
    assert kept((0, NEAR, disc(0, 0, radius)), (1, NEAR, disc(shift, 0, radius))) == "a"


def test_an_outline_that_crosses_itself():
    bow = shapely.Polygon([(0, 0), (20, 20), (20, 0), (0, 20)])
    hook = shapely.Polygon([(0, 0), (9, 0), (9, 9), (5, 9), (5, 0), (0, 0)])
    assert kept((0, NEAR, bow), (1, NEAR, shapely.box(0, 0, 20, 20))) == "b"
    assert kept((0, NEAR, hook), (1, NEAR, shapely.box(0, 0, 9, 9))) == "b"


# --- against a slow twin --------------------------------------------------------------------


def resolve_slowly(cells):
    """Drop nuclei by the rule as written: compare all pairs, largest first."""
    shapes = {i: polygon for i, _, polygon in cells}
    size = {
        i: polygon.area * 0.8 ** bool(seam & CANDIDATE) * 0.8 ** bool(seam & CUT)
        for i, seam, polygon in cells
    }
    stays = []
    for i in sorted(shapes, key=lambda i: (-size[i], i)):
        partners = [j for j in stays if j >> 20 != i >> 20]
        limits = [0.4 * min(shapes[i].area, shapes[j].area) for j in partners]
        overlaps = [shapes[i].intersection(shapes[j]).area for j in partners]
        if not any(o > limit for o, limit in zip(overlaps, limits, strict=True)):
            stays.append(i)
    return sorted(set(shapes) - set(stays))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.integers(1, 20), st.integers(1, 9))
def test_as_a_loop_over_all_pairs_and_however_parts_are_cut(seed, number, band, size):
    rng = np.random.default_rng(seed)
    cells = [
        ((int(rng.integers(6)) << 20) + n, int(rng.choice([1, 2, 5, 6])), disc(x, y, r))
        for n, (x, y, r) in enumerate(rng.uniform((0, 0, 4), (120, 120, 20), (number, 3)))
    ]
    before = seams.BAND
    try:
        seams.BAND = band
        found = resolve(parts_of(cells, size))
    finally:
        seams.BAND = before
    assert found.dropped.tolist() == resolve_slowly(cells)


# --- discs as the tiles of a slide see them -------------------------------------------------


@st.composite
def discs(draw, largest):
    """Draw discs [N, 3] (x, y, radius) that do not overlap; many of them lie at seams."""
    inner = st.floats(5, EDGES[-1] - 5)
    near = st.builds(lambda e, d: e + d, st.sampled_from([200, 400]), st.floats(-50, 50))
    place = st.one_of(inner, near.filter(lambda v: 5 <= v <= EDGES[-1] - 5))
    found = []
    for _ in range(draw(st.integers(1, 12))):
        x, y, radius = draw(place), draw(place), draw(st.floats(10, largest))
        if all(np.hypot(x - a, y - b) >= radius + r for a, b, r in found):
            found.append((x, y, radius))
    return np.array(found)


def see(discs_N3, jitter_px=0.0, seed=0):
    """Return cells [(cell_id, seam, polygon)] as tiles offer them, and the disc of each."""
    rng = np.random.default_rng(seed)
    slide = shapely.box(0, 0, EDGES[-1], EDGES[-1])
    cells, sources = [], []
    spans = list(itertools.pairwise(EDGES))
    for tile, ((y0, y1), (x0, x1)) in enumerate(itertools.product(spans, spans)):
        core = Box(x0, y0, x1 - x0, y1 - y0)
        read = core.grow(HALO)
        seen = discs_N3 + rng.uniform(-jitter_px, jitter_px, discs_N3.shape)
        shapes = np.array([disc(*values) for values in seen])
        shapes = shapely.intersection(shapes, slide)
        window = shapely.box(x0 - HALO, y0 - HALO, x1 + HALO, y1 + HALO)
        shapes = shapely.intersection(shapes, window)
        there = np.flatnonzero(shapely.area(shapes) > 10)
        centre = shapely.get_coordinates(shapely.centroid(shapes[there]))
        index, seam = select_offered(
            centre, shapely.bounds(shapes[there]), core, read, MARGIN0, 1.0
        )
        for number, (n, bits) in enumerate(zip(there[index], seam, strict=True)):
            cells.append(((tile << 20) + number, int(bits), shapes[n]))
            sources.append(int(n))
    return cells, sources


def after_compaction(cells, sources):
    """Return the cells that remain: [(disc, polygon)]."""
    found = resolve(parts_of([cell for cell in cells if cell[1]], 3))
    dropped = set(found.dropped.tolist())
    return [(n, c[2]) for c, n in zip(cells, sources, strict=True) if c[0] not in dropped]


@settings(max_examples=100, deadline=None)
@given(discs(largest=1.25 * HALO))
def test_every_disc_is_kept_once_and_as_complete_as_any_tile_sees_it(discs_N3):
    cells, sources = see(discs_N3)
    remaining = after_compaction(cells, sources)
    assert sorted(n for n, _ in remaining) == list(range(len(discs_N3)))
    for n, polygon in remaining:
        best = max(c[2].area for c, source in zip(cells, sources, strict=True) if source == n)
        assert polygon.area == pytest.approx(best)


@settings(max_examples=100, deadline=None)
@given(discs(largest=1.25 * HALO), st.integers(0, 2**32 - 1))
def test_every_disc_is_kept_once_with_jitter(discs_N3, seed):
    """Centres and radii differ by up to 2 px between any tile and the truth."""
    remaining = after_compaction(*see(discs_N3, jitter_px=2.0, seed=seed))
    assert sorted(n for n, _ in remaining) == list(range(len(discs_N3)))


@pytest.mark.parametrize("offset", [(-9, -9), (0.5, 0.5), (9, -4), (-1, 20)])
def test_a_nucleus_wider_than_the_overlap_at_a_corner_of_four_tiles(offset):
    big = np.array([[200 + offset[0], 200 + offset[1], 40.0]])
    cells, sources = see(big)
    assert len(cells) > 1
    assert sum(not cell[1] & CUT for cell in cells) <= 1
    ((_, polygon),) = after_compaction(cells, sources)
    assert polygon.area == pytest.approx(max(cell[2].area for cell in cells))


def test_ownership_alone_loses_and_doubles():
    """Candidates save discs that are seen with jitter: compare without and with them."""
    places = itertools.product((100, 200, 300), np.arange(20, 400, 24), (10.0,))
    cells, sources = see(np.array(list(places)), jitter_px=2.0, seed=1)
    owned = [n for c, n in zip(cells, sources, strict=True) if not c[1] & CANDIDATE]
    assert len(set(owned)) < len(set(sources))
    assert len(set(owned)) < len(owned)
    found = [n for n, _ in after_compaction(cells, sources)]
    assert sorted(found) == sorted(set(sources)) == list(range(48))
