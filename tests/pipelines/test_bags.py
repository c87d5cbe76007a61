"""BAGS against a slow loop over spots and cells; slides that cannot train are refused at once."""

import csv
import gzip
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy import io as scipy_io
from scipy.spatial import cKDTree

from scellst_ray import storage
from scellst_ray.core import schemas
from scellst_ray.pipelines.bags import build_bags
from scellst_ray.slides.manifest import read_manifest
from scellst_ray.spots.panel import CountFilter
from scellst_ray.stages.bags import choose_panel, make_bags, provenance
from scellst_ray.stages.networks import vectors
from scellst_ray.stages.supervision import Rules, link_slide, tissue_points, training_slides
from tests.support.small_run import write_small_run


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


def panel_of(slides):
    return [outs_of(slides[0])[1][gene] for gene in (5, 1, 6)]


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


def with_cells(small, folder, slide_id, column, values):
    """Return a run that differs in one column of one slide's CELLS."""
    run = replace(small.run, uri=str(folder))
    for other in ("s0", "s1"):
        cells = pq.read_table(small.run.cells_uri(other))
        if other == slide_id:
            index = cells.schema.get_field_index(column)
            cells = cells.set_column(index, cells.schema.field(column), [values(cells)])
        storage.publish_table(run.cells_uri(other), cells)
    return run


@pytest.mark.parametrize("check", [True, False])
def test_one_slide_without_a_linked_cell_is_named_whatever_the_others(
    small, slides, tmp_path, check
):
    run = with_cells(
        small, tmp_path / "far", "s0", "x0", lambda c: np.float32(1e6) + c["x0"].to_numpy()
    )
    rules = Rules(check_alignment=check)
    words = r"slide s0: none of its \d+ spots has a cell; 0% of the spots lie on tissue.*mpp"
    with pytest.raises(ValueError, match=words):
        make_bags(slides[0], panel_of(slides), run, str(tmp_path), rules)
    assert storage.list_files(str(tmp_path / "bags")) == []
    # Nothing is chosen on the sound slide alone either.
    with pytest.raises(ValueError, match=r"cannot train: s0: slide s0: none") as caught:
        choose_panel(slides, "variable:2", run, rules)
    assert "s1" not in str(caught.value)
    assert make_bags(slides[1], panel_of(slides), run, str(tmp_path), rules)["num_spots"] > 10


def test_embeddings_that_are_not_finite_are_refused_where_they_are_used(small, slides, tmp_path):
    linked = pq.read_table(small.run.cells_uri("s1"))["cell_id"].to_pylist()
    make_bags(slides[1], panel_of(slides), small.run, str(tmp_path / "ok"))
    used = pq.read_table(tmp_path / "ok/bags/s1.parquet", columns=["cell_id"])
    used = {cell for bag in used["cell_id"].to_pylist() for cell in bag}
    unused = next(cell for cell in linked if cell not in used)

    def broken(cell_id, value):
        def values(cells):
            matrix = np.array(cells["embedding"].to_pylist(), np.float16)
            matrix[cells["cell_id"].to_pylist().index(cell_id), 3] = value
            return vectors(matrix)

        return values

    for number, value in enumerate((np.nan, np.inf)):
        cell_id = sorted(used)[5]
        run = with_cells(small, tmp_path / f"{number}", "s1", "embedding", broken(cell_id, value))
        words = rf"slide s1: embeddings of 1 cells .* the first of cell {cell_id}\. .*float32"
        with pytest.raises(ValueError, match=words):
            make_bags(slides[1], panel_of(slides), run, str(tmp_path))
    run = with_cells(small, tmp_path / "unused", "s1", "embedding", broken(unused, np.nan))
    assert make_bags(slides[1], panel_of(slides), run, str(tmp_path))["num_spots"] > 10


def moved(slide, folder, change):
    """Return the slide with its spots elsewhere: change takes and gives x and y."""
    outs = folder / "outs"
    shutil.copytree(slide.row.columns["spots"], outs)
    positions = outs / "spatial/tissue_positions.csv"
    header, *lines = positions.read_text().splitlines()
    assert header.endswith("pxl_row_in_fullres,pxl_col_in_fullres")
    rows = [line.split(",") for line in lines]
    for row in rows:
        x, y = change(float(row[5]), float(row[4]))
        row[4:] = [str(y), str(x)]
    positions.write_text("\n".join([header, *map(",".join, rows)]) + "\n")
    return replace(slide, row=replace(slide.row, columns={"spots": str(outs)}))


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda x, y: (x / 4, y / 4), r"scaled by 4, \d+% would: the likely cause"),
        (lambda x, y: (x * 2, y * 2), r"scaled by 0\.5, \d+% would: the likely cause"),
        (lambda x, y: (x + 5000, y), r"swapping, mirroring or scaling .* does not help"),
    ],
)
def test_spots_off_the_tissue_are_refused_with_the_likely_cause(
    small, slides, tmp_path, change, cause
):
    slide = moved(slides[0], tmp_path, change)
    with pytest.raises(ValueError, match=rf"slide s0: .*% of the spots lie on tissue.*{cause}"):
        make_bags(slide, panel_of(slides), small.run, str(tmp_path))
    with pytest.raises(ValueError, match=rf"cannot train: s0: .*{cause}"):
        choose_panel([slide, slides[1]], "variable:2", small.run)


def test_alignment_may_be_overridden_where_some_spot_has_cells(small, slides, tmp_path):
    slide = moved(slides[0], tmp_path, lambda x, y: (2 * x, 2 * y))
    with pytest.raises(ValueError, match="check_alignment false trains on it as it is"):
        make_bags(slide, panel_of(slides), small.run, str(tmp_path))
    rules = Rules(check_alignment=False)
    result = make_bags(slide, panel_of(slides), small.run, str(tmp_path), rules)
    assert result["share_spots_on_tissue"] < 0.6
    assert result["num_spots"] > 0


def test_spots_outside_the_image_are_refused(small, slides, tmp_path):
    sized = replace(slides[0], size0=(700, 1040))
    with pytest.raises(
        ValueError, match=r"slide s0: \d+ of \d+ spots lie outside the image of 700"
    ):
        make_bags(sized, panel_of(slides), small.run, str(tmp_path))
    sized = replace(slides[0], size0=(1280, 1040))
    assert make_bags(sized, panel_of(slides), small.run, str(tmp_path))["num_spots_outside"] == 0


def test_tissue_is_seen_in_the_image_where_there_is_one(synthetic_slide, slides):
    assert tissue_points(slides[0]) is None  # no such file
    row = replace(slides[0].row, uri="s3://bucket/slide.tiff")
    assert tissue_points(replace(slides[0], row=row)) is None  # not fetched for that
    slide = replace(slides[0], row=replace(slides[0].row, uri=str(synthetic_slide.slide)))
    points = tissue_points(slide)
    truth = pq.read_table(synthetic_slide.truth)
    nuclei = np.column_stack([truth["x0"].to_numpy(), truth["y0"].to_numpy()])
    assert points.min() >= 0
    assert points[:, 0].max() < 720
    assert points[:, 1].max() < 520
    distance = cKDTree(points).query(nuclei)[0]
    assert np.mean(distance <= 64) > 0.95  # px: points lie 32 um apart


def test_filters_and_mitochondria_are_those_asked_for(small, slides, tmp_path):
    strict = Rules(CountFilter(min_gene_counts=400, min_spot_counts=60))
    plain = make_bags(slides[0], panel_of(slides), small.run, str(tmp_path))
    fewer = make_bags(slides[0], panel_of(slides), small.run, str(tmp_path), strict)
    _, _, counts, _ = outs_of(slides[0])
    for result, least in ((plain, 200), (fewer, 400)):
        assert result["num_genes_passing"] == (counts.sum(axis=0) >= least).sum()
        assert result["num_genes_read"] == counts.shape[1]
    assert fewer["num_spots_passing"] < plain["num_spots_passing"] <= plain["num_spots_read"]


def test_counts_and_size_factors_for_losses_on_counts(small, slides, tmp_path):
    panel = panel_of(slides)
    rules = Rules(with_counts=True)
    result = make_bags(slides[0], panel, small.run, str(tmp_path), rules)
    stored = pq.read_table(tmp_path / "bags/s0.parquet")
    make_bags(slides[0], panel, small.run, str(tmp_path / "without"))
    plain = pq.read_table(tmp_path / "without/bags/s0.parquet")
    assert stored.drop_columns(["counts", "size_factor"]).equals(plain)
    barcodes, genes, counts, _ = outs_of(slides[0])
    passing = (counts.sum(axis=0) >= 200) & ((counts > 0).sum(axis=0) >= len(barcodes) // 10)
    library = counts[:, passing].sum(axis=1)
    median = np.median(library[library >= 20])
    assert result["median_library"] == median
    for row in stored.to_pylist():
        spot = barcodes.index(row["spot_id"])
        assert row["counts"] == [counts[spot, genes.index(gene)] for gene in panel]
        assert row["size_factor"] == pytest.approx(library[spot] / median, rel=1e-6)


def test_counts_that_are_not_whole_are_refused_only_where_needed(small, slides, tmp_path):
    outs = tmp_path / "outs"
    shutil.copytree(slides[0].row.columns["spots"], outs)
    path = outs / "filtered_feature_bc_matrix/matrix.mtx.gz"
    counts = scipy_io.mmread(io.BytesIO(gzip.decompress(path.read_bytes()))).astype(float)
    counts.data += 0.25
    buffer = io.BytesIO()
    scipy_io.mmwrite(buffer, counts)
    path.write_bytes(gzip.compress(buffer.getvalue()))
    slide = replace(slides[0], row=replace(slides[0].row, columns={"spots": str(outs)}))
    panel = panel_of(slides)
    assert make_bags(slide, panel, small.run, str(tmp_path))["num_spots"] > 10
    with pytest.raises(
        ValueError, match=r"slide s0: \d+ of \d+ counts are not whole.*loss on counts"
    ):
        make_bags(slide, panel, small.run, str(tmp_path), Rules(with_counts=True))
    with pytest.raises(ValueError, match=r"slide s0: \d+ of \d+ counts are not whole.*by hvg"):
        choose_panel([slide], "hvg:2", small.run)


def test_unknown_panel_genes_are_named_with_their_slide(small, slides, tmp_path):
    with pytest.raises(ValueError, match=r"slide s0: 1 of 2 panel genes .*NOGENE \(close:"):
        make_bags(slides[0], [*panel_of(slides)[:1], "NOGENE"], small.run, str(tmp_path))


def test_provenance_says_how_supervision_came_about(small, slides, tmp_path):
    rules = Rules(CountFilter(min_spot_counts=30), with_counts=True)
    panel = choose_panel(slides, "svg:3", small.run, rules)
    bags = {
        slide.row.slide_id: make_bags(slide, panel.genes, small.run, str(tmp_path), rules)
        for slide in slides
    }
    origin = provenance(panel, rules, bags)
    assert json.loads(json.dumps(origin, allow_nan=False)) == origin
    assert origin["genes"]["rule"] == "svg:3"
    assert origin["genes"]["training_slides"] == ["s0", "s1"]
    assert len(origin["genes"]["scores"]["geometric_mean"]) == 3
    assert origin["filters"]["min_spot_counts"] == 30
    slide = origin["slides"]["s1"]
    assert slide["num_spots"] <= slide["num_spots_passing"] <= slide["num_spots_read"]
    assert slide["tissue_from"] == "cells"
    assert slide["share_spots_on_tissue"] > 0.9
    assert "scale" not in slide


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
        f"new is missing in {small.run.uri}, not done",
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


def test_choose_panel(small, slides, tmp_path):
    genes = outs_of(slides[0])[1]

    def choose(rule, given=slides):
        return choose_panel(given, rule, small.run).genes

    chosen = choose("variable:3")
    assert len(set(chosen)) == 3
    assert set(chosen) <= set(genes)
    # The most variable first, so a shorter panel is the beginning of a longer one.
    assert choose("variable:2") == chosen[:2]
    assert choose("variable:3", slides[::-1]) == chosen
    assert choose(f"{genes[4]},{genes[0]}") == [genes[4], genes[0]]
    (tmp_path / "panel.txt").write_text(f"# mine\n{genes[2]}\n\n{genes[1]}\n")
    assert choose(str(tmp_path / "panel.txt")) == [genes[2], genes[1]]
    assert choose(f"markers:{tmp_path}/panel.txt") == [genes[2], genes[1]]
    for wrong, reason in (
        ("variable:many", "variable:N with N at least 1"),
        ("variable:", "variable:N"),
        ("variable:9999", "9999 genes asked for"),
        ("highest:20", "no such file"),
        (f"{genes[0]},{genes[0]}", "more than once"),
    ):
        with pytest.raises(ValueError, match=reason):
            choose(wrong)


def test_only_training_slides_and_spots_with_cells_choose(small, slides):
    """Held-out spots do not matter, and neither do spots that cannot train."""
    alone = choose_panel(slides[:1], "variable:3", small.run)
    assert alone.info["training_slides"] == ["s0"]
    barcodes, genes, counts, _ = outs_of(slides[0])
    passing = (counts.sum(axis=0) >= 200) & ((counts > 0).sum(axis=0) >= len(barcodes) // 10)
    library = counts[:, passing].sum(axis=1)
    cells = pq.read_table(small.run.cells_uri("s0"))
    xy0 = np.column_stack([cells["x0"].to_numpy(), cells["y0"].to_numpy()])
    linked = link_slide(slides[0], xy0, Rules(), see_image=False)
    filled = set(linked.spots.spot_id[linked.links.num_cells > 0].tolist())
    assert small.bare["s0"] not in filled
    kept = (library >= 20) & np.array([barcode in filled for barcode in barcodes])
    logged = np.log1p(counts[kept] / library[kept, None] * 1e4)
    variance = dict(zip(genes, logged.var(axis=0), strict=True))
    candidates = [gene for gene, passes in zip(genes, passing, strict=True) if passes]
    assert alone.genes == sorted(candidates, key=lambda gene: (-variance[gene], gene))[:3]


def without_spots(slides):
    return [
        replace(s, row=replace(s.row, columns={"spots": f"gone_{s.row.slide_id}"})) for s in slides
    ]


def test_choose_panel_names_every_slide_it_cannot_read(small, slides):
    with pytest.raises(ValueError, match=r"cannot train: s0: .*gone_s0.*; s1: .*gone_s1"):
        choose_panel(without_spots(slides), "variable:2", small.run)


@pytest.mark.ray
def test_ray_equals_make_bags_and_names_every_bad_slide(local_ray, small, slides, tmp_path):
    rules = Rules(with_counts=True)
    panel = choose_panel(slides, "variable:4", small.run, rules).genes
    out = str(tmp_path / "ray")
    results = build_bags(slides, panel, small.run, out, local_ray.num_cpus, rules)
    for slide in slides:
        slide_id = slide.row.slide_id
        plain = make_bags(slide, panel, small.run, str(tmp_path / "plain"), rules)
        assert results[slide_id] == plain
        files = [tmp_path / name / "bags" / f"{slide_id}.parquet" for name in ("ray", "plain")]
        assert pq.read_table(files[0]).equals(pq.read_table(files[1]), check_metadata=True)
    bad = without_spots(slides)
    with pytest.raises(ValueError, match=r"cannot train: s0: .*gone_s0.*; s1: .*gone_s1"):
        build_bags(bad, panel, small.run, str(tmp_path / "bad"), 1)
