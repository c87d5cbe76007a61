"""Names with a genome in front, and Ensembl ids."""

import pytest

from scellst_ray.spots.gene_names import bare_name, is_ensembl, prefix_problem, starts_with


@pytest.mark.parametrize(
    ("gene", "bare"),
    [
        ("GRCh38_ERBB2", "ERBB2"),
        ("mm10___Erbb2", "Erbb2"),
        ("GRCm39-Erbb2", "Erbb2"),
        ("hg38-2024-A_ERBB2", "ERBB2"),
        ("T2T-CHM13v2.0_ERBB2", "ERBB2"),
        ("HUMANIN", "HUMANIN"),
        ("MM1", "MM1"),
        ("RNF1-AS1", "RNF1-AS1"),
    ],
)
def test_the_genome_is_taken_off(gene, bare):
    assert bare_name(gene) == bare


@pytest.mark.parametrize(
    "gene",
    [
        *("MT-CO1", "mt-Co1", "GRCh38_MT-CO1", "mm10___mt-Co1", "GRCh38-MT-CO1", "hg19_MT-ND4L"),
        *(
            "Homo_sapiens_MT-CO1",
            "MT-CO1_ENSG00000198804",
            "MT.CO1",
            "mt:CoI",
            "GRCh38_gencode_MT-CYB",
        ),
        *("ENSG00000198804", "ENSG00000198804.2", "GRCh38_ENSG00000212907.2", "ENSMUSG00000065947"),
        *("ENSMUSG00000064336", "ENSMUSG00000064372.1"),
    ],
)
def test_mitochondrial_genes_in_every_naming(gene):
    assert starts_with(gene, "MT-")


@pytest.mark.parametrize(
    "gene", ["MTOR", "MT1A", "MTND1P23", "hg19_MTOR", "ENSG00000198805", "ENSMUSG00000064362", "X"]
)
def test_other_genes_are_not_mitochondrial(gene):
    assert not starts_with(gene, "MT-")


def test_any_prefix_is_found_behind_the_genome():
    assert starts_with("GRCh38_RPL13", "rpl")
    assert not starts_with("GRCh38_ERBB2", "rpl")
    assert is_ensembl("mm10_ENSMUSG00000064351.1")
    assert not is_ensembl("ENSA")


def test_names_that_hide_the_prefix_are_reported():
    problem = prefix_problem(["ENSG00000141736", "ENSG00000171345"], "MT-")
    assert problem is not None
    assert "2 of 2 names are no symbols" in problem
    assert prefix_problem(["ENSG00000141736", "ENSG00000198804"], "MT-") is None
    assert prefix_problem(["ERBB2", "KRT8"], "MT-") is None
    assert prefix_problem(["GRCh38_ERBB2", "GRCh38_KRT8"], "MT-") is not None
