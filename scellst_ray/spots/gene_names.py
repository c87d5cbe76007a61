"""Understand gene names that are no bare symbols: prefixes of genomes, and Ensembl ids."""

import re
from collections.abc import Sequence

from scellst_ray.spots.files import shown

# Names that references give genomes, such as GRCh38_, mm10___, hg38-2024-A_ and T2T-CHM13v2.0_.
# Seurat turns "_" into "-".
GENOME = re.compile(
    r"(?:GRC[A-Z]\d+|HG\d{2}|MM\d{1,2}|RN\d|T2T|CHM13|HUMAN|MOUSE|REFDATA-GEX)"
    r"(?:[-.]?(?:CHM13|V\d|P\d|\d{4}|[A-Z](?=[-_:|]))[\d.]*)*[-_:|]+",
    re.IGNORECASE,
)
ENSEMBL = re.compile(r"ENS[A-Z]{0,4}G(\d{11})(?!\d)", re.IGNORECASE)
MITOCHONDRIAL = "MT-"
# Genes of the mitochondrial genome as R writes their names: "MT.CO1", "MT_CO1".
MITOCHONDRIAL_OF_R = re.compile(r"MT[._](?:ND\d|CO\d|ATP\d|CYT?B|RNR\d|T[A-Z]\d?\b)")
# Ensembl's ids of the 37 genes of each mitochondrial genome, without ENSG00000 and ENSMUSG00000.
HUMAN_MITOCHONDRIAL = frozenset(
    re.findall(
        r"\d+",
        "210049 211459 210077 210082 209082 198888 210100 210107 210112 198763 210117 210127 "
        "210135 210140 210144 198804 210151 210154 198712 210156 228253 198899 198938 210164 "
        "198840 210174 212907 198886 210176 210184 210191 198786 198695 210194 198727 210195 "
        "210196",
    )
)
MOUSE_MITOCHONDRIAL = frozenset(
    [f"{number:06d}" for number in range(64336, 64373) if number != 64362] + ["065947"]
)


def bare_name(gene: str) -> str:
    """Return a gene's name without the prefix of its genome."""
    return GENOME.sub("", gene, count=1) if GENOME.match(gene) else gene


def has_genome(gene: str) -> bool:
    """Return whether a gene's name begins with the name of a genome."""
    return GENOME.match(gene) is not None


def is_ensembl(gene: str) -> bool:
    """Return whether a gene is named by an Ensembl id, with or without version or genome."""
    return ENSEMBL.match(bare_name(gene)) is not None


def mostly_ensembl(genes: Sequence[str]) -> bool:
    """Return whether more than half of the genes are named by Ensembl ids."""
    return 2 * sum(map(is_ensembl, genes)) > len(genes)


def starts_with(gene: str, prefix: str) -> bool:
    """Return whether a gene's bare name begins with a prefix, whatever stands before the name.

    For "MT-", the Ensembl ids of the mitochondrial genes of human and mouse count as well.

    Args:
        gene: Name such as MT-CO1, GRCh38_MT-CO1, mm10___mt-Co1 or ENSG00000198804.2.
        prefix: Beginning of symbols in any case, such as "MT-".
    """
    name, wanted = bare_name(gene).upper(), prefix.upper()
    if name.startswith(wanted) or f"_{wanted}" in name:
        return True
    if wanted != MITOCHONDRIAL:
        return False
    is_fly = name.startswith("MT:")
    return is_fly or is_mitochondrial_id(name) or MITOCHONDRIAL_OF_R.match(name) is not None


def is_mitochondrial_id(gene: str) -> bool:
    """Return whether a name holds the Ensembl id of a mitochondrial gene of human or mouse."""
    found = ENSEMBL.search(gene)
    if found is None:
        return False
    species = found.group().upper()[3 : found.group().upper().index("G")]
    number = found.group(1).removeprefix("00000")
    return (species == "" and number in HUMAN_MITOCHONDRIAL) or (
        species == "MUS" and number in MOUSE_MITOCHONDRIAL
    )


def prefix_problem(genes: Sequence[str], prefix: str) -> str | None:
    """Return why a prefix may miss genes: no name has it, and most names are no symbols."""
    if any(starts_with(gene, prefix) for gene in genes):
        return None
    odd = [gene for gene in genes if is_ensembl(gene) or has_genome(gene) or gene.isdecimal()]
    if 2 * len(odd) <= len(genes):
        return None
    return (
        f"no gene begins with {prefix!r}, and {len(odd)} of {len(genes)} names are no symbols, "
        f"such as {shown(odd[:3])}"
    )
