"""BAGS against a slow loop over spots and cells; what cannot train is said at once."""

import csv
import gzip
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import io as scipy_io
from small_run import write_small_run

from scellst_ray import schemas, storage
from scellst_ray.cohort import read_manifest
from scellst_ray.pipelines.bags import build_bags, choose_panel, make_bags, training_slides


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return write_small_run(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def slides(small):
    return training_slides(read_manifest(str(small.manifest)), small.run, None)


def outs_of(slide):
    """Read a Space Ranger folder by hand: barcodes, genes, counts [S, G], (x, y) by barcode."""
    folder = Path(slide.row.columns["spots"])
    texts = {
        name: gzip.decompress((folder / f"filtered_feature_bc_matrix/{name}.gz").read_bytes())
        for name in ("matrix.mtx", "barcodes.tsv", "features.tsv")
    }
    counts = scipy_io.mmread(io.BytesIO(texts["matrix.mtx"])).toarray().T
    barcodes = texts["barcodes.tsv"].decode().split()
    genes = [line.split("\t")[1] for line in texts["features.tsv"].decode().splitlines()]
    with (folder / "spatial/tissue_positions.csv").open(newline="") as file:
        places = {
            row["barcode"]: (float(row["pxl_col_in_fullres"]), float(row["pxl_row_in_fullres"]))
            for row in csv.DictReader(file)
        }
    return barcodes, genes, counts, places


def slow_bags(slide, panel, cells):
    """Return (barcode, cell ids, embeddings, target) of every bag, and the scale, by loops."""
    barcodes, genes, counts, places = outs_of(slide)
    radius0 = 55.0 / 2 / slide.mpp
    passing = [
        g
        for g in range(len(genes))
        if counts[:, g].sum() >= 200 and (counts[:, g] > 0).sum() >= int(0.1 * len(barcodes))
    ]
    bags = []
    for spot, barcode in enumerate(barcodes):
        library = counts[spot, passing].sum()
        x0, y0 = places[barcode]
        inside = [
            cell for cell in cells if (cell["x0"] - x0) ** 2 + (cell["y0"] - y0) ** 2 <= radius0**2
        ]
        if library >= 20 and inside:
            values = [np.log1p(counts[spot, genes.index(g)] / library * 1e4) for g in panel]
            ids = [cell["cell_id"] for cell in inside]
            bags.append((barcode, ids, [cell["embedding"] for cell in inside], values))
    scale = [
        np.percentile([bag[3][g] for bag in bags], 95) - min(bag[3][g] for bag in bags)
        for g in range(len(panel))
    ]
    return bags, scale


def test_bags_equal_a_slow_loop(small, slides, tmp_path):
    panel = [outs_of(slides[0])[1][gene] for gene in (5, 1, 6)]
    for slide in slides:
        slide_id = slide.row.slide_id
        cells = pq.read_table(small.run.cells_uri(slide_id)).to_pylist()
        expected, scale = slow_bags(slide, panel, cells)
        result = make_bags(slide, panel, small.run, str(tmp_path))
        stored = pq.read_table(tmp_path / "bags" / f"{slide_id}.parquet")
        schemas.check(stored.schema, "BAGS", "test")
        found = stored.to_pylist()
        assert [row["spot_id"] for row in found] == [bag[0] for bag in expected]
        assert [row["cell_id"] for row in found] == [bag[1] for bag in expected]
        for row, bag in zip(found, expected, strict=True):
            np.testing.assert_array_equal(row["embedding"], bag[2])
            np.testing.assert_allclose(row["target"], np.divide(bag[3], scale), rtol=1e-5)
        np.testing.assert_allclose(result["scale"], scale, rtol=1e-6)
        assert result["num_spots"] == len(found) > 10
        assert result["num_links"] == sum(len(row["cell_id"]) for row in found)
        assert result["error"] is None
        # A measured spot whose cells are gone has no bag.
        barcodes, _, counts, _ = outs_of(slide)
        assert counts[barcodes.index(small.bare[slide_id])].sum() > 20
        assert small.bare[slide_id] not in stored["spot_id"].to_pylist()


def test_no_spot_with_cells_names_the_slide(small, slides, tmp_path):
    cells = pq.read_table(small.run.cells_uri("s0"))
    run = replace(small.run, uri=str(tmp_path / "far"))
    far = cells.set_column(2, cells.schema.field("x0"), [np.float32(1e6) + cells["x0"].to_numpy()])
    storage.publish_table(run.cells_uri("s0"), far)
    with pytest.raises(ValueError, match=r"slide s0: none of its \d+ spots has a cell.*mpp"):
        make_bags(slides[0], choose_panel(slides, "variable:2"), run, str(tmp_path))
    assert storage.list_files(str(tmp_path / "bags")) == []


def test_training_slides_lists_all_problems(small, tmp_path):
    manifest = tmp_path / "manifest.csv"
    manifest.write_text(small.manifest.read_text() + "bare,b.tiff,0.5,\nnew,n.tiff,0.5,somewhere\n")
    rows = read_manifest(str(manifest))
    wanted = ["s0", "nobody", "bare", "new", "s0"]
    with pytest.raises(ValueError, match="cannot train") as caught:
        training_slides(rows, small.run, wanted)
    message = str(caught.value)
    for part in (
        "nobody is not in the manifest",
        "bare has no spots in the manifest",
        f"new is not there in {small.run.uri}, not done",
        "s0 is asked for twice",
        "`spots` column",
    ):
        assert part in message
    record = storage.read_json(small.run.record_uri("s0"))
    failed = replace(small.run, uri=str(tmp_path / "run"))
    storage.publish_json(failed.record_uri("s0"), record | {"status": "partial"})
    with pytest.raises(ValueError, match="s0 is partial in"):
        training_slides(rows, failed, ["s0"])
    bare = [row for row in rows if row.slide_id == "bare"]
    with pytest.raises(ValueError, match="no row of the manifest has spots"):
        training_slides(bare, small.run, None)
    chosen = training_slides(rows[:2], small.run, ["s1"])
    assert [(slide.row.slide_id, slide.mpp) for slide in chosen] == [("s1", 0.5)]


def test_choose_panel(slides, tmp_path):
    genes = outs_of(slides[0])[1]
    chosen = choose_panel(slides, "variable:3")
    assert len(set(chosen)) == 3
    assert set(chosen) <= set(genes)
    # The most variable first, so a shorter panel is the beginning of a longer one.
    assert choose_panel(slides, "variable:2") == chosen[:2]
    assert choose_panel(slides[::-1], "variable:3") == chosen
    assert choose_panel(slides, f"{genes[4]},{genes[0]}") == [genes[4], genes[0]]
    (tmp_path / "panel.txt").write_text(f"# mine\n{genes[2]}\n\n{genes[1]}\n")
    assert choose_panel(slides, str(tmp_path / "panel.txt")) == [genes[2], genes[1]]
    for wrong, reason in (
        ("variable:many", "variable:N, a comma-separated list or a file"),
        ("variable:", "variable:N"),
        ("variable:9999", "9999 variable genes asked for"),
        ("highest:20", "no such file"),
        (f"{genes[0]},{genes[0]}", "more than once"),
    ):
        with pytest.raises(ValueError, match=reason):
            choose_panel(slides, wrong)


def without_spots(slides):
    return [
        replace(s, row=replace(s.row, columns={"spots": f"gone_{s.row.slide_id}"})) for s in slides
    ]


def test_choose_panel_names_every_slide_it_cannot_read(slides):
    with pytest.raises(ValueError, match=r"cannot train: s0: .*gone_s0.*; s1: .*gone_s1"):
        choose_panel(without_spots(slides), "variable:2")


@pytest.mark.ray
def test_ray_equals_make_bags_and_names_every_bad_slide(local_ray, small, slides, tmp_path):
    panel = choose_panel(slides, "variable:4")
    results = build_bags(slides, panel, small.run, str(tmp_path / "ray"), local_ray.num_cpus)
    for slide in slides:
        slide_id = slide.row.slide_id
        plain = make_bags(slide, panel, small.run, str(tmp_path / "plain"))
        assert results[slide_id] == plain
        files = [tmp_path / name / "bags" / f"{slide_id}.parquet" for name in ("ray", "plain")]
        assert pq.read_table(files[0]).equals(pq.read_table(files[1]), check_metadata=True)
    bad = without_spots(slides)
    with pytest.raises(ValueError, match=r"cannot train: s0: .*gone_s0.*; s1: .*gone_s1"):
        build_bags(bad, panel, small.run, str(tmp_path / "bad"), 1)
