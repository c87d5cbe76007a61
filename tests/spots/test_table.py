import logging

import anndata.utils
import numpy as np
import pandas as pd
import polars as pl
import pytest
from scipy import sparse

from scellst_ray.spots.table import (
    Spots,
    check_inside,
    check_spots,
    check_whole_counts,
    join_spots,
    radius_px,
    unique_gene_names,
)


def make_spots(counts, **changes) -> Spots:
    counts = sparse.csr_matrix(np.asarray(counts, np.float32))
    num_spots, num_genes = counts.shape
    parts = {
        "spot_id": np.array([f"s{i}" for i in range(num_spots)]),
        "xy0": np.arange(2.0 * num_spots).reshape(-1, 2),
        "radius0": 5.0,
        "counts": counts,
        "genes": [f"G{i}" for i in range(num_genes)],
    }
    return Spots(**(parts | changes))


GOOD = [[1, 0, 2], [0, 3, 0]]


def test_sound_spots_pass():
    check_spots(make_spots(GOOD), "here")
    # A few bins of damaged positions, and positions that are not known yet.
    xy0 = np.array([[1.0, max(i, 2)] for i in range(40)])
    check_spots(make_spots(GOOD * 20, xy0=xy0), "here")
    check_spots(make_spots(GOOD, xy0=np.zeros((2, 2))), "here")


@pytest.mark.parametrize(
    ("spots", "words"),
    [
        (make_spots([[0, 0], [0, 0]]), ["no counts at all", "2 spots x 2 genes"]),
        (make_spots([[1, 0], [0, -3]]), ["-3.0", "gene G1", "spot s1", "raw counts"]),
        (make_spots([[1, np.nan], [0, 0]]), ["nan", "gene G1", "spot s0"]),
        (make_spots(GOOD, spot_id=np.array(["s", "s"])), ["['s']", "more than once"]),
        (make_spots(GOOD, genes=["A", "B", "A"]), ["['A']", "genes"]),
        (make_spots(GOOD, genes=["A", "B"]), ["2 spots x 3 genes", "2 genes"]),
        (make_spots(GOOD, xy0=np.array([[1, np.inf], [0, 0]])), ["spot s0", "inf"]),
        (
            make_spots(GOOD * 2, xy0=np.array([[1, 2], [3, 4]] * 2)),
            ["4 spots lie at only 2 different places", "split the file"],
        ),
        (
            make_spots(GOOD * 9, xy0=np.array([[1, i % 6] for i in range(18)])),
            ["18 spots lie at only 6 different places"],
        ),
        (make_spots(GOOD, radius0=0.0), ["radius 0.0", "spot_diameter_um"]),
    ],
)
def test_unsound_spots_are_named(spots, words):
    with pytest.raises(ValueError, match=r"^folder/x: ") as caught:
        check_spots(spots, "folder/x")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_select_by_mask_and_by_index_agree():
    spots = make_spots([[1, 0], [0, 3], [4, 5]])
    by_mask = spots.select(np.array([True, False, True]))
    by_index = spots.select(np.array([0, 2]))
    for part in (by_mask, by_index):
        assert part.spot_id.tolist() == ["s0", "s2"]
        assert part.counts.toarray().tolist() == [[1, 0], [4, 5]]
        assert part.xy0.tolist() == [[0, 1], [4, 5]]
        assert part.genes == spots.genes
    assert spots.select(np.array([2, 0])).spot_id.tolist() == ["s2", "s0"]


@pytest.mark.parametrize(
    "names",
    [["A", "B"], ["A", "A", "B", "A"], ["TBCE", "TBCE-1", "TBCE"], ["A", "A", "A-1", "A-1"]],
)
@pytest.mark.filterwarnings("ignore:Suffix used")
def test_repeated_genes_get_the_names_anndata_gives(names):
    assert unique_gene_names(names) == anndata.utils.make_index_unique(pd.Index(names)).tolist()


def positions_of(**places) -> pl.DataFrame:
    rows = [(name, float(x), float(y)) for name, (x, y) in places.items()]
    return pl.DataFrame(rows, schema=["spot_id", "x0", "y0"], orient="row")


def test_join_drops_what_has_no_partner_and_says_so(caplog):
    counts = sparse.csr_matrix(np.array([[1, 2], [3, 4], [5, 6]]))
    positions = positions_of(c=(30, 31), nowhere=(0, 0), a=(10, 11))
    with caplog.at_level(logging.INFO):
        spots = join_spots(counts, ["a", "b", "c"], ["G", "G"], positions, 5.0, "here")
    assert spots.spot_id.tolist() == ["a", "c"]
    assert spots.xy0.tolist() == [[10, 11], [30, 31]]
    assert spots.counts.toarray().tolist() == [[1, 2], [5, 6]]
    assert spots.genes == ["G", "G-1"]
    assert "1 counts without a position, 1 positions without counts" in caplog.text


def test_join_refuses_sections_that_share_no_spot():
    with pytest.raises(ValueError, match="no spot id occurs in both") as caught:
        join_spots(
            sparse.csr_matrix(np.ones((1, 1))), ["a"], ["G"], positions_of(b=(1, 2)), 5.0, "here"
        )
    assert "'a'" in str(caught.value)
    assert "'b'" in str(caught.value)


def test_join_refuses_a_barcode_counted_twice():
    with pytest.raises(ValueError, match=r"among the counts, such as \['a'\]"):
        join_spots(
            sparse.csr_matrix(np.ones((2, 1))),
            ["a", "a"],
            ["G"],
            positions_of(a=(1, 2)),
            5.0,
            "here",
        )


def test_radius_is_half_the_diameter_in_px():
    assert radius_px(55.0, 0.5, "here") == 55.0
    for diameter_um, mpp in [(0, 0.5), (55, 0), (55, -1), (55, float("nan"))]:
        with pytest.raises(ValueError, match="here: spot diameter"):
            radius_px(diameter_um, mpp, "here")


def test_counts_that_are_not_whole_are_named_with_what_needs_them():
    check_whole_counts(make_spots(GOOD), "here", "this")
    words = r"here: 2 of 3 counts are not whole .* the first 2\.5 for gene G2 in spot s0; nb needs"
    with pytest.raises(ValueError, match=words) as caught:
        check_whole_counts(make_spots([[1, 0, 2.5], [0, 0.5, 0]]), "here", "nb")
    assert "Give raw counts" in str(caught.value)


def test_spots_outside_the_image():
    xy0 = np.random.default_rng(0).uniform(0, [900, 500], (100, 2))
    counts = np.ones((100, 1))
    inside = make_spots(counts, xy0=xy0)
    assert check_inside(inside, 900, 500, "here") == 0
    xy0 = xy0.copy()
    xy0[:5] = [[-0.1, 0], [900, 0], [0, 500], [0, -3], [1e4, 1e4]]
    assert check_inside(make_spots(counts, xy0=xy0), 900, 500, "here") == 5
    xy0[5] = [12345.2, 7]
    with pytest.raises(
        ValueError, match=r"here: 6 of 100 spots lie outside the image of 900 x 500"
    ):
        check_inside(make_spots(counts, xy0=xy0), 900, 500, "here")
    with pytest.raises(ValueError, match=r"the first s0 at \(x, y\) = \(30000, 7\)"):
        check_inside(make_spots(counts[:1], xy0=np.array([[3e4, 7.0]])), 900, 500, "here")
