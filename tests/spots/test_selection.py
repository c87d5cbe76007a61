"""Rules for gene panels: their meaning, their panels, their errors."""

import json

import numpy as np
import pytest
from scipy import sparse

from scellst_ray.spots.panel import gene_columns, log_normalise
from scellst_ray.spots.selection import (
    Section,
    choose_genes,
    explicit_panel,
    parse_rule,
    read_markers,
)
from scellst_ray.spots.spatial import morans_i, neighbour_graph
from scellst_ray.spots.table import Spots
from scellst_ray.spots.variable import highly_variable

NUM_GENES = 120
GENES = [f"G{i:03d}" for i in range(NUM_GENES)]
SPATIAL = ("G077", "G101")


def section(slide_id, seed, order=None, drop=()):
    """Return a 12 x 12 hexagonal section with two spatial genes, its genes in `order`."""
    rng = np.random.default_rng(seed)
    row, column = np.divmod(np.arange(144), 12)
    xy0 = np.column_stack([(column + row % 2 / 2) * 100.0, row * 86.6])
    rate_G = np.random.default_rng(9).lognormal(1.5, 1.0, NUM_GENES)
    rate_SG = rate_G * rng.gamma(3, 1 / 3, (144, NUM_GENES))
    rate_SG[:, 77] = 6 * np.exp(np.sin(xy0[:, 0] / 200))
    rate_SG[:, 101] = 6 * np.exp(np.cos(xy0[:, 1] / 200))
    order = range(NUM_GENES) if order is None else order
    columns = [i for i in order if GENES[i] not in drop]
    counts = rng.poisson(rate_SG)[:, columns]
    names = [GENES[i] for i in columns]
    spot_id = np.array([f"s{i}" for i in range(144)])
    spots = Spots(spot_id, xy0, 27.5, sparse.csr_matrix(counts.astype(np.float32)), names)
    return Section(slide_id, [*names, "RARE"], spots)


@pytest.fixture(scope="module")
def sections():
    order = np.random.default_rng(1).permutation(NUM_GENES)
    return [section("a", 0), section("b", 1, order), section("c", 2, drop=("G005",))]


@pytest.mark.parametrize(
    ("genes", "expected"),
    [
        ("hvg:250", ("hvg", "250")),
        ("svg: 7", ("svg", "7")),
        ("variable:1", ("variable", "1")),
        ("markers:s3://b/m.csv", ("markers", "s3://b/m.csv")),
        ("EPCAM,CD3E", ("list", "EPCAM,CD3E")),
        ("panel.txt", ("file", "panel.txt")),
        ("s3://bucket/panel.txt", ("file", "s3://bucket/panel.txt")),
    ],
)
def test_rules(genes, expected):
    assert parse_rule(genes) == expected


@pytest.mark.parametrize("genes", ["hvg:", "hvg:many", "svg:0", "variable:-3", "hvg", "svg:1.5"])
def test_rules_without_a_number_are_refused(genes):
    kind = genes.partition(":")[0]
    with pytest.raises(ValueError, match=f"genes is '{genes}'; give {kind}:N with N at least 1"):
        parse_rule(genes)


def test_markers_without_a_file_are_refused():
    with pytest.raises(ValueError, match="markers:FILE"):
        parse_rule("markers:")


def test_explicit_panels_ask_no_slide(tmp_path):
    (tmp_path / "p.txt").write_text("CD3E\n# no\nEPCAM\n")
    for genes, how in ((str(tmp_path / "p.txt"), "file"), ("CD3E, EPCAM", "list")):
        panel = explicit_panel(genes)
        assert panel.genes == ["CD3E", "EPCAM"]
        assert panel.info == {"rule": genes, "method": f"given as a {how}", "num_genes": 2}
        assert choose_genes(genes, []) == panel
    assert explicit_panel("hvg:3") is None


def test_hvg_is_seurat_v3_of_the_shared_genes(sections):
    panel = choose_genes("hvg:20", sections)
    shared = [gene for gene in GENES if gene != "G005"]
    counts = [s.spots.counts[:, gene_columns(s.spots.genes, shared, "x")] for s in sections]
    columns, found = highly_variable(counts, ["a", "b", "c"], 20)
    assert panel.genes == [shared[column] for column in columns]
    assert panel.info["training_slides"] == ["a", "b", "c"]
    assert panel.info["num_candidates"] == NUM_GENES - 1
    np.testing.assert_allclose(
        panel.info["scores"]["normalised_variance"], found["normalised_variance"][columns]
    )
    assert json.loads(json.dumps(panel.info, allow_nan=False)) == panel.info


def test_svg_finds_planted_genes_by_moran_of_log_counts(sections):
    panel = choose_genes("svg:5", sections)
    assert set(panel.genes[:2]) == set(SPATIAL)
    scores = []
    for one in sections:
        column = one.spots.genes.index(panel.genes[0])
        values = log_normalise(one.spots.counts)[:, [column]]
        scores.append(morans_i(neighbour_graph(one.spots.xy0, "x").weights, values)[0])
    assert panel.info["scores"]["geometric_mean"][0] == pytest.approx(np.prod(scores) ** (1 / 3))
    assert panel.info["graphs"]["b"]["kind"] == "lattice"
    assert 4.5 < panel.info["graphs"]["b"]["mean_neighbours"] < 6
    assert json.loads(json.dumps(panel.info, allow_nan=False)) == panel.info


@pytest.mark.parametrize("rule", ["hvg:15", "svg:4", "variable:15"])
def test_order_of_slides_does_not_matter_and_shorter_panels_begin_longer_ones(sections, rule):
    panel = choose_genes(rule, sections)
    assert choose_genes(rule, sections[::-1]).genes == panel.genes
    assert len(set(panel.genes)) == panel.info["num_genes"] == len(panel.genes)
    if not rule.startswith("hvg"):  # ranks of hvg depend on the number of genes
        kind = rule.partition(":")[0]
        assert choose_genes(f"{kind}:2", sections).genes == panel.genes[:2]


def test_variable_genes_by_a_slow_loop(sections):
    logs = [log_normalise(one.spots.counts) for one in sections]
    common = set.intersection(*(set(one.spots.genes) for one in sections))
    scores = {}
    for gene in common:
        per_slide = []
        for one, values in zip(sections, logs, strict=True):
            column = values[:, one.spots.genes.index(gene)].astype(float)
            per_slide.append(sum((v - column.mean()) ** 2 for v in column) / len(column))
        scores[gene] = sum(per_slide) / 3
    expected = sorted(common, key=lambda gene: (-scores[gene], gene))[:7]
    assert choose_genes("variable:7", sections).genes == expected
    assert choose_genes("variable:7", sections[::-1]).genes == expected


def small_section(counts, genes):
    """Return a section of two spots."""
    xy0 = np.array([[0.0, 0.0], [100.0, 0.0]])
    counts = sparse.csr_matrix(np.array(counts, np.float32))
    return Section("a", genes, Spots(np.array(["s0", "s1"]), xy0, 27.5, counts, genes))


def test_ties_of_variable_genes_go_by_name_and_gene_order_does_not_matter():
    counts = np.array([[0, 1, 0], [1, 0, 0]])
    for columns, genes in ((counts, ["B", "A", "C"]), (counts[:, ::-1], ["C", "A", "B"])):
        assert choose_genes("variable:3", [small_section(columns, genes)]).genes == ["A", "B", "C"]


def test_too_many_variable_genes_asked_for():
    with pytest.raises(ValueError, match="3 genes asked for, but 2 genes pass"):
        choose_genes("variable:3", [small_section(np.ones((2, 2)), ["A", "B"])])


def test_chosen_genes_that_are_not_spatial_are_counted(sections):
    info = choose_genes("svg:110", sections).info
    assert info["num_chosen_not_spatial"] > 20
    assert info["scores"]["geometric_mean"][-1] == 0.0


def test_markers_are_those_that_every_slide_measures(sections, tmp_path):
    path = tmp_path / "markers.csv"
    path.write_text("cell_type,Gene\nT,G003\nB,G005\nB,RARE\nT,G003\nX,NONE\nX,\n")
    panel = choose_genes(f"markers:{path}", sections)
    assert panel.genes == ["G003", "RARE"]
    assert panel.info["not_measured"] == ["G005", "NONE"]
    path.write_text("gene\nNONE\n")
    with pytest.raises(ValueError, match=r"none of its 1 markers, such as \['NONE'\]"):
        choose_genes(f"markers:{path}", sections)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.txt", "A\nB\n"),
        ("m.csv", "cell_type,symbol\nT,A\nT,B\nB,A\n"),
        ("m.tsv", "Marker\tcell\nA\tT\nB\tT\n"),
        ("m.csv", "immune\nA\nB\n"),
    ],
)
def test_files_of_markers(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_markers(str(tmp_path / name)) == ["A", "B"]


@pytest.mark.parametrize(
    ("text", "words"),
    [("a,b\n1,2\n", r"columns \['a', 'b'\] name no gene"), ("gene\n", "name no gene"), ("", "not")],
)
def test_tables_without_markers_are_refused(tmp_path, text, words):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_markers(str(tmp_path / "m.csv"))
    with pytest.raises(ValueError, match="not a table of marker genes"):
        read_markers(str(tmp_path / "none.csv"))


def test_no_shared_gene_shows_how_slides_name_theirs(sections):
    other = section("mouse", 5)
    names = [f"ENSMUSG{i:05d}" for i in range(NUM_GENES)]
    renamed = Spots(other.spots.spot_id, other.spots.xy0, 27.5, other.spots.counts, names)
    with pytest.raises(ValueError, match="no gene is shared by all 2 training slides") as caught:
        choose_genes("hvg:5", [sections[0], Section("mouse", names, renamed)])
    assert "a has 120, such as ['G000', 'G001', 'G002']" in str(caught.value)
    assert "mouse has 120, such as ['ENSMUSG00000'" in str(caught.value)
    assert "symbols or Ensembl ids" in str(caught.value)


def test_too_many_genes_asked_for(sections):
    with pytest.raises(ValueError, match=r"999 genes asked for, but 119 genes pass the filters"):
        choose_genes("svg:999", sections)


def test_hvg_needs_whole_counts_and_says_which_are_not(sections):
    spots = sections[1].spots
    counts = spots.counts.copy()
    counts.data[7] = 2.5
    broken = Spots(spots.spot_id, spots.xy0, 27.5, counts, spots.genes)
    given = [sections[0], Section("b", spots.genes, broken)]
    with pytest.raises(
        ValueError,
        match=r"slide b: 1 of \d+ counts are not whole numbers, the fi"
        r"rst 2\.5 for gene G\d+ in spot s0; choosing genes by hvg",
    ):
        choose_genes("hvg:5", given)
    assert len(choose_genes("variable:5", given).genes) == 5
