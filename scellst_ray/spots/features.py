"""Tell genes from other features of a matrix: antibodies, control probes, unused codewords.

G: features.
"""

import logging
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from scellst_ray.spots.files import shown
from scellst_ray.spots.gene_names import bare_name

logger = logging.getLogger(__name__)

GENE_EXPRESSION = "Gene Expression"
# Types that say "a gene", in lower case with spaces; if one occurs, every other type is no gene.
TYPES_OF_GENES = ("gene expression", "gene", "rna", "predesigned gene", "custom gene")
# Parts of types that are no gene, for columns that name genes in another way (a biotype).
TYPES_OF_OTHERS = re.compile(
    r"antibody|protein capture|crispr|multiplexing|antigen capture|peaks|chromatin|control"
    r"|codeword|blank|spike.?in|hashtag|\bcustom\b"
)
# Names that instruments give features that are no genes. No gene has such a name.
CONTROL_NAMES = re.compile(
    r"(neg|negative)[ _.-]?control"  # Xenium: NegControlProbe_00042, NegControlCodeword_0500
    r"|antisense[_.-]"  # Xenium: antisense_PROKR2
    r"|blank([ _.-]|\d|$)"  # Xenium: BLANK_0006; MERSCOPE: Blank-12
    r"|unassigned[ _.-]?codeword|deprecated[ _.-]?codeword"  # Xenium
    r"|intergenic[ _.-]?region|genomic[ _.-]?control"  # Xenium Prime
    r"|system[ _.-]?control|neg[ _.-]?prb|neg[ _.-]?probe|custom[ _.-]?neg"  # CosMx, GeoMx
    r"|false[ _.-]?code|negative[ _.-]?\d*$|control[ _.-]?(probe|codeword)"  # CosMx
    r"|ercc[_.-]\d{5}$"  # spike-ins
    r"|hashtag[ _.-]?\d|(adt|hto)[_.-]"  # antibodies
    r"|.*[ _.-]totalseq"  # antibodies: CD3_TotalSeqB
    r"|.+_((neg|negative)_?)?control([ _.-]?\d+)?$",
    re.IGNORECASE,
)


def select_genes(
    genes: Sequence[str], types: Sequence[str] | None, source: str
) -> NDArray[np.int64]:
    """Return the columns of the features that are genes, in order; the others are logged.

    Args:
        genes: Names of the features [G].
        types: Type of each feature [G], such as "Gene Expression" or "Antibody Capture"; None if
            the file states none.
        source: Name of the file in errors.

    Raises:
        ValueError: No feature is a gene.
    """
    by_type = _genes_by_type(types, len(genes))
    by_name = np.array([CONTROL_NAMES.match(bare_name(gene)) is None for gene in genes], np.bool_)
    columns = np.flatnonzero(by_type & by_name)
    if not len(columns):
        kinds = sorted(set(types))[:5] if types else list(genes[:5])
        message = (
            f"{source}: no feature of type {GENE_EXPRESSION!r} among {len(genes)}; the types are "
            f"{shown(kinds)}. Give the gene-expression matrix."
        )
        raise ValueError(message)
    left_out = np.flatnonzero(~(by_type & by_name))
    if len(left_out):
        text = "%s: left out %d features that are no genes, such as %s"
        logger.info(text, source, len(left_out), shown([genes[column] for column in left_out[:3]]))
    return columns.astype(np.int64)


def _genes_by_type(types: Sequence[str] | None, num_features: int) -> NDArray[np.bool_]:
    """Return which features are genes by their type, bool [G]; all without types."""
    if types is None:
        return np.ones(num_features, np.bool_)
    plain = [" ".join(re.split(r"[\s_-]+", kind.strip().lower())) for kind in types]
    if any(kind in TYPES_OF_GENES for kind in plain):
        return np.array([kind in TYPES_OF_GENES for kind in plain], np.bool_)
    return np.array([TYPES_OF_OTHERS.search(kind) is None for kind in plain], np.bool_)
