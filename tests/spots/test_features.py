"""Antibodies, controls and unused codewords are no genes."""

import logging

import pytest

from scellst_ray.spots.features import select_genes

GENES = ["ERBB2", "NEGR1", "BLNK", "ERCC1", "ANTXR1", "MIR-CONTROL1", "ADTRP", "INTS1"]
CONTROLS = [
    *("NegControlProbe_00042", "NegControlCodeword_0500", "antisense_PROKR2", "BLANK_0006"),
    *("UnassignedCodeword_0001", "DeprecatedCodeword_0322", "Intergenic_Region_1", "Blank-12"),
    *("NegPrb3", "SystemControl4", "FalseCode1", "Negative12", "NegProbe-WTX", "ERCC-00002"),
    *("CD3_TotalSeqB", "mouse_IgG1_control", "GRCh38_NegControlProbe_1", "negative_control_1"),
]


def test_controls_are_left_out_by_name_and_counted(caplog):
    caplog.set_level(logging.INFO)
    assert select_genes(GENES, None, "s").tolist() == list(range(len(GENES)))
    assert not caplog.records
    assert select_genes(CONTROLS + GENES, None, "s").tolist() == list(
        range(len(CONTROLS), len(CONTROLS + GENES))
    )
    assert f"left out {len(CONTROLS)} features" in caplog.text


@pytest.mark.parametrize(
    ("types", "kept"),
    [
        (["Gene Expression", "Antibody Capture", "Custom"], [0]),
        (["gene_expression", "Negative Control Probe", "gene_expression"], [0, 2]),
        (["protein_coding", "lncRNA", "spike-in"], [0, 1]),
        (["predesigned_gene", "custom_gene", "unassigned_codeword"], [0, 1]),
        (["gene", "gene", "spike-in"], [0, 1]),
        (None, [0, 1, 2]),
    ],
)
def test_types_of_features(types, kept):
    assert select_genes(["A", "B", "C"], types, "s").tolist() == kept


def test_a_matrix_without_genes_is_refused():
    with pytest.raises(ValueError, match=r"s: no feature of type 'Gene Expression' among 1"):
        select_genes(["CD3"], ["Antibody Capture"], "s")
